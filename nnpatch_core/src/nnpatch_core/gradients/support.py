"""Which models gradients flow through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nnpatch_core._models import evaluating
from nnpatch_core._wrappers import is_spread
from nnpatch_core.errors import GradientError

#: How far a quantised module's gradient may be from what it does, as a share of that: some round
#: their input too, which a gradient does not see.
_ROUNDED = 0.1


def check_gradients(model: nn.Module) -> None:
    """Raise `GradientError` for a model whose activations can have no gradient.

    A quantised module is tried: with its numbers rounded it is linear all the same, and has a
    gradient if what computes it gives one.
    """
    if torch.is_inference_mode_enabled():
        raise GradientError(
            "torch.inference_mode() is on, which keeps no graph: leave it, or use torch.no_grad()"
        )
    name = type(model).__name__
    for path, module in model.named_modules():
        for own, weight in module.named_parameters(path, recurse=False):
            if weight.is_inference():
                raise GradientError(
                    f"the weights of {name} were made in inference mode ({own!r}), and no graph "
                    "can go through them: load the model outside of torch.inference_mode()"
                )
    floats = [weight.dtype for weight in model.parameters() if weight.is_floating_point()]
    quantised = [each for each in model.named_modules() if _quantised(each[1]) and floats]
    for path, module in quantised:
        with evaluating(module):
            problem = _problem(module, floats[0])
        if problem is not None:
            raise GradientError(
                f"{name} is quantised, and {path!r} ({type(module).__name__}) {problem}: load it "
                "unquantised, or with weights that are rounded and nothing else"
            )


def _quantised(module: Any) -> bool:
    # Those of torch keep packed weights, those of other libraries integers, or a type of tensor.
    if ".quantized." in f"{type(module).__module__}.":
        return True
    weight = getattr(module, "weight", getattr(module, "W_q", None))
    if not isinstance(weight, Tensor) or isinstance(module, nn.Embedding) or weight.is_meta:
        return False
    if is_spread(weight):
        return False
    if not (weight.is_floating_point() or weight.is_complex()):
        return True
    return type(weight) not in (Tensor, nn.Parameter)


def _problem(module: Any, dtype: torch.dtype) -> str | None:
    """The fault of a linear module's gradient, told by running it; None if there is none."""
    width = getattr(module, "in_features", None)
    if not isinstance(width, int):
        return "does not say what it takes, so that its gradient cannot be tried"
    try:
        return _tried(module, width, dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"does not run by itself ({type(error).__name__}: {error})"


def _tried(module: nn.Module, width: int, dtype: torch.dtype) -> str | None:
    device = next((each.device for each in (*module.parameters(), *module.buffers())), None)
    draw = torch.Generator().manual_seed(0)
    here, step = (
        torch.randn(2, 4, width, generator=draw, dtype=torch.float32, device="cpu").to(
            device, dtype
        )
        for _ in range(2)
    )
    # As in a run without a graph, at whose end some change over to kernels that keep none.
    with torch.no_grad():
        module(here)
    with torch.enable_grad():
        given = here.requires_grad_()
        output = module(given)
        if not output.requires_grad:
            return "has no gradient"
        change = (module(given + step) - output).detach()
        gradient: Any = torch.autograd.grad(output, given, change, allow_unused=True)[0]
    if gradient is None:
        return "has no gradient"
    # Not all devices have float64.
    change, gradient, step = (each.cpu().double() for each in (change, gradient, step))
    expected, told = float((change**2).sum()), float((gradient * step).sum())
    if not abs(told - expected) <= _ROUNDED * expected:
        return f"has another gradient than what it does: {told / expected:.3g} times as large"
    return None
