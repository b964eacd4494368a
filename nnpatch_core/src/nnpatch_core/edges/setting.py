"""Everything that a sweep over edges, paths or circuits knows before it runs."""

from __future__ import annotations

from typing import Any

import attrs

from nnpatch_core._models import as_nnsight, evaluating, module_of
from nnpatch_core.adapters import ModelAPI, check_fits
from nnpatch_core.edges.given import Ablated, ablated
from nnpatch_core.edges.layers import Structure
from nnpatch_core.edges.put import EdgePut
from nnpatch_core.edges.structure import find_structure
from nnpatch_core.errors import PatchingError
from nnpatch_core.interventions import (
    Ablation,
    PairArguments,
    PairRuns,
    RunArguments,
    check_ablation,
    one_mask,
    pair_arguments,
    read_pairs,
)
from nnpatch_core.plugins import find_adapter
from nnpatch_core.sweep import Options


@attrs.frozen(eq=False)
class Setting:
    """A model, the prompts of two runs, and what senders get in place of the target run's.

    Args:
        nnmodel: the model, wrapped by nnsight.
        api: the adapter.
        structure: what is known of the layers.
        runs: the prompts.
        arguments: these as they were given.
        ablation: how senders are ablated; None is the source run's activations.
    """

    nnmodel: Any
    api: ModelAPI
    structure: Structure
    runs: PairRuns
    arguments: PairArguments
    ablation: Ablation | None

    def given(self, options: Options) -> Ablated | None:
        """The activations of ablated senders; None is the source run's activations.

        Raises:
            PatchingError: one of its kinds, naming the argument that is wrong.
        """
        if self.ablation is None:
            return None
        return ablated(self.nnmodel, self.api, self._target(), self.ablation, options)

    def put(self, options: Options) -> EdgePut:
        """The values that a sweep over edges puts."""
        return EdgePut(self.api, self.structure, self.given(options))

    def _target(self) -> RunArguments:
        """The target prompts, as those of one run."""
        given = self.arguments
        mask = one_mask("target", given.attention_mask, given.target_attention_mask)
        answers = given.target_answer_index, given.source_answer_index
        return RunArguments(given.target_tokens, *answers, mask)


def open_setting(
    nnmodel: Any,
    api: Any,
    given: PairArguments,
    ablation: Ablation | None,
    *,
    metric_data: Any = None,
    confident: bool = False,
    swapped: bool = False,
) -> Setting:
    """Read what a sweep over edges is given, and find out how the model is built.

    Args:
        nnmodel: the model.
        api: an adapter, its name, or None to find it by the model.
        given: the arguments about the prompts; a `PromptPairs` may stand for them.
        ablation: how senders are ablated, checked.
        metric_data: the argument of that name.
        confident: whether the model must prefer each run's own answer.
        swapped: whether source and target prompts change places; answers stay.

    Raises:
        PatchingError: one of its kinds, naming the argument that is wrong.
    """
    arguments = pair_arguments(given)
    traced = as_nnsight(nnmodel)
    model = module_of(traced)
    adapter = find_adapter(api, model)
    check_fits(adapter, model)
    if swapped:
        arguments = attrs.evolve(
            arguments,
            source_tokens=arguments.target_tokens,
            target_tokens=arguments.source_tokens,
            source_attention_mask=arguments.target_attention_mask,
            target_attention_mask=arguments.source_attention_mask,
        )
    runs = read_pairs(traced, arguments, metric_data=metric_data, confident=confident)
    with evaluating(model):
        structure = find_structure(traced, adapter, runs.target)
    return Setting(traced, adapter, structure, runs, arguments, ablation)


def read_ablated(ablation: Any, reference: Any, per_position: Any, seed: Any) -> Ablation | None:
    """The ablation that arguments ask for; None if senders get the source run's activations.

    Raises:
        PatchingError: one of its kinds, naming the argument that is wrong.
    """
    if ablation is None:
        if reference is not None or per_position:
            raise PatchingError("reference= and per_position= mean nothing without ablation=")
        return None
    own = seed if isinstance(ablation, str) and ablation == "resample" else None
    return check_ablation("ablation", Ablation(ablation, reference, per_position, own))
