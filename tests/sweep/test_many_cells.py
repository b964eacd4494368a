"""A million cells are planned as arrays: no object stands for each of them."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnpatch_core import Sites, plan_sweep
from nnpatch_core._models import as_nnsight
from nnpatch_core.interventions import PairArguments, read_pairs
from nnpatch_core.results import Baseline
from nnpatch_core.site import Site
from nnpatch_core.sites import bind_cells, bind_grids
from nnpatch_core.sweep import Options, Repairs, identity, prepare
from nnpatch_core.sweep.estimation import Estimation
from nnpatch_core.testing import tiny_api, tiny_model

#: Bytes that planning may take for each cell: numbers of cell, place and run.
MOST = 300


def test_a_cell_takes_few_bytes() -> None:
    model, seq_len = tiny_model("llama"), 4096
    target = torch.randint(3, 60, (1, seq_len))
    source = target.clone()
    source[0, 1] += 1
    sites = Sites(["o", "resid"], seq_pos_type="each")
    # What is made once, such as modules that are imported, counts for no cell.
    plan_sweep(model, tiny_api(), sites, source[:, :8], target[:, :8])
    tracemalloc.start()
    plan = plan_sweep(model, tiny_api(), sites, source, target)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.cells == 3 * seq_len * 5
    assert plan.runs == 3 * (seq_len - 1) * 5
    assert peak < MOST * plan.cells


def test_a_cell_takes_few_bytes_where_it_is_estimated() -> None:
    """Until a forward runs, the identity of a checkpoint included."""
    model, seq_len = tiny_model("llama"), 4096
    target = torch.randint(3, 60, (1, seq_len))
    source = target.clone()
    source[0, 1] += 1
    answers = torch.tensor([1]), torch.tensor([2])
    traced = as_nnsight(model)

    def planned(length: int) -> int:
        prompts = source[:, :length], target[:, :length], *answers
        runs = read_pairs(traced, PairArguments(*prompts))
        options = Options(memory_budget=2**38)
        sites = Sites(["o", "resid"], seq_pos_type="each")
        sweep, runs = prepare(
            traced, tiny_api(), sites, runs, "logit_difference", options, gathers=False
        )
        estimation = Estimation.of(sweep, Repairs(None, qk_fix=False, grad_drop=False))
        # What is known of the unpatched runs does not go by cells.
        logits = torch.zeros(1, 64)
        told = identity(
            sweep, runs, runs.values(sweep), "", "", estimation.told,
            runs.context(logits, logits), {"": Baseline(logits[:, 0], logits[:, 0])},
        )  # fmt: skip
        assert told["sites"].startswith(f"{estimation.parts.owner.size} ")
        return len(sweep.patches.cells)

    planned(8)
    tracemalloc.start()
    cells = planned(seq_len)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert cells == 3 * seq_len * 5
    assert peak < MOST * cells


NAMES = st.lists(
    st.sampled_from(["resid", "resid_pre", "attn", "mlp", "q", "k", "v", "o"]),
    min_size=1,
    max_size=3,
    unique=True,
)
WHERE: Any = st.sampled_from([(None, None), ("each", None), ("last", None), ("lastk", 2)])


@given(names=NAMES, where=WHERE, layers=st.sets(st.integers(0, 2), min_size=1), data=st.data())
@settings(deadline=None, max_examples=60)
def test_arrays_are_the_sites_that_they_stand_for(
    names: list[str], where: Any, layers: set[int], data: st.DataObject
) -> None:
    model, api, seq_len = tiny_model("llama"), tiny_api(), 5
    grids = Sites(names, list(layers), *where).grids(model, api, seq_len)
    made = [site for grid in grids.values() for site in grid.sites]
    assert all(isinstance(site, Site) for site in made)
    bound = bind_grids([grid.sites for grid in grids.values()], model, seq_len).cells
    alone = bind_cells(made, model, seq_len).cells
    kept = sorted(data.draw(st.sets(st.integers(0, len(made) - 1), min_size=1)))
    for some, numbers in (
        (bound, range(len(made))),
        (bound.take(torch.tensor(kept).numpy()), kept),
    ):
        for cell, number in zip(some, numbers, strict=True):
            (site,), (other,) = cell.sites, alone[number].sites
            assert (cell.label, cell.named.name) == (made[number].label, made[number].name)
            assert (site.place.location, site.head) == (other.place.location, other.head)
            assert site.positions.groups == other.positions.groups


@pytest.mark.parametrize("name", ["resid", "o"])
def test_a_grid_has_the_sites_of_its_places(name: str) -> None:
    grid = Sites(name, [0, 2], "each").grids(tiny_model("llama"), tiny_api(), 3)[name]
    for place, site in zip(grid.index.tolist(), grid.sites, strict=True):
        assert place == [site.layer, *site.seq_pos, *([] if site.head is None else [site.head])]
    assert [site.label for site in grid.sites[2:4]] == [grid.sites[n].label for n in (2, 3)]
