"""Sums of outcomes, such as the difference of two: values, and how sure they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._printable import printable, shown
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results import selection, tables
from nnpatch_core.results.compare import check_axes
from nnpatch_core.results.notebook import as_html
from nnpatch_core.results.parts import Cells, Prompts, Scale
from nnpatch_core.results.pictures import PictureKind, draw_combination
from nnpatch_core.results.stability import Stability, stability
from nnpatch_core.results.statistics import Term, alike, cell_values, read_level
from nnpatch_core.results.sureness import band, interval, pvalues
from nnpatch_core.results.top import Top, make_top
from nnpatch_core.sites import Axis

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nnpatch_core.results.outcome import Outcome


@attrs.frozen(eq=False, repr=False)
class Combination(Mapping[str, Tensor]):
    """Outcomes whose values add up, each with a weight: a mapping from site name to tensor.

    `one - other`, `(one + other) / 2` and the like make it, of outcomes with the same grids. Those
    that are of the same prompts, in whatever order, have these drawn together in its statistics;
    those of others are drawn by themselves. Outcomes that share some prompts and not all are taken
    to be of others, with a `StatisticsWarning`.

    Args:
        terms: the outcomes with their weights.
        cells: site name to the cells, which all have.

    Examples:
        >>> import torch
        >>> from nnpatch_core import Sites, activation_patching, attribution_patching
        >>> from nnpatch_core.testing import tiny_model
        >>> source = torch.tensor([[5, 6, last] for last in range(10, 18)])
        >>> target = torch.tensor([[5, 9, last] for last in range(10, 18)])
        >>> sites = Sites(["attn", "mlp"], seq_pos_type="each")
        >>> prompts = source, target, torch.full((8,), 1), torch.full((8,), 2)
        >>> arguments = (tiny_model("llama"), None, sites, *prompts)
        >>> exact = activation_patching(*arguments, progress=False)
        >>> error = attribution_patching(*arguments, progress=False) - exact
        >>> error
        Combination(attribution - activation, logit_difference: attn [3, 3], mlp [3, 3])
        >>> error.paired, error["mlp"].shape
        (True, torch.Size([3, 3]))
        >>> error.interval("mlp").holds(0.0).shape
        torch.Size([3, 3])
    """

    terms: tuple[Term, ...]
    cells: Mapping[str, Cells]

    # So that a number of numpy leaves its product with this to `__rmul__`.
    __array_ufunc__ = None

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __getitem__(self, name: str) -> Tensor:
        """The values of a site name, float32, 0 where nothing was swept."""
        key = selection.find_name(self.cells, name)
        return self.cells[key].place(cell_values(self, key), 0.0)

    def __iter__(self) -> Iterator[str]:
        return iter(self.cells)

    def __len__(self) -> int:
        return len(self.cells)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(cells.shape)}" for name, cells in self.cells.items())
        groups = len(alike([term.outcome for term in self.terms]))
        own = "prompts of their own" if groups == len(self.terms) else f"{groups} sets of prompts"
        apart = "" if groups == 1 else f"; {own}"
        return printable(f"Combination({self.kind}, {self.metric}: {shapes}{apart})")

    def _repr_html_(self) -> str:
        return as_html(self)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.cells)

    def __add__(self, other: Any) -> Combination:
        return combined(self, other, 1.0)

    def __sub__(self, other: Any) -> Combination:
        return combined(self, other, -1.0)

    def __neg__(self) -> Combination:
        return self * -1.0

    def __mul__(self, number: Any) -> Combination:
        return scaled(self, number)

    __rmul__ = __mul__

    def __truediv__(self, number: Any) -> Combination:
        return divided(self, number)

    @property
    def paired(self) -> bool:
        """Whether all outcomes are of the same prompts, in whatever order."""
        return len(alike([term.outcome for term in self.terms])) == 1

    @property
    def scale(self) -> Scale:
        """The scale of all outcomes."""
        return self.terms[0].outcome.scale

    @property
    def magnitude(self) -> bool:
        """Whether values are of sizes."""
        return self.terms[0].outcome.magnitude

    @property
    def metric(self) -> str:
        """The metric; those of all outcomes where they have others."""
        return " and ".join(dict.fromkeys(term.outcome.metric for term in self.terms))

    @property
    def kind(self) -> str:
        """The kinds of the outcomes, such as `"attribution - activation"`."""
        words = ""
        for term in self.terms:
            sign = "-" if term.weight < 0 else "+"
            factor = "" if abs(term.weight) == 1 else f"{abs(term.weight):.3g} x "
            words += f" {sign} {factor}{term.outcome.kind}"
        return words.removeprefix(" + ").strip()

    @property
    def info(self) -> Mapping[str, str]:
        """The words of each outcome on how it was run; where they differ, each in its place."""
        names = dict.fromkeys(name for term in self.terms for name in term.outcome.info)
        said = {
            name: dict.fromkeys(term.outcome.info.get(name, "-") for term in self.terms)
            for name in names
        }
        return {name: " | ".join(values) for name, values in said.items()}

    @property
    def estimated(self) -> bool:
        """True if some cells are made of estimates."""
        return not all(bool(cells.exact.all()) for cells in self.cells.values())

    @property
    def prompts(self) -> Prompts:
        """Those of the first outcome."""
        return self.terms[0].outcome.prompts

    @property
    def tokens(self) -> tuple[str, ...]:
        """A label for each position; those of the first outcome."""
        return self.terms[0].outcome.tokens

    @property
    def count(self) -> int:
        """How many prompts there were, in the outcome that has the fewest."""
        return min(term.outcome.count for term in self.terms)

    def axes(self, name: str) -> tuple[Axis, ...]:
        """The axes of a site name's tensor."""
        return self.cells[selection.find_name(self.cells, name)].axes

    def swept(self, name: str) -> Tensor:
        """The cells of a site name that were swept, bool, of its tensor's shape."""
        cells = self.cells[selection.find_name(self.cells, name)]
        return cells.place(torch.ones(len(cells.index), dtype=torch.bool, device="cpu"), 0.0)

    def elided(self, name: str) -> Tensor:
        """The cells that put nothing else there in any outcome, bool, of its tensor's shape."""
        cells = self.cells[selection.find_name(self.cells, name)]
        return cells.place(cells.elided.all(-1), False)

    def exact(self, name: str) -> Tensor:
        """The cells that are no estimates in any outcome, bool, of its tensor's shape."""
        cells = self.cells[selection.find_name(self.cells, name)]
        return cells.place(cells.exact, False)

    def interval(
        self,
        name: Any = None,
        level: float = 0.95,
        seed: int = 0,
        *,
        resamples: int = 10_000,
        wider: bool = False,
    ) -> Any:
        """See `Outcome.interval`."""
        return interval(self, name, level, seed, resamples, wider)

    def band(
        self,
        name: Any = None,
        level: float = 0.95,
        seed: int = 0,
        *,
        flips: int = 10_000,
        wider: bool = False,
    ) -> Any:
        """See `Outcome.band`."""
        return band(self, name, level, seed, flips, wider)

    def pvalues(
        self, name: Any = None, adjust: str | None = "max_t", seed: int = 0, *, flips: int = 10_000
    ) -> Any:
        """See `Outcome.pvalues`; of outcomes of the same prompts alone."""
        return pvalues(self, name, adjust, seed, flips)

    def top(
        self, n: int = 10, name: Any = None, distinct: bool = True, *, level: float = 0.95
    ) -> Top:
        """See `Outcome.top`."""
        return make_top(self, n, name, distinct, level=level)

    def stability(
        self,
        k: int = 10,
        name: Any = None,
        distinct: bool = True,
        seed: int = 0,
        *,
        resamples: int = 10_000,
    ) -> Stability:
        """See `Outcome.stability`."""
        return stability(self, k, name, distinct, seed, resamples)

    def to_dataframe(self, *, level: float | None = 0.95) -> pandas.DataFrame:
        """One row a cell; see `Outcome.to_dataframe`."""
        read = None if level is None else read_level(level)
        return tables.frame(tables.cell_blocks(self, level=read), self.tokens)

    def plot(
        self,
        *,
        sites: Sequence[str] | None = None,
        kind: PictureKind | None = None,
        interactive: bool = False,
        title: str | None = None,
        limit: float | Literal["largest"] | None = None,
        crop: bool | None = None,
        layers: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        size: tuple[float, float] | None = None,
        values: bool | None = None,
        mark: int = 0,
        mute: float | None = 0.95,
        ax: Axes | None = None,
    ) -> Figure | plotly.graph_objects.Figure:
        """See `Outcome.plot`; for a difference beside its two sides `Outcome.plot_beside`."""
        return draw_combination(
            self,
            sites=sites,
            kind=kind,
            interactive=interactive,
            title=title,
            limit=limit,
            crop=crop,
            layers=layers,
            positions=positions,
            size=size,
            values=values,
            mark=mark,
            mute=mute,
            ax=ax,
        )


