"""Which columns of an activation belong to which head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import attrs
import torch
from torch import Tensor

HeadKind: TypeAlias = Literal["query", "key_value"]
Projection: TypeAlias = Literal["q", "k", "v"]


@attrs.frozen(eq=False)
class Heads:
    """How many heads a layer has.

    Args:
        query: the number of query heads.
        key_value: the number of key/value heads, each shared by a group of query heads.
        config: the model's text config, for a layout that needs more.
    """

    query: int
    key_value: int
    config: Any = attrs.field(default=None, repr=False)

    def count(self, kind: HeadKind) -> int:
        """The number of heads of a kind."""
        return self.query if kind == "query" else self.key_value


#: The width of an activation and the heads of its layer to `[heads, dim]`: each head's columns.
HeadColumns: TypeAlias = Callable[[int, Heads], Tensor]


def consecutive(width: int, count: int) -> Tensor:
    """Heads that stand one after the other, `[heads, dim]`: what a component has by default.

    Examples:
        >>> consecutive(6, 2).tolist()
        [[0, 1, 2], [3, 4, 5]]
    """
    return torch.arange(width, device="cpu").view(count, -1)


_part: Projection = attrs.field(validator=attrs.validators.in_(("q", "k", "v")))


@attrs.frozen
class Fused:
    """One projection for q, k and v: all query heads, then all key heads, then all value heads.

    The layout of GPT-2's `c_attn`, Phi-3's `qkv_proj` and Falcon's multi-query `query_key_value`.

    Args:
        part: which of the three, `"q"`, `"k"` or `"v"`.

    Examples:
        >>> Fused("k")(8, Heads(query=2, key_value=1)).tolist()
        [[4, 5]]
    """

    part: Projection = _part

    def __call__(self, width: int, heads: Heads) -> Tensor:
        """The columns `[heads, dim]` of the part."""
        each = consecutive(width, heads.query + 2 * heads.key_value)
        keys, values = heads.query, heads.query + heads.key_value
        parts = {"q": each[:keys], "k": each[keys:values], "v": each[values:]}
        return parts[self.part]


@attrs.frozen
class Interleaved:
    """One projection for q, k and v: for each key/value head its query heads, its key, its value.

    The layout of NeoX's and BLOOM's `query_key_value`, and of the newer Falcons' with groups.

    Args:
        part: which of the three, `"q"`, `"k"` or `"v"`.

    Examples:
        >>> Interleaved("k")(12, Heads(query=2, key_value=2)).tolist()
        [[2, 3], [8, 9]]
    """

    part: Projection = _part

    def __call__(self, width: int, heads: Heads) -> Tensor:
        """The columns `[heads, dim]` of the part."""
        group = heads.query // heads.key_value
        each = torch.arange(width, device="cpu").view(heads.key_value, group + 2, -1)
        return {"q": each[:, :-2].flatten(0, 1), "k": each[:, -2], "v": each[:, -1]}[self.part]


def _count(_: Any, attribute: Any, value: Any) -> None:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{attribute.name} must be a whole number from 0, got {value!r}")


@attrs.frozen
class PartOfHead:
    """One of several parts, equally wide, that a projection has for each query head.

    The layout of a projection that gives each head its query and then its gate (Qwen 3.5).

    Args:
        index: which part, from 0.
        parts: how many there are.

    Examples:
        >>> PartOfHead(0, parts=2)(8, Heads(query=2, key_value=2)).tolist()
        [[0, 1], [4, 5]]
    """

    index: int = attrs.field(validator=_count)
    parts: int = attrs.field(validator=_count)

    @parts.validator
    def _enough(self, _: Any, parts: int) -> None:
        if self.index >= parts:
            raise ValueError(f"part {self.index} of {parts} is out of range")

    def __call__(self, width: int, heads: Heads) -> Tensor:
        """The columns `[heads, dim]` of the part."""
        return torch.arange(width, device="cpu").view(heads.query, self.parts, -1)[:, self.index]
