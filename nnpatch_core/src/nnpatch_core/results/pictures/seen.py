"""An outcome as a picture sees it: grids of numbers, how sure they are, and what shows nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch
from numpy.typing import NDArray

from nnpatch_core._printable import printable
from nnpatch_core.results.pictures.certainty import Certainty, certainty, share
from nnpatch_core.results.pictures.crop import Lines
from nnpatch_core.results.pictures.panels import Grid
from nnpatch_core.results.pictures.request import PictureKind, Request, chosen

if TYPE_CHECKING:
    from nnpatch_core.results.combination import Combination
    from nnpatch_core.results.outcome import Outcome

_NOT_SWEPT = "nothing was swept there"
_UNTOLD = Certainty({})


@attrs.frozen(eq=False)
class Seen:
    """Some site names of an outcome, in one metric.

    Args:
        name: what tells it from others beside it.
        grids: the numbers of each site name.
        certainty: how sure they are.
        level: of the certainty; None where none was asked for.
        layers: the layers of the model.
        positions: the positions of the prompts.
        broken: how many cells were swept and have no number.
    """

    name: str
    grids: tuple[Grid, ...]
    certainty: Certainty
    level: float | None
    layers: Lines
    positions: Lines
    broken: int = 0

    @property
    def cells(self) -> int:
        """How many cells have a band."""
        return sum(int((~np.isnan(band[0])).sum()) for band in self.certainty.bands.values())

    def words(self, there: str, missing: str) -> list[str]:
        """Words on cells without a number, and on certainty, if it was asked for.

        Args:
            there: what is said of bands, with `{percent}` and `{cells}` in it.
            missing: what is said before the reason why there are none.
        """
        told = []
        if self.broken:
            cells = "1 cell has" if self.broken == 1 else f"{self.broken:,} cells have"
            told.append(f"{cells} no number: some prompts gave nan or inf there")
        if self.level is None:
            return told
        if self.certainty.lacks:
            return [*told, f"{missing}: {self.certainty.lacks}"]
        told.append(there.format(percent=share(self.level), cells=f"{self.cells:,}"))
        return [*told, self.certainty.doubt] if self.certainty.doubt else told


def see(
    outcome: Outcome | Combination, names: Sequence[str], request: Request, kind: PictureKind
) -> Seen:
    """The numbers of some site names of an outcome.

    Args:
        outcome: the outcome.
        names: the site names, one of them at least.
        request: what is asked of the picture.
        kind: how they are drawn; bars of a list of sites have intervals of their own.
    """
    width = outcome.prompts.target_tokens.shape[1]
    tokens = tuple(
        printable(outcome.prompts.label(position, strip=True)) for position in range(width)
    )
    together = not (kind == "bars" and are_lists(outcome, names))
    sure = _UNTOLD
    if request.mute is not None:
        sure = certainty(outcome, names, request.mute, together=together)
    grids = tuple(
        Grid(name, outcome.axes(name), _values(outcome, name), sure.bands.get(name))
        for name in names
    )
    layers, positions = _layers(outcome, names), _positions(outcome, names, tokens)
    return Seen(
        name=outcome.metric,
        grids=grids,
        certainty=sure,
        level=request.mute,
        layers=attrs.evolve(layers, chosen=chosen(request.layers, len(layers.labels), "layers")),
        positions=attrs.evolve(positions, chosen=chosen(request.positions, width, "positions")),
        broken=sum(int((outcome.swept(name) & ~outcome[name].isfinite()).sum()) for name in names),
    )


def are_lists(outcome: Outcome | Combination, names: Sequence[str]) -> bool:
    """Tell whether all of the site names are lists of the user's own sites."""
    return all(outcome.axes(name)[0].name == "site" for name in names)


def _values(outcome: Outcome | Combination, name: str) -> NDArray[np.float64]:
    """The values of a site name's grid, nan where nothing was swept."""
    values = torch.where(outcome.swept(name), outcome[name].double(), torch.nan)
    made: NDArray[np.float64] = values.numpy()
    return made


def _layers(outcome: Outcome | Combination, names: Sequence[str]) -> Lines:
    """The model's layers, idle where none of the sites was swept; none without such an axis."""
    labels: tuple[str, ...] = ()
    swept: set[int] = set()
    for name in names:
        first = outcome.axes(name)[0]
        if first.name == "layer":
            labels = tuple(map(str, first.labels))
            swept.update(outcome.cells[name].index[:, 0].tolist())
    idle = ("" if number in swept else _NOT_SWEPT for number in range(len(labels)))
    return Lines(labels, tuple(idle))


def _positions(
    outcome: Outcome | Combination, names: Sequence[str], tokens: tuple[str, ...]
) -> Lines:
    """The positions of the prompts, idle where none of the sites was run."""
    count = len(tokens)
    swept, run, changed = torch.zeros(3, count, dtype=torch.bool, device="cpu")
    for name in names:
        axes = [axis.name for axis in outcome.axes(name)]
        if "position" in axes:
            others = [number for number, axis in enumerate(axes) if axis != "position"]
            swept |= outcome.swept(name).sum(others).bool()
            cells = outcome.cells[name]
            known = cells.place(cells.known.all(-1), False)
            run |= (outcome.swept(name) & ~known).sum(others).bool()
            changed |= (outcome.swept(name) & ~outcome.elided(name)).sum(others).bool()
    same = outcome.prompts.same()
    words = []
    for position in range(count):
        if run[position]:
            words.append("")
        elif not swept[position]:
            words.append(_NOT_SWEPT)
        elif outcome.scale == "restored" and same[position]:
            words.append("source and target are the same there")
        elif changed[position]:
            words.append("nothing reads what is there")
        else:
            words.append("nothing changes there")
    return Lines(tokens, tuple(words))
