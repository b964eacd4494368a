"""Runs one layer alone, on what it was given in a forward, and notes what its modules do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor, nn

from nnpatch_core._models import evaluating, forward_arguments, input_device
from nnpatch_core._upstream import Cache
from nnpatch_core._wrappers import parts_of_adapters
from nnpatch_core.batch import Batch

Edit: TypeAlias = Callable[[Tensor], Tensor]
#: Share of the largest number of an activation below which a difference is rounding.
_ROUNDING = {torch.float16: 1e-2, torch.bfloat16: 5e-2}


@attrs.define(eq=False)
class Call:
    """One call of a module: input and output, as far as they are `[batch, seq, width]`, and when.

    Args:
        entered: its first input.
        left: its output, or the first such item of the tuple that it gives.
        item: which item that is.
        begun: when it was called, counting the calls and returns of the layer's modules.
        ended: when it returned.
        times: how often it ran.
    """

    entered: Tensor | None = None
    left: Tensor | None = None
    item: int = 0
    begun: int = 0
    ended: int = 0
    times: int = 0


Calls: TypeAlias = Mapping[str, Call]


@attrs.frozen(eq=False)
class LayerProbe:
    """A layer, and the arguments that it was called with in a forward of tokens, `shape`."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shape: torch.Size

    def run(
        self, path: str | None = None, edit: Edit | None = None, *, entry: bool = False
    ) -> Calls:
        """Run the layer, with `edit` on the output of the module at `path`, or on what it is given.

        Returns:
            Path to `Call` for each module that ran once; `""` is the layer itself.
        """
        args, kwargs = list(self.args), dict(self.kwargs)
        if entry and edit is not None:
            if args:
                args[0] = edit(args[0])
            else:
                first = next(iter(kwargs))
                kwargs[first] = edit(kwargs[first])
        calls: dict[str, Call] = {}
        clock = iter(range(1_000_000))
        hooks = []
        inside = parts_of_adapters(self.layer)
        for name, module in self.layer.named_modules():
            # What is numbered is one of many, such as an expert, and no place of its own; nor is
            # what an adapted module is made of.
            if name in inside or any(part.isdigit() for part in name.split(".")):
                continue
            calls[name] = Call()
            if name == path and edit is not None:
                hooks.append(module.register_forward_hook(partial(_edited, edit, self.shape)))
            begin = partial(_begin, calls[name], clock, self.shape)
            hooks.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            end = partial(_end, calls[name], clock, self.shape)
            hooks.append(module.register_forward_hook(end))
        try:
            with evaluating(self.layer), torch.no_grad():
                self.layer(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        own = calls[""]
        if own.entered is not None and own.left is not None:
            # What comes in may still lie on the device of the layer before.
            own.entered = own.entered.to(own.left.device)
        return {name: call for name, call in calls.items() if call.times == 1}


def capture(model: nn.Module, batch: Batch) -> dict[str, list[LayerProbe]]:
    """Run the model, and find each list of modules that behaves like its layers.

    Returns:
        Path of the list to a probe of each layer: each ran once, in order, and was given what the
        one before it gave.
    """
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    # An edit in place may come later, so what is kept is a copy.
    seen: dict[str, list[tuple[int, LayerProbe, Tensor | None, Tensor | None]]] = {}
    hooks = []
    for path, module in lists.items():
        for number, child in enumerate(module):
            note = partial(_note, seen.setdefault(path, []), number, batch.tokens.shape)
            hooks.append(child.register_forward_hook(note, with_kwargs=True))
    device = input_device(model)
    arguments = forward_arguments(model, batch if device is None else batch.to(device))
    try:
        with evaluating(model), torch.no_grad():
            model(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    probes = {}
    for path, calls in seen.items():
        numbers = [number for number, *_ in calls]
        if numbers == list(range(len(lists[path]))) and _chained(calls):
            probes[path] = [probe for _, probe, *_ in calls]
    return probes


def _chained(calls: list[tuple[int, LayerProbe, Tensor | None, Tensor | None]]) -> bool:
    if any(entered is None or left is None for *_, entered, left in calls):
        return False
    return all(
        left is not None and entered is not None and left.equal(entered)
        for (*_, left), (*_, entered, _) in pairwise(calls)
    )


def _note(
    seen: list[Any],
    number: int,
    shape: torch.Size,
    layer: nn.Module,
    args: Any,
    kwargs: Any,
    output: Any,
) -> None:
    entered, left = _first(args, kwargs, shape), _item(output, shape)[1]
    # A family may fill a cache although it is told not to; a second run must not find it.
    fresh = tuple(None if isinstance(value, Cache) else value for value in args)
    named = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    probe = LayerProbe(layer, fresh, named, shape)
    seen.append((number, probe, entered, None if left is None else left.clone()))


def _begin(call: Call, clock: Any, shape: torch.Size, _: nn.Module, args: Any, kwargs: Any) -> None:
    entered = _first(args, kwargs, shape)
    call.entered = None if entered is None else entered.clone()
    call.begun = next(clock)
    call.times += 1


def _end(call: Call, clock: Any, shape: torch.Size, _: nn.Module, args: Any, output: Any) -> None:
    call.item, left = _item(output, shape)
    call.left = None if left is None else left.clone()
    call.ended = next(clock)


def _edited(edit: Edit, shape: torch.Size, _: nn.Module, args: Any, output: Any) -> Any:
    item, left = _item(output, shape)
    if left is None:
        return output
    if isinstance(output, tuple | list):
        edited = edit(left).reshape(output[item].shape)
        return type(output)((*output[:item], edited, *output[item + 1 :]))
    return edit(left).reshape(output.shape)


def _activation(value: Any, shape: torch.Size) -> Tensor | None:
    """`value` as `[batch, seq, width]`, if that is what it is, or all tokens in a row."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    if value.ndim == 2 and len(value) == shape[0] * shape[1]:
        return value.view(*shape, -1)
    return value if value.ndim == 3 and value.shape[:2] == shape else None


def _first(args: Any, kwargs: Any, shape: torch.Size) -> Tensor | None:
    """The first input, as a site of side "input" has it."""
    return _activation(next(iter((*args, *kwargs.values())), None), shape)


def _item(output: Any, shape: torch.Size) -> tuple[int, Tensor | None]:
    if not isinstance(output, tuple | list):
        return 0, _activation(output, shape)
    for item, value in enumerate(output):
        activation = _activation(value, shape)
        if activation is not None:
            return item, activation
    return 0, None


def same(first: Tensor, second: Tensor) -> Tensor:
    """Tell, elementwise, whether two activations are equal but for rounding."""
    scale = torch.maximum(first.abs().max(), second.abs().max()).float()
    gap = (first.float() - second.float()).abs()
    return gap <= _ROUNDING.get(first.dtype, 1e-4) * scale
