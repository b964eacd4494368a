"""Sweeps that run elsewhere: workers stand for the model, or a server has it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from nnpatch_core._arguments import bound
from nnpatch_core._models import Elsewhere
from nnpatch_core._workers import Workers
from nnpatch_core.errors import RemoteError, WorkerError
from nnpatch_core.patching.batches import is_stream
from nnpatch_core.sweep import Runs, Sweep
from nnpatch_core.tracing import why_not_sent

_P = ParamSpec("_P")
_R = TypeVar("_R")
#: Arguments that may be an iterable of batches.
_BATCHES = ("source_tokens", "tokens")


def on_workers(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function`, which takes `Workers` too as its first argument, `nnmodel`."""

    @functools.wraps(function)
    def swept(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        first: Any = kwargs.get("nnmodel", args[0] if args else None)
        if not isinstance(first, Workers):
            return function(*args, **kwargs)
        given = dict(bound(function, args, kwargs).arguments)
        del given["nnmodel"]
        if given.pop("remote", False) is not False:
            raise WorkerError(
                "workers have the model themselves: leave out remote=, or pass the model in place "
                "of workers"
            )
        _check(given)
        found: _R = first.swept(swept, given)
        return found

    return swept


def check_sent(sweep: Sweep, runs: Runs) -> None:
    """Raise `RemoteError` for what a sweep needs and cannot send, if it runs elsewhere."""
    if not isinstance(sweep.nnmodel, Elsewhere):
        return
    told = f"remote={sweep.nnmodel.remote!r}"
    for space in sweep.patches.cells.spaces:
        reason = why_not_sent(space)
        if reason is not None:
            raise RemoteError(f"{told} sends numbers, and {reason}: sweep it here")
    if runs.target.sites:
        raise RemoteError(
            f"{told} brings logits back, and a metric reads activations: leave it out, or sweep "
            "here"
        )


def _check(given: Mapping[str, Any]) -> None:
    """Raise `WorkerError` for a call of many sweeps."""
    for name in _BATCHES:
        if is_stream(given.get(name)):
            raise WorkerError(
                f"{name} is an iterable of batches, which workers do not take: give all prompts in "
                "one call, as one PromptPairs, which the sweep cuts by itself, or pass the model "
                "itself in place of workers"
            )
