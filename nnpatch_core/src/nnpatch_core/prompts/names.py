"""Finds the columns of a table by the names that people give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from nnpatch_core._printable import named, shown
from nnpatch_core.errors import TokensError
from nnpatch_core.prompts.rows import COLUMNS, PROMPTS

_ANSWERS = ("answer", "answers", "correct", "correct_answer", "label")
#: What each column may be called where there is none of its own name.
NAMES: Mapping[str, tuple[str, ...]] = {
    "source": ("clean", "prompt", "clean_prompt", "source_prompt"),
    "target": (
        "corrupt",
        "corrupted",
        "counterfactual",
        "corrupt_prompt",
        "corrupted_prompt",
        "counterfactual_prompt",
        "target_prompt",
    ),
    "source_answer": (*_ANSWERS, "clean_answer", "clean_label", "source_answers"),
    "target_answer": (
        "wrong_answer",
        "wrong_answers",
        "incorrect",
        "incorrect_answer",
        "corrupt_answer",
        "corrupted_answer",
        "counterfactual_answer",
        "corrupt_label",
        "corrupted_label",
        "counterfactual_label",
        "target_answers",
    ),
}
#: The end of the name of a column that has token ids.
IDS = "_idx"
#: A prompt inside of an object, beside which its own answer may stand.
_INSIDE = ".prompt"


class ColumnsError(Exception):
    """Columns that cannot be told.

    Args:
        faults: all that is wrong, one after the other.
        names: of the columns that were found, by the names of `COLUMNS`.
    """

    def __init__(self, faults: Sequence[str], names: Mapping[str, Any]) -> None:
        super().__init__("\n".join(faults))
        self.names = names


def find_names(
    renamed: Any, present: Sequence[Any], wanted: Sequence[str] = COLUMNS
) -> tuple[Any, ...]:
    """Find the user's names of the columns.

    Args:
        renamed: names that the user chose.
        present: the columns of the table.
        wanted: those of `COLUMNS` to find.

    Raises:
        TokensError: the renaming is none.
        ColumnsError: columns are missing, stand twice, or may be one of several; two are one.
    """
    if renamed is not None and not isinstance(renamed, Mapping):
        raise TokensError(
            f"columns must be a mapping, such as {{'source': 'clean'}}: {shown(renamed)}"
        )
    renamed = dict(renamed or {})
    unknown = sorted(set(renamed) - set(wanted), key=repr)
    if unknown:
        raise TokensError(
            f"columns= renames {shown(unknown[0])}; it may rename {', '.join(wanted)}"
            f"{_other_way(unknown, renamed)}"
        )
    found, several = _found(renamed, present, wanted)
    faults = list(several.values())
    # Where its prompt stands tells where an answer does.
    known = [name for name in wanted if not {name, name.removesuffix("_answer")} & {*several}]
    missing = [name for name in known if name not in found or found[name] not in present]
    if missing:
        faults.append(_missing(missing, found, renamed, present, wanted))
    names: dict[str, Any] = {}
    for column in known:
        if column in missing:
            continue
        name = found[column]
        times = present.count(name)
        other = next((own for own, its in names.items() if its == name), None)
        if other is not None:
            faults.append(f"columns= reads {other} and {column} from one column, {shown(name)}")
        elif times > 1:
            faults.append(f"column {shown(name)} stands {times} times in the table")
        else:
            names[column] = name
    if faults:
        raise ColumnsError(faults, names)
    return tuple(names.values())


def _found(
    renamed: Mapping[str, Any], present: Sequence[Any], wanted: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Find each column by the user's choice, by its own name, or by another of its names.

    Returns:
        The names, and a fault of each column that may be one of several.
    """
    found: dict[str, Any] = {}
    several: dict[str, str] = {}
    for column in wanted:
        name = renamed.get(column, column)
        inside = f"{name}{_INSIDE}"
        if name not in present and column in PROMPTS and inside in present:
            name = inside
        if column in renamed or name in present:
            found[column] = name
    for column in wanted:
        if column not in found:
            there = [name for name in present if name not in found.values()]
            candidates = _candidates(column, found, there)
            if len(candidates) > 1:
                chosen = {column: candidates[0].removesuffix(_INSIDE)}
                several[column] = (
                    f"{column} may be {' or '.join(map(shown, candidates))}: choose by columns=, "
                    f"such as columns={shown({**renamed, **chosen})}"
                )
            elif candidates:
                found[column] = candidates[0]
    return found, several


