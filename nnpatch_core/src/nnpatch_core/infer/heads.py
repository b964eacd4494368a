"""Finds the projections of heads in a layer, by what turning their output round does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import attrs
import torch
from torch import Tensor, nn

from nnpatch_core._wrappers import as_it_was
from nnpatch_core.adapters import (
    Component,
    Fused,
    HeadColumns,
    Heads,
    Interleaved,
    PartOfHead,
    consecutive,
)
from nnpatch_core.infer.probe import Calls, LayerProbe, same

_POSITION = 2
_LATER = slice(_POSITION + 1, None)
Part: TypeAlias = Literal["q", "k", "v"]


@attrs.frozen
class HeadComponents:
    """The components of a layer that have heads.

    Args:
        components: `q`, `k`, `v`, `o`, as far as they were found, in execution order.
        key_value: how many key/value heads there are; None where no component has such heads.
        missing: for each component that was not found, why.
    """

    components: dict[str, Component]
    key_value: int | None
    missing: dict[str, str]


class Changes(NamedTuple):
    """The numbers that change by more than rounding, and those that change at all."""

    clearly: Tensor
    ever: Tensor

    def by(self, expected: Tensor) -> bool:
        """Whether all of what is expected to change does, and clearly nothing else."""
        return bool(self.ever[expected].all() and not self.clearly[~expected].any())


@attrs.frozen(eq=False)
class _Attention:
    """A layer's attention as the search sees it."""

    probe: LayerProbe
    calls: Calls
    output: str
    heads: Heads

    @property
    def before(self) -> Tensor:
        """The input of the output projection, `[batch, seq, width]`."""
        entered = self.calls[self.output].entered
        if entered is None:
            raise KeyError(self.output)
        return entered

    def by_head(self, value: Tensor) -> Tensor:
        """`[batch, seq, query heads, dim]`."""
        return value[..., consecutive(value.shape[-1], self.heads.query).to(value.device)]

    def after(self, path: str, columns: Tensor, position: int | None) -> Tensor:
        """The input of the output projection when columns of a module are turned round."""

        def edit(value: Tensor) -> Tensor:
            edited = value.clone()
            where = slice(None) if position is None else slice(position, position + 1)
            edited[:, where, columns.to(value.device)] *= -1
            return edited

        entered = self.probe.run(path, edit)[self.output].entered
        if entered is None:
            raise KeyError(self.output)
        return entered

    def changed(self, path: str, columns: Tensor, position: int | None) -> Changes:
        """`[seq, query heads, dim]`: where that input changes, in some prompt."""
        after = self.after(path, columns, position)
        clearly = self.by_head(~same(after, self.before)).any(0)
        return Changes(clearly, self.by_head(after != self.before).any(0))

    def turned(self, path: str, columns: Tensor) -> Tensor:
        """`[query heads]`: which heads turn round as a whole, when the columns do everywhere."""
        after = self.after(path, columns, None)
        return self.by_head(same(after, -self.before)).all(-1).all(0).all(0)

    def group(self, head: int) -> Tensor:
        """`[query heads]`: those that share a key/value head."""
        size = self.heads.query // self.heads.key_value
        return torch.arange(self.heads.query, device=self.before.device) // size == head


def find_heads(
    probe: LayerProbe, query_heads: int, key_value_heads: int, config: Any, until: int | None
) -> HeadComponents:
    """Find the projections of a layer, as far as they can be told by what they do.

    Args:
        probe: the layer.
        query_heads: how many query heads the config says there are.
        key_value_heads: how many key/value heads it says, where the values do not tell.
        config: the model's text config.
        until: when, by the clock of the layer's calls, its attention ends; None if unknown.
    """
    calls = probe.run()
    paths = _projections(probe, calls, until)
    reason = "no projection is handed what heads have mixed of earlier tokens"
    for output in _outputs(probe, calls, paths):
        entered = calls[output].entered
        if entered is None or entered.shape[-1] % query_heads:
            reason = f"what {output} is handed does not split into {query_heads} heads"
            continue
        inner = [path for path in paths if calls[path].ended < calls[output].begun]
        heads = Heads(query_heads, key_value_heads, config)
        components = _search(_Attention(probe, calls, output, heads), inner)
        if components is not None:
            return components
        reason = f"nothing before {output} does to its heads what q, k or v would"
    return no_heads(reason)


def no_heads(reason: str) -> HeadComponents:
    """No component with heads, and why."""
    return HeadComponents({}, None, dict.fromkeys(("q", "k", "v", "o"), reason))


def _projections(probe: LayerProbe, calls: Calls, until: int | None) -> list[str]:
    """List modules that hold one matrix, in the order of calls; of nested ones the outermost."""
    paths: list[str] = []
    for path, call in sorted(calls.items(), key=lambda item: item[1].begun):
        inside = any(path.startswith(f"{outer}.") for outer in paths)
        late = until is not None and call.ended > until
        if path and call.left is not None and not inside and not late:
            module = as_it_was(probe.layer.get_submodule(path))
            matrices = [weight for weight in module.parameters() if weight.ndim == 2]
            if len(matrices) == 1 and not isinstance(module, nn.Embedding):
                paths.append(path)
    return paths


