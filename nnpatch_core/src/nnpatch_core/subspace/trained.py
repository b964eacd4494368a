"""A learned subspace, how it came about, and its controls."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import attrs

from nnpatch_core._extras import extra
from nnpatch_core._html import block, preformatted
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.report import Facts, Reports, Study
from nnpatch_core.spaces import Subspace
from nnpatch_core.subspace.controls import Control
from nnpatch_core.subspace.evaluation import Evaluation
from nnpatch_core.subspace.learning import Epoch
from nnpatch_core.subspace.pictures import plot_history
from nnpatch_core.subspace.proportion import Proportion, check_level
from nnpatch_core.subspace.reported import facts_of_evaluation, study_of_trained


@attrs.frozen(eq=False, repr=False)
class Trained(Reports):
    """A subspace that was learned.

    It may stand wherever a subspace is named. Its text is a table.

    Args:
        subspace: that of the epoch with the lowest loss on the pairs held out.
        history: the epochs, from 0, which is before anything was learned.
        evaluation: what it does on the pairs held out, beside its controls.
        controls: those that were made of the pairs learned from: `"difference of means"`;
            `"random labels"`, learned in the same way to give other tokens; `"random model"`,
            learned in a model whose weights are random, where that was asked for.
        held_out_pairs: the pairs held out.
        seen: a number for each pair that was learned from.
    """

    subspace: Subspace
    history: tuple[Epoch, ...]
    evaluation: Evaluation
    controls: Mapping[str, Control]
    held_out_pairs: PromptPairs
    seen: frozenset[int]

    @property
    def accuracy(self) -> Proportion:
        """Its interchange accuracy on the pairs held out."""
        return self.evaluation.accuracy

    @property
    def target_accuracy(self) -> Proportion:
        """The share of these in which the patched run still gives the target answer."""
        return self.evaluation.target_accuracy

    @property
    def best(self) -> Epoch:
        """The epoch that the subspace is of."""
        return min(self.history, key=lambda each: each.held_out_loss)

    def to_dataframe(self) -> Any:
        """The history as a frame of pandas, a row for each epoch.

        Raises:
            OutcomeError: pandas is not installed.
        """
        return extra("pandas", "pandas").DataFrame([attrs.asdict(each) for each in self.history])

    def plot(self) -> Any:
        """Loss and accuracy over epochs, as a matplotlib figure.

        Raises:
            OutcomeError: matplotlib is not installed.
        """
        return plot_history(self.history, self.best.epoch)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """See `Subspace.save_pretrained`."""
        self.subspace.save_pretrained(folder)

    def _study(self, level: float) -> Study:
        check_level(level)
        return study_of_trained(self)

    def _report_facts(self, width: float, level: float) -> Facts:
        return facts_of_evaluation(self.evaluation, width)

    def __str__(self) -> str:
        told = (
            f"{self.subspace}, learned from {len(self.seen)} pairs: epoch {self.best.epoch} of "
            f"{self.history[-1].epoch}; on pairs held out:"
        )
        return f"{told}\n{self.evaluation}"

    def _repr_html_(self) -> str:
        return block(preformatted(str(self)))

    def __repr__(self) -> str:
        return f"Trained({self.subspace}, accuracy {self.accuracy} on pairs held out)"