def combined(one: Any, other: Any, weight: float) -> Combination:
    """One outcome or combination, and another with a weight.

    Raises:
        OutcomeError: their grids, scales or units differ.
    """
    if not all(hasattr(each, "terms") for each in (one, other)):
        return cast(Combination, NotImplemented)
    pairs = [
        *((term.weight, term.outcome) for term in one.terms),
        *((weight * term.weight, term.outcome) for term in other.terms),
    ]
    return _combination(pairs)


def scaled(one: Any, number: Any) -> Combination:
    """An outcome or combination with a weight."""
    if not _is_number(number):
        return cast(Combination, NotImplemented)
    return _combination([(float(number) * term.weight, term.outcome) for term in one.terms])


def divided(one: Any, number: Any) -> Combination:
    """An outcome or combination, divided by a number."""
    return scaled(one, 1 / number if _is_number(number) and number else None)


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return number and bool(np.isfinite(value))


def _combination(pairs: Sequence[tuple[float, Outcome]]) -> Combination:
    first = pairs[0][1]
    rows: list[dict[str, Tensor]] = [{} for _ in pairs]
    for _, outcome in pairs:
        _check_alike(first, outcome)
    cells = {}
    for name, own in first.cells.items():
        sides = []
        for number, (_, outcome) in enumerate(pairs):
            side = outcome.cells[selection.find_name(outcome.cells, name)]
            check_axes(name, own.axes, side.axes, ("one outcome", "the other"))
            rows[number][name] = _rows(name, own, side)
            sides.append((side, rows[number][name]))
        cells[name] = _shared(own, sides)
    renamed = [
        attrs.evolve(
            outcome,
            cells={name: outcome.cells[selection.find_name(outcome.cells, name)] for name in cells},
            raw={
                metric: {name: raw[selection.find_name(raw, name)] for name in cells}
                for metric, raw in outcome.raw.items()
            },
        )
        for _, outcome in pairs
    ]
    terms = tuple(
        Term(weight, outcome, own)
        for (weight, _), outcome, own in zip(pairs, renamed, rows, strict=True)
    )
    return Combination(terms, cells)


