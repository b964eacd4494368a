"""Whether the cone engine suits a sweep, as far as can be told without running the model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from nnpatch_core._models import takes_cache
from nnpatch_core.layers import row_of
from nnpatch_core.site import Site


def why_not_cone(sites: Iterable[Site], model: nn.Module) -> str | None:
    """Why a sweep of `sites` cannot run in the cone engine; None if it may."""
    sites = list(sites)
    adapters = {id(site.api): site.api for site in sites}.values()
    for api in adapters:
        if not getattr(api, "cone", True):
            return f"adapter {api.name!r} says that its models cannot run from the middle"
    paths = sorted({api.layers for api in adapters})
    if len(paths) > 1:
        return f"the sites are in several lists of layers: {', '.join(paths)}"
    for site in sites:
        row = row_of(site.api, model, site.layer, site.component)
        if not row.module and row.item:
            return f"{site.component} is item {row.item} of what a layer gives, not the first"
    if not takes_cache(model):
        return f"{type(model).__name__} does not take keys and values of tokens that have been run"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return f"{type(model).__name__} is an encoder and a decoder"
    return None
