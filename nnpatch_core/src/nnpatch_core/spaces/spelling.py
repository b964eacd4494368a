"""How users name a space: the argument `subspace`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnpatch_core._integers import strict_int
from nnpatch_core._printable import shown
from nnpatch_core.errors import LayerError, SubspaceError
from nnpatch_core.spaces.features import Features
from nnpatch_core.spaces.space import Space

_METHODS = ("encode", "decode", "interchange", "set", "width", "rank")


def as_space(value: Any) -> Space | None:
    """The argument `subspace=` of a site: a `Subspace`, `Features`, an autoencoder, or None.

    Raises:
        SubspaceError: it is none of them.
    """
    if value is None or (not isinstance(value, type) and _is_space(value)):
        found: Space | None = value
        return found
    # A learned one has it inside.
    inner = getattr(value, "subspace", None)
    if inner is not None and _is_space(inner):
        own: Space = inner
        return own
    codes = not isinstance(value, type) and all(hasattr(value, name) for name in _METHODS[:2])
    # A tokenizer has methods of these names too.
    if codes and not hasattr(value, "batch_decode"):
        return Features(value)
    raise SubspaceError(
        f"subspace must be a Subspace, or an object with encode and decode, got {shown(value)}"
    )


def by_layer(value: Any) -> Space | Mapping[int, Space] | None:
    """The argument `subspace=` of a grid: one for all layers, or a mapping, one for each.

    Raises:
        SubspaceError: it is neither.
        LayerError: a layer is no integer from 0 on.
    """
    if not isinstance(value, Mapping):
        return as_space(value)
    found = {}
    for key, each in value.items():
        layer = strict_int(key, "a layer of subspace=", LayerError)
        if layer < 0:
            raise LayerError(f"layer {layer} of subspace= is out of range: layers are from 0")
        space = as_space(each)
        if space is None:
            raise SubspaceError(f"subspace= has None for layer {layer}: leave the layer out")
        found[layer] = space
    if not found:
        raise SubspaceError("subspace= is an empty mapping: give a subspace for each layer")
    return found


def _is_space(value: Any) -> bool:
    return all(hasattr(value, name) for name in _METHODS)
