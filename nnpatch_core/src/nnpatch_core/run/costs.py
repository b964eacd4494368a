"""The cost of analyses that have no plan of cells: told by counting, before anything runs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from nnpatch_core.circuits import find_circuit
from nnpatch_core.edges import Estimate, Nodes, likely_nodes
from nnpatch_core.patching import EDGE_STEPS
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.run.settings import Settings
from nnpatch_core.run.sweeps import sites_of
from nnpatch_core.subspace import train_subspace

#: A run with a graph, forwards and backwards, takes about so many forwards.
_GRAPH = 3


def cost_of(settings: Settings, model: nn.Module, api: Any, pairs: PromptPairs) -> list[str]:
    """The cost of a run of paths, edges, a circuit or subspaces, in lines for people.

    Args:
        settings: of the run.
        model: the model, perhaps without weights.
        api: its adapter.
        pairs: the prompts.
    """
    if settings.method == "subspace":
        return [*_of_subspaces(settings, model, api, pairs)]
    if settings.method == "path":
        return [*_of_paths(settings)]
    nodes = likely_nodes(api, model)
    if settings.method == "circuit":
        return [*_of_circuit(settings, nodes)]
    return [*_of_edges(settings, nodes)]


def _of_edges(settings: Settings, nodes: Nodes) -> Iterator[str]:
    senders = [nodes.sender(name) for name in settings.senders] or range(len(nodes.senders))
    receivers = [nodes.receiver(name) for name in settings.receivers] or range(len(nodes.receivers))
    layers = [nodes.n_layers - nodes.receivers[number].layer for number in receivers]
    edges = [
        passed
        for sender in senders
        for number, passed in zip(receivers, layers, strict=True)
        if nodes.mask[sender, number]
    ]
    groups = "" if settings.positions is None else " for each of the positions"
    yield f"edges         {len(edges)}{groups}"
    measured = len(edges)
    if settings.estimate is not None:
        yield _estimate(settings.estimate, settings.steps, nodes)
        measured = min(settings.top_k or 0, len(edges))
    if measured:
        yield _measured(measured, edges, nodes.n_layers)


def _of_circuit(settings: Settings, nodes: Nodes) -> Iterator[str]:
    defaults = inspect.signature(find_circuit).parameters
    method = settings.estimate or str(defaults["method"].default)
    most = defaults["top_k"].default if settings.top_k is None else settings.top_k
    layers = [
        nodes.n_layers - nodes.receivers[number].layer
        for number, edges in enumerate(nodes.mask.sum(0).tolist())
        for _ in range(edges)
    ]
    yield f"edges         {len(layers)}"
    yield _estimate(method, settings.steps, nodes)
    if most:
        yield _measured(min(most, len(layers)), layers, nodes.n_layers)
    yield f"circuits      at most {settings.evaluations} runs of all pairs, about two forwards each"


def _of_paths(settings: Settings) -> Iterator[str]:
    count = 1 if settings.path else len(settings.senders) * len(settings.receivers)
    yield f"paths         at most {count}, each from its first receiver on"
    if settings.through is not None:
        yield "through       MLPs between sender and receiver are computed again for each path"


def _of_subspaces(
    settings: Settings, model: nn.Module, api: Any, pairs: PromptPairs
) -> Iterator[str]:
    batch = pairs.batch
    grids = sites_of(settings, api).grids(model, api, batch.seq_len, batch)
    sites = sum(len(grid.sites) for grid in grids.values())
    default = inspect.signature(train_subspace).parameters["batch_size"].default
    at_once = default if settings.batch_size is None else settings.batch_size
    steps = settings.epochs * math.ceil(len(pairs) * (1 - settings.held_out) / at_once)
    yield f"sites         {sites}, a subspace each"
    yield f"steps         at most {steps} for each, of up to {at_once} pairs, from the site on"


def _estimate(method: str, steps: int | None, nodes: Nodes) -> str:
    points = EDGE_STEPS if steps is None else steps
    passes = Estimate(method, points).passes(nodes.n_layers)
    return (
        f"estimate      {method}: {passes} run{'s' * (passes != 1)} of all pairs with a graph, "
        f"about {_GRAPH * passes} forwards"
    )


def _measured(count: int, layers: Sequence[int], n_layers: int) -> str:
    """Edges measured exactly: a run begins in the layer that reads, with the others of it."""
    share = sum(layers) / (len(layers) * n_layers)
    return (
        f"measured      {count} edges in each pair, on average {share:.0%} of the layers each, "
        "from the first token on that differs"
    )
