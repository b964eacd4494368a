"""Hooks on the output of one layer of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nnpatch.subspace._projection import LowRankOrthogonalProjection
from nnpatch_core.errors import LayerError, SubspaceError


class _LayerHook:
    """Stands on a layer from `attach` until `remove`, and may be switched off in between."""

    def __init__(
        self,
        proj: LowRankOrthogonalProjection,
        layer: int,
        device: torch.device | str | None,
        last_token_only: bool,
    ) -> None:
        self.proj = proj
        self.layer = layer
        self.last_token_only = last_token_only
        self.hook: Any = None
        self._activated = True
        if device is not None:
            proj.to(device)

    def attach(self, model: Any) -> Any:
        """Put the hook on the layer of a model, plain or wrapped by nnsight.

        Returns:
            torch's handle of the hook.

        Raises:
            SubspaceError: it stands on a layer already, or the model keeps its layers elsewhere
                than `model.model.layers`.
            LayerError: the model has no such layer.
        """
        if self.hook is not None:
            raise SubspaceError("the hook stands on a layer already: call remove() first")
        layers = _layers(model)
        if not isinstance(self.layer, int) or not 0 <= self.layer < len(layers):
            raise LayerError(
                f"layer {self.layer!r} is out of range: the model has {len(layers)} layers, from 0"
            )
        module: nn.Module = layers[self.layer]
        self.hook = module.register_forward_hook(self)
        return self.hook

    def remove(self) -> None:
        """Take the hook off its layer.

        Raises:
            SubspaceError: it stands on none.
        """
        if self.hook is None:
            raise SubspaceError("the hook stands on no layer: call attach(model) first")
        self.hook.remove()
        self.hook = None

    def activate(self) -> None:
        """Switch it on."""
        self._activated = True

    def deactivate(self) -> None:
        """Switch it off, and leave it where it is."""
        self._activated = False

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self._activated:
            return None
        whole = output[0] if isinstance(output, tuple) else output
        self.proj.to(whole.device)
        changed = self._seen(whole)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def _seen(self, whole: Tensor) -> Tensor | None:
        """The layer's output `[batch, seq, width]` as changed, or None."""
        raise NotImplementedError

    def _target(self, whole: Tensor) -> Tensor:
        return whole[:, -1, :] if self.last_token_only else whole


class SteerHook(_LayerHook):
    """Holds the coordinates of a layer's output at a value, in each pass of the model.

    Args:
        proj: the projection.
        layer: 0 is the first.
        value: `[batch]`, or `[batch, rank]`, one for each prompt; a number is that of all prompts.
        device: where the projection is put; by default where the layer's output is.
        last_token_only: the last token of each pass alone; False is every token.

    Examples:
        >>> from nnpatch_core.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> hook = SteerHook(LowRankOrthogonalProjection(model.config.hidden_size), layer=1)
        >>> handle = hook.attach(model)
        >>> hook.set_value(torch.tensor([6.0]))
        >>> out = model(input_ids=torch.tensor([[1, 2, 3]]))
        >>> hook.remove()
    """

    def __init__(
        self,
        proj: LowRankOrthogonalProjection,
        layer: int,
        value: Tensor | float | None = None,
        device: torch.device | str | None = None,
        last_token_only: bool = True,
    ) -> None:
        super().__init__(proj, layer, device, last_token_only)
        self.value = value

    def set_value(self, value: Tensor | float) -> None:
        """Set the value, and switch the hook on."""
        self.value = value
        self.activate()

    def get_value(self, output: Tensor) -> Tensor:
        """The values `[batch]` or `[batch, rank]` for a layer's output `[batch, seq, width]`.

        Raises:
            SubspaceError: no value was set.
        """
        if self.value is None:
            raise SubspaceError("no value was set: call set_value(value) first")
        basis = self.proj.weight
        value = torch.as_tensor(self.value, dtype=basis.dtype, device=output.device)
        return value if value.ndim else value.expand(len(output), basis.shape[1])

    def _seen(self, whole: Tensor) -> Tensor:
        changed = self.proj.constant_forward(self.get_value(whole), self._target(whole))
        changed = changed.to(whole.dtype)
        if self.last_token_only:
            return torch.cat([whole[:, :-1], changed[:, None]], dim=1)
        return changed


class BinaryHook(SteerHook):
    """A `SteerHook` of two values, between which it is switched.

    Args:
        proj: the projection.
        layer: 0 is the first.
        value_a: the first; it is set to begin with.
        value_b: the second.
        last_token_only: see `SteerHook`.
    """

    def __init__(
        self,
        proj: LowRankOrthogonalProjection,
        layer: int,
        value_a: float = 6.0,
        value_b: float = -6.0,
        last_token_only: bool = True,
    ) -> None:
        super().__init__(proj, layer, value_a, last_token_only=last_token_only)
        self.value_a = value_a
        self.value_b = value_b

    def set_constant_a(self) -> None:
        """The first value for all prompts."""
        self.set_value(self.value_a)

    def set_constant_b(self) -> None:
        """The second value for all prompts."""
        self.set_value(self.value_b)

    def set_binary(self, value: Tensor) -> None:
        """The second value for prompts that are True in `[batch]`, the first for the others.

        Raises:
            SubspaceError: they are neither true nor false.
        """
        chosen = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
        if chosen.ndim != 1 or not bool(((chosen == 0) | (chosen == 1)).all()):
            raise SubspaceError(f"value must be [batch], each true or false, got {value}")
        self.set_value(torch.where(chosen.bool(), self.value_b, self.value_a))


class FeatureCollectionHook(_LayerHook):
    """Collects the coordinates of a layer's output.

    Args:
        proj: the projection.
        layer: 0 is the first.
        device: where the projection is put; by default where the layer's output is.
        last_token_only: the last token of each pass alone; False is every token.
        only_one_forward: the hook takes itself off the layer after one pass.
    """

    def __init__(
        self,
        proj: LowRankOrthogonalProjection,
        layer: int,
        *,
        device: torch.device | str | None = None,
        last_token_only: bool = True,
        only_one_forward: bool = True,
    ) -> None:
        super().__init__(proj, layer, device, last_token_only)
        self.only_one_forward = only_one_forward
        self._features: list[Tensor] = []

    @property
    def features(self) -> Tensor:
        """The coordinates `[prompts, rank]` or `[prompts, seq, rank]` of the passes so far.

        Raises:
            SubspaceError: there was no pass, or they are of several lengths.
        """
        lengths = {each.shape[1:] for each in self._features}
        if len(lengths) != 1:
            told = f"of the shapes {[list(each.shape) for each in self._features]}"
            raise SubspaceError(
                f"the passes gave features {told}: take those of one length at a time"
                if lengths
                else "nothing was collected yet: attach the hook, and call the model"
            )
        return torch.cat(self._features)

    def _seen(self, whole: Tensor) -> None:
        self._features.append(self.proj.project(self._target(whole)).detach())
        if self.only_one_forward:
            self.remove()


def _layers(model: Any) -> Any:
    """The layers of a model, or of what nnsight has wrapped."""
    inner = getattr(model, "_module", model)
    for _ in range(3):
        found = getattr(inner, "layers", None)
        if isinstance(found, nn.ModuleList):
            return found
        inner = getattr(inner, "model", None)
    raise SubspaceError(
        f"a {type(model).__name__} has no model.model.layers: steer it with nnpatch_core.steering, "
        "which knows where the layers of other families are"
    )
