"""The argument that says where a model is steered."""

from __future__ import annotations

from typing import Any

from torch import nn

from nnpatch_core._printable import shown
from nnpatch_core.adapters import check_fits
from nnpatch_core.errors import PositionError, SteeringError, SubspaceError
from nnpatch_core.plugins import find_adapter
from nnpatch_core.site import MultiSite, Site, check_site
from nnpatch_core.spaces import Space, Subspace, as_space

#: How a record names the last position of each prompt, and its positions.
_LAST, _AT_LAST = "'last'", (-1,)


def site_of(given: Any, api: Any, model: nn.Module) -> Site:
    """A site of the model, as it was given or where a subspace was made.

    Args:
        given: a `Site`, or a `Subspace` that knows its site.
        api: the adapter by which that is found in the model; None is the one for the model.
        model: the Hugging Face model.

    Raises:
        SteeringError: it is neither.
        SubspaceError: a subspace of which it is not known where it was made.
        PositionError: a site with positions of a source run.
        PatchingError: one of its kinds, if the model does not have the site.
    """
    if isinstance(given, MultiSite):
        raise SteeringError(
            f"site is a MultiSite of {len(given.sites)} sites, and a value is for one: steer each "
            "in a `with` of its own, one inside the other"
        )
    if isinstance(given, Site):
        if api is not None:
            raise SteeringError(
                f"api= is for a Subspace: site {given.label} has its adapter, {given.api.name!r}"
            )
        if given.source_seq_pos is not None:
            raise PositionError(
                f"site {given.label} has source_seq_pos, and steering takes no values from a source"
            )
        site = given
    else:
        site = _recorded(given, api, model)
    check_fits(site.api, model)
    check_site(site, model)
    return site


def _recorded(given: Any, api: Any, model: nn.Module) -> Site:
    try:
        space = as_space(given)
    except SubspaceError:
        space = None
    if space is None:
        raise SteeringError(
            f"site must be a Site, or a Subspace that knows its site, got {shown(given)}"
        )
    record = getattr(space, "site", None)
    if record is None:
        raise SubspaceError(f"{shown(space)} does not know where it was made: {_advice(space)}")
    if record.where not in (None, _LAST):
        raise SubspaceError(
            f"{shown(space)} was made at {record.where}, which are other positions in other "
            f"prompts: {_advice(space)}"
        )
    return Site.get_site(
        find_adapter(api, model),
        record.component,
        record.layer,
        record.head,
        _AT_LAST if record.where == _LAST else record.seq_pos,
        subspace=space,
    )


def _advice(space: Space) -> str:
    made = "Subspace(basis, site=site)" if isinstance(space, Subspace) else "one"
    return (
        "give the site, Site.get_site(api, name, layer, seq_pos=[-1], subspace=...)"
        f", or make {made} that knows it"
    )
