"""The labelled outcome of a sweep.

`Outcome` holds what was measured and hands each question on: values and other figures to
`statistics`, rows and arrays to `tables`, a choice of cells to `selection` and `chosen`, the
strongest of them to `top`, another outcome beside it to `compare`, heatmaps to `pictures`, pages of
a notebook to `notebook`, and files to `file`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import attrs
import torch
from torch import Tensor

from nnpatch_core._arguments import check_flags
from nnpatch_core._integers import strict_int
from nnpatch_core._printable import printable, shown
from nnpatch_core.errors import OutcomeError
from nnpatch_core.report import Facts, Reports, Study
from nnpatch_core.results import file, grouping, parquet, selection, tables
from nnpatch_core.results.agreement import Agreement
from nnpatch_core.results.chosen import choose
from nnpatch_core.results.combination import Combination, combined, divided, scaled
from nnpatch_core.results.compare import compare
from nnpatch_core.results.formats import (
    FLAG,
    INFO,
    NUMBERS,
    TEXT,
    Array,
    Each,
    IfMeans,
    Part,
    choice,
    record,
    stored,
)
from nnpatch_core.results.interval import Interval
from nnpatch_core.results.moments import Moments, standard_errors
from nnpatch_core.results.notebook import as_html
from nnpatch_core.results.parts import Baseline, Cells, Prompts, Scale
from nnpatch_core.results.pictures import PictureKind, PlotOptions, draw_beside, draw_outcome
from nnpatch_core.results.reported import facts_of, study_of
from nnpatch_core.results.screening import Screening
from nnpatch_core.results.stability import Stability, stability
from nnpatch_core.results.statistics import (
    Term,
    cell_values,
    flat_cells,
    prompt_values,
    read_level,
)
from nnpatch_core.results.sureness import Adjust, band, check_prompts, interval, needed, pvalues
from nnpatch_core.results.top import Top, make_top
from nnpatch_core.sites import Axis

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects
    import xarray
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAN = float("nan")


@attrs.frozen(eq=False, repr=False)
class Outcome(Reports, Mapping[str, Tensor]):
    """The outcome of a sweep: a mapping from site name to a tensor of values.

    The tensor's axes are layer, then position (where positions were patched one by one), then head
    (for components with heads); cells that were not swept are 0. The labelled forms have nan there.

    Args:
        kind: the kind of sweep, such as `"activation"` or `"ablation (zero)"`.
        scale: `"restored"`: (mean patched - mean target) / (mean source - mean target), so that 0
            is the target run and 1 the source run; `"change"`: mean patched - mean unpatched, in
            the metric's unit.
        cells: site name to the cells that were swept.
        raw: metric to site name to the metric of each patched run, `[cells, batch]`.
        baselines: metric to the unpatched runs' values.
        prompts: the prompts that were run.
        metric: the metric that the mapping shows.
        info: where the numbers come from, in words: model and a digest of its weights, adapter,
            engine, what was known without running, seed, time, machine and versions.
        magnitude: whether values are sizes: the mean over the prompts of how far each moved,
            without a sign.
        screening: how the cells that were measured were chosen, where others are estimates.
        moments: of a sweep with `keep="means"`: all that is known of its prompts. `raw` and
            `baselines` have one column then, of means, and `prompts` the first prompt.

    Examples:
        >>> import torch
        >>> from nnpatch_core import Sites, activation_patching, attribution_patching
        >>> from nnpatch_core.testing import tiny_model
        >>> sites = Sites(["mlp", "k"], seq_pos_type="each")
        >>> source, target = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]])
        >>> answers = torch.tensor([1]), torch.tensor([2])
        >>> arguments = (tiny_model("llama"), None, sites, source, target, *answers)
        >>> out = activation_patching(*arguments, progress=False)
        >>> out
        Outcome(activation, logit_difference: mlp [3, 3], k [3, 3, 2])
        >>> out["mlp"][0, 0]
        tensor(0.)
        >>> estimate = attribution_patching(*arguments, progress=False)

    The examples of the methods go on from here.
    """

    # Each names the format that it is saved in; see `nnpatch_core.results.formats`.
    kind: str = attrs.field(metadata=stored(TEXT))
    scale: Scale = attrs.field(metadata=stored(choice("restored", "change")))
    cells: Mapping[str, Cells] = attrs.field(metadata=stored(Each("sites", Part(Cells))))
    raw: Mapping[str, Mapping[str, Tensor]] = attrs.field(
        metadata=stored(Each("metrics", Each("sites", Array(NUMBERS, ("cells", "batch")))))
    )
    baselines: Mapping[str, Baseline] = attrs.field(
        metadata=stored(Each("metrics", Part(Baseline)))
    )
    prompts: Prompts = attrs.field(metadata=stored(Part(Prompts)))
    metric: str = attrs.field(metadata=stored(TEXT))
    info: Mapping[str, str] = attrs.field(metadata=stored(INFO))
    magnitude: bool = attrs.field(default=False, metadata=stored(FLAG))
    screening: Screening | None = attrs.field(default=None, metadata=stored(record(Screening)))
    moments: Moments | None = attrs.field(default=None, metadata=stored(IfMeans(Part(Moments))))

    # So that a number of numpy leaves its product with this to `__rmul__`.
    __array_ufunc__ = None

    # Two outcomes are compared by their tensors, not by `==` on a mapping of them.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __getitem__(self, name: str) -> Tensor:
        """The values of a site name, float32, 0 where nothing was swept.

        Raises:
            NotSweptError: the site name was not swept; it is a `KeyError` too.
        """
        return self._placed(name, cell_values, 0.0)

    def __iter__(self) -> Iterator[str]:
        return iter(self.cells)

    def __len__(self) -> int:
        return len(self.cells)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(cells.shape)}" for name, cells in self.cells.items())
        means = "" if self.moments is None else f", means of {self.moments.count} prompts"
        return printable(f"Outcome({self.kind}, {self.metric}: {shapes}{means})")

    def _repr_html_(self) -> str:
        return as_html(self)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.cells)

    def __add__(self, other: Any) -> Combination:
        return combined(self, other, 1.0)

    def __sub__(self, other: Any) -> Combination:
        """The difference to an outcome with the same grids; see `Combination`.

        Raises:
            OutcomeError: their sites, axes, swept cells, scales or units differ.
        """
        return combined(self, other, -1.0)

    def __neg__(self) -> Combination:
        return scaled(self, -1.0)

    def __mul__(self, number: Any) -> Combination:
        return scaled(self, number)

    __rmul__ = __mul__

    def __truediv__(self, number: Any) -> Combination:
        return divided(self, number)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The outcomes whose values add up to these: itself alone."""
        return (Term(1.0, self),)

    @property
    def estimated(self) -> bool:
        """True if some cells are estimates.

        Examples:
            >>> out.estimated, estimate.estimated
            (False, True)
        """
        return not all(bool(cells.exact.all()) for cells in self.cells.values())

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that were measured.

        Examples:
            >>> out.metrics
            ('logit_difference',)
        """
        return tuple(self.raw)

    @property
    def baseline(self) -> Baseline:
        """The metric of the unpatched runs, in its unit.

        Examples:
            >>> out.baseline.source.shape
            torch.Size([1])
        """
        return self.baselines[self.metric]

    @property
    def tokens(self) -> tuple[str, ...]:
        """A label for each position: a text, or an id where no tokenizer was at hand.

        Examples:
            >>> out.tokens
            ('5', '6|9', '7')
        """
        return tuple(
            self.prompts.label(position) for position in range(self.prompts.target_tokens.shape[1])
        )

    def for_metric(self, metric: str) -> Outcome:
        """The same sweep, seen through another of its metrics.

        Raises:
            OutcomeError: the metric was not measured.

        Examples:
            >>> out.for_metric("logit_difference").metric
            'logit_difference'
        """
        if not isinstance(metric, str) or metric not in self.raw:
            there = shown(list(self.raw))
            raise OutcomeError(f"no metric {shown(metric)} was measured; there are {there}")
        return attrs.evolve(self, metric=metric)

    def axes(self, name: str) -> tuple[Axis, ...]:
        """The axes of a site name's tensor.

        Raises:
            NotSweptError: the site name was not swept.

        Examples:
            >>> [axis.name for axis in out.axes("k")]
            ['layer', 'position', 'kv_head']
        """
        return self._cells(name).axes

    def swept(self, name: str) -> Tensor:
        """The cells of a site name that were swept, bool, of its tensor's shape.

        Raises:
            NotSweptError: the site name was not swept.

        Examples:
            >>> out.swept("mlp").shape, bool(out.swept("mlp").all())
            (torch.Size([3, 3]), True)
        """
        cells = self._cells(name)
        return cells.place(torch.ones(len(cells.index), dtype=torch.bool, device="cpu"), 0.0)

    def elided(self, name: str) -> Tensor:
        """The cells of a site name that put nothing else there, bool, of its tensor's shape.

        In every prompt what would be put is, bitwise, what was there: the value is the unpatched
        run's own, exactly, and the cone engine did not run it. `cells[name].elided` has it for each
        prompt.

        Raises:
            NotSweptError: the site name was not swept.

        Examples:
            >>> out.elided("mlp")[0].tolist()  # the prompts begin alike
            [True, False, False]
        """
        cells = self._cells(name)
        return cells.place(cells.elided.all(-1), False)

    def unread(self, name: str) -> Tensor:
        """The cells of a site name that nothing reads, bool, of its tensor's shape.

        In every prompt that has a token there, nothing that the answer depends on reads what the
        cell patches, or what of it would change: in the last layer, `q`, `o`, `attn`, `mlp` and
        `resid` left of the last token. Estimates mark these cells, which need no gradient; a
        measured sweep runs them and marks none. A cell may be both unread and `elided`.
        `cells[name].unread` has it for each prompt.

        Raises:
            NotSweptError: the site name was not swept.

        Examples:
            >>> estimate.unread("mlp")[-1].tolist(), estimate.elided("mlp")[-1].tolist()
            ([True, True, False], [True, False, False])
        """
        cells = self._cells(name)
        unread = (cells.unread | ~cells.present).all(-1) & cells.unread.any(-1)
        return cells.place(unread, False)

    def exact(self, name: str) -> Tensor:
        """The cells of a site name that are no estimates, bool, of its tensor's shape.

        They were measured, or are known without: in every prompt they are elided or unread, so that
        they change no answer.

        Raises:
            NotSweptError: the site name was not swept.

        Examples:
            >>> bool(out.exact("mlp").all()), estimate.exact("mlp")[-1].tolist()
            (True, [True, True, False])
        """
        cells = self._cells(name)
        return cells.place(cells.exact, False)

    def flat(self, name: str) -> Tensor:
        """The cells of a site name that are estimated to be 0, bool, of its tensor's shape.

        Something else would be put there, and the gradient says nothing about it: either nothing
        comes after it, as beyond a sliding window, or the model is saturated there. Measure them.

        Raises:
            NotSweptError: the site name was not swept.

        Examples:
            >>> bool(estimate.flat("mlp").any())
            False
        """
        return self._placed(name, flat_cells, False)

    def magnitudes(self) -> Outcome:
        """The same sweep, its values as sizes: the mean over the prompts of how far each moved.

        This is the contribution c(n) of Kramár et al., "AtP*" (2024). Where effects of opposite
        sign meet in a batch, it is not the absolute value of their mean.

        Examples:
            >>> bool((out.magnitudes()["k"] >= 0).all())
            True
        """
        if not self.magnitude:
            check_prompts(self, "magnitudes()")
        return attrs.evolve(self, magnitude=True)

    def standard_error(self, name: str) -> Tensor:
        """The standard error of each value, float64, of its tensor's shape; nan where not swept.

        By the delta method, for the ratio of means that a value is; on the scale `"change"` that of
        a mean. It takes the prompts to be drawn independently. Of one prompt it is inf.

        Raises:
            NotSweptError: the site name was not swept.
            OutcomeError: the values are sizes.

        Examples:
            >>> out.standard_error("mlp")[-1].tolist()
            [inf, inf, inf]
        """
        return self._placed(name, standard_errors, _NAN)

    @overload
    def interval(
        self,
        name: str,
        level: float = 0.95,
        seed: int = 0,
        *,
        resamples: int = 10_000,
        wider: bool = False,
    ) -> Interval: ...

    @overload
    def interval(
        self,
        name: list[str] | tuple[str, ...] | None = None,
        level: float = 0.95,
        seed: int = 0,
        *,
        resamples: int = 10_000,
        wider: bool = False,
    ) -> dict[str, Interval]: ...

    def interval(
        self,
        name: str | list[str] | tuple[str, ...] | None = None,
        level: float = 0.95,
        seed: int = 0,
        *,
        resamples: int = 10_000,
        wider: bool = False,
    ) -> Interval | dict[str, Interval]:
        """The interval in which a value would lie with all prompts like these, for each cell alone.

        Prompts are drawn again, with return, a pair as one unit, and the ratio of means is computed
        anew: the bias-corrected and accelerated bootstrap (Efron, 1987), at the wider level that
        makes up for few prompts (Hesterberg, 2015). It takes the prompts to be drawn independently
        from those that you mean to speak of; it says nothing of other templates or models. Of many
        intervals some miss the truth: `band` is for all cells at once. An interval of an estimate
        is about that estimate.

        Args:
            name: a site name, or several; None is all.
            level: the share of such intervals that hold the truth.
            seed: of the draws; the order of the prompts does not matter.
            resamples: how often the prompts are drawn.
            wider: take the wider end of this and of value +- Student's t x `standard_error`: safer
                where a few prompts have far larger effects than the others. On 25 prompts of
                SmolLM2 95 percent intervals held the truth in 92 percent of draws, these in 96.

        Returns:
            Two tensors, each shaped as `out[name]`, nan where nothing was swept; for several names
            a mapping from each to that. A cell that is elided has [0, 0]. Where there is one
            prompt, or the interval of the denominator holds 0, all are (-inf, inf).

        Warns:
            StatisticsWarning: all are (-inf, inf), or the prompts are too few for this level.

        Raises:
            NotSweptError: a site name was not swept.
            OutcomeError: no level, a wrong number of draws, or only means were kept.

        Examples:
            >>> import warnings
            >>> with warnings.catch_warnings():
            ...     warnings.simplefilter("ignore")  # there is one prompt
            ...     low, high = out.interval("mlp")
            >>> low.shape, high[0, 0].item()
            (torch.Size([3, 3]), inf)
        """
        return interval(self, name, level, seed, resamples, wider)

    @overload
    def band(
        self,
        name: str,
        level: float = 0.95,
        seed: int = 0,
        *,
        flips: int = 10_000,
        wider: bool = False,
    ) -> Interval: ...

    @overload
    def band(
        self,
        name: list[str] | tuple[str, ...] | None = None,
        level: float = 0.95,
        seed: int = 0,
        *,
        flips: int = 10_000,
        wider: bool = False,
    ) -> dict[str, Interval]: ...

    def band(
        self,
        name: str | list[str] | tuple[str, ...] | None = None,
        level: float = 0.95,
        seed: int = 0,
        *,
        flips: int = 10_000,
        wider: bool = False,
    ) -> Interval | dict[str, Interval]:
        """Intervals that hold the truth in all cells at once, in a share `level` of such sweeps.

        They are wider than those of `interval`, and are those to look at before a cell is picked
        from many. Each is the value and so many of its standard errors to both sides; how many says
        the largest studentised mean over all cells (max-T) where the signs of the prompts'
        residuals, (patched - target) - value x (source - target), are flipped at random, for all
        cells together. Assumed is what `interval` assumes, and that prompts lie evenly around the
        value: where a few reach far to one side, and prompts are few, bands hold less often.

        Args:
            name: a site name, or several; None is all. The band holds over all of their cells.
            level: the share of such sweeps in which every cell's interval holds the truth.
            seed: of the flips.
            flips: how often the signs are drawn.
            wider: reach at least as far as Student's t does for all cells, by Bonferroni. On 25
                prompts of SmolLM2 95 percent bands held all cells in 89 percent of draws,
                Bonferroni's in 95.

        Returns:
            As `interval`.

        Warns:
            StatisticsWarning: as `interval`.

        Raises:
            NotSweptError: a site name was not swept.
            OutcomeError: as `interval`.

        Examples:
            >>> import warnings
            >>> with warnings.catch_warnings():
            ...     warnings.simplefilter("ignore")  # there is one prompt
            ...     list(out.band(["mlp", "k"]))
            ['mlp', 'k']
        """
        return band(self, name, level, seed, flips, wider)

    @overload
    def pvalues(
        self, name: str, adjust: Adjust = "max_t", seed: int = 0, *, flips: int = 10_000
    ) -> Tensor: ...

    @overload
    def pvalues(
        self,
        name: list[str] | tuple[str, ...] | None = None,
        adjust: Adjust = "max_t",
        seed: int = 0,
        *,
        flips: int = 10_000,
    ) -> dict[str, Tensor]: ...

    def pvalues(
        self,
        name: str | list[str] | tuple[str, ...] | None = None,
        adjust: Adjust = "max_t",
        seed: int = 0,
        *,
        flips: int = 10_000,
    ) -> Tensor | dict[str, Tensor]:
        """P-values of "the patch moves nothing on average", for each measured cell.

        Without an effect a prompt's patched - target might as well have the other sign: signs are
        drawn at random for each prompt, for all cells together, and the p-value is (1 + b) / (1 +
        flips), where b draws have a studentised mean of at least the size that was seen. So effects
        are taken to lie evenly around their mean, and prompts to be independent. With n prompts
        none can be below 2^(1 - n) in the long run.

        Args:
            name: a site name, or several; None is all. The family, for which p-values are adjusted,
                is the measured cells of all of them, without those that are elided.
            adjust: `"max_t"` (Westfall and Young, 1993) and `"holm"` (1979) hold the chance of one
                false finding in the family; max-T counts that cells go together, and finds more:
                Holm's are as many times larger as there are cells. `"bh"` (Benjamini and Hochberg,
                1995) holds the expected share of false ones among the findings. None adjusts
                nothing.
            seed: of the flips.
            flips: how often the signs are drawn.

        Returns:
            A tensor, float64, shaped as `out[name]`, nan outside the family; for several names a
            mapping from each to that.

        Warns:
            StatisticsWarning: none can be below 0.05, with so few prompts or flips, or so many
                cells.

        Raises:
            NotSweptError: a site name was not swept.
            OutcomeError: no cell was measured, values are sizes, another `adjust`, a wrong number
                of draws, or only means were kept.

        Examples:
            >>> import warnings
            >>> with warnings.catch_warnings():
            ...     warnings.simplefilter("ignore")  # there is one prompt
            ...     out.pvalues("mlp")[-1]  # what is elided has none
            tensor([nan, 1., 1.], dtype=torch.float64)
        """
        return pvalues(self, name, adjust, seed, flips)

    def prompts_needed(self, name: str, width: float, level: float = 0.95) -> Tensor:
        """How many prompts like these an interval of some width needs, for each cell.

        By Student's t and the standard error that these prompts have: a plan for the next table of
        prompts, not a promise.

        Args:
            name: a site name.
            width: from end to end, on the outcome's scale.
            level: of the interval.

        Returns:
            Whole numbers, float64, shaped as `out[name]`; nan where not swept, inf where these
            prompts do not tell.

        Warns:
            StatisticsWarning: the denominator may be 0, so that all are inf.

        Raises:
            NotSweptError: the site name was not swept.
            OutcomeError: a width that is not positive, no level, or values that are sizes.

        Examples:
            >>> out.prompts_needed("mlp", width=0.1)[-1].tolist()  # one prompt tells nothing
            [inf, inf, inf]
        """
        return needed(self, name, width, level)

    def stability(
        self,
        k: int = 10,
        name: str | list[str] | tuple[str, ...] | None = None,
        distinct: bool = True,
        seed: int = 0,
        *,
        resamples: int = 10_000,
    ) -> Stability:
        """How far the `k` cells of largest size would stay the same with other prompts.

        Prompts are drawn again, as for `interval`, and the cells ranked anew.

        Args:
            k: the number of cells.
            name: a site name, or several; None is all.
            distinct: whether neighbouring layers of almost one value count as their strongest
                alone, as in `top`.
            seed: of the draws.
            resamples: how often the prompts are drawn.

        Warns:
            StatisticsWarning: there is one prompt, so that all draws are the same.

        Raises:
            NotSweptError: a site name was not swept.
            OutcomeError: a `k` that is not positive, a wrong number of draws, or only means were
                kept.

        Examples:
            >>> import warnings
            >>> with warnings.catch_warnings():
            ...     warnings.simplefilter("ignore")  # there is one prompt
            ...     out.stability(2, name="k").kept
            1.0
        """
        return stability(self, k, name, distinct, seed, resamples)

    @property
    def count(self) -> int:
        """How many prompts there were.

        Examples:
            >>> out.count
            1
        """
        return len(self.baseline.target) if self.moments is None else self.moments.count

    def patched(self, name: str) -> Tensor:
        """The metric of each patched run, `[..., batch]`, in its unit; nan where not swept.

        A prompt that has no token there is in that run as it was.

        Raises:
            NotSweptError: the site name was not swept.

        Examples:
            >>> out.patched("k").shape
            torch.Size([3, 3, 2, 1])
        """
        check_prompts(self, "patched()")
        return self._cells(name).place(self.raw[self.metric][self._key(name)], _NAN)

    def per_prompt(self, name: str) -> Tensor:
        """Each prompt's own value, `[..., batch]`, on the outcome's scale.

        It is nan where nothing was swept, and for a prompt that has no token there; a prompt whose
        own source and target run agree has inf or nan on the scale `"restored"`.

        Raises:
            NotSweptError: the site name was not swept.

        Examples:
            >>> torch.allclose(out.per_prompt("mlp")[..., 0], out["mlp"], atol=1e-5)
            True
        """
        check_prompts(self, "per_prompt()")
        return self._placed(name, prompt_values, _NAN)

    def strongest(self, k: int = 10, sites: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The `k` cells of the largest absolute value, as plain rows: site, labels, value.

        `top` has them as a table, with intervals, and one row for what is one fact. Where some
        values are estimates, `exact` says whether this one is none. A cell whose runs gave nan
        comes first, for something went wrong there.

        Args:
            k: the number of cells, at most.
            sites: site names to look at, such as `["q", "o"]` for heads alone; None is all.

        Raises:
            OutcomeError: a `k` that is no number of cells, or a site name that was not swept (a
                `KeyError` too).

        Examples:
            >>> for row in out.strongest(2, sites=["k"]):
            ...     print(list(row))
            ['site', 'layer', 'position', 'head', 'token', 'value']
            ['site', 'layer', 'position', 'head', 'token', 'value']
        """
        k = strict_int(k, "k", OutcomeError)
        if k < 0:
            raise OutcomeError(f"k must be at least 0, got {k}")
        return selection.strongest(self, k, selection.find_names(self.cells, sites))

    def top(
        self,
        n: int = 10,
        name: str | Sequence[str] | None = None,
        distinct: bool = True,
        *,
        level: float = 0.95,
    ) -> Top:
        """The strongest cells as a table, with how sure each value is.

        Rows are sorted by absolute value; one whose runs gave nan comes first, for something went
        wrong there. A row has the labels of its cell, `value`, and where there are several prompts
        `low` and `high`, its interval (see `interval`), and `p_value`, adjusted for all
        cells of the site names that are asked (see `pvalues`, max-T). The words below the table say
        how these are made, and what they assume. Where some values are estimates, `exact` says
        whether this one is none.

        Args:
            n: the number of rows, at most.
            name: a site name, or several, such as `["q", "o"]` for heads alone; None is all.
            distinct: whether neighbours among the swept layers of one component, position and head
                share a row, if their values are within 5 percent of the strongest one's, which the
                row shows; `layers` has all of them. False gives each cell a row.
            level: of the intervals.

        Raises:
            OutcomeError: an `n` that is no number of rows, a `level` that is none, or a site name
                that was not swept (a `KeyError` too).

        Examples:
            >>> top = out.top(2, "mlp")
            >>> [(row["layers"], row["token"]) for row in top]
            [('0', '7'), ('1', '7')]
            >>> print(top.notes[0])
            Of one prompt: nothing tells how much other prompts would change a value.
        """
        return make_top(self, n, name, distinct, level=level)

    def sel(
        self,
        *,
        site: str | Sequence[str] | None = None,
        layer: int | Sequence[int] | None = None,
        position: int | Sequence[int] | None = None,
        span: str | Sequence[str] | None = None,
        token: str | Sequence[str] | None = None,
        head: int | Sequence[int] | None = None,
        column: int | Sequence[int] | None = None,
        label: str | Sequence[str] | None = None,
        sender: str | Sequence[str] | None = None,
        receiver: str | Sequence[str] | None = None,
    ) -> Outcome:
        """The same outcome with the cells alone that have some labels.

        Axes keep their full length; all other cells count as not swept, and site names that keep
        none are left out. An outcome that lacks some cells has no `screening`, whose bound is on
        all of them.

        Args:
            site: site names.
            layer: layers; negative ones count from the end.
            position: positions; negative ones count from the end.
            span: names of spans.
            token: texts of tokens: as `tokens` shows them, or the token of one of the prompts,
                with or without the spaces around it.
            head: heads, or key/value heads.
            column: columns of `seq_pos`, where each prompt has positions of its own.
            label: labels of a list of your own sites.
            sender: senders of edges or paths.
            receiver: receivers of edges or paths.

        Each takes one label, a list of them, all of which must be there, or for numbers a `range`,
        some of which must.

        Raises:
            OutcomeError: no cell has a label, or all of them together; the message says which there
                are.
            NotSweptError: a site name that was not swept; it is a `KeyError` too.

        Examples:
            >>> late = out.sel(layer=range(1, 3), token="7")
            >>> late.swept("mlp").nonzero().tolist()
            [[1, 2], [2, 2]]
            >>> out.sel(site="k", head=5)
            Traceback (most recent call last):
            nnpatch_core.errors.OutcomeError: no cell has head=5: of each head there are 0-1
        """
        labels = {
            "layer": layer,
            "position": position,
            "span": span,
            "token": token,
            "head": head,
            "column": column,
            "label": label,
            "sender": sender,
            "receiver": receiver,
        }
        return choose(self, site, labels)

    def by_group(self, column: str | Sequence[Any]) -> dict[Any, Outcome]:
        """The outcome of each group of prompts, by first appearance: the same sweep, run once.

        Every figure of such an outcome is of its own prompts alone, and it has no `screening`,
        whose bound is on the mean over all of them. None is the group of the prompts whose value is
        missing.

        Args:
            column: the name of a further column of the prompts' table, such as `"template"`; or one
                value for each prompt.

        Raises:
            UnknownNameError: there is no such column.
            OutcomeError: not one value for each prompt; a group whose source and target run are
                equal in the metric.

        Examples:
            >>> [group["mlp"].shape for group in out.by_group(["easy"]).values()]
            [torch.Size([3, 3])]
        """
        check_prompts(self, "by_group()")
        return grouping.split(self, column)

    def agreement(self, exact: Outcome, top_k: int = 20) -> Agreement:
        """Compare this outcome, as an estimate, with an exact one, cell by cell.

        Compared are the cells that this outcome estimates and the other measured, matched by site
        name and place; of two measured outcomes all that both swept. If either is of `magnitudes`,
        both are.

        Args:
            exact: the measured outcome; the prompts are not compared.
            top_k: the number of strongest cells that `recall` and `sign_agreement` are about.

        Raises:
            OutcomeError: the wrong way round, another metric or scale, no site in both, other axes
                of a site, no cell in both, or a `top_k` that is not positive.

        Examples:
            >>> estimate.agreement(out).cells  # the other 12 of 27 are known
            15
        """
        return compare(self, exact, top_k)

    def to_dataframe(
        self, per_prompt: bool = False, *, level: float | None = 0.95
    ) -> pandas.DataFrame:
        """One row a cell: site, layer, position, token, head, value, low, high, p_value.

        What was not swept is nan. Sites of a list of your own have a `label` in place of layer,
        position and head. Where some values are estimates, `exact` says which are not. `low` and
        `high` are the ends of `interval`, `p_value` is that of `pvalues` over all cells (max-T),
        nan where a cell has none. Where prompts are too few, or source and target run may not
        differ, so that `interval` warns, the ends are -inf and inf. Of means alone (see `keep=`)
        the interval is by `standard_error` and Student's t.

        Args:
            per_prompt: one row a cell and prompt instead, with the prompt's own value, and the
                metric of the patched, the source and the target run in its unit.
            level: of the intervals; None leaves `low`, `high` and `p_value` out, which take
                seconds on a grid of thousands of cells.

        Raises:
            OutcomeError: pandas is not installed (`pip install nnpatch-core[pandas]`), or no level.

        Examples:
            >>> list(out.to_dataframe())[-4:]
            ['value', 'low', 'high', 'p_value']
            >>> list(out.to_dataframe(level=None))
            ['site', 'layer', 'position', 'token', 'head', 'value']
        """
        check_flags(per_prompt=per_prompt)
        read = None if level is None else read_level(level)
        if per_prompt:
            check_prompts(self, "per_prompt=True")
            return tables.frame(tables.prompt_blocks(self), self.tokens)
        return tables.frame(tables.cell_blocks(self, level=read), self.tokens)

    def to_parquet(
        self,
        path: str | os.PathLike[str],
        per_prompt: bool = False,
        *,
        level: float | None = 0.95,
    ) -> None:
        """Write a Parquet file: one row a cell that was swept, one column a metric.

        Beside the labels of a cell a row has `exact` (it is no estimate), `elided` (its patch put
        nothing else there) and for each metric, under its name, the value, with `_low`, `_high` and
        `_p` behind the name the interval and the p-value of `to_dataframe`. The metadata of the
        file's schema has under `nnpatch` what the numbers are of, as JSON: kind, scale, the number
        of prompts and all of `info`. The file is written whole or not at all.

        Args:
            path: the file; a link is followed.
            per_prompt: one row a cell and prompt instead, with `prompt`, and for each metric the
                prompt's own value, and with `_patched`, `_source` and `_target` behind the name the
                metric of these runs in its unit.
            level: of the intervals; None leaves them and the p-values out.

        Raises:
            OutcomeError: pyarrow is not installed (`pip install nnpatch-core[parquet]`), the file
                cannot be written, two columns have one name, or no level.

        Examples:
            >>> import tempfile
            >>> import pyarrow.parquet
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     out.to_parquet(f"{folder}/cells.parquet")
            ...     table = pyarrow.parquet.read_table(f"{folder}/cells.parquet")
            >>> table.num_rows, table.column_names[-4:-2]
            (27, ['logit_difference', 'logit_difference_low'])
        """
        check_flags(per_prompt=per_prompt)
        read = None if level is None else read_level(level)
        if per_prompt:
            check_prompts(self, "per_prompt=True")
        parquet.write(path, self, bool(per_prompt), read)

    def to_xarray(self, per_prompt: bool = False) -> xarray.Dataset:
        """One variable a site name, with labelled axes; nan where not swept.

        Its attributes say what the numbers are of, with all of `info`, and can be written:
        `to_xarray().to_netcdf(path)`, for which the extra brings h5netcdf.

        Args:
            per_prompt: with a last axis `prompt`, and each prompt's own value.

        Raises:
            OutcomeError: xarray is not installed (`pip install nnpatch-core[xarray]`).

        Examples:
            >>> out.to_xarray()["k"].dims
            ('layer', 'position', 'kv_head')
        """
        check_flags(per_prompt=per_prompt)
        if per_prompt:
            check_prompts(self, "per_prompt=True")
        return tables.dataset(self, bool(per_prompt))

    @overload
    def plot(
        self, *, interactive: Literal[False] = False, **options: Unpack[PlotOptions]
    ) -> Figure: ...

    @overload
    def plot(
        self, *, interactive: Literal[True], **options: Unpack[PlotOptions]
    ) -> plotly.graph_objects.Figure: ...

    @overload
    def plot(
        self, *, interactive: bool, **options: Unpack[PlotOptions]
    ) -> Figure | plotly.graph_objects.Figure: ...

    def plot(
        self,
        *,
        sites: Sequence[str] | None = None,
        metrics: str | Sequence[str] | None = None,
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
        """A picture of the kind that suits the axes: a heatmap, lines over layers, or bars.

        A heatmap has layers up, and tokens, spans or heads across, one panel a site name. Colours
        are centred on 0 (white), with one scale for all panels; what was not swept is grey. A
        component with heads that was swept position by position has a row for each head, or a panel
        for each position, where that is one, or heads are many. Sites that have nothing but layers
        are lines in one chart, and lists of your own sites are bars.

        What is not sure is told apart. Colours of cells whose simultaneous band holds 0 are washed
        out, lines have their bands as shaded areas, and the bars of a list error bars, each an
        interval of its own. A note below says so, or why nothing is known.

        The picture is at most 16 inches wide. Where panels do not fit, positions at which no panel
        has anything that was run are left out; then columns are narrower, and labels and panels are
        where there is room for them. Labels have their positions then. Layers in which no panel has
        anything that was swept are left out where they are most of the layers. The note names all
        that is left out, and says why.

        Args:
            sites: site names to draw; None is all.
            metrics: names of metrics to draw side by side, or `"all"`; None is the outcome's. On
                the scale `"change"` each has a scale of its own, for their units differ.
            kind: `"heatmap"`; `"lines"`, one for each position, span or head, of which the eight
                that reach furthest have colours; or `"bars"`, of grids the 30 strongest cells.
            interactive: a plotly figure, whose `write_html` gives a page, instead of a matplotlib
                one, whose `savefig` gives a PNG, SVG or PDF. Panels with the same labels are zoomed
                together.
            title: by default model, kind and metric.
            limit: the value of the darkest colours, or the end of the axis; `"largest"` is the
                largest absolute value. By default it is that too, but at least 1 on the scale
                `"restored"`, and on `"change"` the size of the metric in the unpatched run (1 where
                that is 0), so that a tiny effect looks tiny.
            crop: True leaves out every position where nothing was run and every layer where nothing
                was swept, wherever there are others; False keeps them; None leaves positions out
                where there is no room, and layers where they are most of them.
            layers: the layers to show, such as `range(5, 20)`, instead.
            positions: the positions to show, instead.
            size: width and height of the whole picture, in inches.
            values: True writes the values into the cells, False does not; None does where they fit
                and are few.
            mark: how many of the strongest cells are outlined, those of `top`: of neighbouring
                layers with almost the same value the strongest.
            mute: the level of the bands and intervals; None looks for none, and mutes nothing.
            ax: axes of a matplotlib figure of your own to draw into, for one site name.

        Returns:
            A `matplotlib.figure.Figure`, which a notebook shows as a picture, or a
            `plotly.graph_objects.Figure`; with `ax=` its figure.

        Raises:
            OutcomeError: matplotlib or plotly is not installed (`pip install
                nnpatch-core[plot]`), nothing to draw, an argument that does not fit, or a site name
                that was not swept (a `KeyError` too).

        Examples:
            >>> [axis.get_title() for axis in out.plot().axes]
            ['mlp', 'k', '']
            >>> out.plot(kind="bars", mark=1).axes[0].get_xlabel()  # doctest: +ELLIPSIS
            'restored (0 target, 1 source); the largest is ...'
        """
        return draw_outcome(
            self,
            sites=sites,
            metrics=metrics,
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

    def plot_beside(
        self,
        other: Outcome,
        *,
        labels: tuple[str, str] | None = None,
        sites: Sequence[str] | None = None,
        interactive: bool = False,
        title: str | None = None,
        limit: float | Literal["largest"] | None = None,
        limit_difference: float | Literal["largest"] | None = None,
        crop: bool | None = None,
        layers: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        size: tuple[float, float] | None = None,
        values: bool | None = None,
        mark: int = 0,
        mute: float | None = 0.95,
    ) -> Figure | plotly.graph_objects.Figure:
        """Heatmaps in three columns: this outcome, another, and this one minus the other.

        Args:
            other: an outcome of the same metric, scale and grids.
            labels: what to call the two; by default their kinds, if these differ.
            sites: site names to draw; None is all that are in both.
            interactive: as in `plot`.
            title: by default model and metric.
            limit: the value of the darkest colours, as in `plot`; of all three columns, unless
                `limit_difference` is given.
            limit_difference: that of the third column, which has a scale of its own then;
                `"largest"` is its largest absolute value.
            crop: as in `plot`.
            layers: as in `plot`.
            positions: as in `plot`.
            size: as in `plot`.
            values: as in `plot`.
            mark: as in `plot`, on each scale.
            mute: as in `plot`.

        Returns:
            A `matplotlib.figure.Figure` or a `plotly.graph_objects.Figure`.

        Raises:
            OutcomeError: matplotlib or plotly is not installed, no site in both, another metric,
                scale or grid, or an argument that does not fit.

        Examples:
            >>> figure = estimate.plot_beside(out, sites=["mlp"])
            >>> [axis.get_title() for axis in figure.axes[:3]]
            ['mlp: attribution', 'mlp: activation', 'mlp: attribution − activation']
        """
        return draw_beside(
            self,
            other,
            labels=labels,
            sites=sites,
            interactive=interactive,
            title=title,
            limit=limit,
            limit_difference=limit_difference,
            crop=crop,
            layers=layers,
            positions=positions,
            size=size,
            values=values,
            mark=mark,
            mute=mute,
        )

    def _study(self, level: float) -> Study:
        return study_of(self, level=level)

    def _report_facts(self, width: float, level: float) -> Facts:
        return facts_of(self, width, level)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the outcome to one safetensors file, whole or not at all.

        A link is followed; a file that is replaced hands its permissions on.

        Raises:
            OutcomeError: it cannot be written, as on a full disk; the old file is as it was.

        Examples:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     out.save(f"{folder}/out.safetensors")
            ...     again = Outcome.load(f"{folder}/out.safetensors")
            >>> torch.equal(again["k"], out["k"])
            True
        """
        file.write(path, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Outcome:
        """Read an outcome that `save` wrote.

        Raises:
            OutcomeError: the file is not an outcome, not of this version, or damaged; or its parts
                do not fit together.

        Examples:
            >>> Outcome.load("nowhere.safetensors")  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            nnpatch_core.errors.OutcomeError: nowhere.safetensors is not an outcome: there is ...
        """
        return file.read(path, cls)

    def _placed(self, name: str, figures: Callable[[Outcome, str], Tensor], fill: float) -> Tensor:
        """Figures of a site name's swept cells, `[cells, ...]`, in its grid."""
        key = self._key(name)
        return self.cells[key].place(figures(self, key), fill)

    def _key(self, name: str) -> str:
        return selection.find_name(self.cells, name)

    def _cells(self, name: str) -> Cells:
        return self.cells[self._key(name)]
