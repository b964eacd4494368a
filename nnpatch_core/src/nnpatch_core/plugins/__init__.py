"""Plugins: what third parties add, found through entry points of the group `nnpatch`."""

from nnpatch_core.plugins.hookspecs import hookimpl
from nnpatch_core.plugins.lookup import find_adapter, find_metric, find_seq_pos
from nnpatch_core.plugins.manager import Failure, Plugin, Registered, Registry, load_plugins

__all__ = [
    "Failure",
    "Plugin",
    "Registered",
    "Registry",
    "find_adapter",
    "find_metric",
    "find_seq_pos",
    "hookimpl",
    "load_plugins",
]
