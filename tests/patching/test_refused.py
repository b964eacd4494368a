"""Arguments that would be ignored, or that give nan, are refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nnpatch_core import (
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
)
from nnpatch_core.errors import GradientError, MetricError, OutcomeError, PatchingError
from nnpatch_core.metrics import reads_tokens
from nnpatch_core.testing import tiny_model
from tests.helpers import counted
from tests.helpers.attribution import told

SOURCE = torch.tensor([[5, 6, 7, 8], [5, 6, 4, 8]])
TARGET = torch.tensor([[5, 9, 7, 8], [5, 3, 4, 8]])
ANSWERS = torch.tensor([1, 2]), torch.tensor([4, 5])
SITES = Sites(["attn", "mlp"], seq_pos_type="each")


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


def swept(patching: Any, model: Any, sites: Sites = SITES, **options: Any) -> Any:
    return patching(model, None, sites, SOURCE, TARGET, *ANSWERS, progress=False, **options)


def ablated(model: Any, **options: Any) -> Any:
    return ablation_patching(model, None, SITES, SOURCE, *ANSWERS, progress=False, **options)


# Agreement, the wrong way round -----------------------------------------------------------------


def test_agreement_the_wrong_way_round(llama: Any) -> None:
    exact, estimate = swept(activation_patching, llama), swept(attribution_patching, llama)
    with pytest.raises(OutcomeError, match=r"wrong way round.*estimate\.agreement\(exact\)"):
        exact.agreement(estimate)
    assert estimate.agreement(exact).cells


def test_agreement_of_measured_zeros(llama: Any) -> None:
    """Nothing is an estimate where a sweep only finds that nothing changes."""
    sites = Sites(["attn"], seq_pos_type="custom", seq_pos=[0])
    exact = swept(activation_patching, llama, sites)
    assert exact.elided("attn")[:, 0].all()
    assert exact.agreement(exact).cells == exact.swept("attn").sum()


def test_agreement_with_what_a_screen_measured(llama: Any) -> None:
    exact = swept(activation_patching, llama)
    screened = swept(activation_patching, llama, screen="attribution", top_k=2, spot_checks=1)
    found = exact.agreement(screened, top_k=3)
    assert found.cells >= 3
    assert found.recall == found.sign_agreement == 1


# Seeds of nothing -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["zero", "mean"])
def test_seed_without_a_draw(llama: Any, method: str) -> None:
    with pytest.raises(PatchingError, match=f"seed=3 means nothing with method='{method}'"):
        ablated(llama, method=method, seed=3)
    assert ablated(llama, method=method).kind == f"ablation ({method})"


def test_seed_without_a_screen(llama: Any) -> None:
    with pytest.raises(PatchingError, match="seed=3 means nothing without screen="):
        swept(activation_patching, llama, seed=3)


@pytest.mark.parametrize(
    ("seed", "words"),
    [
        (0.5, "seed must be an integer, got 0.5 (float)"),
        ("x", "seed must be an integer, got 'x' (str)"),
        (True, "seed must be an integer, got True (bool)"),
        (2**64, "seed must be a number of 64 bits, got 18446744073709551616"),
    ],
)
def test_a_bad_seed_is_one_error_everywhere(seed: Any, words: str) -> None:
    model = counted.Counted(tiny_model("llama"))
    for call in (
        lambda: ablated(model.model, method="resample", seed=seed),
        lambda: swept(activation_patching, model.model, screen="attribution", top_k=1, seed=seed),
    ):
        with pytest.raises(PatchingError) as caught:
            call()
        assert (caught.type, str(caught.value)) == (PatchingError, words)
    assert model.forwards == 0


def test_seed_is_0_unless_it_is_given(llama: Any) -> None:
    one, other = (ablated(llama, method="resample", **seed) for seed in ({}, {"seed": 0}))
    assert all(torch.equal(one[name], other[name]) for name in one)
    options = {"screen": "attribution", "top_k": 2, "spot_checks": 2}
    one, other = (
        swept(activation_patching, llama, **options, **seed) for seed in ({}, {"seed": 0})
    )
    assert all(torch.equal(one.exact(name), other.exact(name)) for name in one)


# Token ids without numbers ----------------------------------------------------------------------


@pytest.mark.parametrize("patching", [activation_patching, attribution_patching])
def test_tokens_read_that_have_no_numbers(llama: Any, patching: Callable[..., Any]) -> None:
    @reads_tokens(lambda context: torch.tensor([[1], [2]], device="meta"))
    def first(logits: Tensor) -> Tensor:
        return logits[:, 1]

    with pytest.raises(MetricError, match=r"'first' declares .* no numbers .* device 'meta'"):
        swept(patching, llama, metric=first)


@pytest.mark.parametrize(
    "ids", [torch.tensor([[1 + 0j], [2]]), torch.tensor([[1], [2]]).to_sparse()]
)
def test_tokens_read_that_are_no_plain_integers(llama: Any, ids: torch.Tensor) -> None:
    @reads_tokens(lambda context: ids)
    def first(logits: Tensor) -> Tensor:
        return logits[:, 1]

    with pytest.raises(MetricError, match="'first' declares"):
        swept(activation_patching, llama, metric=first)


# Activations that are cut off -------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"qk_fix": True}, {"grad_drop": True}])
def test_site_that_a_hook_detaches(options: Any) -> None:
    model = tiny_model("gemma2")
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *call: call[2].detach())
    try:
        with told(SITES, options), pytest.raises(GradientError, match=r"layers\.1.*detach"):
            swept(attribution_patching, model, **options)
    finally:
        hook.remove()
