"""The cells of a sweep: what each patches, and its place in the outcome."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._models import module_of
from nnpatch_core._printable import shown
from nnpatch_core._warnings import warn
from nnpatch_core.adapters import ModelAPI, check_fits, of_other_type
from nnpatch_core.errors import AdapterWarning, PatchingError, PositionError
from nnpatch_core.seq_pos import PromptBatch
from nnpatch_core.sites import Grid, GridSites, SweepSites, bind_grids
from nnpatch_core.tracing import Patches, check_forwards


@attrs.frozen(eq=False)
class Layout:
    """The cells of a sweep, name by name.

    Args:
        grids: site name to its cells, and their places in the outcome.
        patches: the same cells, found in the model.
    """

    grids: Mapping[str, Grid]
    patches: Patches

    def by_name(self, values: Tensor) -> dict[str, Tensor]:
        """`[cells, ...]` of all cells as site name to those of its cells."""
        sizes = [len(grid.sites) for grid in self.grids.values()]
        return dict(zip(self.grids, torch.split(values, sizes), strict=True))

    def present(self, mask: Tensor) -> Tensor:
        """`[cells, batch]`, bool: which prompts have a token where a cell patches.

        Args:
            mask: `[batch, seq]`: 1 where a prompt can be patched.
        """
        real, cells = mask.bool().cpu(), self.patches.cells
        # Looked up by positions, of which there are far fewer than cells.
        at_any = torch.zeros(len(cells.positions), len(real), dtype=torch.bool, device="cpu")
        for number in cells.used("positions"):
            at_any[number] = cells.positions[number].picked(real).any(1)
        return torch.from_numpy(cells.any_site(at_any.numpy()[cells.sites.positions]))

    def rows(self, rows: slice) -> Layout:
        """The same cells in some of the prompts."""
        patches = self.patches.rows(rows)
        return self if patches is self.patches else Layout(self.grids, patches)

    def repeated(self, times: int) -> Layout:
        """The same cells in the prompts several times after one another."""
        own = [len(each.at) for each in self.patches.positions if len(each.at) > 1]
        if times == 1 or not own:
            return self
        index = torch.arange(own[0], device="cpu").repeat(times)
        return Layout(self.grids, self.patches.rows(index))

    def only(self, kept: Tensor) -> Layout:
        """Some of the cells; `kept` is `[cells]`, bool."""
        grids = {
            name: self.grids[name].take(some.nonzero().flatten().numpy())
            for name, some in self.by_name(kept).items()
        }
        cells = self.patches.cells.take(kept.nonzero().flatten().numpy())
        return Layout(grids, attrs.evolve(self.patches, cells=cells))

    def where_present(self, mask: Tensor) -> Layout:
        """The cells without those that only padding would be patched in.

        Args:
            mask: `[batch, seq]`: 1 where a prompt can be patched.

        Raises:
            PositionError: no cell is left.
        """
        kept = self.present(mask).any(1)
        if not kept.any():
            raise PositionError("every position that is swept is padding in every prompt")
        return self if kept.all() else self.only(kept)


def lay_out(nnmodel: Any, api: Any, sites: SweepSites, prompts: PromptBatch) -> Layout:
    """Find what is to be swept in the model, and check that it is there.

    Args:
        nnmodel: the model, wrapped by nnsight.
        api: an adapter, its name, or None to find it by the model.
        sites: what the user asks for.
        prompts: that it is swept in.

    Raises:
        PatchingError: one of its kinds, for whatever is wrong.

    Warns:
        AdapterWarning: the adapter does not claim the model's type.
    """
    if isinstance(sites, type) or not hasattr(sites, "grids"):
        raise PatchingError(
            f"sites must be Sites(...) or Sites.from_sites(...), got {shown(sites)}"
        )
    model, seq_len = module_of(nnmodel), prompts.seq_len
    grids = sites.grids(nnmodel, api, seq_len, prompts)
    for adapter in _adapters(grids.values()):
        check_fits(adapter, model)
        if doubt := of_other_type(adapter, model):
            warn(doubt, AdapterWarning)
    cells = [grid.sites for grid in grids.values()]
    layout = Layout(grids, bind_grids(cells, nnmodel, seq_len, prompts))
    check_forwards(layout.patches.places, model)
    return layout


def _adapters(grids: Iterable[Grid]) -> list[ModelAPI]:
    """The adapters of sites, each once."""
    found = {}
    for grid in grids:
        if isinstance(grid.sites, GridSites):
            found[id(grid.sites.api)] = grid.sites.api
        else:
            found |= {id(site.api): site.api for cell in grid.sites for site in cell.sites}
    return list(found.values())
