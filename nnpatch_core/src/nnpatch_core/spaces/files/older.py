"""Projections of the older library nnpatch: a weight under an orthogonal parametrisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nnpatch_core._printable import shown
from nnpatch_core.errors import SubspaceError
from nnpatch_core.spaces.files.content import Content
from nnpatch_core.spaces.files.orthogonal import parametrised

#: Entries of a state dict, and of a config, that give the size.
_SIZES = ("embed_dim", "rank")
WEIGHT = "weight"
PARAMETER = "parametrizations.weight.original"
BASE = "parametrizations.weight.0.base"


def is_older(names: Mapping[str, Any]) -> bool:
    """Whether a state dict is one of the older library's projections, by its names."""
    own = set(names) - set(_SIZES)
    return own == {WEIGHT} or (PARAMETER in own and own <= {PARAMETER, BASE})


def is_older_config(config: Any) -> bool:
    """Whether a `config.json` is one of the older library's projections."""
    return isinstance(config, Mapping) and {*_SIZES} <= set(config)


def content_of(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Content:
    """The subspace of a state dict.

    Raises:
        SubspaceError: it holds something else, or another size than it says.
    """
    if not is_older(tensors):
        raise SubspaceError(
            f"a projection of the older library has the tensors {PARAMETER} and {BASE}, or "
            f"{WEIGHT}; it has {shown(sorted(tensors))}"
        )
    if WEIGHT in tensors:
        basis = tensors[WEIGHT]
    else:
        basis = parametrised(tensors[PARAMETER], tensors.get(BASE))
    told = [*(_size(tensors, name) for name in _SIZES), *(config.get(name) for name in _SIZES)]
    for name, number, size in zip(_SIZES * 2, told, (*basis.shape, *basis.shape), strict=False):
        if number is not None and number != size:
            raise SubspaceError(
                f"it says {name} {shown(number)}, and its weight has the shape {list(basis.shape)}"
            )
    return Content(basis, info={"method": "learned", "file": "a projection of the older nnpatch"})


def _size(tensors: Mapping[str, Tensor], name: str) -> Any:
    found = tensors.get(name)
    if found is None:
        return None
    return found.item() if found.numel() == 1 else list(found.shape)
