"""Finds the attribute of a config that says how many heads there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

QUERY_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")


def first_count(config: Any, names: Sequence[str], layer: int) -> int | None:
    """Read how many a layer has, off the first attribute that says so."""
    for name in names:
        count = _of_layer(getattr(config, name, None), layer)
        if count is not None:
            return count
    return None


def attribute_with(
    config: Any, names: Sequence[str], counts: Sequence[int | None], default: str
) -> str | int:
    """Find the attribute that gives each layer its count; if there is none, give the count.

    A count of None is that of a layer whose heads nobody asks for.
    """
    wanted = {layer: count for layer, count in enumerate(counts) if count is not None}
    if not wanted:
        return default
    for name in names:
        value = getattr(config, name, None)
        if all(_of_layer(value, layer) == count for layer, count in wanted.items()):
            return name
    return max(wanted.values())


def _of_layer(value: Any, layer: int) -> int | None:
    if isinstance(value, list | tuple):
        value = value[layer] if layer < len(value) else None
    return value if isinstance(value, int) and value > 0 else None