def _outputs(probe: LayerProbe, calls: Calls, paths: list[str]) -> Iterator[str]:
    """Give the modules that may be the output projection, the likeliest first.

    Where some earlier projection has values, turning it round turns what the output projection is
    handed round; at one token, it does something to later ones.
    """
    likely: dict[str, None] = {}
    for path in reversed(paths):
        everywhere = probe.run(path, torch.neg)
        somewhere = probe.run(path, _turn_one)
        for output in paths:
            old = calls[output].entered
            if old is None or calls[output].begun < calls[path].ended or not old.any():
                continue
            new = everywhere[output].entered if output in everywhere else None
            near = somewhere[output].entered if output in somewhere else None
            if new is None or near is None or new.shape != old.shape:
                continue
            if same(new, -old).all() and not same(near, old)[:, _LATER].all():
                likely[output] = None
    yield from likely
    # Where keys and values come from one latent projection, nothing turns round; the queries tell.
    if paths and paths[-1] not in likely:
        yield paths[-1]


def _turn_one(value: Tensor) -> Tensor:
    edited = value.clone()
    edited[:, _POSITION] *= -1
    return edited


def _search(attention: _Attention, paths: list[str]) -> HeadComponents | None:
    """Find q, k and v before an output projection; None if there is none of them."""
    dim = attention.before.shape[-1] // attention.heads.query
    taken: set[tuple[str, int]] = set()
    value = _first(attention, paths, "v", dim, taken)
    if value is not None:
        attention = attrs.evolve(attention, heads=attrs.evolve(attention.heads, key_value=value[1]))
    key = _first(attention, paths, "k", None, taken)
    query = _first(attention, paths, "q", None if key is None else key[2], taken)
    parts = {"q": query, "k": key, "v": value}
    components = {part: match[0] for part, match in parts.items() if match is not None}
    if "q" not in components and "v" not in components:
        # Nothing else tells that what was taken for the output projection is one.
        return None
    ended = {part: attention.calls[each.module].ended for part, each in components.items()}
    components = {part: components[part] for part in sorted(components, key=ended.__getitem__)}
    components["o"] = Component(attention.output, "input", heads="query")
    reason = f"none of {', '.join(paths)} does to each head what {{}} does"
    missing = {part: reason.format(part) for part in parts if part not in components}
    key_value = attention.heads.key_value if "k" in components or "v" in components else None
    return HeadComponents(components, key_value, missing)


def _first(
    attention: _Attention,
    paths: list[str],
    part: Part,
    dim: int | None,
    taken: set[tuple[str, int]],
) -> tuple[Component, int, int] | None:
    """Find the first component that acts as the part, how many key/value heads, and how wide.

    Columns in `taken` are another part's; those of the component are added.
    """
    for path in reversed(paths):
        left = attention.calls[path].left
        width = 0 if left is None else left.shape[-1]
        for heads, layout in _layouts(attention.heads, part, width, dim):
            tried = attrs.evolve(attention, heads=heads)
            count = heads.query if part == "q" else heads.key_value
            columns = consecutive(width, count) if layout is None else layout(width, heads)
            own = {(path, column) for column in columns.flatten().tolist()}
            if own & taken or dim not in (None, columns.shape[1]):
                continue
            if all(_TESTS[part](tried, path, columns[head], head) for head in range(count)):
                kind: Literal["query", "key_value"] = "query" if part == "q" else "key_value"
                item = attention.calls[path].item
                taken |= own
                component = Component(path, heads=kind, item=item, columns=layout)
                return component, heads.key_value, columns.shape[1]
    return None


def _layouts(
    heads: Heads, part: Part, width: int, dim: int | None
) -> Iterator[tuple[Heads, HeadColumns | None]]:
    """Give the layouts that a width allows, with the heads that it would then have."""
    if part == "q":
        if width % heads.query == 0:
            yield heads, None
    elif part == "v":
        if dim and width % dim == 0 and width and heads.query % (width // dim) == 0:
            yield attrs.evolve(heads, key_value=width // dim), None
    elif width % heads.key_value == 0:
        yield heads, None
    for key_value in dict.fromkeys((heads.key_value, heads.query, 1)):
        own = attrs.evolve(heads, key_value=key_value)
        if part != "v" and key_value != heads.key_value:
            continue
        if heads.query % key_value == 0 and width % (heads.query + 2 * key_value) == 0:
            yield own, Fused(part)
            yield own, Interleaved(part)
    if part == "q" and width % (2 * heads.query) == 0:
        yield heads, PartOfHead(0, 2)


def _is_query(attention: _Attention, path: str, columns: Tensor, head: int) -> bool:
    # Half of a gate, which is no query, reaches half of the head.
    for chosen in (columns, columns[: max(1, len(columns) // 2)]):
        changed = attention.changed(path, chosen, _POSITION)
        expected = torch.zeros_like(changed.ever)
        expected[_POSITION, head] = True
        if not changed.by(expected):
            return False
    return True


def _is_key(attention: _Attention, path: str, columns: Tensor, head: int) -> bool:
    own = attention.group(head)
    # Half of a value reaches half of the heads' columns.
    for chosen in (columns, columns[: max(1, len(columns) // 2)]):
        changed = attention.changed(path, chosen, _POSITION)
        if changed.clearly[:, ~own].any() or changed.clearly[:_POSITION].any():
            return False
        if not changed.ever[_LATER].any(0)[own].all():
            return False
    return not attention.turned(path, columns).any()


def _is_value(attention: _Attention, path: str, columns: Tensor, head: int) -> bool:
    own = attention.group(head)
    if not attention.turned(path, columns).equal(own):
        return False
    return not attention.changed(path, columns, None).clearly[:, ~own].any()


_TESTS = {"q": _is_query, "k": _is_key, "v": _is_value}
