"""Prompts of different lengths: what columns mix is said, once, and only where they do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nnpatch_core import (
    MultiSite,
    Outcome,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    plan_sweep,
)
from nnpatch_core.errors import PromptWarning
from nnpatch_core.testing import tiny_api, tiny_model

SOURCE = torch.tensor([[5, 6, 7, 8], [9, 11, 12, 13]])
TARGET = torch.tensor([[5, 9, 7, 8], [9, 11, 14, 13]])
ANSWERS = torch.tensor([1, 2]), torch.tensor([3, 4])
EQUAL = torch.ones(2, 4, dtype=torch.int64)
UNEQUAL = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
RIGHT = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
API = tiny_api()
EACH = Sites("resid", layers=[1], seq_pos_type="each")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def at(*positions: Any) -> Site:
    return Site.get_site(API, "resid", layer=1, seq_pos=list(positions))


class EverySecond:
    """A strategy of somebody else's."""

    one_by_one = True

    def __repr__(self) -> str:
        return "EverySecond()"  # Two processes must give a test one name.

    def expand(self, seq_len: int) -> list[tuple[int]]:
        return [(position,) for position in range(0, seq_len, 2)]


def activation(
    model: Any, sites: Sites, source: torch.Tensor, target: torch.Tensor, **options: Any
) -> Outcome:
    return activation_patching(
        model, None, sites, SOURCE, TARGET, *ANSWERS, source_attention_mask=source,
        target_attention_mask=target, progress=False, **options,
    )  # fmt: skip


def full(model: Any, sites: Sites, source: torch.Tensor, target: torch.Tensor) -> Outcome:
    return activation(model, sites, source, target, engine="full")


def chunked(model: Any, sites: Sites, source: torch.Tensor, target: torch.Tensor) -> Outcome:
    return activation(model, sites, source, target, batch_size=1)


def screened(model: Any, sites: Any, source: torch.Tensor, target: torch.Tensor) -> Any:
    return activation(model, sites, source, target, screen="atp*", top_k=1)


def attribution(model: Any, sites: Any, source: torch.Tensor, target: torch.Tensor) -> Any:
    return attribution_patching(
        model, None, sites, SOURCE, TARGET, *ANSWERS, source_attention_mask=source,
        target_attention_mask=target, progress=False,
    )  # fmt: skip


def planned(model: Any, sites: Sites, source: torch.Tensor, target: torch.Tensor) -> Any:
    return plan_sweep(
        model, None, sites, SOURCE, TARGET, source_attention_mask=source,
        target_attention_mask=target,
    )  # fmt: skip


def ablation(
    model: Any, sites: Any, source: torch.Tensor, target: torch.Tensor, **options: Any
) -> Any:
    return ablation_patching(
        model, None, sites, TARGET, *ANSWERS, attention_mask=target, progress=False, **options
    )


def resampled(model: Any, sites: Any, source: torch.Tensor, target: torch.Tensor) -> Any:
    return ablation(model, sites, source, target, method="resample", reference=(SOURCE, source))


def estimated_ablation(model: Any, sites: Any, source: torch.Tensor, target: torch.Tensor) -> Any:
    return attribution_patching(
        model, None, sites, None, TARGET, *ANSWERS, attention_mask=target, ablation="zero",
        progress=False,
    )  # fmt: skip


PAIRED = [activation, full, chunked, screened, attribution, planned, resampled]
SINGLE = [ablation, estimated_ablation]


@pytest.mark.parametrize("sweep", PAIRED + SINGLE)
def test_it_is_said_once_by_every_entry_point(model: Any, sweep: Callable[..., Any]) -> None:
    for mask in (UNEQUAL, RIGHT):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sweep(model, EACH, mask, mask)
        (warning,) = caught
        assert warning.category is PromptWarning
        assert warning.filename == __file__
        assert str(warning.message).startswith(
            "prompts have 3 to 4 tokens: a position is a place in the batch of 4, "
        )


@pytest.mark.parametrize("sweep", PAIRED + SINGLE)
def test_prompts_of_one_length_are_silent(model: Any, sweep: Callable[..., Any]) -> None:
    short = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    for mask in (EQUAL, short):
        sweep(model, EACH, mask, mask)


@pytest.mark.parametrize("sweep", PAIRED)
def test_the_two_prompts_of_a_pair(model: Any, sweep: Callable[..., Any]) -> None:
    with pytest.warns(PromptWarning) as caught:
        sweep(model, EACH, UNEQUAL, EQUAL)
    (warning,) = caught
    assert "have 3 to 4 tokens" in str(warning.message)
    # A donor of a resample belongs to no pair of the user's, and may be either of the two.
    if sweep is not resampled:
        assert "and differ within 1 of 2 pairs" in str(warning.message)


MIXED = [
    Sites("resid", seq_pos_type="each"),
    Sites("resid", seq_pos_type="lastk", seq_pos=2),
    Sites("resid", seq_pos_type="custom", seq_pos=[-1, -2]),
    Sites("resid", seq_pos_type="custom", seq_pos=[1]),
    Sites("resid", seq_pos_type="custom_constant", seq_pos=[1, -1]),
    Sites("resid", seq_pos_type=EverySecond()),
    Sites.from_sites([at(-1), at(-2)]),
    Sites.from_sites([at(1)]),
    Sites.from_sites([MultiSite([at(-1), at(1)])]),
]
ALIKE = [
    Sites("resid"),
    Sites("resid", seq_pos_type="last"),
    Sites("resid", seq_pos_type="lastk", seq_pos=1),
    Sites("resid", seq_pos_type="custom", seq_pos=[-2]),
    Sites("resid", seq_pos_type="custom", seq_pos=[3]),
    Sites("resid", seq_pos_type="custom_constant", seq_pos=[-1, -2]),
    Sites.from_sites([at(-1), Site.get_site(API, "resid", layer=1)]),
    Sites.from_sites([MultiSite([at(-1), at(-2)])]),
]


@pytest.mark.parametrize("sites", MIXED, ids=repr)
def test_where_columns_mix(model: Any, sites: Sites) -> None:
    with pytest.warns(PromptWarning, match="each column mixes"):
        planned(model, sites, UNEQUAL, UNEQUAL)


@pytest.mark.parametrize("sites", ALIKE, ids=repr)
def test_where_nothing_is_mixed(model: Any, sites: Sites) -> None:
    planned(model, sites, UNEQUAL, UNEQUAL)


def test_what_the_warning_advises_silences_it(model: Any) -> None:
    activation(model, EACH, EQUAL, EQUAL)
    activation(model, Sites("resid", layers=[1], seq_pos_type="last"), UNEQUAL, UNEQUAL)
