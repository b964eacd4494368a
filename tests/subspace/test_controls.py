"""A model that knows nothing, and what it takes to draw one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnpatch_core.subspace.controls import untrained
from nnpatch_core.testing import tiny_model


def test_random_weights_leave_the_random_numbers_of_all_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A seed for all would be kept by the GPUs, of which several may hold the model."""

    def seeded(*_: Any) -> None:
        raise AssertionError("a device is seeded")

    model = tiny_model("llama")
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    for device in (torch.cuda, torch.xpu):
        monkeypatch.setattr(device, "manual_seed_all", seeded)
    first = untrained(model, 3)
    assert torch.equal(torch.rand(3), wanted)
    again, other = untrained(model, 3), untrained(model, 4)
    weights = [each.get_output_embeddings().weight for each in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
