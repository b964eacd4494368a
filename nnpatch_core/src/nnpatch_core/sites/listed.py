"""The user's own sites as a sweep has them, and several grids as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import torch

from nnpatch_core._arguments import listed
from nnpatch_core._models import module_of
from nnpatch_core._printable import shown
from nnpatch_core.batch import GivenTokens, check_tokens, pack_left, unpack
from nnpatch_core.errors import PatchingError
from nnpatch_core.plugins import find_adapter
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.seq_pos import PromptBatch
from nnpatch_core.site import AnySite, MultiSite, Site, check_site
from nnpatch_core.sites.grid import Axis, Grid
from nnpatch_core.sites.sweep_sites import SweepSites


def prompts_of(tokens: GivenTokens | PromptPairs) -> PromptBatch:
    """The prompts; `TokensError` where they are none."""
    if isinstance(tokens, PromptPairs):
        return tokens.batch
    ids, mask = unpack("tokens", tokens)
    check_tokens("tokens", ids)
    mask = torch.ones_like(ids, dtype=torch.int64) if mask is None else mask
    return PromptBatch(pack_left(ids, mask))


def _site_list(sites: Any) -> tuple[AnySite, ...]:
    given = listed(sites)
    if given is None:
        raise PatchingError(f"from_sites takes a list of sites, got {shown(sites)}")
    if not given:
        raise PatchingError("the list of sites is empty; give at least one")
    for site in given:
        if not isinstance(site, Site | MultiSite):
            raise PatchingError(f"from_sites takes Site and MultiSite objects, got {shown(site)}")
    return given


@attrs.frozen
class SiteList:
    """The user's own sites, each patched alone; made by `Sites.from_sites`."""

    sites: tuple[AnySite, ...] = attrs.field(converter=_site_list)

    def get_sites_dict(
        self, nnmodel: Any, api: Any, tokens: GivenTokens | PromptPairs
    ) -> dict[str, list[AnySite]]:
        """Site name to the list of its sites, in the order of the list."""
        prompts = prompts_of(tokens)
        grids = self.grids(nnmodel, api, prompts.seq_len, prompts)
        return {name: list(grid.sites) for name, grid in grids.items()}

    def grids(
        self, nnmodel: Any, api: Any, seq_len: int, prompts: PromptBatch | None = None
    ) -> dict[str, Grid]:
        """Site name to its cells; each site keeps the adapter that it was made with.

        Raises:
            PatchingError: a component, layer, head or position that is not there.
        """
        model = module_of(nnmodel)
        if api is not None:
            find_adapter(api)
        by_name: dict[str, list[AnySite]] = {}
        for cell in self.sites:
            for site in cell.sites:
                check_site(site, model, seq_len)
            by_name.setdefault(cell.name, []).append(cell)
        return {
            name: Grid((Axis("site", _labels(cells)),), np.arange(len(cells)), tuple(cells))
            for name, cells in by_name.items()
        }


@attrs.frozen
class Together:
    """Several grids of sites in one sweep, of different names."""

    parts: tuple[SweepSites, ...]

    def grids(
        self, nnmodel: Any, api: Any, seq_len: int, prompts: PromptBatch | None = None
    ) -> dict[str, Grid]:
        """See `SweepSites.grids`."""
        found: dict[str, Grid] = {}
        for part in self.parts:
            found |= part.grids(nnmodel, api, seq_len, prompts)
        return found


def _labels(cells: Sequence[AnySite]) -> tuple[str, ...]:
    """The label of each cell; with a number where nothing but its subspaces part it from others."""
    spaces: dict[str, dict[tuple[int, ...], int]] = {}
    numbers = []
    for cell in cells:
        own = spaces.setdefault(cell.label, {})
        numbers.append(own.setdefault(tuple(id(site.subspace) for site in cell.sites), len(own)))
    pairs = zip(cells, numbers, strict=True)
    return tuple(
        cell.label if len(spaces[cell.label]) == 1 else f"{cell.label} #{number + 1}"
        for cell, number in pairs
    )
