"""What senders get where they are ablated: zeros, means, or another prompt's activations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnpatch_core.adapters import ModelAPI
from nnpatch_core.edges.changes import Given
from nnpatch_core.edges.layers import Layers
from nnpatch_core.edges.put import GivenOf
from nnpatch_core.interventions import Ablation, Recorded, RunArguments, read_ablation
from nnpatch_core.seq_pos import PromptBatch
from nnpatch_core.site import Site
from nnpatch_core.sites import Sites
from nnpatch_core.sweep import Options, lay_out, make_sweep


def ablated(
    nnmodel: Any, api: ModelAPI, run: RunArguments, ablation: Ablation, options: Options
) -> GivenOf:
    """Find out what senders get; a mean runs the model when it is first wanted.

    Args:
        nnmodel: the model, wrapped by nnsight.
        api: the adapter.
        run: the target prompts.
        ablation: how they are ablated.
        options: how the sweep may run.

    Raises:
        PatchingError: one of its kinds, naming the argument that is wrong.
    """
    runs = read_ablation(nnmodel, run, ablation)
    layers = Sites(["o", "mlp"]).grids(nnmodel, api, runs.target.seq_len)
    sites = [
        Site.get_site(api, "resid_pre", 0),
        *(
            Site.get_site(api, name, layer)
            for name, grid in layers.items()
            for layer in sorted({site.layer for cell in grid.sites for site in cell.sites})
        ),
    ]
    layout = lay_out(nnmodel, api, Sites.from_sites(sites), PromptBatch(runs.target))
    sweep = make_sweep(layout, runs.target, {}, options, gathers=False)
    runs.check(sweep)
    kept: list[Any] = []

    def given(found: Layers, chunk: slice) -> tuple[Given, Tensor | None]:
        if not kept:
            kept.append(runs.values(sweep))
        _, intervention = kept[0].of(sweep.rows(chunk), chunk)
        return _given(found, intervention), None

    return given


def _given(layers: Layers, intervention: Any) -> Given:
    target = layers.target

    def of(location: Any, own: Tensor) -> Tensor:
        if isinstance(intervention, Recorded):
            return intervention.activations[location].to(own)
        return own.new_zeros(1, *own.shape[1:])

    return Given(
        of((f"{layers.path}.0.", "input", 0), target.streams[0]),
        [
            of(own["o"].location, heads)
            for own, heads in zip(layers.places, target.heads, strict=True)
        ],
        [of(own["mlp"].location, mlp) for own, mlp in zip(layers.places, target.mlp, strict=True)],
        intervention.mask,
    )
