"""A choice of cells by their labels: layers, positions, tokens, spans, heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._arguments import listed
from nnpatch_core._hints import did_you_mean
from nnpatch_core._integers import strict_int
from nnpatch_core._printable import shown
from nnpatch_core._ranges import ranges
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.axes import AXES, NUMBERED
from nnpatch_core.results.selection import find_names, only

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome
    from nnpatch_core.results.parts import Prompts

#: The arguments whose negative numbers count from the end.
_FROM_END = ("layer", "position")


@attrs.frozen
class _Asked:
    """The labels that an argument asks for; of a range not all of them need be there."""

    argument: str
    labels: tuple[Any, ...]
    is_range: bool = False

    def __str__(self) -> str:
        labels = self.labels[0] if len(self.labels) == 1 else list(self.labels)
        return f"{self.argument}={shown(labels)}"


def choose(outcome: Outcome, site: Any, labels: dict[str, Any]) -> Outcome:
    """The outcome with the cells alone that have some labels; see `Outcome.sel`.

    Args:
        outcome: the outcome.
        site: site names, or one; None is all.
        labels: argument to one label, or several; None asks for nothing.

    Raises:
        OutcomeError: no cell matches, or what is asked for is no label.
        NotSweptError: a site name that was not swept.
    """
    names = tuple(dict.fromkeys(find_names(outcome.cells, site, "site")))
    if not names:
        raise OutcomeError("site is empty: it matches no cell")
    asked = [_read(argument, value) for argument, value in labels.items() if value is not None]
    kept = {
        name: torch.ones(len(outcome.cells[name].index), dtype=torch.bool, device="cpu")
        for name in names
    }
    for each in asked:
        found = {name: _matches(outcome, name, each) for name in names}
        _check_found(outcome, each, found)
        kept = {name: rows & found[name].any(0) for name, rows in kept.items()}
    kept = {name: rows for name, rows in kept.items() if bool(rows.any())}
    if not kept:
        words = " and ".join(map(str, asked)) or f"site={shown(site)}"
        raise OutcomeError(f"no cell of {shown(list(names))} has {words} together")
    return only(outcome, kept)


def _read(argument: str, value: Any) -> _Asked:
    """The labels of an argument: numbers or texts, one or several."""
    one = isinstance(value, str) or getattr(value, "ndim", None) == 0
    given = (value,) if one or isinstance(value, int) else listed(value)
    if isinstance(value, slice | bytes) or given is None:
        kind = "numbers" if argument in NUMBERED else "texts"
        raise OutcomeError(f"{argument} must be one label or a list of {kind}, got {shown(value)}")
    if not given:
        raise OutcomeError(f"{argument} is empty: it matches no cell")
    if argument in NUMBERED:
        what = f"each of {argument}" if len(given) > 1 else argument
        given = tuple(strict_int(label, what, OutcomeError) for label in given)
    else:
        for label in given:
            if not isinstance(label, str):
                raise OutcomeError(f"{argument} is named by a text, got {shown(label)}")
    return _Asked(argument, given, isinstance(value, range))


def _matches(outcome: Outcome, name: str, asked: _Asked) -> Tensor:
    """`[labels, cells]`, bool: which cells of a site name have which label."""
    cells = outcome.cells[name]
    column = "position" if asked.argument == "token" else asked.argument
    at = next((at for at, axis in enumerate(cells.axes) if AXES[axis.name].column == column), None)
    nothing = torch.zeros(len(asked.labels), len(cells.index), dtype=torch.bool, device="cpu")
    if at is None:
        return nothing
    places = _places(outcome.prompts, asked, cells.axes[at].labels)
    own = cells.index[:, at]
    for row, wanted in enumerate(places):
        nothing[row] = torch.isin(own, torch.tensor(wanted, dtype=torch.int64, device="cpu"))
    return nothing


def _places(prompts: Prompts, asked: _Asked, labels: Sequence[int | str]) -> list[list[int]]:
    """For each label that is asked for the places on an axis that have it."""
    if asked.argument == "token":
        texts = [prompts.texts(position) for position in range(len(labels))]
        return [[at for at, own in enumerate(texts) if label in own] for label in asked.labels]
    if asked.argument in _FROM_END:
        count = len(labels)
        wanted = [label + count if -count <= label < 0 else label for label in asked.labels]
    else:
        wanted = list(asked.labels)
    return [[at for at, own in enumerate(labels) if own == label] for label in wanted]


def _check_found(outcome: Outcome, asked: _Asked, found: dict[str, Tensor]) -> None:
    """Raise `OutcomeError` for a label that no cell has."""
    each = torch.stack([matches.any(1) for matches in found.values()]).any(0).tolist()
    if all(each) or (asked.is_range and any(each)):
        return
    missing = (
        asked if asked.is_range else _Asked(asked.argument, (asked.labels[each.index(False)],))
    )
    there = _there(outcome, list(found), asked.argument)
    if not there:
        axes = {axis.name: None for name in found for axis in outcome.axes(name)}
        raise OutcomeError(
            f"no cell has {missing}: {shown(list(found))} have the axes {', '.join(axes)} alone"
        )
    if asked.argument in NUMBERED:
        raise OutcomeError(
            f"no cell has {missing}: of each {asked.argument} there are {ranges(there)}"
        )
    hint = did_you_mean(missing.labels[0], _texts(outcome, list(found), asked.argument))
    raise OutcomeError(f"no cell has {missing}{hint}; there are {shown(there)}")


def _there(outcome: Outcome, names: Iterable[str], argument: str) -> list[Any]:
    """The labels that the cells of some site names have, each once."""
    if argument == "token":
        labels = map(outcome.prompts.label, _labels(outcome, names, "position"))
        return list(dict.fromkeys(labels))
    return _labels(outcome, names, argument)


def _texts(outcome: Outcome, names: Iterable[str], argument: str) -> list[str]:
    """The texts by which a label may be named."""
    if argument == "token":
        places = _labels(outcome, names, "position")
        texts = {text: None for place in places for text in sorted(outcome.prompts.texts(place))}
        # Of a token with and without its spaces one is enough.
        return [text for text in dict.fromkeys(map(str.strip, texts)) if text]
    return _labels(outcome, names, argument)


def _labels(outcome: Outcome, names: Iterable[str], column: str) -> list[Any]:
    """The labels in a column of a table that the cells of some site names have, each once."""
    labels: list[Any] = []
    for name in names:
        cells = outcome.cells[name]
        for at, axis in enumerate(cells.axes):
            if AXES[axis.name].column == column:
                places = sorted({*cells.index[:, at].tolist()})
                labels += [axis.labels[place] for place in places]
    return list(dict.fromkeys(sorted(labels) if column in NUMBERED else labels))
