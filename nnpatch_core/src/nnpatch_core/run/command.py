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
_OTHERWISE = {
    "force_model_confidence": "confident",
    "metric": "metrics",
    "seq_pos": "at",
    "seq_pos_type": "positions",
    "site_names": "sites",
}
#: A renaming, in a message: `columns={'source': 'question'}`.
_COLUMNS = re.compile(r"\bcolumns=(?P<names>\{[^{}]*\})")
#: An argument of a call, in a message: `name='value'`, `name=`.
_ARGUMENT = re.compile(r"\b(?P<name>[a-z_]+)=(?:'(?P<value>[\w*-]+)'|(?=[\s,:;.)]|$))")


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
    """
    names = {name: name for name, *_ in options()} | _OTHERWISE

    def told(found: re.Match[str]) -> str:
        name, value = names.get(found["name"]), found["value"] or ""
        return found[0] if name is None else f"--{name.replace('_', '-')} {value}".rstrip()

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
    elif isinstance(value, tuple):
        yield from (option, ",".join(value))
    else:
        yield from (option, str(value))
