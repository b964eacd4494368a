"""The command line that settings stand for."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnpatch_core.run.settings import Settings, options
from nnpatch_core.run.toml import changed

#: Arguments of calls whose settings have other names.
OTHERWISE = {
    "force_model_confidence": "confident",
    "metric": "metrics",
    "seq_pos": "at",
    "seq_pos_type": "positions",
    "site_names": "sites",
    "source_seq_pos": "source_at",
}
#: A renaming, in a message: `columns={'source': 'question'}`.
_COLUMNS = re.compile(r"\bcolumns=(?P<names>\{[^{}]*\})")
#: An argument of a call, in a message: `name='value'`, `name=True`, `name=[1, 2]`, `name=`.
_ARGUMENT = re.compile(
    r"\b(?P<name>[a-z_]+)=(?:'(?P<text>[\w*-]+)'|(?P<flag>True|False)\b|(?P<number>-?\d[\w.]*\b)"
    r"|\[(?P<several>[\w', -]+)\]|(?=[\s,:;.)]|$))"
)
#: Advice that is a call of Python, and what does the same for a command.
PHRASES = {
    "pairs.swapped(), or ": "",
    "PromptPairs.from_template gives spans, and spans= of the other constructors": (
        "--spans names the columns that have their texts"
    ),
    "sweep each kind of prompt alone, as pairs.groups has them": (
        "give each kind of prompt a table of its own"
    ),
    "PromptPairs.from_template gives them, and spans= of the other constructors": (
        "--spans names the columns that have them"
    ),
    "as (text, 0) for the first and (text, -1) for the last": (
        "as --spans NAME=COLUMN:0 for the first and COLUMN:-1 for the last"
    ),
    "; PromptPairs.from_csv, from_jsonl, from_json and from_parquet read files of any name": "",
    ": name another file, or delete it": ": --overwrite begins anew",
    ", which pandas.read_csv(path, dtype=str) keeps as they stand in a file": "",
}


def command_of(settings: Settings) -> str:
    """The command that runs with these settings, to be pasted into a shell.

    Examples:
        >>> from pathlib import Path
        >>> command_of(Settings(table=Path("my pairs.csv"), model="gpt2", layers=("0-2",)))
        "nnpatch run 'my pairs.csv' --model gpt2 --layers 0-2"
    """
    given = dict(changed(settings))
    table = given.pop("table", Path())
    words = ["nnpatch", "run", str(table), *_words("model", given.pop("model", ""))]
    for name, value in given.items():
        words += _words(name, value)
    return shlex.join(words)


def in_options(text: str) -> str:
    """A message with options of the command line in place of arguments of a call.

    Examples:
        >>> in_options("faulty='drop' leaves them out")
        '--faulty drop leaves them out'
        >>> in_options("did you mean columns={'source': 'my text'}?")
        "did you mean --columns 'source=my text'?"
        >>> in_options("force_model_confidence=True, space=False, heads=[1, 2]")
        '--confident, --no-space, --heads 1,2'
    """
    names = {name: name for name, *_ in options()} | OTHERWISE
    for phrase, instead in PHRASES.items():
        text = text.replace(phrase, instead)

    def told(found: re.Match[str]) -> str:
        name = names.get(found["name"])
        if name is None:
            return found[0]
        no = "no-" if found["flag"] == "False" else ""
        several = (found["several"] or "").replace("'", "").replace(", ", ",")
        value = found["text"] or found["number"] or several
        return f"--{no}{name.replace('_', '-')} {value}".rstrip()

    return _ARGUMENT.sub(told, _COLUMNS.sub(_renaming, text))


def _renaming(found: re.Match[str]) -> str:
    try:
        names = ast.literal_eval(found["names"])
    except (SyntaxError, ValueError):
        # It was cut where it was too long.
        return found[0]
    return f"--columns {shlex.quote(','.join(f'{own}={name}' for own, name in names.items()))}"


def _words(name: str, value: Any) -> Iterator[str]:
    option = f"--{name.replace('_', '-')}"
    if value is True:
        yield option
    elif value is False:
        yield f"--no-{option[2:]}"
    elif isinstance(value, tuple):
        yield from (option, ",".join(value))
    else:
        yield from (option, str(value))
