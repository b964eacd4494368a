"""On which device each layer of a model runs, as accelerate or the user has placed it."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import nn

from nnpatch_core._devices import numbered
from nnpatch_core._models import input_device
from nnpatch_core._ranges import ranges
from nnpatch_core._wrappers import hooked_device


@attrs.frozen
class Placement:
    """On which device each layer of a model runs.

    A layer whose weights are offloaded runs where they are moved to.

    Args:
        first: the device on which tokens are embedded.
        layers: for each layer its device.
        head: the device on which logits are computed.
    """

    first: str
    layers: tuple[str, ...]
    head: str

    @property
    def kinds(self) -> str:
        """The kinds of devices that layers run on, in words.

        Examples:
            >>> Placement("cuda:0", ("cuda:0", "cuda:1"), "cuda:1").kinds
            'cuda'
            >>> Placement("cuda:0", ("cuda:0", "cuda:1", "cpu"), "cpu").kinds
            'cuda (layers 0-1), cpu (layer 2)'
        """
        kinds = [torch.device(each).type for each in self.layers]
        every = dict.fromkeys(kinds)
        if len(every) < 2:
            return ", ".join(every)
        of = {each: [number for number, kind in enumerate(kinds) if kind == each] for each in every}
        return ", ".join(
            f"{each} (layer{'s' * (len(layers) > 1)} {ranges(layers)})"
            for each, layers in of.items()
        )

    @property
    def devices(self) -> tuple[str, ...]:
        """Each device once, in the order in which a forward comes to them."""
        return tuple(dict.fromkeys((self.first, *self.layers, self.head)))

    @property
    def working(self) -> tuple[str, ...]:
        """Those that do more than to embed tokens."""
        return tuple(dict.fromkeys((*self.layers, self.head)))

    @property
    def several(self) -> bool:
        """Whether a model lies on more than one device."""
        return len(self.devices) > 1

    def layers_on(self, device: str) -> tuple[int, ...]:
        """The layers of one device."""
        return tuple(number for number, each in enumerate(self.layers) if each == device)


def placement_of(model: Any, layers: str) -> Placement:
    """Find out on which device each layer of a model runs; nothing is moved or run.

    Args:
        model: the Hugging Face model.
        layers: dotted path of its list of layers.
    """
    first = str(numbered(input_device(model) or torch.device("cpu")))
    each = model.get_submodule(layers).children()
    found = tuple(_device_of(layer, first) for layer in each)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    last = found[-1] if found else first
    return Placement(first, found, last if head is None else _device_of(head, last))


def _device_of(module: nn.Module, otherwise: str) -> str:
    """Where a module runs; what only the meta device has runs where its neighbour does."""
    devices = [hooked_device(each) for each in module.modules()]
    devices += [weight.device for weight in module.parameters() if not weight.is_meta]
    return next((str(numbered(device)) for device in devices if device is not None), otherwise)
