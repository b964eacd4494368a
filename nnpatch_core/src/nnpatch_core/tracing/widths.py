"""How wide an activation is, as far as it can be told before anything runs."""

from __future__ import annotations

from typing import Any

from nnpatch_core.adapters import Place
from nnpatch_core.spaces import Space, check_width


def width_of(place: Place) -> int | None:
    """The width of the whole activation at a place; None where only a run can tell."""
    module = place.model.get_submodule(place.path.rstrip("."))
    # Of linear layers, and of those that keep their weights the other way round.
    sides = ("in_features", "nx") if place.component.side == "input" else ("out_features", "nf")
    width = next((getattr(module, side) for side in sides if hasattr(module, side)), None)
    if width is None and not hasattr(module, "nf"):
        config: Any = getattr(place.model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        width = getattr(text, "hidden_size", None)
    return width if isinstance(width, int) else None


def check_space(space: Space, place: Place, head: int | None) -> None:
    """Raise `SubspaceError` where a space is of another width than what it is to be a part of.

    Args:
        space: the space.
        place: the place.
        head: one head of it, or None for the component as a whole.
    """
    whole = width_of(place)
    if whole is None:
        return
    columns = place.columns(whole)
    named = f"{place.name} of layer {place.layer}"
    if columns is None:
        check_width(space, whole, named)
    elif head is None:
        check_width(space, columns.numel(), named)
    else:
        check_width(space, columns.shape[1], f"head {head} of {named}")
