"""The names of the components that nnpatch knows."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from nnpatch_core._hints import did_you_mean

#: The components of a layer that nnpatch knows, in execution order.
COMPONENT_NAMES = ("resid_pre", "q", "k", "v", "o", "attn", "mlp", "resid")
#: Those that bring nothing to another token before their layer ends.
OWN_TOKEN = ("q", "o", "attn", "mlp", "resid")
#: Other names of the field for the same components.
SYNONYMS: Mapping[str, str] = {
    "resid_post": "resid",
    "attn_out": "attn",
    "mlp_out": "mlp",
    "z": "o",
}
#: The rest of the name of a hook point, such as `blocks.3.attn.hook_q`.
_HOOK_POINT = re.compile(r"(?:blocks\.\d+\.)?(?:\w+\.)?hook_")


def canonical_name(name: str) -> str:
    """The name that a synonym stands for; any other name is itself.

    Examples:
        >>> canonical_name("z"), canonical_name("attn_out"), canonical_name("mlp")
        ('o', 'attn', 'mlp')
    """
    return SYNONYMS.get(name, name)


def did_you_mean_component(name: str, names: Collection[str]) -> str:
    """Say which of some components, or of their synonyms, an unknown name may mean; "" if none.

    Examples:
        >>> did_you_mean_component("blocks.3.attn.hook_z", ["o", "resid"])
        ' (did you mean z?)'
        >>> did_you_mean_component("residual", ["o", "resid"])
        ' (did you mean resid?)'
    """
    bare = _HOOK_POINT.sub("", name)
    if bare != name and canonical_name(bare) in names:
        return f" (did you mean {bare}?)"
    synonyms = [each for each, component in SYNONYMS.items() if component in names]
    return did_you_mean(bare, [*names, *synonyms])
