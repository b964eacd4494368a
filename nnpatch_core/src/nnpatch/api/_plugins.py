"""Plugins are distributions of their own, which may not be installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def plugin(distribution: str) -> Iterator[None]:
    """Import from a plugin inside; where it is missing, the error says which distribution has it.

    Raises:
        ModuleNotFoundError: the plugin is not installed.
    """
    module = distribution.replace("-", "_")
    try:
        yield
    except ModuleNotFoundError as error:
        # A plugin that is there may lack something of its own.
        if error.name != module:
            raise
        raise ModuleNotFoundError(
            f"this adapter is in the distribution {distribution}, which is not installed: "
            f"pip install {distribution}",
            name=module,
        ) from error
