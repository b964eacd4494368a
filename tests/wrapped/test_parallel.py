"""Models of which each of several processes has a part: two real processes, and what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnpatch_core.errors import AdapterError
from nnpatch_core.testing import tiny_model
from tests.helpers.parallel import CALLS, run_parted


@pytest.fixture(scope="module")
def parted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes says of a model parted in each way."""
    return run_parted(tmp_path_factory.mktemp("parted"))


def test_tensor_parallel_models_are_refused(parted: list[dict[str, Any]]) -> None:
    for each in parted:
        found = each["tensor-parallel"]
        assert found["before"] < 1e-5
        for name in CALLS:
            assert found[name]["error"] == "AdapterError", found[name]
            assert "tensor-parallel" in found[name]["message"]
            assert "device_map='auto'" in found[name]["message"]
        # The model is as it was.
        assert found["after"] == found["before"]


def test_what_fsdp_puts_together_layer_by_layer(parted: list[dict[str, Any]]) -> None:
    for each in parted:
        found = each["fully sharded"]
        assert found["before"] == 0
        for name in ("cone", "full", "attribution", "plan", "steer"):
            assert found[name]["gap"] < 2e-6, (name, found[name])
        # Some modules, called by themselves, have their own part alone.
        edges = found["edges"]
        assert edges.get("error") == "EngineError" or edges["gap"] < 2e-6, edges
        assert found["after"] == 0


@pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")
@pytest.mark.parametrize("name", CALLS)
def test_a_model_that_says_so_is_refused_before_anything_runs(name: str) -> None:
    model: Any = tiny_model("llama")
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    model._tp_size = 2
    with pytest.raises(AdapterError, match="tensor-parallel"):
        CALLS[name](model)
    assert not forwards
    # One process that has all of it is none.
    alone: Any = tiny_model("llama")
    alone._tp_size = 1
    with torch.no_grad():
        CALLS[name](alone)
