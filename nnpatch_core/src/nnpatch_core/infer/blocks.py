"""Finds the modules of a layer that add to the residual stream, by what adds up to what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import permutations
from typing import TypeAlias

import attrs
import torch
from torch import Tensor

from nnpatch_core._rounding import as_typed
from nnpatch_core.adapters import Component, Residual
from nnpatch_core.infer.probe import Calls, LayerProbe, same

#: Paths of two modules, the one that ends first before the other.
Pair: TypeAlias = tuple[str, str]


@attrs.frozen
class Blocks:
    """The components of a layer that add to its residual stream.

    Args:
        components: `attn` and `mlp`, as far as there are such, in execution order.
        residual: as `DecoderAPI` has it.
        mixer: path of a block that mixes tokens without being attention by its name.
    """

    components: dict[str, Component]
    residual: Residual | None
    mixer: str | None = None


def find_blocks(probe: LayerProbe) -> Blocks:
    """Find the blocks that add to the residual stream: one that mixes tokens, one that does not."""
    calls = probe.run()
    layer = calls.get("")
    if layer is None or layer.entered is None or layer.left is None:
        return Blocks({}, None)
    pre, resid = layer.entered, layer.left
    added = _addable(calls, pre)
    pairs = [pair for pair in permutations(added, 2) if calls[pair[0]].ended < calls[pair[1]].begun]
    pairs.sort(key=lambda pair: sum(_depth(calls, path) for path in pair))
    for residual, match in _matches(calls, pre, resid):
        for pair in pairs:
            if match(*pair):
                return _named(probe, calls, pair, residual)
    for path in added:
        if same(pre + _left(calls, path), resid).all():
            return _named(probe, calls, (path,), "sum")
    return Blocks({}, None)


def _addable(calls: Calls, pre: Tensor) -> list[str]:
    """List the modules whose output could be added to the residual stream, outermost first."""
    paths = [
        path
        for path, call in calls.items()
        if path and call.left is not None and call.left.shape == pre.shape and call.left.any()
    ]
    return sorted(paths, key=lambda path: _depth(calls, path))


def _depth(calls: Calls, path: str) -> float:
    """Sorts paths: outermost first; of equals, the one that comes first."""
    return path.count(".") + calls[path].begun / 1e6


def _left(calls: Calls, path: str) -> Tensor:
    left = calls[path].left
    if left is None:
        raise KeyError(path)
    return left


def _matches(
    calls: Calls, pre: Tensor, resid: Tensor
) -> Iterator[tuple[Residual | None, Callable[[str, str], bool]]]:
    """Give the ways in which a layer may use its two blocks, and a test of each."""

    def summed(first: str, second: str) -> bool:
        total = pre + _left(calls, first) + _left(calls, second)
        return bool(same(total, resid).all())

    def scaled(first: str, second: str) -> bool:
        parts = torch.stack([pre, _left(calls, first), _left(calls, second)], -1).float()
        solution = torch.linalg.lstsq(
            parts.flatten(0, -2), resid.float().flatten()[:, None]
        ).solution
        with as_typed(parts):
            fits = same((parts @ solution)[..., 0], resid).all()
        return bool(fits and (solution.abs() > 1e-3).all())

    def normed(first: str, second: str) -> bool:
        """Each sum is handed to a norm, whose output goes on."""
        for norm in _fed(calls, pre + _left(calls, first)):
            for last in _fed(calls, norm + _left(calls, second)):
                if same(last, resid).all():
                    return True
        return False

    yield "sum", summed
    yield "scaled", scaled
    yield None, normed


def _fed(calls: Calls, value: Tensor) -> Iterator[Tensor]:
    """Give the outputs of the modules whose input is `value`."""
    for call in calls.values():
        if call.entered is None or call.left is None or call.entered.shape != value.shape:
            continue
        if call.left.shape == value.shape and same(call.entered, value).all():
            yield call.left


def _named(
    probe: LayerProbe, calls: Calls, paths: tuple[str, ...], residual: Residual | None
) -> Blocks:
    """Name the blocks: the one that mixes tokens is attention, by its name or its class."""
    ordered = sorted(paths, key=lambda path: calls[path].begun)
    # The first one depends on the layer's input alone; so does the second, if they are parallel.
    mixer = next((path for path in ordered if _mixes_tokens(probe, calls, path)), None)
    components, unnamed = {}, None
    for path in ordered:
        component = Component(path, item=calls[path].item)
        if path != mixer:
            components["mlp"] = component
        elif _is_attention(probe, path):
            components["attn"] = component
        else:
            unnamed = path
    return Blocks(components, residual, unnamed)


def _is_attention(probe: LayerProbe, path: str) -> bool:
    """Whether a block, or for a norm behind it one of the layer's children, is called attention."""
    module = probe.layer.get_submodule(path)
    names = [path, type(module).__name__]
    if not any(True for _ in module.children()):
        names += [name for name, _ in probe.layer.named_children()]
    return any("att" in name.lower() for name in names)


def _mixes_tokens(probe: LayerProbe, calls: Calls, path: str) -> bool:
    """Whether a module's output at a token depends on the tokens before."""
    position = 1
    changed = probe.run(None, lambda value: _turned(value, position), entry=True)
    if path not in changed:
        return False
    before, after = _left(calls, path), _left(changed, path)
    later = slice(position + 1, None)
    return not same(before, after)[:, later].all()


def _turned(value: Tensor, position: int) -> Tensor:
    edited = value.clone()
    edited[:, position] = -edited[:, position]
    return edited
