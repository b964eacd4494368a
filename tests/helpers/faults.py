"""Traces that fail: the one place that knows where the engines run theirs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nnpatch_core.engine import full
from nnpatch_core.engine.cone import ascent
from nnpatch_core.engine.cone import execution as cone
from nnpatch_core.sweep import checkpoint
from nnpatch_core.sweep.ledger import Ledger

#: What runs one trace of each engine, as owner and name; of estimates what takes a part of them.
RUNS: dict[str, tuple[Any, str]] = {
    "cone": (cone.ConeExecution, "_run"),
    "full": (full, "patching"),
    "gradient": (Ledger, "note"),
}
#: The same of the cone engine, inside of what tells its own errors from the model's.
INSIDE = (ascent.Ascent, "run")


def broken_after(
    monkeypatch: pytest.MonkeyPatch, count: int, engine: str = "cone"
) -> Callable[[], None]:
    """A sweep breaks off when so many traces were run, and was saved before; gives the remedy."""
    owner, name = RUNS[engine]
    real, left = getattr(owner, name), [count]

    def breaking(*arguments: Any, **options: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, breaking)
    # Save as often as there is something to save.
    monkeypatch.setattr(checkpoint, "_SHARE", 1e9)
    return lambda: monkeypatch.setattr(owner, name, real)


def failing_at(monkeypatch: pytest.MonkeyPatch, call: int, error: Exception) -> list[int]:
    """A trace of the cone engine fails, the first being 1; the list has one entry for each."""
    owner, name = INSIDE
    real, calls = getattr(owner, name), []

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise error
        return real(*arguments)

    monkeypatch.setattr(owner, name, failing)
    return calls


def room_for(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """The cone engine's device has room for so many rows and no more."""
    owner, name = RUNS["cone"]
    real = getattr(owner, name)

    def small(run: Any, bucket: Any, columns: Any) -> Any:
        if len(bucket.runs) > most:
            raise torch.OutOfMemoryError("no room")
        return real(run, bucket, columns)

    monkeypatch.setattr(owner, name, small)


def slow_down(seconds: float, engine: str = "cone") -> None:
    """For good: in a process that is to be killed, every trace of an engine takes longer."""
    owner, name = RUNS[engine]
    real = getattr(owner, name)

    def slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return real(*arguments, **options)

    setattr(owner, name, slowly)
