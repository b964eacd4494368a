"""The engines: each a row that says what stands against it, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import attrs
from torch import Tensor

from nnpatch_core._printable import shown
from nnpatch_core.batch import Batch
from nnpatch_core.engine.cone import (
    beginning_of,
    open_cone,
    open_cone_replay,
    why_not_cone,
    why_rather_not_cone,
)
from nnpatch_core.engine.execution import Execution
from nnpatch_core.engine.full import at_once, no_reason, open_full
from nnpatch_core.engine.replay import Replay, open_full_replay
from nnpatch_core.errors import EngineError, UnknownNameError
from nnpatch_core.memory import Beginning
from nnpatch_core.tracing import Patches

#: For what is patched: a reason against an engine, in words, or None.
Reason: TypeAlias = Callable[[Patches], str | None]


@attrs.frozen
class Engine:
    """A way to run the cells of a sweep.

    Args:
        name: as `engine=` names it.
        why_not: why it cannot run a sweep, as far as can be told without a forward.
        why_rather_not: why `engine="auto"` passes it over, though it can be tried.
        open: opens it on some prompts: `(patches, target, intervention, limits, logits)`, where
            `logits` are those of the unpatched target run, or None if it was not run. It raises
            `EngineError` where the model turns out not to suit it.
        open_replay: opens it for one cell with one site, to be patched over and over:
            `(patches, target, values, chunks, store)`. With the replay it gives the logits of the
            unpatched target run, or None; it raises as `open` does.
        beginning: for what is patched and the prompts of each run: the tokens that may run in
            pieces, where the prompts do not fit in memory at once.
    """

    name: str
    why_not: Reason
    why_rather_not: Reason
    open: Callable[..., Execution]
    open_replay: Callable[..., tuple[Replay, Tensor | None]] = open_full_replay
    beginning: Callable[[Patches, Sequence[Batch]], Beginning] = at_once


#: In the order in which `engine="auto"` prefers them; the last one runs every sweep.
ENGINES = (
    Engine("cone", why_not_cone, why_rather_not_cone, open_cone, open_cone_replay, beginning_of),
    Engine("full", no_reason, no_reason, open_full),
)


@attrs.frozen
class Choice:
    """The engines that a sweep may run in.

    Args:
        name: as it was asked for, `"auto"` too; the engine that is left, where `"auto"` has passed
            others over.
        engines: in the order in which they are tried.
        fallback: why it is not the first of all; None if it is.
    """

    name: str
    engines: tuple[Engine, ...]
    fallback: str | None = None


def check_engine(name: Any) -> str:
    """The name of an engine, or `"auto"`.

    Raises:
        UnknownNameError: it is none.
    """
    names = ["auto", *(engine.name for engine in ENGINES)]
    if not isinstance(name, str) or name not in names:
        raise UnknownNameError(f"unknown engine {shown(name)}; there are {', '.join(names)}")
    return name


def beginning_for(name: str, patches: Patches, batches: Sequence[Batch]) -> Beginning:
    """The tokens that may run in pieces, given the engine that was asked for.

    Args:
        name: of an engine, or `"auto"`.
        patches: the cells.
        batches: the prompts of each run.
    """
    likeliest = next(engine for engine in ENGINES if name in ("auto", engine.name))
    return likeliest.beginning(patches, batches)


def choose_engines(name: str, patches: Patches) -> Choice:
    """The engines that a sweep may run in, given the name that was asked for.

    Raises:
        EngineError: the engine that was asked for cannot run the sweep.
    """
    fallback = None
    for number, engine in enumerate(ENGINES):
        if name not in ("auto", engine.name):
            continue
        reason = engine.why_not(patches)
        if name == engine.name:
            if reason is not None:
                raise EngineError(f"engine={name!r} cannot run this sweep: {reason}")
            return Choice(name, (engine,))
        reason = reason or engine.why_rather_not(patches)
        if reason is None:
            settled = name if fallback is None else engine.name
            able = [
                each
                for each in ENGINES[number:]
                if not (each.why_not(patches) or each.why_rather_not(patches))
            ]
            return Choice(settled, tuple(able), fallback)
        fallback = fallback or reason
    raise EngineError(f"no engine can run this sweep: {fallback}")
