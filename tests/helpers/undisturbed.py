"""Two metrics that few shortcuts survive, and what a sweep must leave of a model as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnpatch_core import per_prompt

#: Whose logits a model must give again.
PROMPT = (5, 6, 7, 8)


@per_prompt
def bent(logits: Tensor, context: Any) -> Tensor:
    """Reads all logits, and is not linear."""
    own = logits.gather(1, context.source_answer_index[:, None])[:, 0]
    return own.tanh() - 0.1 * logits.square().mean(-1)


def compared(logits: Tensor) -> Tensor:
    """Compares prompts."""
    return logits[:, 3] - 0.5 * logits[:, 3].mean()


def state_of(model: Any) -> dict[str, Any]:
    """What a sweep must leave as it was."""
    return {
        "weights": [weight.detach().clone() for weight in model.parameters()],
        "flags": [weight.requires_grad for weight in model.parameters()],
        "gradients": [weight.grad is None for weight in model.parameters()],
        "training": [module.training for module in model.modules()],
        "types": [type(module) for module in model.modules()],
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in model.modules()
        ],
        "generator": torch.get_rng_state(),
        "gradient mode": torch.is_grad_enabled(),
        "logits": model(torch.tensor([PROMPT])).logits.detach(),
    }


def check_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    for what, value in before.items():
        if what == "weights":
            assert all(map(torch.equal, value, after[what]))
        elif isinstance(value, Tensor):
            assert value.equal(after[what]), what
        else:
            assert value == after[what], what
