"""Whether one engine gives what the other does, however rows are cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from nnpatch_core import Outcome
from nnpatch_core.memory import needs as memory
from nnpatch_core.testing import Trace

#: At most 9e-6 was measured in thousands of sweeps, and most effects are far above 1e-3.
ATOL = 2e-5


def gap_of(found: Outcome, expected: Outcome) -> float:
    """The largest difference of any prompt's metrics in any cell; relative, where above 1."""
    largest = 0.0
    for metric, names in expected.raw.items():
        assert list(found.raw[metric]) == list(names)
        for name, values in names.items():
            assert torch.equal(found.cells[name].index, expected.cells[name].index)
            if values.numel():
                gaps = (found.raw[metric][name] - values) / values.abs().clamp(min=1)
                largest = max(largest, gaps.abs().max().item())
    return largest


def check_cone(found: Outcome, expected: Outcome, atol: float = ATOL) -> None:
    """The first was run by the cone engine, the second by whole forwards: they agree."""
    assert (found.info["engine"], expected.info["engine"]) == ("cone", "full")
    assert "fallback" not in found.info
    assert gap_of(found, expected) <= atol
    for metric, names in found.raw.items():
        unpatched = found.baselines[metric].target
        for name, values in names.items():
            elided = found.cells[name].elided
            assert torch.equal(values[elided], unpatched.expand_as(values)[elided])


def of_rows(seen: list[Trace]) -> list[Trace]:
    """The cone engine's own traces, of all that were seen in a sweep of prompts that fit at once.

    Two come before: the source run and the target run, or an ablation's unpatched run and the same
    run recorded.
    """
    return seen[2:]


def from_the_middle(seen: list[Trace]) -> list[int]:
    """The rows of each trace that leaves tokens out.

    Of prompts that begin as their sources do those are the cone engine's own, however many prompts
    fit at once.
    """
    whole = max((trace.tokens for trace in seen), default=0)
    return [trace.rows for trace in seen if trace.tokens < whole]


@contextmanager
def cut_by(overhead: float, tokens_at_once: int) -> Iterator[None]:
    """Plan for a machine of other costs, so that rows are cut into other buckets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(memory._OVERHEAD, "cpu", overhead)
        patch.setitem(memory._TOKENS_AT_ONCE, "cpu", tokens_at_once)
        yield
