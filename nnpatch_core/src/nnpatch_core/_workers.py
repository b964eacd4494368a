"""Processes that have a model each, and stand for it in a sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

#: What takes workers in place of a model.
TAKES_WORKERS = (
    "workers stand for a model in activation_patching, ablation_patching, attribution_patching, "
    "path_patching and edge_patching"
)


@runtime_checkable
class Workers(Protocol):
    """Processes that have a model each; they are given in place of one."""

    def swept(self, sweep: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        """The result of a sweep.

        Args:
            sweep: the function that was called.
            given: its arguments by name, but for the model.
        """
        ...
