"""Path patching: what senders write, as some receivers alone read it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import attrs
from torch import Tensor

from nnpatch_core._arguments import check_flags, listed
from nnpatch_core._hints import did_you_mean
from nnpatch_core._models import in_one_thread
from nnpatch_core._printable import shown
from nnpatch_core.batch import GivenTokens
from nnpatch_core.edges import Setting, fitting_prompts, open_setting
from nnpatch_core.engine import check_engine, choose_engines
from nnpatch_core.errors import EdgeError, UnknownNameError
from nnpatch_core.interventions import PairArguments
from nnpatch_core.memory import MemoryBudget
from nnpatch_core.metrics import MetricSpec
from nnpatch_core.names import EngineName
from nnpatch_core.patching.batches import in_batches
from nnpatch_core.patching.elsewhere import on_workers
from nnpatch_core.paths import PATH, Named, PathPut, PathSites, Reader, sites_of
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.results import Keep, Outcome
from nnpatch_core.seq_pos import PromptBatch, Span
from nnpatch_core.sweep import (
    Checkpoint,
    Options,
    budget_of,
    measure_sweep,
    prepare,
    warn_of_chunks,
    warn_of_columns,
)

_THROUGH = ("mlps",)


@on_workers
@in_one_thread
@in_batches("source_tokens")
def path_patching(
    nnmodel: Any,
    api: Any,
    senders: Any,
    receivers: Any,
    source_tokens: GivenTokens | PromptPairs,
    target_tokens: GivenTokens | None = None,
    source_answer_index: Tensor | None = None,
    target_answer_index: Tensor | None = None,
    *,
    through: Literal["mlps"] | None = None,
    path: Any = None,
    attention_mask: Tensor | None = None,
    source_attention_mask: Tensor | None = None,
    target_attention_mask: Tensor | None = None,
    spans: Mapping[str, Span] | None = None,
    metric: MetricSpec = "logit_difference",
    metric_data: Mapping[str, Tensor] | None = None,
    source_answer_tokens: Tensor | None = None,
    target_answer_tokens: Tensor | None = None,
    force_model_confidence: bool = False,
    engine: EngineName = "auto",
    batch_size: int | None = None,
    memory_budget: MemoryBudget = None,
    checkpoint: str | os.PathLike[str] | None = None,
    keep: Keep = "prompts",
    progress: bool = True,
    tokenizer: Any = None,
) -> Outcome:
    """Patch paths: only the receivers see that the senders are as in the source run.

    Three runs stand behind a value. The source run and the target run are recorded. In a second run
    on the target prompts every head and every MLP is held at the target run's activation, the
    senders at the source run's, and what the receivers read is kept. In a third one the receivers
    are computed from that and held, and all else is free. The value is (mean patched - mean
    target) / (mean source - mean target), as in `activation_patching`. The method is that of Wang
    et al., "Interpretability in the Wild" (2022), and Goldowsky-Dill et al., "Localizing Model
    Behavior with Path Patching" (2023).

    Senders are heads (`"a9.h6"`, sites `o`), all heads of a layer (sites `attn`), MLPs (`"m3"`,
    sites `mlp`) and the embeddings (`"input"`, site `resid_pre` of layer 0). Receivers are a head's
    query, and the key and the value of a key/value head (`"a10.h7<q>"`, `"a10.h2<k>"`; sites `q`,
    `k`, `v`), what an MLP reads (`"m3"`, sites `mlp`), the stream before or after a layer
    (`"resid_pre4"`, sites `resid_pre`, `resid`) and the final stream (`"logits"`). A query and a
    key together are a head's pattern: `("a10.h7<q>", "a10.h2<k>")`.

    Args:
        nnmodel: an `NNsight`, a `TransformersModel` or a plain Hugging Face model.
        api: an adapter (class or instance), its registered name, or None to find it by the model.
        senders: `Sites`, whose cells are swept; a name of a node, a `Site`, or what counts as one,
            a `MultiSite` or a tuple of names and sites; or a list of any of these, each swept. Its
            positions are those where it is swapped. None where `path` is given.
        receivers: the same; positions are those where a receiver is held. None where `path` is
            given.
        source_tokens: `[batch, seq]`, where activations are taken, or a tokenizer's output; or a
            `PromptPairs`, which stands for this and all other arguments about the prompts.
        target_tokens: the same, of the prompts that are patched.
        source_answer_index: `[batch]`, the token that each source prompt calls for.
        target_answer_index: `[batch]`, the token that each target prompt calls for.
        through: what is recomputed in the second run: `"mlps"` are those that are no senders; None
            is nothing, so that the direct path alone counts.
        path: several nodes one after the other, in place of `senders` and `receivers`: a list whose
            first member is as `senders`, and the others as `receivers`. What a receiver amid it
            writes once it sees the change is what is sent on from there: the heads that read a
            query, key or value, or the MLP. A member that is swept is itself `Sites` or a list.
        attention_mask: `[batch, seq]`, 1 for a token and 0 for padding, of both runs.
        source_attention_mask: the same, of the source run.
        target_attention_mask: the same, of the target run.
        spans: parts of the prompts by name, for `Sites` that go by them; a `PromptPairs` brings its
            own.
        metric: a metric's name, a callable, or several; see `nnpatch_core.metrics`.
        metric_data: what metrics are to know of each prompt, tensors `[batch, ...]` by name.
        source_answer_tokens: `[batch, n]`, all tokens of the answer that each source prompt calls
            for, for metrics of sequences, which append it; -1 fills on the right.
        target_answer_tokens: the same of each target prompt's.
        force_model_confidence: raise unless each run prefers its own answer for every prompt.
        engine: `"cone"` computes for each path only what its receivers can reach, `"full"` runs a
            whole forward for each; `"auto"` is the first where adapter and model allow it.
        batch_size: how many prompts run together, at most; None is as many as fit in memory.
        memory_budget: bytes that the sweep may use besides the model's weights, or a string such
            as `"4 GiB"`; None is half of what is free. Of each device, where the model lies on
            several; or sizes by device, as `{"cuda:0": "4 GiB", "cuda:1": "9 GiB"}`.
        checkpoint: a file that is kept up to date with what was measured. The same call goes on
            from it.
        keep: `"prompts"` keeps the numbers of each prompt; `"means"` their means and moments alone.
        progress: whether a bar shows the paths done.
        tokenizer: gives the outcome its token strings.

    Returns:
        The `Outcome`, whose one tensor is `"path"`. Its axes are `sender` and `receiver`, of which
        one with a single place is left out (the receiver, if both have). A path that is not there,
        as its sender comes after its receiver, is not swept. Of a longer path all but the last
        member is the sender.

    Raises:
        EdgeError: a node that the model does not have; or one, named by itself, that comes after
            all receivers, or before all senders.
        PatchingError: another kind of it, before any sweep runs, naming the value that is wrong.
        AdapterError: the adapter lacks the components of a layer that paths go by.
        EngineError: the model's layers cannot be called by themselves, or do not add to a stream.

    Examples:
        >>> import torch
        >>> from nnpatch_core import Sites
        >>> from nnpatch_core.testing import tiny_api, tiny_model
        >>> source, target = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]])
        >>> out = path_patching(
        ...     tiny_model("llama"), tiny_api(), Sites("o", layers=[0, 1]), ["m1", "logits"],
        ...     source, target, torch.tensor([1]), torch.tensor([2]), progress=False,
        ... )
        >>> out["path"].shape, [axis.name for axis in out.axes("path")]
        (torch.Size([8, 2]), ['sender', 'receiver'])
    """
    check_flags(force_model_confidence=force_model_confidence)
    check_engine(engine)
    if through is not None and not (isinstance(through, str) and through in _THROUGH):
        raise UnknownNameError(
            f"unknown through {shown(through)}{did_you_mean(through, _THROUGH)}; it is None, "
            "or 'mlps', so that MLPs on the way are recomputed"
        )
    given = _members(senders, receivers, path)
    arguments = PairArguments(
        source_tokens,
        target_tokens,
        source_answer_index,
        target_answer_index,
        attention_mask,
        source_attention_mask,
        target_attention_mask,
        tokenizer,
        spans,
        source_answer_tokens=source_answer_tokens,
        target_answer_tokens=target_answer_tokens,
    )
    file = None if checkpoint is None else Checkpoint(checkpoint)
    options = Options(batch_size, budget_of(file, memory_budget), progress)
    setting = open_setting(
        nnmodel,
        api,
        arguments,
        None,
        metric_data=metric_data,
        confident=force_model_confidence,
    )
    traced, adapter, runs = setting.nnmodel, setting.api, setting.runs
    # Before some tokens are run, to find out how the layers are built.
    options = fitting_prompts(
        traced,
        runs.target,
        options,
        layers=adapter.layers,
        estimated=None,
        told=memory_budget is not None,
    )
    sites = _sites(setting, given)
    runs = attrs.evolve(
        runs,
        kind=PATH if through is None else f"{PATH} (through {through})",
        put=PathPut(adapter, setting.structure, through),
        shifted=sites.shifted,
    )
    prompts, source = runs.prompts, runs.source
    sweep, runs = prepare(traced, adapter, sites, runs, metric, options)
    for each in sites_of(value for _, value in given):
        warn_of_columns(each, sites.prompts, prompts.strings, source)
    warn_of_chunks(sweep, sweep.chunks)
    return measure_sweep(sweep, runs, choose_engines(engine, sweep.patches), file)


def _members(senders: Any, receivers: Any, path: Any) -> list[tuple[str, Any]]:
    """The members of the paths, each with the argument that names it."""
    if path is None:
        for name, value in (("senders", senders), ("receivers", receivers)):
            if value is None:
                raise EdgeError(f"{name} is None: name at least one node, or give path=")
            if isinstance(value, PromptPairs):
                raise EdgeError(f"{name} is a PromptPairs: both ends come before the prompts")
        return [("senders", senders), ("receivers", receivers)]
    if senders is not None or receivers is not None:
        raise EdgeError(
            "path= names all nodes of a path: pass None as senders and receivers beside it"
        )
    given = None if isinstance(path, str) else listed(path)
    if given is None or len(given) < 2:
        raise EdgeError(
            "path must be a list of at least two members, such as ['a0.h1', 'a2.h3<q>', 'logits'], "
            f"got {shown(path)}"
        )
    return [(f"path[{number}]", value) for number, value in enumerate(given)]


def _sites(setting: Setting, given: list[tuple[str, Any]]) -> PathSites:
    """The paths of a sweep."""
    runs, nodes = setting.runs, setting.structure.nodes
    prompts = PromptBatch(runs.target, runs.source, runs.spans)
    reader = Reader(setting.nnmodel, setting.api, nodes, prompts)
    (argument, first), *others = given
    members: list[list[Named[Any]]] = [
        reader.senders(argument, first),
        *(reader.receivers(argument, value) for argument, value in others),
    ]
    return PathSites(setting.nnmodel, setting.api, nodes, members, prompts)
