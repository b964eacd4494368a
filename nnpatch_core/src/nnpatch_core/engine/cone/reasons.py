"""Whether the cone engine suits a sweep, as far as can be told without running the model."""

from __future__ import annotations

from collections.abc import Sequence

from nnpatch_core._models import Elsewhere
from nnpatch_core._upstream import cache_keywords
from nnpatch_core.adapters import ModelAPI, tables
from nnpatch_core.batch import Batch
from nnpatch_core.engine.cone.buckets import counted
from nnpatch_core.memory import Beginning
from nnpatch_core.tracing import LEAST_HELD, Patches, forward_hooks, in_words, pieces_differ


def why_not_cone(patches: Patches) -> str | None:
    """Why a sweep cannot run in the cone engine; None if it may."""
    adapters, model = patches.adapters, patches.model
    if isinstance(patches.nnmodel, Elsewhere):
        return (
            f"remote={patches.nnmodel.remote!r} runs it without nnpatch, and this engine "
            "needs a cache of its own there"
        )
    for api in adapters:
        if not getattr(api, "cone", True):
            return f"adapter {api.name!r} says that its models cannot run from the middle"
    if not all(_alike(api, adapters[0]) for api in adapters):
        names = ", ".join(sorted(api.name for api in adapters))
        return f"the sites are of several adapters: {names}"
    for place in patches.places:
        if not place.component.module and place.component.item:
            item = place.component.item
            return f"{place.name} is item {item} of what a layer gives, not the first"
    if not cache_keywords(model):
        return f"{type(model).__name__} does not take keys and values of tokens that have been run"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return f"{type(model).__name__} is an encoder and a decoder"
    return None


def why_rather_not_cone(patches: Patches) -> str | None:
    """Why `engine="auto"` prefers whole forwards, though the cone could be tried; or None."""
    reason = _hooked(patches)
    if reason is None:
        return None
    return f"{reason}: engine='cone' runs it all the same, and compares unpatched rows"


def beginning_of(patches: Patches, batches: Sequence[Batch]) -> Beginning:
    """The tokens that may run in pieces.

    Right of them is all that a sweep records or reads, and all that it runs of patched prompts.

    Args:
        patches: the cells.
        batches: the prompts of each run.
    """
    model = patches.model
    reason = why_not_cone(patches) or _hooked(patches) or pieces_differ(model)
    if reason is None and any(batch.sites for batch in batches):
        reason = "a metric reads activations"
    if reason is not None:
        return Beginning(reason=reason)
    reads = [int(batch.read.min()) for batch in batches if batch.read is not None]
    until = max(min([patches.first_taken, *reads]), 0)
    if not until:
        return Beginning(reason="a first token is patched or read")
    for batch in batches:
        for row, tokens in enumerate(batch.mask[:, :until].sum(1).tolist()):
            if 0 < tokens < LEAST_HELD:
                told = (
                    f"prompt {row} has {counted(tokens, 'token')} left of position {until}, the "
                    "first that is patched or read: too few to see whether pieces change anything"
                )
                return Beginning(reason=told)
    return Beginning(until)


def _alike(one: ModelAPI, other: ModelAPI) -> bool:
    """Whether two adapters are the same one, made twice."""
    if type(one) is not type(other) or (one.name, one.layers) != (other.name, other.layers):
        return False
    return [dict(table) for table in tables(one)] == [dict(table) for table in tables(other)]


def _hooked(patches: Patches) -> str | None:
    """That the model has hooks which may go by what runs together; None if it has none."""
    hooks = forward_hooks(patches.model)
    if not hooks:
        return None
    return (
        f"the model has {in_words(hooks)}, which may treat rows, or passes of few tokens, each in "
        "its own way"
    )
