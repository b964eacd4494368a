"""A model that runs elsewhere gives what it gives here, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnpatch_core import Outcome, Sites, ablation_patching, activation_patching
from nnpatch_core.metrics import reads_tokens
from nnpatch_core.subspace import Subspace
from nnpatch_llama import Llama3
from tests.helpers.served import Served

BLOCKS, HEADS = ("resid_pre", "resid", "attn", "mlp"), ("q", "k", "v", "o")
#: What may be asked for, by name.
METRICS: dict[str, dict[str, Any]] = {
    "two columns": {},
    "the whole vocabulary": {"metric": ["logit_difference", "kl_divergence"]},
    "positions": {"metric": "loss"},
    "answers": {
        "metric": ["sequence_log_probability_difference", "answer_probability"],
        "source_answer_tokens": torch.tensor([[1, 8, 9], [2, 7, -1], [3, -1, -1]]),
        "target_answer_tokens": torch.tensor([[4, -1, -1], [5, 6, -1], [6, 2, 1]]),
    },
}
ANSWERS = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])


def check(there: Outcome, here: Outcome) -> None:
    assert list(there) == list(here)
    for metric, names in here.raw.items():
        assert torch.equal(there.baselines[metric].target, here.baselines[metric].target)
        for name, values in names.items():
            assert torch.equal(there.raw[metric][name], values), (metric, name)


@pytest.fixture(scope="module", params=["local", "server"])
def away(request: Any, served: Served) -> tuple[Any, Any, Any]:
    """The model here, the model as it is passed with `remote=`, and that."""
    if request.param == "local":
        return served.here(), served.here(), "local"
    return served.here(), served.there(), served.url


@st.composite
def prompts(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Source and target `[3, seq]`, and their mask."""
    width = draw(st.integers(2, 6))
    row = st.lists(st.integers(2, 60), min_size=width, max_size=width)
    source = torch.tensor(draw(st.lists(row, min_size=3, max_size=3)))
    lengths = torch.tensor([width, *draw(st.lists(st.integers(2, width), min_size=2, max_size=2))])
    left = draw(st.booleans())
    mask = (torch.arange(width) < lengths[:, None]).long()
    # Each pair differs at some token, and so in its logits.
    at = torch.full_like(lengths, width - 1) if left else lengths - 1
    target = source.clone()
    target[torch.arange(3), at] = (target[torch.arange(3), at] + 1) % 60
    return source, target, mask.flip(1) if left else mask


@st.composite
def sites(draw: st.DrawFn) -> Sites:
    names = draw(st.lists(st.sampled_from((*BLOCKS, *HEADS)), min_size=1, max_size=3, unique=True))
    kind = draw(st.sampled_from(["each", "last", "all", "custom_constant"]))
    positions = {"seq_pos": [-1, -2]} if kind == "custom_constant" else {}
    layers = draw(st.sampled_from([None, [0], [0, 2]]))
    return Sites(names, layers=layers, seq_pos_type=kind, **positions)


@given(data=st.data())
@settings(deadline=None, max_examples=8)
@pytest.mark.filterwarnings("ignore::nnpatch_core.errors.PromptWarning")
def test_activations(away: tuple[Any, Any, Any], data: st.DataObject) -> None:
    here, there, remote = away
    source, target, mask = data.draw(prompts())
    options = {
        "attention_mask": mask,
        "progress": False,
        "batch_size": data.draw(st.sampled_from([2, 3])),
        **METRICS[data.draw(st.sampled_from(sorted(METRICS)))],
    }
    call = Llama3, data.draw(sites()), source, target, *ANSWERS
    expected = activation_patching(here, *call, engine="full", **options)
    check(activation_patching(there, *call, remote=remote, **options), expected)


@given(data=st.data())
@settings(deadline=None, max_examples=6)
@pytest.mark.filterwarnings("ignore::nnpatch_core.errors.PromptWarning")
def test_ablations(away: tuple[Any, Any, Any], data: st.DataObject) -> None:
    here, there, remote = away
    source, target, mask = data.draw(prompts())
    reference = data.draw(st.sampled_from([None, (source, mask)]))
    which: dict[str, Any] = data.draw(
        st.sampled_from(
            [
                {"method": "zero"},
                {"method": "mean", "reference": reference},
                {"method": "mean", "per_position": True, "reference": reference},
                {"method": "resample", "reference": reference, "seed": 3},
            ]
        )
    )
    options = {"attention_mask": mask, "progress": False, "batch_size": 2, **which}
    call = Llama3, data.draw(sites()), target, *ANSWERS
    expected = ablation_patching(here, *call, engine="full", **options)
    check(ablation_patching(there, *call, remote=remote, **options), expected)


@pytest.mark.parametrize("method", ["mean", "resample"])
def test_ablations_at_positions_of_each_prompt(away: tuple[Any, Any, Any], method: str) -> None:
    here, there, remote = away
    tokens = torch.arange(2, 20).view(3, 6)
    own = Sites(["resid", "o"], seq_pos_type="custom", seq_pos=[[0, -1], [1, -1], [3, -2]])
    kind = {"method": method, **({"per_position": True} if method == "mean" else {})}
    call, options = (Llama3, own, tokens, *ANSWERS), {"progress": False, "batch_size": 2, **kind}
    expected = ablation_patching(here, *call, engine="full", **options)
    check(ablation_patching(there, *call, remote=remote, **options), expected)


@pytest.mark.parametrize("name", [*BLOCKS, *HEADS])
def test_subspaces(away: tuple[Any, Any, Any], name: str) -> None:
    here, there, remote = away
    space = Subspace.random(8 if name in HEADS else 32, rank=3)
    source, target = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 8]])
    call = Llama3, Sites(name, seq_pos_type="each", subspace=space), source, target
    answers = torch.tensor([1]), torch.tensor([2])
    expected = activation_patching(here, *call, *answers, engine="full", progress=False)
    check(activation_patching(there, *call, *answers, remote=remote, progress=False), expected)


def test_other_positions_of_the_source(away: tuple[Any, Any, Any]) -> None:
    here, there, remote = away
    tokens = torch.arange(2, 20).view(3, 6)
    shifted = Sites(
        ["resid", "q"],
        seq_pos_type="custom",
        seq_pos=[[0, -1], [1, -1], [3, -2]],
        source_seq_pos=[[1, -2], [1, -1], [0, -1]],
    )
    call = Llama3, shifted, tokens, tokens.flip(1), *ANSWERS
    expected = activation_patching(here, *call, engine="full", progress=False)
    check(activation_patching(there, *call, remote=remote, progress=False), expected)


def test_a_metric_of_some_columns_gets_them_alone(served: Served) -> None:
    seen = []

    @reads_tokens(lambda context: torch.tensor([7, 11]))
    def columns(logits: torch.Tensor, context: Any) -> torch.Tensor:
        seen.append(int((~logits.isnan()).all(0).sum()))
        return logits[:, 7] - logits[:, 11]

    source, target = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 8]])
    answers = torch.tensor([1]), torch.tensor([2])
    call = Llama3, Sites("resid"), source, target, *answers
    options = {"metric": columns, "progress": False, "batch_size": 1}
    expected = activation_patching(served.here(), *call, engine="full", **options)
    del seen[:]
    there = activation_patching(served.there(), *call, remote=served.url, **options)
    check(there, expected)
    assert seen[-1] == 2