def _check_alike(one: Outcome, other: Outcome) -> None:
    for field in ("scale", "magnitude"):
        first, second = getattr(one, field), getattr(other, field)
        if first != second:
            raise OutcomeError(
                f"one outcome has the {field} {shown(first)} and the other {shown(second)}: their "
                "values do not add up"
            )
    if one.scale == "change" and one.metric != other.metric:
        raise OutcomeError(
            f"one outcome has changes of {shown(one.metric)} and the other of "
            f"{shown(other.metric)}: their values do not add up. Choose by for_metric(...)"
        )
    names = [selection.matching(other.cells, name) for name in one.cells]
    if None in names or len(one.cells) != len(other.cells):
        raise OutcomeError(
            f"one outcome has the sites {shown(list(one.cells))} and the other "
            f"{shown(list(other.cells))}: choose those of both by sel(site=[...])"
        )


def _rows(name: str, one: Cells, other: Cells) -> Tensor:
    """The row in `other` of each cell of `one`."""
    places = {tuple(place): row for row, place in enumerate(other.index.tolist())}
    wanted = [tuple(place) for place in one.index.tolist()]
    lacking = [place for place in wanted if place not in places]
    if lacking or len(places) != len(wanted):
        own = set(wanted)
        place = lacking[0] if lacking else next(each for each in places if each not in own)
        labels = ", ".join(
            f"{axis.name} {axis.labels[at]}" for axis, at in zip(one.axes, place, strict=True)
        )
        raise OutcomeError(
            f"{shown(name)} at {labels} was swept in one outcome and not in the other: choose the "
            "cells of both by sel(...)"
        )
    return torch.tensor([places[place] for place in wanted], dtype=torch.int64, device="cpu")


def _shared(own: Cells, sides: Sequence[tuple[Cells, Tensor]]) -> Cells:
    """The cells of a sum: known where each outcome's are."""

    def everywhere(mask: str) -> Tensor:
        masks = [getattr(cells, mask)[rows].all(-1) for cells, rows in sides]
        return torch.stack(masks).all(0)[:, None]

    present = torch.stack([cells.present[rows].any(-1) for cells, rows in sides]).any(0)[:, None]
    exact = torch.stack([cells.exact[rows] for cells, rows in sides]).all(0)
    known = torch.stack([cells.known[rows].all(-1) for cells, rows in sides]).all(0)[:, None]
    elided = everywhere("elided")
    return attrs.evolve(own, present=present, elided=elided, unread=known & ~elided, exact=exact)
