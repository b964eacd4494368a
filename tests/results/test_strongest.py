"""The strongest cells, found without looking at each."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnpatch_core import Sites, activation_patching
from nnpatch_core.errors import OutcomeError
from nnpatch_core.testing import tiny_api, tiny_model

OUT = activation_patching(
    tiny_model(),
    tiny_api(),
    Sites(["resid", "k"], layers=[0, 2], seq_pos_type="custom", seq_pos=[2, 1]),
    torch.tensor([[5, 6, 7]]),
    torch.tensor([[5, 9, 7]]),
    torch.tensor([1]),
    torch.tensor([2]),
    progress=False,
)
CELLS = {name: len(cells.index) for name, cells in OUT.cells.items()}
# Few values, so that there are ties.
VALUES = st.sampled_from([0.0, 1.0, -1.0, 2.0, math.nan, math.inf, -math.inf])


@given(
    values=st.lists(VALUES, min_size=sum(CELLS.values()), max_size=sum(CELLS.values())),
    k=st.integers(0, 15),
)
@settings(deadline=None)
def test_they_are_those_of_a_sort_of_all(values: Any, k: Any) -> None:
    raw, rest = {}, list(values)
    for name, count in CELLS.items():
        raw[name], rest = torch.tensor(rest[:count])[:, None], rest[count:]
    out = attrs.evolve(OUT, scale="change", raw={OUT.metric: raw})
    out = attrs.evolve(
        out, baselines={OUT.metric: attrs.evolve(out.baseline, target=torch.zeros(1))}
    )
    every = []
    for name, cells in out.cells.items():
        for place in cells.index.tolist():
            every.append((name, place, out[name][tuple(place)].item()))
    every.sort(key=lambda cell: -math.inf if math.isnan(cell[2]) else -abs(cell[2]))
    found = out.strongest(k)
    assert len(found) == min(k, len(every))
    for row, (name, place, value) in zip(found, every, strict=False):
        assert (row["site"], row["layer"], row["position"]) == (name, *place[:2])
        assert row.get("head") == (place[2] if name == "k" else None)
        assert row["value"] == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize("k", [-1, 1.5, "3", True])
def test_a_number_of_cells_is_a_count(k: float | int | str) -> None:
    with pytest.raises(OutcomeError, match="k must be"):
        OUT.strongest(k)
