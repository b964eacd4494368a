"""Plugins: what third parties add, found through entry points of the group `nnpatch`."""

from nnpatch_core.plugins.hookspecs import hookimpl
from nnpatch_core.plugins.inferring import (
    Inferred,
    infer_unclaimed,
    not_read_off,
    package_command,
    why_unclaimed,
)
from nnpatch_core.plugins.lookup import claimed, find_adapter, find_metric, find_seq_pos
from nnpatch_core.plugins.manager import (
    ENVIRONMENT_VARIABLE,
    Failure,
    Plugin,
    Registered,
    Registry,
    load_plugins,
)
from nnpatch_core.plugins.sources import source_of

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "Failure",
    "Inferred",
    "Plugin",
    "Registered",
    "Registry",
    "claimed",
    "find_adapter",
    "find_metric",
    "find_seq_pos",
    "hookimpl",
    "infer_unclaimed",
    "load_plugins",
    "not_read_off",
    "package_command",
    "source_of",
    "why_unclaimed",
]
