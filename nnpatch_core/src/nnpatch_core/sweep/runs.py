"""The runs of a sweep, as the sweep sees them: prompts, answers, and what is put at its sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, Self, TypeAlias

import attrs
from torch import Tensor, nn

from nnpatch_core._arrays import Booleans
from nnpatch_core.batch import Batch
from nnpatch_core.metrics import Metric, MetricContext, Reading
from nnpatch_core.results import Baseline, Prompts, Scale
from nnpatch_core.seq_pos import Span
from nnpatch_core.sweep.sweep import Sweep
from nnpatch_core.tracing import Intervention, Patches

#: For a sweep and the prompts that run together: the logits of the run that was made to record
#: values, if there was one, and what is put.
ValuesOf: TypeAlias = Callable[[Sweep, slice], tuple["Tensor | None", Intervention]]


@attrs.frozen(eq=False)
class Values:
    """The values that are put at the sites of a sweep.

    Args:
        mask: `[batch, seq]`: 1 where it can be put.
        of: what is put, for some of the cells and prompts.
        depends: what it depends on besides the prompts, by a name that people know.
    """

    mask: Tensor
    of: ValuesOf
    depends: Mapping[str, Tensor]


class Runs(Protocol):
    """A source run and a target run, or one run that is ablated."""

    @property
    def ablation(self) -> str | None:
        """How the run is ablated, such as `"zero"`; None of two runs."""
        ...

    @property
    def kind(self) -> str:
        """How an outcome calls the sweep, such as `"activation"` or `"ablation (zero)"`."""
        ...

    @property
    def trims(self) -> bool:
        """Whether it records nothing left of the first position that is patched."""
        ...

    @property
    def scale(self) -> Scale:
        """The scale of the outcome's values."""
        ...

    @property
    def source(self) -> Batch:
        """Where values come from."""
        ...

    @property
    def target(self) -> Batch:
        """Where they are put."""
        ...

    @property
    def prompts(self) -> Prompts:
        """The prompts as they are run, with their texts."""
        ...

    @property
    def batches(self) -> Mapping[str, Batch]:
        """The prompts of each run, by the run's name."""
        ...

    @property
    def spans(self) -> Mapping[str, Span]:
        """Parts of the prompts, by name."""
        ...

    def aligned(self, patches: Patches) -> Patches:
        """The cells, with the positions that their values come from in these runs."""
        ...

    def mask_of(self, patches: Patches) -> Tensor:
        """`[batch, seq]`: 1 where prompts can be patched, as far as is known before a run."""
        ...

    @property
    def changed(self) -> Booleans:
        """`[batch, seq]`: where a patch may put something else, as far as the prompts tell."""
        ...

    @property
    def reading(self) -> Reading | None:
        """Where the metrics read the logits; None is the last token alone."""
        ...

    @property
    def data(self) -> Mapping[str, Tensor]:
        """`[batch, ...]` by name, for metrics."""
        ...

    def read_by(self, metrics: Mapping[str, Metric], model: nn.Module) -> Self:
        """The same as metrics read them: with answers appended, and where logits are wanted.

        Where there are several answers, the prompts stand in them once with each. Nothing runs for
        that.
        """
        ...

    def check(self, sweep: Sweep) -> None:
        """Raise, or warn, where prompts and answers do not go with the sweep."""
        ...

    def values(self, sweep: Sweep) -> Values:
        """The values that are put at the sites; this may run the model."""
        ...

    def context(self, source_logits: Tensor | None, target_logits: Tensor) -> MetricContext:
        """The context that metrics compare with, given the logits of the unpatched runs."""
        ...

    def unpatched(self, sweep: Sweep, chunks: Sequence[slice]) -> MetricContext:
        """The same, from runs of its own; `chunks` are the prompts that run together."""
        ...

    def check_baseline(self, context: MetricContext, baseline: Mapping[str, Baseline]) -> None:
        """Raise where no value can be compared with the unpatched runs."""
        ...
