"""The names of the components that nnpatch knows."""

from __future__ import annotations

#: The components of a layer that nnpatch knows, in execution order.
COMPONENT_NAMES = ("resid_pre", "q", "k", "v", "o", "attn", "mlp", "resid")
#: Those that bring nothing to another token before their layer ends.
OWN_TOKEN = ("q", "o", "attn", "mlp", "resid")
_ALIASES = {"z": "o"}


def canonical_name(name: str) -> str:
    """The name that an alias stands for: `z` is `o`; any other name is itself.

    Examples:
        >>> canonical_name("z")
        'o'
    """
    return _ALIASES.get(name, name)
