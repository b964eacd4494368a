"""One thread at a time uses a model; another one is told so, whatever it calls."""

from __future__ import annotations

import copy
import pickle
import threading
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
    edge_patching,
    infer_adapter,
    path_patching,
)
from nnpatch_core.errors import EngineError, MetricError
from nnpatch_core.testing import run_checks, tiny_model
from nnpatch_llama import Llama3
from tests.helpers.samples import ONE

SOURCE, TARGET, ANSWERS = ONE
SITES = Sites("resid", seq_pos_type="each")


def activation(model: Any, **options: Any) -> Any:
    return activation_patching(
        model, Llama3, SITES, SOURCE, TARGET, *ANSWERS, progress=False, **options
    )


CALLS: dict[str, Callable[[Any], Any]] = {
    "activation": activation,
    "screened": lambda model: activation(model, screen="attribution", top_k=2),
    "ablation": lambda model: ablation_patching(
        model, Llama3, SITES, TARGET, *ANSWERS, progress=False
    ),
    "attribution": lambda model: attribution_patching(
        nnmodel=model,
        api=Llama3,
        sites=SITES,
        source_tokens=SOURCE,
        target_tokens=TARGET,
        source_answer_index=ANSWERS[0],
        target_answer_index=ANSWERS[1],
        progress=False,
    ),
    "edges": lambda model: edge_patching(model, Llama3, SOURCE, TARGET, *ANSWERS, progress=False),
    "edges, estimated": lambda model: edge_patching(
        model, Llama3, SOURCE, TARGET, *ANSWERS, method="eap", progress=False
    ),
    "path": lambda model: path_patching(
        model, Llama3, "a0.h1", "logits", SOURCE, TARGET, *ANSWERS, progress=False
    ),
    "average": lambda model: cache_average(model, [Site.get_site(Llama3, "mlp", 1)], SOURCE),
    "kit": lambda model: run_checks(Llama3, model, only="check_layers"),
    "inferred": infer_adapter,
}


def while_another_sweeps(model: Any, then: Callable[[], Any]) -> Any:
    """What `then` gives in this thread while another one is in the middle of a sweep."""
    begun, done = threading.Event(), threading.Event()

    def waiting(logits: torch.Tensor, context: Any) -> torch.Tensor:
        begun.set()
        assert done.wait(60)
        return logits[:, 1] - logits[:, 2]

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(activation, model, metric=waiting)
        try:
            assert begun.wait(60)
            return then()
        finally:
            done.set()
            assert running.result().info["engine"] == "cone"


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("wrap", [lambda model: model, NNsight])
def test_a_second_thread_is_told(name: str, wrap: Callable[[Any], Any]) -> None:
    model = tiny_model("llama")

    def then() -> None:
        with pytest.raises(EngineError, match="another thread is using this LlamaForCausalLM"):
            CALLS[name](wrap(model))

    while_another_sweeps(model, then)
    # And when that one is through, it works.
    CALLS[name](wrap(model))


def test_each_thread_may_have_a_model_of_its_own() -> None:
    expected = activation(tiny_model("llama"))["resid"]
    model = tiny_model("llama")
    mine = tiny_model("llama")
    found = while_another_sweeps(model, lambda: activation(mine)["resid"])
    assert torch.equal(found, expected)


def test_a_copy_made_meanwhile_is_free() -> None:
    expected = activation(tiny_model("llama"))["resid"]
    model = tiny_model("llama")
    for copied in (copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))):
        mine = while_another_sweeps(model, lambda copied=copied: copied(model))
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(activation, mine).result()["resid"], expected)
        assert "_nnpatch_user" not in vars(mine)


def test_an_error_leaves_the_model_free() -> None:
    model = tiny_model("llama")

    def broken(logits: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(MetricError, match="ZeroDivisionError"):
        activation(model, metric=broken)
    assert "_nnpatch_user" not in vars(model)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(activation, model).result()
