"""The needs of checks: what an adapter must have, or declare, for a check to apply to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from nnpatch_core.adapters import ModelAPI, component_names, find_component
from nnpatch_core.conformance.subject import Subject

Check: TypeAlias = Callable[[Subject], None]
#: Says why an adapter does not meet it; None if the adapter does.
Need: TypeAlias = Callable[[ModelAPI], str | None]
#: Each check to all that it needs; the first need that is not met is the reason to skip it.
Needs: TypeAlias = Mapping[Check, tuple[Need, ...]]


def component(name: str) -> Need:
    """The adapter has a component."""
    return lambda api: None if name in component_names(api) else f"the adapter has no {name}"


def heads(name: str) -> Need:
    """The adapter has a component, and it has heads."""

    def unmet(api: ModelAPI) -> str | None:
        if name not in component_names(api):
            return f"the adapter has no {name}"
        no_heads = find_component(api, name).heads is None
        return f"the adapter's {name} has no heads" if no_heads else None

    return unmet


def any_of(*names: str, otherwise: str) -> Need:
    """The adapter has one of some components; `otherwise` says that it has none."""
    return lambda api: None if {*names} & {*component_names(api)} else otherwise


def declared(tag: str) -> Need:
    """The adapter does not switch a declaration off."""

    def unmet(api: ModelAPI) -> str | None:
        value = getattr(api, tag, True)
        return None if value else f"the adapter declares {tag}={value}"

    return unmet
