"""An observer sees every forward that nnpatch runs, as the model does, and leaves no mark."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from nnsight import NNsight

from nnpatch_core import (
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    cache_average,
)
from nnpatch_core.errors import AdapterError
from nnpatch_core.testing import Trace, tiny_api, tiny_model, traces

SOURCE = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [3, 4, 5, 6]])
TARGET = torch.tensor([[5, 6, 9, 8], [9, 20, 11, 12], [3, 4, 5, 30]])
ANSWERS = torch.tensor([21, 22, 23]), torch.tensor([31, 32, 33])
GRID = Sites(["resid", "q"], seq_pos_type="each")
RESID = Site.get_site(tiny_api(), "resid", 1)


def telling() -> tuple[Any, list[Trace]]:
    """A model, and what it says itself of each of its forwards."""
    model = tiny_model()
    told: list[Trace] = []

    kind = type(model)

    # What it takes is looked up, so that the cone engine can run it.
    @functools.wraps(kind.forward)
    def forward(*args: Any, **given: Any) -> Any:
        output = kind.forward(*args, **given)
        rows, tokens = output.logits.shape[0], given["input_ids"].shape[1]
        told.append(Trace(rows, tokens, torch.is_grad_enabled()))
        return output

    model.__class__ = type("Telling", (kind,), {"forward": forward})
    return model, told


def patch(model: Any, **options: Any) -> Any:
    return activation_patching(
        model, tiny_api(), GRID, SOURCE, TARGET, *ANSWERS, progress=False, **options
    )


def ablate(model: Any, **options: Any) -> Any:
    return ablation_patching(model, tiny_api(), GRID, TARGET, *ANSWERS, progress=False, **options)


def estimate(model: Any, **options: Any) -> Any:
    return attribution_patching(
        model, tiny_api(), GRID, SOURCE, TARGET, *ANSWERS, progress=False, **options
    )


CALLS: dict[str, Callable[[Any], Any]] = {
    "cone": lambda model: patch(model, engine="cone"),
    "full": lambda model: patch(model, engine="full"),
    "prompt by prompt": lambda model: patch(model, batch_size=1),
    "screened": lambda model: patch(model, screen="attribution", top_k=3),
    "zeros": lambda model: ablate(model),
    "means": lambda model: ablate(model, method="mean", reference=SOURCE),
    "estimate": lambda model: estimate(model),
    "path": lambda model: estimate(model, steps=2),
    "GradDrop": lambda model: estimate(model, grad_drop=True),
    "average": lambda model: cache_average(model, [RESID], SOURCE),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_every_forward_is_reported_as_it_was(call: Callable[[Any], Any]) -> None:
    model, told = telling()
    with traces(model) as seen:
        call(model)
    assert seen
    assert seen == told


def test_rows_tokens_and_gradients_are_told_apart() -> None:
    model = tiny_model()
    with traces(model) as seen:
        patch(model, engine="cone")
        estimate(model)
    assert {trace.gradients for trace in seen} == {False, True}
    assert {trace.tokens for trace in seen} > {4}
    assert max(trace.rows for trace in seen) > len(SOURCE)


def test_observers_do_not_hinder_each_other() -> None:
    """Whichever ends first, and whichever thread runs the model."""
    model = tiny_model()
    patch(model)  # after which nnsight's own marks are on it
    before = set(vars(model))
    first, second = traces(model), traces(NNsight(model))
    one = first.__enter__()
    patch(model, engine="full")
    other = second.__enter__()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(patch, model, engine="full").result()
    first.__exit__(None, None, None)
    patch(model, engine="full")
    second.__exit__(None, None, None)
    patch(model, engine="full")
    assert len(one) == len(other) > 0
    assert one[: len(one) // 2] == one[len(one) // 2 :]
    assert set(vars(model)) == before


def test_a_copy_has_observers_of_its_own() -> None:
    model = tiny_model()
    with traces(model) as seen:
        copied = copy.deepcopy(model)
        with traces(copied) as own:
            patch(copied)
        assert own
        assert seen == []
        patch(copy.copy(model))
        assert seen == []


def test_nothing_is_left_after_an_error() -> None:
    model = tiny_model()
    patch(model)  # after which nnsight's own marks are on it
    before = set(vars(model))

    def look_on() -> None:
        with traces(model) as seen:
            patch(model)
            assert seen
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look_on()
    assert set(vars(model)) == before


def test_a_forward_that_fails_is_none() -> None:
    model = tiny_model()

    class Failing(type(model)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise torch.OutOfMemoryError("no room")

    model.__class__ = Failing
    with traces(model) as seen, pytest.raises(torch.OutOfMemoryError):
        patch(model)
    assert seen == []


def test_what_is_no_model_is_told_so() -> None:
    with pytest.raises(AdapterError, match="nnmodel must be"), traces("gpt2"):
        pass
