"""Tells the user that a sweep runs in a dearer engine than was to be expected, and how much."""

from __future__ import annotations

from nnpatch_core._arrays import Booleans
from nnpatch_core._models import Elsewhere
from nnpatch_core._warnings import warn
from nnpatch_core.errors import EngineWarning, MemoryBudgetError
from nnpatch_core.sweep.cost import plan_of
from nnpatch_core.sweep.sweep import Sweep


def warn_of_fallback(sweep: Sweep, reason: str, changed: Booleans) -> None:
    """Warn that the full engine runs instead of the cone engine.

    Nothing is said where an adapter declares that its models cannot run from the middle: there the
    full engine is the one to be expected; and so where the model runs elsewhere.

    Args:
        sweep: what is patched.
        reason: why it is not the cone engine.
        changed: `[batch, seq]`: where a patch may put something else than what was there.
    """
    if not all(getattr(api, "cone", True) for api in sweep.patches.adapters):
        return
    if isinstance(sweep.nnmodel, Elsewhere):
        # Who asks for that is told by the argument's words, and by the outcome's.
        return
    warn(
        f"this sweep runs in the full engine, with a whole forward for each cell: {reason}."
        f"{_cost(sweep, changed)} engine='full' asks for it without this warning",
        EngineWarning,
    )


def _cost(sweep: Sweep, changed: Booleans) -> str:
    try:
        plan = plan_of(sweep.patches, sweep.limits, changed)
    except MemoryBudgetError:
        return ""
    if not plan.token_layers:
        return " The cone engine would have had nothing to run."
    ratio = plan.full_token_layers / plan.token_layers
    return f" It costs about {ratio:.1f} times what the cone engine would."
