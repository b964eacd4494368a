"""How far two runs of the same thing may be apart, where only rounding parts them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: By type, the share of a tensor's largest number below which a difference is rounding.
SHARES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
#: By what torch may do products of float32 in, the type that keeps as many digits.
_PRODUCTS = {"tf32": torch.float16, "bf16": torch.bfloat16}


def rounding(value: Tensor) -> float:
    """Share of a tensor's largest number below which a difference is rounding.

    The user can let torch compute with fewer digits than the tensor's type has: by autocast, and in
    products of float32.
    """
    kind, dtype = value.device.type, value.dtype
    shares = [SHARES.get(dtype, SHARES[torch.float32])]
    if kind != "meta" and torch.is_autocast_enabled(kind):
        shares.append(SHARES.get(torch.get_autocast_dtype(kind), 0.0))
    if dtype == torch.float32:
        shares.append(SHARES[_PRODUCTS.get(_products_in(kind), dtype)])
    return max(shares)


def _products_in(kind: str) -> str:
    """In which numbers torch may do products of float32 on a kind of device: `"tf32"`, say."""
    backend: Any = torch.backends.cuda if kind == "cuda" else torch.backends.mkldnn
    # Before torch 2.9 there was one switch, for GPUs.
    matmul = getattr(backend, "matmul", None)
    told = getattr(matmul, "fp32_precision", None)
    if told is None and kind == "cuda":
        told = "tf32" if backend.matmul.allow_tf32 else "ieee"
    return str(told)


def as_typed(value: Tensor) -> torch.autocast:
    """A context in which our own arithmetic is done in the type that numbers have.

    The user's autocast is for the model.
    """
    return torch.autocast(value.device.type, enabled=False)
