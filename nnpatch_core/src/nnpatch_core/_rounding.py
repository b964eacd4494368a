"""How far two runs of the same thing may be apart, where only rounding parts them."""

from __future__ import annotations

import torch
from torch import Tensor

#: By type, the share of a tensor's largest number below which a difference is rounding.
SHARES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def rounding(dtype: torch.dtype) -> float:
    """Share of the largest number of a tensor below which a difference is rounding."""
    return SHARES.get(dtype, SHARES[torch.float32])


def as_typed(value: Tensor) -> torch.autocast:
    """A context in which our own arithmetic is done in the type that numbers have.

    The user's autocast is for the model.
    """
    return torch.autocast(value.device.type, enabled=False)
