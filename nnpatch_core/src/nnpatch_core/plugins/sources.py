"""Tells which plugin an adapter is of, for whoever reads an outcome later."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

import attrs

from nnpatch_core._version import __version__
from nnpatch_core.adapters import DecoderAPI, ModelAPI
from nnpatch_core.plugins.manager import ENVIRONMENT_VARIABLE, Registered, load_plugins


def source_of(api: ModelAPI) -> str:
    """The distribution that registers an adapter, with its version; or that none does.

    Examples:
        >>> from nnpatch_core.testing import tiny_api
        >>> source_of(tiny_api()).startswith("no plugin")
        True
    """
    places = tuple((path, _changed(path)) for path in sys.path)
    for each in _registered(os.environ.get(ENVIRONMENT_VARIABLE), places):
        if _is_same(each.value, api):
            return str(each.plugin)
    return f"no plugin: the caller's own, or inferred by nnpatch-core {__version__}"


@functools.lru_cache(maxsize=4)
def _registered(
    limit: str | None, places: tuple[tuple[str, float], ...]
) -> tuple[Registered[ModelAPI], ...]:
    """The adapters of plugins; they stay the same until something else is installed."""
    return load_plugins(report=False).adapters


def _changed(path: str) -> float:
    try:
        return Path(path).stat().st_mtime
    except OSError:
        return 0.0


def _is_same(registered: Any, api: Any) -> bool:
    """Tell whether an adapter is the registered one, which may be made anew each time."""
    if registered is api:
        return True
    if type(registered) is not type(api):
        return False
    if type(api) is not DecoderAPI:
        return True
    # Not its own class's: of this one many are made.
    names = [field.name for field in attrs.fields(DecoderAPI)]
    return all(getattr(registered, name) == getattr(api, name) for name in names)
