"""Everything that a sweep over edges, paths or circuits knows before it runs."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import attrs

from nnpatch_core._models import as_nnsight, evaluating, module_of
from nnpatch_core.adapters import ModelAPI, check_fits, heads_of
from nnpatch_core.edges.given import Ablated, ablated
from nnpatch_core.edges.layers import Structure
from nnpatch_core.edges.nodes import Nodes
from nnpatch_core.edges.put import EdgePut
from nnpatch_core.edges.recording import layer_places
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


@attrs.frozen(eq=False, slots=False)
class Setting:
    """A model, the prompts of two runs, and what senders get in place of the target run's.

    Args:
        nnmodel: the model, wrapped by nnsight.
        api: the adapter.
        runs: the prompts.
        arguments: these as they were given.
        ablation: how senders are ablated; None is the source run's activations.
        swapped: whether source and target prompts have changed places, and answers have stayed.
    """

    nnmodel: Any
    api: ModelAPI
    runs: PairRuns
    arguments: PairArguments
    ablation: Ablation | None
    swapped: bool = False

    @cached_property
    def structure(self) -> Structure:
        """How the layers are built; a few tokens are run for that.

        Raises:
            AdapterError: the adapter lacks a component of a layer.
            EngineError: edges do not go by such layers.
        """
        return self.built()

    def built(self, *, alone: bool = True) -> Structure:
        """The structure, and if `alone` which parts can be had of some tokens alone."""
        with evaluating(module_of(self.nnmodel)):
            return find_structure(self.nnmodel, self.api, self.runs.target, alone=alone)

    @cached_property
    def likely(self) -> Nodes:
        """See `likely_nodes`."""
        return likely_nodes(self.api, module_of(self.nnmodel))

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


def likely_nodes(api: ModelAPI, model: Any) -> Nodes:
    """The nodes, all of them by their names, as though no MLP stood beside its attention.

    Nothing runs for that.

    Args:
        api: the adapter.
        model: the Hugging Face model, perhaps without weights.

    Raises:
        AdapterError: the adapter lacks a component of a layer.
    """
    heads = [heads_of(api, model, layer) for layer in range(len(layer_places(api, model)))]
    return Nodes(
        (each.query for each in heads), (each.key_value for each in heads), (False for _ in heads)
    )


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
    """Read what a sweep over edges is given; no model runs.

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
    if swapped:
        # Metrics have the answers as before; each prompt is told with its own.
        others = {"source": "target", "target": "source"}
        answers = {others[run]: texts for run, texts in runs.prompts.answers.items()}
        runs = attrs.evolve(runs, prompts=attrs.evolve(runs.prompts, answers=answers))
    return Setting(traced, adapter, runs, arguments, ablation, swapped)


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
