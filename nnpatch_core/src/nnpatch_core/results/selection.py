"""Selection: the site names and cells that a call asks for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
from torch import Tensor

from nnpatch_core._arguments import listed
from nnpatch_core._hints import did_you_mean
from nnpatch_core._printable import shown
from nnpatch_core.components import canonical_name
from nnpatch_core.errors import NotSweptError, OutcomeError
from nnpatch_core.results import tables
from nnpatch_core.results.statistics import cell_values

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome


def find_name(names: Collection[str], name: Any) -> str:
    """The one of `names` that `name` stands for, which may be a synonym of it.

    Raises:
        NotSweptError: none of them.
    """
    found = matching(names, name)
    if found is None:
        hint = did_you_mean(name, names)
        raise NotSweptError(f"{shown(name)} was not swept{hint}; there are {shown(list(names))}")
    return found


def matching(names: Collection[str], name: Any) -> str | None:
    """The one of `names` that `name` stands for, which may be a synonym of it; None if none."""
    if not isinstance(name, str) or name in names:
        return name if isinstance(name, str) else None
    alike = (each for each in names if canonical_name(each) == canonical_name(name))
    return next(alike, None)


def find_names(names: Collection[str], sites: Any, argument: str = "sites") -> tuple[str, ...]:
    """The site names that an argument lists, as `names` has them; None is all.

    Raises:
        OutcomeError: the argument is no list.
        NotSweptError: it lists a site name that is not in `names`.
    """
    given = listed((sites,) if isinstance(sites, str) else names if sites is None else sites)
    if given is None:
        raise OutcomeError(f"{argument} must be a list of site names, got {shown(sites)}")
    return tuple(find_name(names, name) for name in given)


def only(outcome: Outcome, kept: Mapping[str, Tensor]) -> Outcome:
    """The same sweep, with some of its cells alone.

    Args:
        outcome: the outcome.
        kept: site name to its cells that stay, by number or as bool; other names are left out.
    """
    raw = {
        metric: {name: by_name[name][rows] for name, rows in kept.items()}
        for metric, by_name in outcome.raw.items()
    }
    moments = outcome.moments
    if moments is not None:
        patched = {
            metric: {name: by_name[name][rows] for name, rows in kept.items()}
            for metric, by_name in moments.patched.items()
        }
        moments = attrs.evolve(moments, patched=patched)
    cells = {name: outcome.cells[name].only(rows) for name, rows in kept.items()}
    whole = all(
        name in cells and len(cells[name].index) == len(every.index)
        for name, every in outcome.cells.items()
    )
    return attrs.evolve(
        outcome,
        cells=cells,
        raw=raw,
        moments=moments,
        # Its bound is on all cells.
        screening=outcome.screening if whole else None,
    )


def strongest(outcome: Outcome, k: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """The table rows of the `k` cells of largest absolute value, nan before all others.

    Args:
        outcome: the outcome.
        k: the number of cells, at most.
        names: the site names to look at.
    """
    # Of each site no more than can be among them, for a row costs more than a number.
    places = {}
    for name in dict.fromkeys(names):
        sizes = cell_values(outcome, name).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
        first = sizes.sort(descending=True, stable=True).indices[:k].sort().values
        places[name] = outcome.cells[name].index[first].tolist()
    blocks = tables.cell_blocks(outcome, places)
    return sorted(tables.rows(blocks, outcome.tokens), key=_rank)[:k]


def _rank(row: dict[str, Any]) -> float:
    return -abs(row["value"]) if row["value"] == row["value"] else -float("inf")
