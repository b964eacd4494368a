"""A subspace as it stands in files, without the class: tensors, and the rest as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import attrs
from torch import Tensor

from nnpatch_core._printable import shown
from nnpatch_core.errors import SubspaceError

#: How deep mappings and lists of `info` may stand in each other.
_DEEPEST = 12
#: The fields of a site's record, in its order, and what each may be.
_SITE: Mapping[str, Callable[[Any], bool]] = {
    "component": lambda value: isinstance(value, str) and bool(value),
    "layer": lambda value: _is_count(value),
    "head": lambda value: value is None or _is_count(value),
    "seq_pos": lambda value: (
        value is None or (isinstance(value, list | tuple) and all(map(_is_int, value)))
    ),
    "where": lambda value: value is None or isinstance(value, str),
}


@attrs.frozen(eq=False)
class Content:
    """All that files say of a subspace.

    Args:
        basis: `[width, rank]`.
        mean: `[width]`, or None.
        site: the fields of a `SiteRecord` by name, or None.
        info: what a model card says of it.
        file: where it was read, as errors name it; "" if nowhere.
    """

    basis: Tensor
    mean: Tensor | None = None
    site: Mapping[str, Any] | None = None
    info: Mapping[str, Any] = attrs.field(factory=dict)
    file: str = ""


def check_site(site: Any) -> dict[str, Any] | None:
    """A site's record as a file has it, by name; positions are a tuple then.

    Raises:
        SubspaceError: it is none.
    """
    if site is None:
        return None
    if not isinstance(site, Mapping) or set(site) != set(_SITE):
        raise SubspaceError(f"its site is {shown(site)}, and must have {', '.join(_SITE)}")
    for name, fits in _SITE.items():
        if not fits(site[name]):
            raise SubspaceError(f"the {name} of its site is {shown(site[name])}")
    positions = site["seq_pos"]
    return {**site, "seq_pos": None if positions is None else tuple(positions)}


def as_json(value: Any, name: str = "info", depth: int = 0) -> Any:
    """`info` as JSON has it; tuples become lists, and numbers of numpy and torch plain ones.

    Raises:
        SubspaceError: something cannot be written so, and the message names its place.
    """
    if depth > _DEEPEST:
        raise SubspaceError(f"{name} stands deeper than {_DEEPEST} mappings and lists")
    if getattr(value, "ndim", None) == 0 and not getattr(value, "is_meta", False):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        if abs(value) >= 2**64:
            raise SubspaceError(f"{name} is a number of more than 64 bits: leave it out")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise SubspaceError(f"{name} is {value}, which is not finite: leave it out")
        return float(value)
    if isinstance(value, list | tuple):
        return [as_json(each, f"{name}[{at}]", depth + 1) for at, each in enumerate(value)]
    if isinstance(value, Mapping):
        wrong = next((key for key in value if not isinstance(key, str)), None)
        if wrong is not None:
            raise SubspaceError(f"the keys of {name} must be text, got {shown(wrong)}")
        return {
            key: as_json(each, f"{name}[{shown(key)}]", depth + 1) for key, each in value.items()
        }
    raise SubspaceError(
        f"{name} must be text, numbers, and mappings and lists of them, got {shown(value)}"
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_int(value) and value >= 0
