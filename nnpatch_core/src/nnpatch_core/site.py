"""A site: one place of a model that can be read and patched, without loops or model accesses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor

from nnpatch_core._arguments import listed
from nnpatch_core._integers import strict_int
from nnpatch_core._models import envoy_of, module_of
from nnpatch_core._printable import shown
from nnpatch_core.adapters import (
    ModelAPI,
    Place,
    check_head,
    check_layer,
    component_names,
    component_of,
    find_component,
    n_layers,
    place_of,
    table_of,
)
from nnpatch_core.components import canonical_name
from nnpatch_core.errors import LayerError, PatchingError, PositionError
from nnpatch_core.names import ComponentName
from nnpatch_core.plugins import find_adapter
from nnpatch_core.seq_pos import (
    NO_SOURCE,
    NONE,
    Group,
    PlacedCell,
    Positions,
    PromptBatch,
    PromptGroups,
    are_per_prompt,
    check_alike,
    check_cell,
    for_all,
    normalise,
    present_in,
    read_positions,
    read_sources,
    resolved,
    spread,
)
from nnpatch_core.spaces import Space, as_space
from nnpatch_core.tracing import (
    BoundSite,
    PatchedTokens,
    check_space,
    put_site,
    read,
    write,
)

#: Of how many prompts a label shows the positions.
_PROMPTS = 2


@attrs.define
class _Memory:
    """The cache of one site: a value, or a sum over prompts and their number."""

    value: Tensor | None = None
    prompts: int = 0


_positions = attrs.converters.optional(read_positions)
_sources = attrs.converters.optional(read_sources)


@attrs.frozen
class Site:
    """One component of one layer, optionally one head of it, at some token positions.

    Make one with `Site.get_site`. Inside your own nnsight trace, `cache` keeps the activation and
    `patch` puts it into another trace. A site's cache is its own.

    Args:
        api: the adapter that knows where the component lives.
        component: its name, see `COMPONENT_NAMES`.
        layer: 0 is the first.
        head: one head, or None for all of them together.
        seq_pos: positions, counted from the start or (negative) from the end, of all prompts or of
            each apart; None is all.
        source_seq_pos: where the values for these are taken; None is the same positions.
        subspace: the part of the activation that is patched: a `Subspace`, or an object with
            `encode` and `decode`; None is all of it.
        asked: the synonym by which the component was asked for, which an outcome keeps.
        where: a name for the positions, which a label shows in their place.
    """

    api: ModelAPI = attrs.field(repr=lambda api: str(api.name))
    component: str
    layer: int
    head: int | None = None
    seq_pos: Group | PromptGroups | None = None
    source_seq_pos: Group | PromptGroups | None = attrs.field(default=None, kw_only=True)
    subspace: Space | None = attrs.field(default=None, kw_only=True, converter=as_space, eq=id)
    asked: str | None = attrs.field(default=None, kw_only=True, eq=False, repr=False)
    where: str | None = attrs.field(default=None, kw_only=True, eq=False, repr=False)
    _memory: _Memory = attrs.field(
        factory=_Memory, init=False, eq=False, repr=False, metadata={"cache": True}
    )

    @classmethod
    def get_site(
        cls,
        api: Any,
        site_name: ComponentName | str,
        layer: int,
        head: int | None = None,
        seq_pos: Any = None,
        source_seq_pos: Any = None,
        subspace: Any = None,
    ) -> Site:
        """A site, checked as far as it can be without a model.

        Args:
            api: an adapter (class or instance), or its registered name.
            site_name: a component's name, such as `"resid"` or `"q"`.
            layer: 0 is the first.
            head: one head of a component with heads; None is all of them together.
            seq_pos: positions patched together: `[k]` for all prompts, or `[batch, k]`, those of
                each prompt; None is every position.
            source_seq_pos: of the same shape, where the source's values for them are taken: `cache`
                looks there. None is the same positions.
            subspace: a `Subspace` of the activation (of a head's, where one is named), or another
                object with `encode` and `decode`: patching changes its coordinates alone. None is
                all of the activation.

        Raises:
            UnknownNameError: the adapter has no such component.
            LayerError: `layer` is negative or no integer.
            HeadError: `head` is negative, no integer, or the component has no heads.
            PositionError: positions that are no integers, duplicated or none at all.
            SubspaceError: `subspace` is none.

        Examples:
            >>> from nnpatch_core.testing import tiny_api
            >>> Site.get_site(tiny_api(), site_name="q", layer=1, head=3, seq_pos=[-1]).label
            'q L1 H3 [-1]'
        """
        adapter = find_adapter(api)
        component = find_component(adapter, site_name)
        layer = strict_int(layer, "a layer", LayerError)
        if layer < 0:
            raise LayerError(f"layer {layer} is out of range: layers are numbered from 0")
        if head is not None:
            head = check_head(head, site_name, component)
        name = canonical_name(site_name)
        positions, sources = _positions(seq_pos), _sources(source_seq_pos)
        if sources is not None and positions is None:
            raise PositionError("source_seq_pos means nothing without seq_pos")
        check_alike(positions, sources)
        return cls(
            adapter,
            name,
            layer,
            head,
            positions,
            source_seq_pos=sources,
            subspace=subspace,
            asked=site_name,
        )

    @property
    def name(self) -> str:
        """The component's name, as it was asked for."""
        return self.component if self.asked is None else self.asked

    @property
    def sites(self) -> tuple[Site, ...]:
        """The site itself: what a `MultiSite` has several of."""
        return (self,)

    @property
    def label(self) -> str:
        """A short name for a table or a picture."""
        head = "" if self.head is None else f" H{self.head}"
        part = "" if self.subspace is None else f" {_part_of(self.subspace)}"
        return f"{self.name} L{self.layer}{head}{self.at}{part}"

    @property
    def at(self) -> str:
        """The positions in a few letters, as the label shows them."""
        if self.where is not None:
            return f" {self.where!r}"
        if self.seq_pos is None:
            return ""
        taken = "" if self.source_seq_pos is None else f" from {_short(self.source_seq_pos)}"
        return f" {_short(self.seq_pos)}{taken}"

    @property
    def value(self) -> Tensor:
        """The value that `cache` kept: `[batch, positions, width]`, or `[1, ...]` for an average.

        Raises:
            PatchingError: nothing was cached.
        """
        if self._memory.value is None:
            raise PatchingError(
                f"site {self.label} has no cache: call site.cache(nnmodel) in an earlier trace, "
                "or patch with zero=True"
            )
        if self._memory.prompts:
            return (self._memory.value / self._memory.prompts).float()
        return self._memory.value

    def cache(self, nnmodel: Any, average: bool = False) -> Tensor:
        """Keep the site's activation of this run; call it inside a trace.

        Args:
            nnmodel: the model that is being traced.
            average: add up over prompts instead, so that the cache becomes the mean over every
                batch since the last `clear`: a mean over a data set of any size.

        Returns:
            This run's activation, `[batch, positions, width]` (`[batch, positions, heads, dim]`
            for every head of a component with heads), with its gradient; the cache has none.

        Raises:
            PatchingError: one of its kinds, if the model does not have the site.
        """
        check_site(self, module_of(nnmodel))
        part = self.select(self.read(nnmodel), nnmodel, source=True)
        memory = self._memory
        if not average:
            memory.value, memory.prompts = part.detach(), 0
            return part
        if are_per_prompt(self.seq_pos) and len({len(row) for row in self.seq_pos}) > 1:
            raise PositionError(
                f"site {self.label} has more positions in some prompts than in others: there is no "
                "mean over them"
            )
        if self.positions(self.read(nnmodel).shape[1]).columns is not None:
            raise PositionError(
                f"site {self.label} names its positions in another order in some prompts than in "
                "others, and each is averaged in the order in which they stand: make a site of each"
            )
        # In float64, so that it stays exact over a large data set; on the CPU, as not all have it.
        total = part.detach().float().sum(0, keepdim=True).cpu().double()
        if memory.prompts and memory.value is not None:
            if memory.value.shape != total.shape:
                raise PositionError(
                    f"site {self.label} was averaged over {memory.value.shape[1]} positions, and "
                    f"this run has {total.shape[1]}: name positions from the end"
                )
            total = memory.value + total
        memory.value, memory.prompts = total, memory.prompts + len(part)
        return part

    def clear(self) -> None:
        """Forget what was cached."""
        self._memory.value, self._memory.prompts = None, 0

    def patch(self, nnmodel: Any, zero: bool = False) -> None:
        """Replace the site's activation of this run; call it inside a trace.

        Args:
            nnmodel: the model that is being traced.
            zero: put zeros there instead of the cached value, which is then not needed.

        Raises:
            PatchingError: nothing was cached, and not `zero`; the model does not have the site, or
                the cache is of another shape than the site has in this run.
        """
        check_site(self, module_of(nnmodel))
        self.write(nnmodel, None if zero else self.value)

    def group(self, seq_len: int) -> Group:
        """The site's positions in a run of `seq_len` tokens, ascending from 0.

        Raises:
            PositionError: each prompt has positions of its own, or one is outside the run.
        """
        if self.seq_pos is None:
            return tuple(range(seq_len))
        return normalise(for_all(self.seq_pos), seq_len)

    def positions(self, seq_len: int, prompts: PromptBatch | None = None) -> Positions:
        """The site's positions in each prompt of a run, and where their values come from.

        Args:
            seq_len: tokens per prompt.
            prompts: the prompts, where they are known: then positions must be tokens of theirs.

        Raises:
            PositionError: a position that is not in the run, or padding in its prompt.
        """
        if self.source_seq_pos is None and not are_per_prompt(self.seq_pos):
            return Positions.of([self.group(seq_len)])
        if are_per_prompt(self.seq_pos):
            groups, sources, columns = resolved(self.seq_pos, self.source_seq_pos, seq_len)
            if prompts is not None:
                self._check(groups, sources, prompts)
            return Positions.of(groups, sources, columns)
        (group,), taken, _ = resolved([self.seq_pos], [self.source_seq_pos], seq_len)
        assert taken is not None
        if prompts is None:
            return Positions.of([group], taken)
        return present_in(prompts, group, taken[0])

    def _check(
        self, groups: PromptGroups, sources: PromptGroups | None, prompts: PromptBatch
    ) -> None:
        if sources is not None and prompts.source is None:
            raise PositionError(NO_SOURCE)
        cell = PlacedCell(self.label, groups, sources)
        check_cell(f"site {self.label}", cell, prompts)

    def bind(self, nnmodel: Any, seq_len: int) -> BoundSite:
        """The site found in a model, for prompts of `seq_len` tokens.

        Raises:
            PatchingError: one of its kinds, if the model or the prompts lack it.
        """
        positions = self.positions(seq_len)
        return BoundSite(self._place(nnmodel), self.head, positions, self.subspace)

    def read(self, nnmodel: Any, run: Sequence[int] | None = None) -> Tensor:
        """The whole activation `[batch, seq, width]` at the site's component, inside a trace.

        Raises:
            AdapterError: it is not of that shape, where `run` is `(batch, seq)`.
        """
        shape = None if run is None else (run[0], run[1])
        return read(envoy_of(nnmodel), self._place(nnmodel), shape)

    def select(self, activation: Tensor, nnmodel: Any, *, source: bool = False) -> Tensor:
        """The site's part of the component's whole activation, a copy.

        Args:
            activation: `[batch, seq, width]`.
            nnmodel: the model that has it.
            source: whether it is taken where the site's values come from.

        Raises:
            PositionError: a position outside the run, or positions of another number of prompts.
        """
        part = self._picked(activation, source)
        columns = self._place(nnmodel).columns(activation.shape[-1])
        if columns is None:
            return part
        return part[..., (columns if self.head is None else columns[self.head]).to(part.device)]

    def _picked(self, activation: Tensor, source: bool) -> Tensor:
        """`[batch, positions, width]`; 0 where a prompt has fewer positions than another."""
        batch, seq_len = activation.shape[:2]
        positions = self.positions(seq_len)
        at = positions.source if source and positions.source is not None else positions.at
        if len(at) not in (1, batch):
            raise PositionError(
                f"site {self.label} has positions of {len(at)} prompts, and this run has {batch}"
            )
        if len(at) == 1:
            return activation[:, at[0].to(activation.device)]
        rows = torch.arange(batch, device=activation.device)[:, None]
        index = at.to(activation.device)
        part = activation[rows, index.clamp(min=0)]
        return torch.where((index == NONE)[..., None], 0.0, part).to(part.dtype)

    def write(self, nnmodel: Any, value: Tensor | None, mask: Tensor | None = None) -> None:
        """Put `value` at the site, inside a trace.

        Args:
            nnmodel: the model that is being traced.
            value: `[batch, positions, width]`, or `[1, ...]` for every prompt; None is zeros.
            mask: `[batch, seq]`: 1 at the tokens that may be replaced; None is all.

        Raises:
            PatchingError: the value is of another shape than the site.
        """
        activation = self.read(nnmodel, None if mask is None else mask.shape).clone()
        old = self.select(activation, nnmodel)
        if value is None:
            value = torch.zeros_like(old)
        if value.shape not in (old.shape, (1, *old.shape[1:])):
            raise PatchingError(
                f"site {self.label} has the shape {list(old.shape)} in this run, and the value "
                f"to put there {list(value.shape)}"
            )
        if mask is None:
            mask = torch.ones(activation.shape[:2], dtype=torch.int64, device="cpu")
        site = self.bind(nnmodel, activation.shape[1])
        put_site(activation, site, 0, _Own(site, value.to(old).expand_as(old).flatten(2), mask))
        self.replace(nnmodel, activation)

    def replace(self, nnmodel: Any, activation: Tensor) -> None:
        """Put a whole activation `[batch, seq, width]` at the site's component, inside a trace."""
        write(envoy_of(nnmodel), self._place(nnmodel), activation)

    def _place(self, nnmodel: Any) -> Place:
        return place_of(self.api, module_of(nnmodel), self.layer, self.component)


@attrs.frozen(eq=False)
class _Own:
    """A site's own value as an intervention: `[batch, positions, columns]` of that site alone."""

    site: BoundSite
    value: Tensor
    mask: Tensor
    by_cell: bool = False

    def patched(self, place: Place, there: Tensor, tokens: PatchedTokens) -> Tensor:
        """See `Intervention.patched`."""
        at = self.site.positions.at
        # Which of its own positions each token is.
        numbers = torch.arange(at.shape[1], device="cpu").expand_as(at)
        wide = spread(at, self.mask.shape[1], numbers).expand(len(self.mask), -1)
        which = wide[tokens.prompts, tokens.positions].to(self.value.device)
        value = self.value[tokens.prompts.to(self.value.device), which]
        columns = self.site.columns(there.shape[-1])
        if columns is None:
            return value
        return there.index_copy(1, columns.to(there.device), value)


def _in_order(sites: Any) -> tuple[Site, ...]:
    given = listed(sites)
    if not given or not all(isinstance(site, Site) for site in given):
        raise PatchingError(f"a MultiSite takes a list of at least one Site, got {shown(sites)}")
    return execution_order(given)


@attrs.frozen
class MultiSite:
    """Several sites, patched together in one forward.

    Args:
        sites: the sites; one component may be named several times.
        name: what the outcome calls it; by default the components, joined by `+`.

    Examples:
        >>> from nnpatch_core.testing import tiny_api
        >>> both = MultiSite([Site.get_site(tiny_api(), name, layer=1) for name in ("mlp", "attn")])
        >>> both.name, [site.name for site in both.sites]
        ('attn+mlp', ['attn', 'mlp'])
    """

    sites: tuple[Site, ...] = attrs.field(converter=_in_order)
    name: str = attrs.field()

    @name.validator
    def _is_text(self, _: Any, name: Any) -> None:
        if not isinstance(name, str):
            raise PatchingError(f"the name of a MultiSite must be a string, got {shown(name)}")

    @name.default
    def _joined(self) -> str:
        return "+".join(dict.fromkeys(site.name for site in self.sites))

    @property
    def label(self) -> str:
        """A short name for a table or a picture."""
        return " + ".join(site.label for site in self.sites)

    def cache(self, nnmodel: Any, average: bool = False) -> tuple[Tensor, ...]:
        """`Site.cache` for each of the sites, in the order in which the model reaches them."""
        return tuple(site.cache(nnmodel, average) for site in self.in_order(nnmodel))

    def clear(self) -> None:
        """Forget what was cached."""
        for site in self.sites:
            site.clear()

    def patch(self, nnmodel: Any, zero: bool = False) -> None:
        """`Site.patch` for each of the sites, in the order in which the model reaches them."""
        for site in self.in_order(nnmodel):
            site.patch(nnmodel, zero)

    def in_order(self, nnmodel: Any) -> tuple[Site, ...]:
        """The sites in the order in which a forward of this model reaches them."""
        for site in self.sites:
            check_site(site, module_of(nnmodel))
        return execution_order(self.sites, nnmodel)


AnySite: TypeAlias = Site | MultiSite


def execution_order(sites: Iterable[Site], nnmodel: Any = None) -> tuple[Site, ...]:
    """Sites in the order in which a forward reaches them, as nnsight wants its accesses.

    Args:
        sites: the sites.
        nnmodel: the model; needed where layers differ in the order of their components.

    Examples:
        >>> from nnpatch_core.testing import tiny_api
        >>> sites = [Site.get_site(tiny_api(), name, 1) for name in ("resid", "q", "attn")]
        >>> [site.name for site in execution_order(sites)]
        ['q', 'attn', 'resid']
    """

    def key(site: Site) -> tuple[int, int]:
        names = component_names(site.api)
        if nnmodel is not None:
            names = list(table_of(site.api, module_of(nnmodel), site.layer))
        return (site.layer, names.index(site.component))

    given = listed(sites)
    if given is None or not all(isinstance(site, Site) for site in given):
        raise PatchingError(f"execution_order takes a list of Site objects, got {shown(sites)}")
    return tuple(sorted(given, key=key)) if len(given) > 1 else given


def _short(positions: Group | PromptGroups) -> str:
    """Positions in a few letters: of each prompt, those of the first ones."""
    if not are_per_prompt(positions):
        return str(list(positions))
    rows = [str(list(row)) for row in positions[:_PROMPTS]]
    return f"[{', '.join(rows)}{', …' if len(positions) > _PROMPTS else ''}]"


def _part_of(space: Space) -> str:
    """A space in a few letters."""
    return "in all of its features" if space.rank is None else f"in rank {space.rank}"


def check_site(site: Site, model: Any, seq_len: int | None = None) -> None:
    """Raise the fitting error if `model`, or a prompt of `seq_len` tokens, lacks the site."""
    find_component(site.api, site.component)
    check_layer(site.layer, n_layers(site.api, model))
    component = component_of(site.api, model, site.layer, site.component)
    if site.head is not None:
        heads = component.heads
        count = site.api.n_heads(model.config, heads, site.layer) if heads else None
        check_head(site.head, site.component, component, count)
    if site.subspace is not None:
        place = place_of(site.api, module_of(model), site.layer, site.component)
        check_space(site.subspace, place, site.head)
    if seq_len is not None:
        site.positions(seq_len)
