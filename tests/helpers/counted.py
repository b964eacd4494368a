"""A model that counts its forwards, without a hook: a hook is a reason for another engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def calling(model: Any, called: Callable[[], None]) -> Any:
    """`model` itself, of a class of its own that calls `called` before each forward."""
    kind = type(model)

    @functools.wraps(kind.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        called()
        return kind.forward(*args, **kwargs)

    model.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return model


class Counted:
    """A model, and how many forwards it has run."""

    def __init__(self, model: Any) -> None:
        self.forwards = 0
        self.model = calling(model, self.count)

    def count(self) -> None:
        self.forwards += 1
