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
from nnpatch_core.adapters import ModelAPI, components, heads_of, table_of
from nnpatch_core.errors import GradientError
from nnpatch_core.gradients.graph import Graph
from nnpatch_core.gradients.terms import columns_of, own_columns, row_at
from nnpatch_core.seq_pos import Group
from nnpatch_core.site import Site
from nnpatch_core.tracing import Replacement, call, forward_hooks, in_words, of_rows

_PROJECTIONS = ("q", "k", "v")
#: Numbers a row: unpatched; all queries of a prompt; or the keys at one group of positions.
_UNPATCHED, _QUERIES, _KEYS = -2, -1, 0


def attention_sites(api: ModelAPI, model: Any, layer: int) -> list[Site]:
    """The sites of a layer's attention that the QK fix looks at.

    Raises:
        GradientError: the adapter does not have all of them.
    """
    table = table_of(api, model, layer)
    missing = [name for name in (*_PROJECTIONS, "o") if name not in table]
    if missing:
        raise GradientError(
            f"the QK fix needs q, k, v and o of a layer, and adapter {api.name!r} has no "
            f"{', '.join(missing)} in layer {layer}"
        )
    return [Site(api, name, layer) for name in (*_PROJECTIONS, "o")]


def attention_module(api: ModelAPI, model: Any, layer: int) -> str:
    """Path, inside a layer, of the module that its projections of queries, keys and values are in.

    Raises:
        GradientError: they are in no one module.
    """
    paths = [row_at(site, model).module for site in attention_sites(api, model, layer)]
    parts = [path.split(".")[:-1] for path in paths]
    common = 0
    while all(len(part) > common for part in parts) and len({part[common] for part in parts}) == 1:
        common += 1
    if not common:
        raise GradientError(
            f"the QK fix runs a layer's attention by itself, and with adapter {api.name!r} its "
            f"projections are in no one module: {', '.join(paths)}"
        )
    return ".".join(parts[0][:common])


@attrs.frozen(eq=False)
class Attention:
    """A layer's attention, ready to be run again.

    Args:
        nnmodel: the model, wrapped by nnsight.
        graph: the forward that it was run in, which has its sites.
        api: the adapter.
        layer: the layer.
        replacement: what is put at its queries and keys.
        rows: how many rows may run together.
    """

    nnmodel: Any
    graph: Graph
    api: ModelAPI
    layer: int
    replacement: Replacement
    rows: int

    def effects(
        self, cotangents: Tensor, queries: bool, groups: Sequence[Group]
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
        batch, seq_len = self.replacement.mask.shape
        o = Site(self.api, "o", self.layer)
        columns = columns_of(o, model, cotangents.shape[-1])
        counts = heads_of(self.api, model, self.layer)
        by_heads = cotangents[..., columns]
        device, many = cotangents.device, len(cotangents)
        of_queries = cotangents.new_zeros(many, batch, seq_len, counts.query)
        of_keys = cotangents.new_zeros(many, batch, len(groups), counts.query)
        # Backwards, so that what has a row for each token is not taken for what has one a prompt.
        backwards = [(prompt, _UNPATCHED) for prompt in reversed(range(batch))]
        before = self._run(backwards, groups).flip(0)
        expected = self.graph.activations[o.location(self.nnmodel)]
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
        real = self.replacement.mask.bool().to(device)
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
                    found = torch.einsum("mshd,rshd->mrh", of_prompt, moved[at_keys])
                of_keys[:, prompt, numbers[at_keys]] = found
        # A key is shared by the query heads of its group.
        group = counts.query // counts.key_value
        shared = of_keys.view(*of_keys.shape[:-1], counts.key_value, group).sum(-1)
        return (
            _with_all(of_queries) if queries else None,
            _with_all(shared) if groups else None,
        )

    def _check(self, found: Tensor, expected: Tensor, hooked: str) -> None:
        allowed = rounding(found.dtype) * float(expected.detach().abs().max())
        gap = float((found - expected.detach()).abs().max())
        if not gap <= allowed:
            raise GradientError(
                f"the QK fix cannot be applied: the attention of layer {self.layer}, run by "
                f"itself{hooked} gives other values than in the model, off by {gap:.3g} where "
                f"rounding explains {allowed:.3g}"
            )

    def _run(self, jobs: Sequence[tuple[int, int]], groups: Sequence[Group]) -> Tensor:
        """What the heads hand on, `[jobs, seq, width]`."""
        model = module_of(self.nnmodel)
        path = f"{self.api.layers}.{self.layer}.{attention_module(self.api, model, self.layer)}"
        batch = len(self.replacement.mask)
        which = torch.tensor([prompt for prompt, _ in jobs], device="cpu")
        args, kwargs = (of_rows(given, which, batch) for given in self.graph.calls[path])
        given = self._projections(jobs, groups)
        *sites, o = attention_sites(self.api, model, self.layer)
        out: list[Tensor] = []

        def visit(traced: Any) -> None:
            done = set()
            for site in sites:
                location = site.location(traced)
                if location not in done:
                    done.add(location)
                    _put(follow(traced, location[0]), row_at(site, model), given[location])
            envoy = follow(traced, o.location(traced)[0])
            out.append(components.read(envoy, row_at(o, model)).clone())

        try:
            call(self.nnmodel, path, args, kwargs, visit)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise GradientError(
                f"the QK fix cannot be applied: the attention of layer {self.layer} does not run "
                f"by itself: {type(error).__name__}: {error}"
            ) from error
        return out[0]

    def _projections(
        self, jobs: Sequence[tuple[int, int]], groups: Sequence[Group]
    ) -> dict[Any, Tensor]:
        """What the projections give in each row, `[jobs, seq, width]` for each location."""
        model = module_of(self.nnmodel)
        device = next(iter(self.graph.activations.values())).device
        which = torch.tensor([prompt for prompt, _ in jobs], device=device)
        kinds = torch.tensor([kind for _, kind in jobs], device=device)
        real = self.replacement.mask.bool().to(device)[which]
        where_keys = torch.zeros_like(real)
        for number, group in enumerate(groups):
            rows = (kinds == number).nonzero().flatten()
            where_keys[rows[:, None], torch.tensor(group, device=device)] = True
        where = {"q": (kinds == _QUERIES)[:, None] & real, "k": where_keys & real}
        found: dict[Any, Tensor] = {}
        for site in attention_sites(self.api, model, self.layer)[:-1]:
            location = site.location(self.nnmodel)
            if location not in found:
                found[location] = self.graph.activations[location].detach()[which]
            if site.component in where and bool(where[site.component].any()):
                value = found[location]
                there = where[site.component][..., None] & own_columns(site, model, value)
                put = self.replacement.at(location)
                other = torch.zeros_like(value[:1]) if put is None else put.to(device, value.dtype)
                rows_of = which if len(other) > 1 else torch.zeros_like(which)
                found[location] = torch.where(there, other[rows_of], value)
        return found


def _with_all(effects: Tensor) -> Tensor:
    """Heads, and after them all of them together."""
    return torch.cat([effects, effects.sum(-1, keepdim=True)], dim=-1)


def _put(envoy: Any, row: components.Component, value: Tensor) -> None:
    # Skipped rather than overwritten: what it would compute is not needed.
    if row.side == "output" and row.item == 0:
        envoy.skip(value)
    else:
        components.write(envoy, row, value)
