"""The agreement of an estimated outcome with an exact one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import attrs
import numpy as np
from numpy.typing import NDArray

from nnpatch_core._html import block, preformatted
from nnpatch_core._integers import strict_int
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results import tables
from nnpatch_core.results.parts import Scale
from nnpatch_core.results.pictures import draw_agreement
from nnpatch_core.results.redrawn import figure_interval
from nnpatch_core.results.statistics import recall, sign_agreement, spearman
from nnpatch_core.sites import Axis

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects
    from matplotlib.figure import Figure

    from nnpatch_core.results.outcome import Outcome

#: The figures of an agreement that prompts move.
AgreementFigure: TypeAlias = Literal[
    "rank_correlation", "rank_correlation_of_sizes", "recall", "sign_agreement"
]

#: The columns of the printed table.
_COLUMNS = (
    "cells",
    "left out",
    " top",
    "recall",
    "signs",
    "rank corr.",
    "rank corr. of sizes",
)


@attrs.frozen(eq=False)
class ComparedCells:
    """The cells of one site name that are compared, in the order of its grid.

    Args:
        axes: the axes of its grid.
        index: `[cells, axes]`, the place of each cell.
        estimate, exact: `[cells]`, the two values of each, finite.
        left_out: the number of further cells, whose values are not both finite.
    """

    axes: tuple[Axis, ...]
    index: NDArray[np.int64]
    estimate: NDArray[np.float64]
    exact: NDArray[np.float64]
    left_out: int


@attrs.frozen(eq=False, repr=False)
class Agreement:
    """An estimate beside what is exact, cell by cell; `Outcome.agreement` makes it.

    Cells count that the one estimates and the other measured. A cell that an estimate knows,
    because its patch changes no answer or because a screen has measured it, agrees by itself.

    Args:
        sites: site name to its cells.
        top_k: the number of largest cells that `recall` and `sign_agreement` are about.
        kinds: the kind of the estimate and of the exact outcome.
        metric: the metric of both.
        scale: the scale of both.
        magnitude: whether the values are sizes, without a sign.
        tokens: a label for each position.
        model: the model of the exact outcome.
        outcomes: the estimate and the exact outcome.

    Examples:
        >>> import torch
        >>> from nnpatch_core import Sites, activation_patching
        >>> from nnpatch_core.testing import tiny_model
        >>> source, target = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]])
        >>> out = activation_patching(
        ...     tiny_model("llama"), None, Sites(["attn", "mlp"], seq_pos_type="each"),
        ...     source, target, torch.tensor([1]), torch.tensor([2]), progress=False,
        ... )
        >>> agreement = out.agreement(out, top_k=5)
        >>> print(agreement)
              cells left out  top recall signs rank corr. rank corr. of sizes
        all      18        0    5   1.00  1.00       1.00                1.00
        attn      9        0    5   1.00  1.00       1.00                1.00
        mlp       9        0    5   1.00  1.00       1.00                1.00
    """

    sites: Mapping[str, ComparedCells]
    top_k: int
    kinds: tuple[str, str]
    metric: str
    scale: Scale
    magnitude: bool
    tokens: tuple[str, ...]
    model: str
    outcomes: tuple[Outcome, Outcome]

    def __repr__(self) -> str:
        return (
            f"Agreement({self.metric}, {self.cells} cells: recall {self.recall:.2f} of "
            f"{self._top}, rank correlation {self.rank_correlation:.2f})"
        )

    def __str__(self) -> str:
        parts = [("all", self), *self.by_site().items()]
        width = max(len(name) for name, _ in parts)
        lines = [f"{'':{width}} " + " ".join(_COLUMNS)]
        for name, part in parts:
            figures = (
                str(part.cells),
                str(part.left_out),
                str(part._top),
                f"{part.recall:.2f}",
                f"{part.sign_agreement:.2f}",
                f"{part.rank_correlation:.2f}",
                f"{part.rank_correlation_of_sizes:.2f}",
            )
            columns = (f"{one:>{len(head)}}" for one, head in zip(figures, _COLUMNS, strict=True))
            lines.append(f"{name:{width}} " + " ".join(columns))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return block(preformatted(str(self)))

    @property
    def cells(self) -> int:
        """The number of cells that are compared.

        Examples:
            >>> out.agreement(out).cells
            27
        """
        return len(self._exact)

    @property
    def left_out(self) -> int:
        """The number of cells that are not compared, for one of their values is not finite.

        Examples:
            >>> out.agreement(out).left_out
            0
        """
        return sum(one.left_out for one in self.sites.values())

    @property
    def rank_correlation(self) -> float:
        """Spearman's correlation of the values; nan for fewer than 2 cells, or a constant.

        Examples:
            >>> round(out.agreement(out).rank_correlation, 6)
            1.0
        """
        return spearman(self._estimate, self._exact)

    @property
    def rank_correlation_of_sizes(self) -> float:
        """Spearman's correlation of the absolute values, which decide on the strongest cells.

        Examples:
            >>> round(out.agreement(out).rank_correlation_of_sizes, 6)
            1.0
        """
        return spearman(np.abs(self._estimate), np.abs(self._exact))

    @property
    def recall(self) -> float:
        """The share of the `top_k` cells of largest exact size that are the estimate's `top_k` too.

        Cells that tie for the last places have an equal part of a place each, so that the order of
        cells does not matter, and a constant estimate finds what chance would. With no more cells
        than `top_k` it is 1; with none, nan.

        Examples:
            >>> out.agreement(out).recall
            1.0
        """
        return recall(self._estimate, self._exact, self._top)

    @property
    def sign_agreement(self) -> float:
        """The share of the `top_k` cells of largest exact size that the estimate gives their sign.

        Signs of smaller cells may be those of rounding. Cells that are exactly 0 have none and do
        not count; where all do not, and for sizes, it is nan.

        Examples:
            >>> out.agreement(out).sign_agreement
            1.0
        """
        if self.magnitude:
            return float("nan")
        return sign_agreement(self._estimate, self._exact, self._top)

    def interval(
        self,
        figure: AgreementFigure = "rank_correlation",
        level: float = 0.95,
        seed: int = 0,
        *,
        resamples: int = 1000,
    ) -> tuple[float, float]:
        """The interval in which a figure would lie with other prompts like these.

        Prompts are drawn again, for the estimate and the exact outcome together if they are of the
        same prompts, and the figure is computed anew: the percentile bootstrap, at the wider level
        that makes up for few prompts (Hesterberg, 2015). Of one prompt it is (nan, nan).

        Args:
            figure: `"rank_correlation"`, `"rank_correlation_of_sizes"`, `"recall"` or
                `"sign_agreement"`.
            level: the share of such intervals that hold the truth.
            seed: of the draws.
            resamples: how often prompts are drawn.

        Warns:
            StatisticsWarning: the outcomes share some of their prompts and not all.

        Raises:
            OutcomeError: another figure, no level, a wrong number of draws, or only means were
                kept.

        Examples:
            >>> out.agreement(out).interval("recall")  # of one prompt
            (nan, nan)
        """
        return figure_interval(self, figure, level, seed, resamples)

    def by_site(self) -> dict[str, Agreement]:
        """Site name to the agreement of its cells alone.

        Examples:
            >>> list(out.agreement(out).by_site())
            ['mlp', 'k']
        """
        return {name: attrs.evolve(self, sites={name: one}) for name, one in self.sites.items()}

    def worst(self, k: int = 10) -> list[dict[str, Any]]:
        """The `k` cells that the estimate misses by most: site, labels of the axes, both values.

        Raises:
            OutcomeError: a `k` that is no number of cells.

        Examples:
            >>> [list(row) for row in out.agreement(out).worst(1)]
            [['site', 'layer', 'position', 'token', 'estimate', 'exact']]
        """
        k = strict_int(k, "k", OutcomeError)
        if k < 0:
            raise OutcomeError(f"k must be at least 0, got {k}")
        rows = tables.rows(tables.compared_blocks(self), self.tokens)
        return sorted(rows, key=lambda row: -abs(row["estimate"] - row["exact"]))[:k]

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a cell: site, layer, position, token, head, estimate, exact.

        Sites of a list of your own have a `label` in place of layer, position and head.

        Raises:
            OutcomeError: pandas is not installed (`pip install nnpatch-core[pandas]`).

        Examples:
            >>> list(out.agreement(out).to_dataframe())
            ['site', 'layer', 'position', 'token', 'head', 'estimate', 'exact']
        """
        return tables.frame(tables.compared_blocks(self), self.tokens)

    @overload
    def plot(
        self,
        *,
        interactive: Literal[False] = False,
        label: int = 5,
        title: str | None = None,
    ) -> Figure: ...

    @overload
    def plot(
        self,
        *,
        interactive: Literal[True],
        label: int = 5,
        title: str | None = None,
    ) -> plotly.graph_objects.Figure: ...

    @overload
    def plot(
        self,
        *,
        interactive: bool,
        label: int = 5,
        title: str | None = None,
    ) -> Figure | plotly.graph_objects.Figure: ...

    def plot(
        self, *, interactive: bool = False, label: int = 5, title: str | None = None
    ) -> Figure | plotly.graph_objects.Figure:
        """Estimates up and exact values across, with a colour for each site name.

        On the diagonal both are equal.

        Args:
            interactive: a plotly figure, which tells each cell under the mouse, instead of a
                matplotlib one.
            label: the number of worst cells that have their names beside them.
            title: by default model, metric and the kinds of both outcomes.

        Returns:
            A `matplotlib.figure.Figure` or a `plotly.graph_objects.Figure`.

        Raises:
            OutcomeError: matplotlib or plotly is not installed (`pip install
                nnpatch-core[plot]`), no cells to draw, a `label` that is no count, or a title that
                is no text.

        Examples:
            >>> out.agreement(out).plot().axes[0].get_xlabel()
            'exact: activation (restored)'
        """
        return draw_agreement(self, interactive=interactive, label=label, title=title)

    @property
    def _estimate(self) -> NDArray[np.float64]:
        return np.concatenate([one.estimate for one in self.sites.values()])

    @property
    def _exact(self) -> NDArray[np.float64]:
        return np.concatenate([one.exact for one in self.sites.values()])

    @property
    def _top(self) -> int:
        return min(self.top_k, self.cells)
