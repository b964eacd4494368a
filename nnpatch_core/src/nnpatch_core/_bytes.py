"""The bytes of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> Tensor:
    """`[bytes]`, uint8 on the CPU: what the tensor's numbers are made of, in their order.

    Examples:
        >>> bytes_of(torch.tensor([1, 256], dtype=torch.int16)).tolist()
        [1, 0, 0, 1]
    """
    plain = tensor.detach().cpu()
    if plain.dtype == torch.bool:
        # A copy of a bool is 0 or 1, whatever byte a file had.
        plain = plain.view(torch.uint8)
    # A copy: what counts as contiguous may still have strides that such a view refuses.
    return plain.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)
