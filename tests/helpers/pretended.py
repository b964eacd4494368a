"""Devices that are not there: tensors that meet on two of them are found on a CPU.

Each tensor is told on which device it pretends to lie, and all are computed on the CPU. What torch
would refuse is refused: an operation on tensors of two devices, but for numbers without an axis and
indices, which may lie in host memory. Float64 is refused too, which not all devices have. As with
accelerate, weights are put on devices by name, and its own hooks move what layers are given.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import accelerate
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
#: Where a tensor's device stands.
_MARK = "_pretended"
#: Operations that copy from one device to another, or look at several tensors each by itself.
_ACROSS = {
    Tensor.copy_,
    Tensor.__len__,
    torch.autograd.grad,
    torch.autograd.backward,
    Tensor.backward,
    Tensor.register_hook,
    Tensor.shape.__get__,
    torch.broadcast_shapes,
    torch.result_type,
    torch.promote_types,
    Tensor.expand_as,
    Tensor.view_as,
    Tensor.reshape_as,
    torch.zeros_like,
    torch.ones_like,
    torch.empty_like,
    torch.full_like,
    torch.rand_like,
    torch.randn_like,
}
#: What moves a tensor.
_TO = (Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.type_as)
_DEVICE = Tensor.device.__get__
_IS_CUDA = Tensor.is_cuda.__get__
_TO_NUMPY = (Tensor.numpy, Tensor.__array__)
_NEW = nn.Parameter.__new__
_READ = (Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_, Tensor.index_put)


class DevicesMeetError(RuntimeError):
    """Tensors of two devices meet in an operation that torch does not do."""


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor pretends to lie."""
    found: torch.device = getattr(tensor, _MARK, CPU)
    return found


def put_on(tensor: Tensor, device: Any) -> None:
    """Let a tensor pretend to lie on a device."""
    where = _named(device)
    if tensor.dtype == torch.float64 and where.type not in ("cpu", "meta"):
        raise TypeError(f"{where} has no float64, as Apple's devices do")
    setattr(tensor, _MARK, where)


def _named(device: Any) -> torch.device:
    if isinstance(device, int):
        return torch.device("cuda", device)
    found = torch.device(device)
    return torch.device("cuda", 0) if found == torch.device("cuda") else found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def _told(value: Any, device: torch.device, known: set[int]) -> Any:
    """What an operation gives, with its device."""
    if isinstance(value, Tensor):
        if id(value) not in known:
            put_on(value, device)
    elif isinstance(value, tuple | list):
        for each in value:
            _told(each, device, known)
    elif isinstance(value, Iterator):
        return iter([_told(each, device, known) for each in value])
    return value


