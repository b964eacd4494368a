"""The strongest cells of some site names alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnpatch_core import Outcome, Sites, activation_patching
from nnpatch_core.errors import NotSweptError, OutcomeError
from nnpatch_core.testing import tiny_model


@pytest.fixture(scope="module")
def out() -> Any:
    sites = Sites(["resid", "q", "o"], seq_pos_type="each")
    runs = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]])
    return activation_patching(
        tiny_model("llama"),
        None,
        sites,
        *runs,
        torch.tensor([1]),
        torch.tensor([2]),
        progress=False,
    )


@pytest.mark.parametrize("sites", [["q"], ["o", "q"], ("resid",), ["q", "q"], ["z"], "o"])
@pytest.mark.parametrize("k", [0, 1, 5, 10_000])
def test_strongest_of_some_sites(out: Outcome, sites: str | list[str] | tuple[str], k: int) -> None:
    """They are those of all cells, in their order, without the other sites."""
    names = {"o" if name == "z" else name for name in ([sites] if sites == "o" else sites)}
    every = [row for row in out.strongest(10_000) if row["site"] in names]
    found = out.strongest(k, sites=sites)
    assert len(found) == min(k, len(every))
    assert [abs(row["value"]) for row in found] == [abs(row["value"]) for row in every[:k]]
    assert {row["site"] for row in found} <= names
    assert all(row in every for row in found)


def test_strongest_of_all_sites(out: Outcome) -> None:
    assert out.strongest(4, sites=None) == out.strongest(4)
    assert out.strongest(4, sites=[]) == []


def test_sites_that_were_not_swept(out: Outcome) -> None:
    with pytest.raises(NotSweptError, match="'mlp' was not swept"):
        out.strongest(sites=["mlp"])
    with pytest.raises(OutcomeError, match="sites must be a list of site names, got 3"):
        out.strongest(sites=3)
