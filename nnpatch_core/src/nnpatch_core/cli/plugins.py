"""`nnpatch plugins`: what is installed, what it registers, and what failed to load."""

from __future__ import annotations

import os
from typing import Any

from nnpatch_core.cli.arguments import AsJson
from nnpatch_core.cli.output import say, say_json, say_table
from nnpatch_core.plugins import ENVIRONMENT_VARIABLE, Failure, Plugin, Registry, load_plugins


def plugins(*, as_json: AsJson = False) -> bool:
    """List the installed plugins, and what failed to load.

    With their adapters, model types and hooks, and those that failed to load with their error. The
    environment variable NNPATCH_PLUGINS limits what is loaded. Exit code 1 if one failed.
    """
    registry = load_plugins(report=False)
    if as_json:
        say_json(
            {
                "limited_to": os.environ.get(ENVIRONMENT_VARIABLE),
                "unknown": list(registry.unknown),
                "plugins": [_as_json(registry, plugin) for plugin in registry.plugins],
                "failures": [_failure_as_json(failure) for failure in registry.failures],
            }
        )
        return not registry.failures
    _print(registry)
    return not registry.failures


def _print(registry: Registry) -> None:
    limit = os.environ.get(ENVIRONMENT_VARIABLE)
    if limit is not None:
        unknown = f"; not installed: {', '.join(registry.unknown)}" if registry.unknown else ""
        say(f"Limited by {ENVIRONMENT_VARIABLE}={limit!r}{unknown}.")
        say()
    if not registry.plugins and not registry.failures:
        if limit is None:
            say("No plugin is installed. nnpatch-llama is one: pip install nnpatch-llama")
        else:
            say("No plugin is loaded: the limit leaves all of them out.")
    rows = []
    for plugin in registry.plugins:
        own = _registered(registry, plugin)
        rows.append(
            (
                plugin.distribution,
                plugin.version,
                _listed(f"{name} ({', '.join(types)})" for name, types in own["adapters"].items()),
                _listed([*own["seq_pos"], *own["metrics"]]),
                _listed(plugin.hooks),
            )
        )
    if rows:
        header = ("plugin", "version", "adapters (model types)", "strategies, metrics", "hooks")
        say_table(header, rows)
    for failure in registry.failures:
        say()
        say(f"Failed: {failure}")


def _listed(values: Any) -> str:
    return ", ".join(values) or "-"


def _registered(registry: Registry, plugin: Plugin) -> dict[str, Any]:
    return {
        "adapters": {
            entry.name: list(entry.value.model_types)
            for entry in registry.adapters
            if entry.plugin == plugin
        },
        "seq_pos": [entry.name for entry in registry.seq_pos if entry.plugin == plugin],
        "metrics": [entry.name for entry in registry.metrics if entry.plugin == plugin],
    }


def _identity(plugin: Plugin) -> dict[str, Any]:
    names = ("name", "distribution", "version", "module")
    return {name: getattr(plugin, name) for name in names}


def _as_json(registry: Registry, plugin: Plugin) -> dict[str, Any]:
    own = _registered(registry, plugin)
    return {**_identity(plugin), "hooks": list(plugin.hooks), **own}


def _failure_as_json(failure: Failure) -> dict[str, str]:
    return {**_identity(failure.plugin), "stage": failure.stage, "error": failure.reason}
