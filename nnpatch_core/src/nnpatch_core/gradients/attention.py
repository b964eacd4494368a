"""The QK fix: queries and keys through the real softmax instead of its tangent.

The attention module of a layer is run again, by itself, with other queries or other keys. What
changes in the mix of values that each head hands on is the exact change that the gradient is then
applied to: with z = sum_j p_j v_j, the sum over j of dm/dp_j (p'_j - p_j) is dm/dz (z' - z).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._models import follow, module_of
from nnpatch_core._rounding import as_typed, rounding
from nnpatch_core.adapters import Location, ModelAPI, Place, heads_of, place_of, table_of
from nnpatch_core.errors import GradientError
from nnpatch_core.gradients.graph import Graph
from nnpatch_core.seq_pos import Positions
from nnpatch_core.spaces import Limit
from nnpatch_core.tracing import (
    Intervention,
    PatchedTokens,
    call,
    forward_hooks,
    in_words,
    of_rows,
    put,
    read,
    skip,
    tokens_of,
    write,
)

_PROJECTIONS = ("q", "k", "v")
#: Numbers a row: unpatched; all queries of a prompt; or the keys at one group of positions.
_UNPATCHED, _QUERIES, _KEYS = -2, -1, 0


@attrs.frozen(eq=False)
class AttentionPlaces:
    """The places of a layer's attention that the QK fix looks at.

    Args:
        projections: those of queries, keys and values.
        o: what the heads hand on.
        module: path, inside the layer, of the module that the projections are in.
    """

    projections: tuple[Place, ...]
    o: Place
    module: str

    @property
    def all(self) -> tuple[Place, ...]:
        """Each of them."""
        return (*self.projections, self.o)


def attention_places(api: ModelAPI, model: Any, layer: int) -> AttentionPlaces:
    """The places of a layer's attention.

    Raises:
        GradientError: the adapter does not have all of them, or they are in no one module.
    """
    table = table_of(api, model, layer)
    missing = [name for name in (*_PROJECTIONS, "o") if name not in table]
    if missing:
        raise GradientError(
            f"the QK fix needs q, k, v and o of a layer, and adapter {api.name!r} has no "
            f"{', '.join(missing)} in layer {layer}"
        )
    *projections, o = (place_of(api, model, layer, name) for name in (*_PROJECTIONS, "o"))
    paths = [place.component.module for place in (*projections, o)]
    steps = [path.split(".")[:-1] for path in paths]
    common = 0
    while all(len(step) > common for step in steps) and len({step[common] for step in steps}) == 1:
        common += 1
    if not common:
        raise GradientError(
            f"the QK fix runs a layer's attention by itself, and with adapter {api.name!r} its "
            f"projections are in no one module: {', '.join(paths)}"
        )
    return AttentionPlaces(tuple(projections), o, ".".join(steps[0][:common]))


@attrs.frozen(eq=False)
class Attention:
    """A layer's attention, ready to be run again.

    Args:
        nnmodel: the model, wrapped by nnsight.
        graph: the forward that it was run in, which has its places.
        places: its places.
        intervention: what is put at its queries and keys.
        alignment: where that comes from; None is each token's own position.
        limit: to which part of them it is limited; None is all.
        rows: how many rows may run together.
    """

    nnmodel: Any
    graph: Graph
    places: AttentionPlaces
    intervention: Intervention
    alignment: Positions | None
    limit: Limit | None
    rows: int

    def effects(
        self, cotangents: Tensor, queries: bool, groups: Sequence[Positions]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The effect of other queries, and of other keys, on the logits weighted by `cotangents`.

        Args:
            cotangents: `[many, batch, seq, width]`, gradients at the layer's `o`.
            queries: whether queries are wanted.
            groups: the groups of positions whose keys are put together.

        Returns:
            `[many, batch, seq, heads + 1]` for the queries, and `[many, batch, groups, kv + 1]` for
            the keys; None for what is not wanted.
        """
        model = module_of(self.nnmodel)
        batch, seq_len = self.intervention.mask.shape
        o = self.places.o
        columns = o.columns(cotangents.shape[-1])
        counts = heads_of(o.api, model, o.layer)
        by_heads = cotangents[..., columns]
        device, many = cotangents.device, len(cotangents)
        of_queries = cotangents.new_zeros(many, batch, seq_len, counts.query)
        of_keys = cotangents.new_zeros(many, batch, len(groups), counts.query)
        # Backwards, so that what has a row for each token is not taken for what has one a prompt.
        backwards = [(prompt, _UNPATCHED) for prompt in reversed(range(batch))]
        before = self._run(backwards, groups).flip(0)
        expected = self.graph.activations[o.location]
        hooks = forward_hooks(model)
        told = f", with {in_words(hooks)}," if hooks else ""
        self._check(before, expected, told)
        kinds = [_QUERIES] * queries + list(range(len(groups)))
        jobs = [(prompt, kind) for prompt in range(batch) for kind in kinds]
        if hooks:
            # As many rows as will run together, each of another prompt than has its number.
            others = [(number + 1) % batch for number in range(min(self.rows, len(jobs)))]
            unpatched = self._run([(prompt, _UNPATCHED) for prompt in others], groups)
            self._check(unpatched, expected[others], told)
        real = self.intervention.mask.bool().to(device)
        for first in range(0, len(jobs), self.rows):
            some = jobs[first : first + self.rows]
            which = torch.tensor([prompt for prompt, _ in some], device=device)
            numbers = torch.tensor([kind for _, kind in some], device=device)
            moved = (self._run(some, groups) - before[which]).to(cotangents.dtype)
            # Chosen, not multiplied: rows of padding may hold anything.
            moved = torch.where(real[which][..., None], moved, 0.0)[..., columns]
            for prompt in torch.unique(which).tolist():
                at_queries = (which == prompt) & (numbers == _QUERIES)
                at_keys = (which == prompt) & (numbers >= _KEYS)
                of_prompt = by_heads[:, prompt]
                if at_queries.any():
                    of_queries[:, prompt] = (of_prompt * moved[at_queries]).sum(-1)
                with as_typed(moved):
                    of_prompt_keys = torch.einsum("mshd,rshd->mrh", of_prompt, moved[at_keys])
                of_keys[:, prompt, numbers[at_keys]] = of_prompt_keys
        # A key is shared by the query heads of its group.
        group = counts.query // counts.key_value
        shared = of_keys.view(*of_keys.shape[:-1], counts.key_value, group).sum(-1)
        return (
            _with_all(of_queries) if queries else None,
            _with_all(shared) if groups else None,
        )

    def _check(self, handed: Tensor, expected: Tensor, hooked: str) -> None:
        allowed = rounding(handed) * float(expected.detach().abs().max())
        gap = float((handed - expected.detach()).abs().max())
        if not gap <= allowed:
            raise GradientError(
                "the QK fix cannot be applied: the attention of layer "
                f"{self.places.o.layer}, run by itself{hooked} gives other values than in the "
                f"model, off by {gap:.3g} where rounding explains {allowed:.3g}"
            )

    def _run(self, jobs: Sequence[tuple[int, int]], groups: Sequence[Positions]) -> Tensor:
        """The mix of values that the heads hand on, `[jobs, seq, width]`."""
        o = self.places.o
        path = f"{o.api.layers}.{o.layer}.{self.places.module}"
        which = torch.tensor([prompt for prompt, _ in jobs], device="cpu")
        batch = len(self.intervention.mask)
        args, kwargs = (of_rows(each, which, batch) for each in self.graph.calls[path])
        values = self._projections(jobs, groups)
        handed: list[Tensor] = []

        def visit(traced: Any) -> None:
            for place in {place.location: place for place in self.places.projections}.values():
                _put(traced, place, values[place.location])
            handed.append(read(traced, o).clone())

        try:
            call(self.nnmodel, path, args, kwargs, visit)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise GradientError(
                f"the QK fix cannot be applied: the attention of layer {o.layer} does not run "
                f"by itself: {type(error).__name__}: {error}"
            ) from error
        return handed[0]

    @torch.no_grad()
    def _projections(
        self, jobs: Sequence[tuple[int, int]], groups: Sequence[Positions]
    ) -> dict[Location, Tensor]:
        """The outputs of the projections in each row, `[jobs, seq, width]` for each location."""
        which = torch.tensor([prompt for prompt, _ in jobs], device="cpu")
        kinds = torch.tensor([kind for _, kind in jobs], device="cpu")
        put_at = tokens_of(self.intervention.mask, self.alignment)
        real = torch.zeros(self.intervention.mask.shape, dtype=torch.bool, device="cpu")
        real[put_at.prompts, put_at.positions] = True
        sources = torch.zeros(real.shape, dtype=torch.int64, device="cpu")
        sources[put_at.prompts, put_at.positions] = put_at.sources
        real = real[which]
        at_keys = torch.zeros_like(real)
        for number, group in enumerate(groups):
            rows = (kinds == number).nonzero().flatten()
            own = group.mask(real.shape[1])
            at_keys[rows] = own[which[rows]] if len(own) > 1 else own
        patched = {"q": (kinds == _QUERIES)[:, None] & real, "k": at_keys & real}
        values: dict[Location, Tensor] = {}
        for place in self.places.projections:
            if place.location not in values:
                activation = self.graph.activations[place.location].detach()
                values[place.location] = activation[which.to(activation.device)]
            if place.name in patched:
                value = values[place.location]
                rows, positions = patched[place.name].nonzero().T
                prompts = which[rows]
                tokens = PatchedTokens(
                    rows, torch.zeros_like(rows), prompts, positions, sources[prompts, positions]
                )
                heads, space = place.columns(value.shape[-1]), None
                if self.limit is not None:
                    space = self.limit.space
                if heads is not None and (self.limit is None or not self.limit.by_head):
                    heads = heads.flatten()
                put(
                    value,
                    place,
                    tokens,
                    self.intervention,
                    columns=None if heads is None else heads[None],
                    space=space,
                )
        return values


def _with_all(effects: Tensor) -> Tensor:
    """Heads, and after them all of them together."""
    return torch.cat([effects, effects.sum(-1, keepdim=True)], dim=-1)


def _put(traced: Any, place: Place, value: Tensor) -> None:
    # Skipped rather than overwritten: what it would compute is not needed.
    if place.component.side == "output" and place.component.item == 0:
        skip(follow(traced, place.path), value)
    else:
        write(traced, place, value)
