"""The weight that torch's orthogonal parametrisation makes of what a state dict holds.

The parametrisation (`torch.nn.utils.parametrizations.orthogonal`) keeps a free parameter X, and a
fixed orthogonal matrix, its base, by which the map of X is multiplied from the left. By default a
square X is mapped by the exponential of its skew-symmetric part, and a tall one by a product of
Householder reflections. The default is assumed: a state dict does not name the map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnpatch_core.errors import SubspaceError


def parametrised(parameter: Tensor, base: Tensor | None) -> Tensor:
    """The weight `[width, rank]`, computed in float64, in the parameter's own type at least.

    Args:
        parameter: `[width, rank]`, the free one.
        base: `[width, width]`, or None if there is none.

    Raises:
        SubspaceError: they do not fit together, or the reflections have lost their signs.
    """
    if parameter.ndim != 2 or not parameter.is_floating_point() or not parameter.numel():
        raise SubspaceError(
            f"its parameter is {parameter.dtype} {list(parameter.shape)}, and must be [width, rank]"
        )
    width, rank = parameter.shape
    if rank > width:
        raise SubspaceError(
            f"its parameter has the shape {[width, rank]}: {rank} vectors of width {width} are no "
            "basis"
        )
    if base is not None and (list(base.shape) != [width] * 2 or not base.is_floating_point()):
        raise SubspaceError(
            f"its parameter is {width} wide, and its base {base.dtype} {list(base.shape)}"
        )
    free = parameter.detach().to("cpu", torch.float64)
    if not bool(free.isfinite().all()):
        raise SubspaceError("its parameter has numbers that are not finite")
    mapped = _exponential(free) if width == rank else _reflections(free)
    weight = mapped if base is None else base.detach().to("cpu", torch.float64) @ mapped
    return weight.to(torch.promote_types(parameter.dtype, torch.float32))


def _exponential(free: Tensor) -> Tensor:
    lower = free.tril()
    own: Tensor = torch.linalg.matrix_exp(lower - lower.T)
    return own


def _reflections(free: Tensor) -> Tensor:
    """The first columns of a product of reflections, each with the sign on the diagonal."""
    # torch reads the signs as integers.
    signs = free.diagonal().trunc()
    if not bool((signs.abs() == 1).all()):
        raise SubspaceError(
            "its parametrisation gives vectors of another length than 1: the diagonal of its "
            "parameter must be 1 or -1, and was changed, as weight decay does; if that is so, "
            "put the signs of the diagonal in its place and save it again"
        )
    below = free.tril(-1)
    scales = 2 / (1 + below.square().sum(0))
    own: Tensor = torch.linalg.householder_product(below, scales) * signs
    return own
