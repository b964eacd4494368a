"""Positions of prompts that cannot be: an error that names them, before any forward; or a word."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nnpatch_core import (
    Site,
    Sites,
    Span,
    Spans,
    ablation_patching,
    activation_patching,
    cache_average,
)
from nnpatch_core.errors import CheckpointError, PatchingError, PositionError, PromptWarning
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.counted import Counted

SOURCE = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]])
TARGET = torch.tensor([[5, 6, 17, 8, 9], [11, 22, 13, 14, 15]])
ANSWERS = torch.tensor([20, 21]), torch.tensor([30, 31])


@pytest.fixture
def counted() -> Counted:
    return Counted(tiny_model("llama"))


def sweep(model: Any, sites: Any, *, count: int = 2, **options: Any) -> Any:
    return activation_patching(
        model,
        tiny_api(),
        sites,
        SOURCE[:count],
        TARGET[:count],
        *(each[:count] for each in ANSWERS),
        progress=False,
        **options,
    )


def span(ends: Any) -> dict[str, Span]:
    return {"name": Span(ends, ends)}


def test_positions_that_are_read_once() -> None:
    def given() -> Any:
        return (position for position in (1, -1))

    assert Sites("resid", seq_pos_type="custom", seq_pos=given()) == Sites(
        "resid", seq_pos_type="custom", seq_pos=[1, -1]
    )
    site = Site.get_site(tiny_api(), "mlp", 0, seq_pos=given(), source_seq_pos=given())
    assert site.seq_pos == site.source_seq_pos == (1, -1)


@pytest.mark.parametrize("source", [torch.tensor(3), 3, "3", b"3"], ids=repr)
def test_sources_that_are_no_list(source: Any) -> None:
    with pytest.raises(PositionError, match="source_seq_pos must be a list of integers, got"):
        Sites("resid", seq_pos_type="custom", seq_pos=[1], source_seq_pos=source)


@pytest.mark.parametrize(
    ("seq_pos", "source", "told"),
    [
        ([1], [9], "source_seq_pos: position 9 is out of range"),
        ([[1], [1]], [[1], [-9]], "source_seq_pos of prompt 1: position -9 is out of range"),
        ([[1], [9]], [[1], [1]], "seq_pos of prompt 1: position 9 is out of range"),
    ],
)
def test_the_argument_that_is_out_of_range(
    counted: Counted, seq_pos: Any, source: Any, told: str
) -> None:
    sites = Sites("resid", seq_pos_type="custom", seq_pos=seq_pos, source_seq_pos=source)
    with pytest.raises(PositionError, match=f"^{told}"):
        sweep(counted.model, sites)
    assert counted.forwards == 0


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        (torch.tensor([[1.0, 2.0]] * 2), "must be integers in the source prompts, got torch.flo"),
        (torch.tensor([[False, True]] * 2), "must be integers in the source prompts, got torch.bo"),
        (torch.ones(2, 2, dtype=torch.complex64), "must be integers in the source prompts, got"),
        (torch.ones(2, 2, dtype=torch.int64, device="meta"), "device 'meta'"),
        (torch.ones(2, 2, dtype=torch.int64).to_sparse(), "layout torch.sparse_coo"),
    ],
    ids=["float", "bool", "complex", "meta", "sparse"],
)
@pytest.mark.parametrize("token", ["last", "all"])
def test_spans_that_are_no_integers(counted: Counted, ends: Tensor, told: str, token: Any) -> None:
    sites = Sites("resid", seq_pos_type=Spans("name", token=token))
    with pytest.raises(PositionError, match=f"^span 'name' .*{re.escape(told)}"):
        sweep(counted.model, sites, spans=span(ends))
    assert counted.forwards == 0


def test_spans_of_small_integers_are_spans() -> None:
    sites = Sites("resid", seq_pos_type="spans", seq_pos="name")
    found = [
        sweep(tiny_model("llama"), sites, spans=span(torch.tensor([[1, 3], [2, 3]], dtype=kind)))
        for kind in (torch.int64, torch.int32, torch.uint8)
    ]
    assert torch.equal(found[0]["resid"], found[1]["resid"])
    assert torch.equal(found[0]["resid"], found[2]["resid"])


@pytest.mark.parametrize("count", [1, 2])
def test_a_span_that_has_moved_is_another_sweep(tmp_path: Path, count: int) -> None:
    """Of one prompt, too: what a checkpoint has of the old place is no number of the new one."""
    sites, model = Sites("resid", seq_pos_type="spans", seq_pos="name"), tiny_model("llama")
    path = tmp_path / "sweep"
    before, after = (span(torch.tensor([[at, at + 1]] * count)) for at in (2, 4))
    sweep(model, sites, count=count, spans=before, checkpoint=path)
    sweep(model, sites, count=count, spans=before, checkpoint=path)
    with pytest.raises(CheckpointError, match="positions: "):
        sweep(model, sites, count=count, spans=after, checkpoint=path)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", [{"method": "mean", "per_position": True}, {"method": "resample"}])
@pytest.mark.parametrize(
    "sites",
    [
        lambda count: Sites("mlp", seq_pos_type="spans", seq_pos="name"),
        lambda count: Sites("mlp", seq_pos_type="custom", seq_pos=[[1]] * count),
        lambda count: Sites.from_sites([Site.get_site(tiny_api(), "mlp", 0, None, [[1]] * count)]),
    ],
    ids=["spans", "columns", "site"],
)
def test_a_reference_has_no_positions_of_its_own(
    counted: Counted, sites: Callable[[int], Any], kind: dict[str, Any], count: int
) -> None:
    """Whether there is one prompt or several."""
    with pytest.raises(PositionError, match="whose positions nobody has named"):
        ablation_patching(
            counted.model,
            tiny_api(),
            sites(count),
            TARGET[:count],
            *(each[:count] for each in ANSWERS),
            reference=SOURCE,
            spans=span(torch.tensor([[1, 2]] * count)),
            **kind,
        )
    assert counted.forwards == 0


def test_one_prompt_is_its_own_mean_at_its_positions() -> None:
    out = ablation_patching(
        tiny_model("llama"),
        tiny_api(),
        Sites("mlp", seq_pos_type="custom", seq_pos=[[1, 3]]),
        TARGET[:1],
        *(each[:1] for each in ANSWERS),
        method="mean",
        per_position=True,
        progress=False,
    )
    torch.testing.assert_close(out["mlp"], torch.zeros(3, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("source", [[2], [-2]])
@pytest.mark.parametrize("kind", ["custom", "custom_constant", "site"])
def test_sources_counted_from_the_start_mix_words(kind: str, source: list[int]) -> None:
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    sites: Any = Sites.from_sites(
        [Site.get_site(tiny_api(), "mlp", 0, seq_pos=[-1], source_seq_pos=source)]
    )
    if kind != "site":
        sites = Sites("mlp", seq_pos_type=kind, seq_pos=[-1], source_seq_pos=source)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sweep(tiny_model("llama"), sites, attention_mask=mask)
    told = [each for each in caught if issubclass(each.category, PromptWarning)]
    assert len(told) == (source == [2])


@pytest.mark.parametrize(
    ("site", "told"),
    [
        ({"seq_pos": [[1, 2], [2, 1]]}, "another order in some prompts"),
        ({"seq_pos": [-1], "source_seq_pos": [0]}, "meets padding"),
        ({"seq_pos": [[3], [3]], "source_seq_pos": [[3], [1]]}, "meets padding"),
    ],
    ids=["order", "shared source", "own source"],
)
def test_positions_without_a_mean(site: dict[str, Any], told: str) -> None:
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    batch = TARGET if told.startswith("another") else (TARGET, mask)
    with pytest.raises(PatchingError, match=told):
        cache_average(tiny_model("llama"), [Site.get_site(tiny_api(), "mlp", 0, **site)], batch)


def test_positions_in_one_order_have_a_mean() -> None:
    site = Site.get_site(tiny_api(), "mlp", 0, seq_pos=[[1, 3], [2, -1]])
    cache_average(tiny_model("llama"), [site], TARGET)
    assert site.value.shape == (1, 2, 32)