class Pretending(TorchFunctionMode):
    """While this holds, tensors lie where they pretend to."""

    def __init__(self) -> None:
        super().__init__()
        #: How many operations there were on tensors of each device.
        self.seen: dict[torch.device, int] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == _DEVICE:
            return device_of(args[0])
        if func == _IS_CUDA:
            return device_of(args[0]).type == "cuda"
        if func in _TO:
            return self._moved(func, *args, **kwargs)
        if func in _TO_NUMPY and device_of(args[0]) != CPU:
            raise TypeError(f"can't convert {device_of(args[0])} device type tensor to numpy")
        named = kwargs.pop("device", None)
        device = self._common(func, args, kwargs)
        if named is not None:
            device = _named(named)
        if device.type == "meta":
            return func(*args, **kwargs, device="meta")
        if named is not None:
            kwargs["device"] = CPU
        self.seen[device] = self.seen.get(device, 0) + 1
        before = [*_tensors(args), *_tensors(kwargs)]
        found = func(*args, **kwargs)
        if func is torch.autograd.grad:
            asked = args[1] if len(args) > 1 else kwargs["inputs"]
            for gradient, at in zip(found, _tensors(asked), strict=True):
                if gradient is not None:
                    put_on(gradient, device_of(at))
            return found
        return _told(found, device, {id(each) for each in before if hasattr(each, _MARK)})

    def _moved(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own = device_of(tensor)
        device = CPU if func is Tensor.cpu else own
        if func is Tensor.cuda:
            device, args = _named(args[0] if args else 0), ()
            kwargs.pop("device", None)
        rest: list[Any] = []
        for each in args:
            if isinstance(each, Tensor):
                device = device_of(each)
                rest.append(each.dtype)
            elif isinstance(each, str | torch.device) or type(each) is int:
                device = _named(each)
            else:
                rest.append(each)
        if func is Tensor.to and kwargs.get("device") is not None:
            device = _named(kwargs["device"])
        kwargs.pop("device", None)
        if isinstance(kwargs.get("other"), Tensor):
            other = kwargs.pop("other")
            device, kwargs["dtype"] = device_of(other), other.dtype
        if device.type == "meta":
            return Tensor.to(tensor, "meta", *rest, **kwargs)
        found = Tensor.to(tensor, *rest, **kwargs) if rest or kwargs else tensor
        if found is tensor and device != own:
            found = tensor.clone()
        if found is not tensor:
            put_on(found, device)
        return found

    def _common(self, func: Any, args: Any, kwargs: Any) -> torch.device:
        """The device on which an operation is done."""
        given = [*_tensors(args), *_tensors(kwargs)]
        if func in _ACROSS:
            return device_of(given[0]) if given else CPU
        if func in _READ:
            return self._indexed(func, args, kwargs)
        devices = {device_of(each) for each in given}
        if len(devices) > 1:
            # A number without an axis may come from host memory.
            devices = {device_of(each) for each in given if each.ndim or device_of(each) != CPU}
        if len(devices) > 1:
            name = getattr(func, "__qualname__", func)
            told = ", ".join(f"{list(each.shape)} on {device_of(each)}" for each in given)
            raise DevicesMeetError(f"{name} of {told}")
        return next(iter(devices), CPU)

    def _indexed(self, func: Any, args: Any, kwargs: Any) -> torch.device:
        own, index, *rest = args
        device = device_of(own)
        index_on = {device_of(each) for each in _tensors(index)}
        if not index_on <= {device, CPU}:
            raise DevicesMeetError(f"{func.__qualname__} of {device} at indices on {index_on}")
        # Slices are copied to, from wherever.
        values = [each for each in _tensors(rest) if index_on and each.ndim]
        others = {device_of(each) for each in values} - {device}
        if others:
            raise DevicesMeetError(f"{func.__qualname__} into {device} from {others}")
        return device


@contextmanager
def pretending(free: int = 2**30) -> Iterator[Pretending]:
    """While this holds, tensors lie where they pretend to, on devices with some free bytes."""
    with ExitStack() as stack:
        for name, value in {
            "mem_get_info": (free, 2 * free),
            "memory_reserved": 0,
            "memory_allocated": 0,
            "get_device_name": "pretended",
        }.items():
            told = functools.partial(_always, value)
            stack.enter_context(patch.object(torch.cuda, name, told))
        # Whatever this machine has.
        kind = functools.partial(torch.device, "cuda")
        stack.enter_context(patch("nnpatch_core._wrappers.accelerator", kind))
        # What makes a parameter is no operation.
        stack.enter_context(patch.object(nn.Parameter, "__new__", staticmethod(_parameter)))
        # Its warning that there are none would be true.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", ".*device_type of 'cuda'", UserWarning)
        yield stack.enter_context(Pretending())


def _parameter(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
    made = _NEW(cls, data, requires_grad)
    if data is not None:
        put_on(made, device_of(data))
    return made


def _always(value: Any, *_: Any) -> Any:
    return value


def device_map(model: Any, layers: Sequence[int], head: int) -> dict[str, int]:
    """Devices for all modules of a model, as accelerate names them.

    Args:
        model: the model.
        layers: the device of each layer; the embedding's is that of the first one's other.
        head: that of all that comes after the layers, where it is not tied to the embedding.
    """
    embedding, unembedding = model.get_input_embeddings(), model.get_output_embeddings()
    first = 1 - layers[0]
    tied = embedding.weight is unembedding.weight
    found: dict[str, int] = {}

    def walk(path: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            own = f"{path}{name}"
            if isinstance(child, nn.ModuleList) and len(child) == len(layers):
                found.update({f"{own}.{n}": device for n, device in enumerate(layers)})
            elif any(isinstance(each, nn.ModuleList) for each in child.modules()):
                walk(f"{own}.", child)
            else:
                after = bool(found) and any(name.endswith(".0") for name in found)
                after = after and not (tied and child is unembedding)
                found[own] = head if after else first

    walk("", model)
    return found


def spread(model: Any, where: Mapping[str, int]) -> Any:
    """Put a model's modules on devices that are not there, as accelerate would.

    Args:
        model: the model, whose modules are all named.
        where: the path of each module, and its device.
    """
    # It puts its hooks where they belong, and then they are told where that is.
    accelerate.dispatch_model(
        model, device_map=dict.fromkeys(where, "cpu"), main_device="cpu", force_hooks=True
    )
    main = next(iter(where.values()))
    for path, module in model.named_modules():
        device = next((where[name] for name in _around(path) if name in where), main)
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            if each is not None:
                each.execution_device = device
        for weight in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            assert device_of(weight) in (CPU, _named(device)), "tied weights on two devices"
            put_on(weight, device)
    model.hf_device_map = dict(where)
    return model


def _around(path: str) -> Iterator[str]:
    """A path, and those of the modules around it."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        yield ".".join(parts[:end])
