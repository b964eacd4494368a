"""Where, and of which pairs, a subspace is learned or measured: found before anything runs."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._models import as_nnsight, module_of
from nnpatch_core._printable import shown
from nnpatch_core._warnings import warn
from nnpatch_core.engine import Choice, check_engine, choose_engines
from nnpatch_core.errors import (
    AnswerWarning,
    PromptWarning,
    SubspaceError,
    TokensError,
)
from nnpatch_core.interventions import PairArguments, PairRuns, read_pairs
from nnpatch_core.plugins import find_adapter
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.site import Site
from nnpatch_core.sites import Sites
from nnpatch_core.spaces import SiteRecord, Space, Subspace
from nnpatch_core.sweep import Options, Sweep, Values, digest, prepare
from nnpatch_core.tracing import BoundSite, width_of


@attrs.frozen(eq=False)
class Found:
    """Pairs of prompts, and a site in the model, before anything runs.

    Args:
        sweep: the site, found in the model, and the memory that there is.
        named: the site, as the user names it.
        runs: the pairs.
        values: what is put there.
        usable: `[usable]`, the numbers of the pairs that tell something: their answers differ, and
            they have a token at the site.
        choice: the engines that may run them.
    """

    sweep: Sweep
    named: Site
    runs: PairRuns
    values: Values
    usable: Tensor
    choice: Choice

    @property
    def site(self) -> BoundSite:
        """The site, found in the model."""
        (site,) = self.sweep.patches.cells[0].sites
        return site

    @property
    def width(self) -> int | None:
        """The width of the activation, of the head's if one is named; None before a run tells."""
        whole = width_of(self.site.place)
        return None if whole is None else own_width(self.site, whole)

    @property
    def keys(self) -> Tensor:
        """`[pairs]`: a number that pairs of the same prompts share, padding aside."""
        runs, keys = self.runs, []
        for number in range(len(runs.target)):
            parts = [
                batch.tokens[number][batch.mask[number].bool()].cpu()
                for batch in (runs.source, runs.target)
            ]
            keys.append(int(digest(*parts), 16))
        return torch.tensor(keys, dtype=torch.int64, device="cpu")


def find_pairs(
    nnmodel: Any,
    api: Any,
    site: Any,
    pairs: Any,
    *,
    engine: str = "auto",
    memory_budget: Any = None,
) -> Found:
    """Find a site in the model, and the pairs that tell something there; nothing runs.

    Args:
        nnmodel: the model.
        api: an adapter, its name, or None to find it by the model.
        site: a `Site`, or `Sites` of one cell.
        pairs: a `PromptPairs`.
        engine: as for `activation_patching`.
        memory_budget: as for `activation_patching`.

    Raises:
        PatchingError: one of its kinds.

    Warns:
        PromptWarning: some pairs tell nothing.
        AnswerWarning: of answers of several tokens, and of sets, the first alone counts.
    """
    check_engine(engine)
    if not isinstance(pairs, PromptPairs):
        raise TokensError(f"pairs must be a PromptPairs, got {shown(pairs)}")
    sites = Sites.from_sites([site]) if isinstance(site, Site) else site
    if not hasattr(sites, "grids") or isinstance(sites, type):
        raise SubspaceError(f"site must be a Site, or Sites of one cell, got {shown(site)}")
    traced = as_nnsight(nnmodel)
    runs = _by_first_tokens(read_pairs(traced, PairArguments(pairs, None)))
    options = Options(memory_budget=memory_budget)
    # Nothing is swept: whole activations are kept.
    sweep, runs = prepare(traced, api, sites, runs, "logit_difference", options, gathers=False)
    cells = sweep.patches.cells
    if not cells:
        raise SubspaceError("no pair has a token at the site: name other positions")
    if len(cells) != 1 or len(cells[0].sites) != 1:
        count = max(len(cells), len(cells[0].sites))
        raise SubspaceError(
            f"a subspace is of one site, and there are {count}: name one layer, component, head "
            "and group of positions; sweep_subspaces takes several in turn"
        )
    values = runs.values(sweep)
    usable = _usable(runs, sweep.layout.present(values.mask)[0])
    (named,) = cells[0].named.sites
    choice = choose_engines(engine, sweep.patches)
    return Found(sweep, from_end(named, sweep.seq_len), runs, values, usable, choice)


def own_width(site: BoundSite, whole: int) -> int:
    """The width of a site's columns, of an activation that is so wide."""
    columns = site.columns(whole)
    return whole if columns is None else len(columns)


def _by_first_tokens(runs: PairRuns) -> PairRuns:
    """The runs, of whose answers no more is known than their first tokens, which is said."""
    names = {"answer_tokens": "tokens of each answer", "answers": "answers of each set"}
    for name, told in names.items():
        count = max(runs.several.get(f"{run}_{name}", 0) for run in ("source", "target"))
        if count:
            warn(
                f"the first of up to {count} {told} is learned and looked at, and no other: give "
                "answers that differ in it",
                AnswerWarning,
            )
    return attrs.evolve(runs, several={})


def _usable(runs: PairRuns, present: Tensor) -> Tensor:
    differ = runs.source_answers.cpu() != runs.target_answers.cpu()
    reasons = {
        "their two answers begin with the same token": ~differ,
        "they have no token at the site": differ & ~present,
    }
    for reason, left_out in reasons.items():
        numbers = left_out.nonzero().flatten().tolist()
        if numbers:
            few = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
            warn(
                f"{len(numbers)} of {len(differ)} pairs are left out, as {reason}: {few}",
                PromptWarning,
            )
    usable = (differ & present).nonzero().flatten()
    if not len(usable):
        raise SubspaceError(
            "no pair is left: in each the two answers are the same token, or there is no token at "
            "the site"
        )
    return usable


def from_end(site: Site, seq_len: int) -> Site:
    """A site at the last token of prompts of one width as one at the last token of any."""
    if site.seq_pos == (seq_len - 1,):
        return attrs.evolve(site, seq_pos=(-1,))
    return site


def site_of(nnmodel: Any, api: Any, where: Any) -> tuple[Any, Space | None]:
    """The site that an argument names, and the space that it brings.

    Args:
        nnmodel: the model.
        api: an adapter, its name, or None to find it by the model.
        where: a `Site`, `Sites`, or a subspace (or what was learned), which stands for the site
            where it was made.

    Raises:
        SubspaceError: a subspace that does not know where it was made.
    """
    space = getattr(where, "subspace", None)
    if isinstance(where, Site):
        return where, space
    if isinstance(where, Sites):
        if space is not None and not hasattr(space, "encode"):
            raise SubspaceError("give one subspace, not one for each layer")
        return where, space
    own = where if isinstance(where, Subspace) else space
    if not isinstance(own, Subspace):
        return where, None
    return site_at(nnmodel, api, own.site, own), own


def site_at(nnmodel: Any, api: Any, at: SiteRecord | None, space: Space) -> Site:
    """The site that a record tells of.

    Raises:
        SubspaceError: there is no record, or its positions differ from prompt to prompt.
    """
    if at is None:
        raise SubspaceError(
            f"{space} does not say where it was made: name the site, as "
            "Site.get_site(api, 'resid', layer, seq_pos=[-1], subspace=S)"
        )
    if at.where is not None:
        raise SubspaceError(
            f"{space} was made at {at.where}, which are others in other prompts: name the site"
        )
    adapter = find_adapter(api, module_of(nnmodel))
    return Site.get_site(adapter, at.component, at.layer, at.head, at.seq_pos, subspace=space)