def _candidates(column: str, found: Mapping[str, Any], present: Sequence[Any]) -> list[str]:
    """Which columns may be one that has no column of its own name."""
    there = list(dict.fromkeys(name for name in present if isinstance(name, str)))
    if column in PROMPTS:
        called = {*NAMES[column], *(f"{name}{_INSIDE}" for name in NAMES[column])}
        ends = f"counterfactual{_INSIDE}" if column == "target" else None
        return [name for name in there if name in called or (ends and name.endswith(ends))]
    prompt = found.get(column.removesuffix("_answer"))
    if isinstance(prompt, str) and prompt.endswith(_INSIDE):
        beside = prompt.removesuffix("prompt")
        own = [name for name in there if name in _with_ids(beside + name for name in _ANSWERS)]
        if own:
            return own
    return [name for name in there if name in _with_ids((column, *NAMES[column]))]


def _with_ids(names: Iterable[str]) -> set[str]:
    return {each for name in names for each in (name, f"{name}{IDS}")}


def _missing(
    missing: Sequence[str],
    found: Mapping[str, Any],
    renamed: Mapping[str, Any],
    present: Sequence[Any],
    wanted: Sequence[str],
) -> str:
    """Say which columns are missing, what there is, and what they may be called."""
    there = ", ".join(map(named, present)) or "none"
    told = [shown(found.get(column, column)) for column in missing]
    several = " or ".join([*([", ".join(told[:-1])] if told[1:] else []), told[-1]])
    line = f"no column {several}; there are {there}"
    # Names of several that are missing are guessed together.
    meant = _meant(found, present, wanted)
    if meant:
        others = {name: own for name, own in found.items() if own != name}
        both = {**renamed, **others, **meant}
        order = [*renamed, *(name for name in wanted if name in both and name not in renamed)]
        return f"{line}; did you mean columns={shown({name: both[name] for name in order})}?"
    called = [column for column in missing if column not in renamed]
    if not called:
        return line
    if not missing[1:]:
        names = ", ".join(NAMES[missing[0]])
        return f"{line}; it may also be called {names}, and columns= names any other"
    names = "".join(f"\n{each} may also be called {', '.join(NAMES[each])}" for each in called)
    return f"{line}{names}\ncolumns= names any other"


def _other_way(unknown: Sequence[Any], renamed: Mapping[Any, Any]) -> str:
    """Advise on a renaming that is misspelled, or the wrong way round."""
    like = get_close_matches(str(unknown[0]), COLUMNS, n=1)
    if like:
        return f"; did you mean {like[0]!r}?"
    if not all(renamed[name] in COLUMNS for name in unknown):
        return ""
    turned = {
        own if name in unknown else name: name if name in unknown else own
        for name, own in renamed.items()
    }
    return f"; it is the wrong way round: columns={shown(turned)}"


def _meant(
    found: Mapping[str, Any], present: Sequence[Any], wanted: Sequence[str]
) -> dict[str, Any]:
    """Guess the renaming that would find the missing columns, where names are much the same."""
    names = [found.get(column, column) for column in wanted]
    free = [own for own in present if isinstance(own, str) and own not in names]
    meant: dict[str, Any] = {}
    for column, name in zip(wanted, names, strict=True):
        if name in present:
            continue
        plain = {own.strip().casefold(): own for own in reversed(free)}
        # A name of the user's choice stands for itself.
        called = [name] if name != column else [column, *NAMES[column]]
        tried = (
            get_close_matches(str(each).strip().casefold(), plain, n=1, cutoff=0.8)
            for each in called
        )
        for like in next((match for match in tried if match), []):
            meant[column] = plain[like]
            free.remove(plain[like])
    return meant
