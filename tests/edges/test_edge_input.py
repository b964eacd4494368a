"""Whatever is wrong with a call of `edge_patching` is told before the model runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nnpatch_core import Component, edge_patching
from nnpatch_core.errors import (
    AdapterError,
    AdapterWarning,
    AnswerError,
    CheckpointError,
    EdgeError,
    EngineError,
    MaskError,
    MemoryBudgetError,
    MetricError,
    PatchingError,
    PositionError,
    TokensError,
    UnknownNameError,
)
from nnpatch_core.testing import tiny_model
from nnpatch_llama import Llama3
from tests.helpers.families import FAMILIES
from tests.helpers.families import model_of as family_model
from tests.helpers.refusals import (
    ONES,
    SOURCE,
    SOURCE_ANSWERS,
    TARGET,
    TARGET_ANSWERS,
    Counted,
)

NAMES = "resid_pre, q, k, v, o, attn, mlp, resid"


@pytest.fixture(scope="module")
def counted() -> Counted:
    return Counted(tiny_model("llama"))


def patched(model: Any, **changed: Any) -> Any:
    arguments = {
        "api": None,
        "source_tokens": SOURCE,
        "target_tokens": TARGET,
        "source_answer_index": SOURCE_ANSWERS,
        "target_answer_index": TARGET_ANSWERS,
        "progress": False,
    }
    return edge_patching(model, **{**arguments, **changed})


#: What is given, the error, and parts of its message: the value, what is allowed, what to do.
BAD: dict[str, tuple[dict[str, Any], type[PatchingError], tuple[str, ...]]] = {
    "unknown sender": (
        {"senders": "a0.h9"},
        EdgeError,
        ("no sender 'a0.h9'", "it has input, a0.h0, a0.h1, ..., m2"),
    ),
    "misspelled sender": ({"senders": ["inptu"]}, EdgeError, ("did you mean input?",)),
    "receiver that does not say what": (
        {"receivers": ["a0.h3"]},
        EdgeError,
        ("'a0.h3' does not say which of a head's inputs receives", "a0.h3<q>", "key, a0.h1<k>"),
    ),
    "query head of a key": (
        {"receivers": ["a0.h3<k>"]},
        EdgeError,
        ("no receiver 'a0.h3<k>'", "4 query heads share 2", "query head 3 reads a0.h1<k>"),
    ),
    "receiver of no head": ({"receivers": "a0.h4<k>"}, EdgeError, ("it has a0.h0<q>",)),
    "receiver of no layer": ({"receivers": "a3.h0"}, EdgeError, ("no receiver 'a3.h0'",)),
    "sender as receiver": ({"receivers": "input"}, EdgeError, ("no receiver 'input'",)),
    "receiver as sender": ({"senders": "logits"}, EdgeError, ("no sender 'logits'",)),
    "edge as sender": ({"senders": "m0->m1"}, EdgeError, ("no sender 'm0->m1'",)),
    "sender after receiver": (
        {"senders": ["m1", "m2"], "receivers": ["m0", "a1.h0<q>"]},
        EdgeError,
        ("no sender writes before a receiver", "first sender is m1", "last receiver is a1.h0<q>"),
    ),
    "sender of its own layer": (
        {"senders": "a1.h0", "receivers": "a1.h1<v>"},
        EdgeError,
        ("no sender writes before",),
    ),
    "no senders": ({"senders": []}, EdgeError, ("senders must be names of nodes", "[]")),
    "no receivers": ({"receivers": ()}, EdgeError, ("receivers must be names of nodes", "()")),
    "number as senders": ({"senders": 3}, EdgeError, ("senders must be names", "got 3")),
    "number as sender": ({"senders": [3]}, EdgeError, ("no sender 3",)),
    "tensor as senders": ({"senders": torch.tensor(2)}, EdgeError, ("senders must be names",)),
    "unknown method": (
        {"method": "eap-ig"},
        UnknownNameError,
        ("'eap-ig'", "exact, eap, eap-ig-inputs, eap-ig-activations, clean-corrupted"),
    ),
    "no method": ({"method": None}, UnknownNameError, ("unknown method None",)),
    "steps of one point": ({"method": "eap", "steps": 3}, PatchingError, ("steps=3", "'eap'")),
    "steps of what measures": ({"steps": 3}, PatchingError, ("steps=3", "'exact'")),
    "no step": (
        {"method": "eap-ig-inputs", "steps": 0},
        PatchingError,
        ("steps must be at least 1", "got 0"),
    ),
    "half a step": ({"method": "eap-ig-inputs", "steps": 2.5}, PatchingError, ("steps", "2.5")),
    "far too many steps": (
        {"method": "eap-ig-activations", "steps": 2**31},
        PatchingError,
        ("not beyond 2**31",),
    ),
    "top_k of what measures": (
        {"top_k": 5},
        PatchingError,
        ("top_k=5", "which measures all edges", "method='eap'"),
    ),
    "spot checks of what measures": ({"spot_checks": 5}, PatchingError, ("spot_checks=5",)),
    "spot checks of nothing": (
        {"method": "eap", "spot_checks": 5},
        PatchingError,
        ("spot_checks=5 means nothing without top_k=",),
    ),
    "no top": ({"method": "eap", "top_k": 0}, PatchingError, ("top_k must be at least 1",)),
    "negative spot checks": (
        {"method": "eap", "top_k": 1, "spot_checks": -1},
        PatchingError,
        ("spot_checks must not be negative", "-1"),
    ),
    "seed of nothing": ({"seed": 1}, PatchingError, ("seed=1 means nothing", "top_k=")),
    "seed of an estimate": ({"method": "eap", "seed": 1}, PatchingError, ("seed=1",)),
    "bad seed": ({"ablation": "resample", "seed": "x"}, PatchingError, ("seed",)),
    "unknown ablation": (
        {"ablation": "zeros"},
        UnknownNameError,
        ("unknown ablation 'zeros'", "zero, mean, resample"),
    ),
    "reference without ablation": (
        {"reference": SOURCE},
        PatchingError,
        ("reference= and per_position= mean nothing without ablation=",),
    ),
    "per position without ablation": ({"per_position": True}, PatchingError, ("per_position=",)),
    "reference of zeros": ({"ablation": "zero", "reference": SOURCE}, PatchingError, ("'zero'",)),
    "reference that is none": (
        {"ablation": "mean", "reference": "x"},
        TokensError,
        ("reference",),
    ),
    "per position of a resample": (
        {"ablation": "resample", "per_position": True},
        PatchingError,
        ("per_position=True",),
    ),
    "clean-corrupted of an ablation": (
        {"ablation": "mean", "method": "clean-corrupted"},
        PatchingError,
        ("'clean-corrupted'", "ablation='mean'", "'eap'"),
    ),
    "checkpoint that is no path": (
        {"checkpoint": 3},
        CheckpointError,
        ("named by a string or a path", "got 3"),
    ),
    "unknown engine": ({"engine": "fast"}, UnknownNameError, ("'fast'", "auto, cone, full")),
    "engine that cannot": (
        {"engine": "cone", "api": attrs.evolve(Llama3, cone=False)},
        EngineError,
        ("engine='cone' cannot run this sweep", "says that its models cannot run"),
    ),
    "unknown metric": ({"metric": "difference"}, UnknownNameError, ("'difference'",)),
    "no metric": ({"metric": []}, MetricError, ("metric",)),
    "unknown strategy": ({"seq_pos_type": "first"}, UnknownNameError, ("'first'",)),
    "strategy without positions": ({"seq_pos_type": "custom"}, PositionError, ("needs seq_pos=",)),
    "positions without strategy": ({"seq_pos": [1]}, PositionError, ("seq_pos=",)),
    "position out of range": (
        {"seq_pos_type": "custom", "seq_pos": [9]},
        PositionError,
        ("position 9 is out of range", "-4 to 3"),
    ),
    "too many last ones": ({"seq_pos_type": "lastk", "seq_pos": 9}, PositionError, ("9",)),
    "unknown span": ({"seq_pos_type": "spans", "seq_pos": ["name"]}, PositionError, ("name",)),
    "positions at padding": (
        {
            "seq_pos_type": "custom",
            "seq_pos": torch.tensor([[0], [1]]),
            "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
        },
        PositionError,
        ("position 0 is padding in prompt 0",),
    ),
    "one target": ({"target_tokens": TARGET[:1]}, TokensError, ("target_tokens",)),
    "no target": ({"target_tokens": None}, TokensError, ("target_tokens",)),
    "answers of one": ({"source_answer_index": torch.tensor([1])}, AnswerError, ("source_answer",)),
    "answer out of range": (
        {"target_answer_index": torch.tensor([1, 99])},
        AnswerError,
        ("target_answer_index", "99"),
    ),
    "two kinds of masks": (
        {"attention_mask": ONES, "source_attention_mask": ONES},
        MaskError,
        ("source_attention_mask",),
    ),
    "mask of zeros": ({"attention_mask": torch.zeros_like(ONES)}, MaskError, ("row 0",)),
    "no batch": ({"batch_size": 0}, PatchingError, ("batch_size", "0")),
    "no memory": (
        {"memory_budget": 1000},
        MemoryBudgetError,
        ("one prompt of 4 tokens needs", "memory_budget leaves", "raise it"),
    ),
    "memory that is none": ({"memory_budget": "much"}, MemoryBudgetError, ("'much'",)),
    "flag that is none": (
        {"force_model_confidence": "yes"},
        PatchingError,
        ("force_model_confidence",),
    ),
    "adapter of other names": (
        {"api": attrs.evolve(Llama3, components={"mlp": Component("mlp")})},
        AdapterError,
        ("no q, k, v, o, attn in layer 0", "there it has mlp"),
    ),
    "unknown adapter": ({"api": "Lama3"}, UnknownNameError, ("'Lama3'",)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(counted: Counted, name: str) -> None:
    changed, error, parts = BAD[name]
    with counted.rejects(error, *parts):
        patched(counted.model, **changed)


def test_what_is_given_twice_counts_once(counted: Counted) -> None:
    edges = patched(counted.model, senders=["m0", "m0"], receivers=("m1", "m1"))
    assert list(edges) == ["m0->m1"]
    assert list(patched(counted.model, senders=iter(["m0"]), receivers={"m1": 1})) == ["m0->m1"]


# Models that have no edges.


def one_row(tokens: Tensor) -> dict[str, Any]:
    return {
        "source_tokens": tokens,
        "target_tokens": tokens + 1,
        "source_answer_index": torch.tensor([1]),
        "target_answer_index": torch.tensor([2]),
    }


#: Families of the tests, with what is said of them before anything runs.
REFUSED: dict[str, tuple[type[PatchingError], str]] = {
    "lfm2": (AdapterError, "no q, k, v, o, attn in layer 0"),
    "olmo_hybrid": (AdapterError, "no q, k, v, o in layer 0"),
    "qwen3_next": (AdapterError, "no q, k, v, o in layer 0"),
    "llama, MLP first in one layer": (AdapterError, "the MLP comes first in layer 1"),
}


@pytest.mark.parametrize("method", ["exact", "eap"])
@pytest.mark.parametrize("name", REFUSED)
def test_families_without_edges(name: str, method: str) -> None:
    error, words = REFUSED[name]
    # Not the one that all tests share: it gets a class of its own.
    counted = Counted(FAMILIES[name].model())
    with counted.rejects(error, words):
        patched(
            counted.model,
            api=FAMILIES[name].api,
            method=method,
            **one_row(torch.tensor([[5, 6, 7, 8, 9, 10]])),
        )


@pytest.mark.parametrize("method", ["exact", "eap"])
def test_layers_that_know_how_many_prompts_there_are(method: str) -> None:
    """BLOOM's are told of all heads of all prompts in one."""
    model, api = family_model("bloom"), FAMILIES["bloom"].api
    with pytest.raises(EngineError, match="layer 0 cannot be called by itself, with other rows"):
        patched(model, api=api, method=method)
    # Of one prompt they are called as ever.
    assert len(patched(model, api=api, method=method, **one_row(SOURCE[:1]))) == 110


@pytest.mark.parametrize("family", ["openai-gpt", "blenderbot-small"])
def test_layers_that_norm_their_sum(family: str) -> None:
    """What they give is no sum, so that a change that is added is not what is read."""
    model = tiny_model(family, num_hidden_layers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)
        with pytest.raises(EngineError, match=r"add what attention and MLP give .* off by"):
            patched(model, **one_row(torch.tensor([[5, 6, 7, 8]])))


def halved() -> Any:
    """A Llama whose second layer halves all that it gives."""
    model = tiny_model("llama", num_hidden_layers=2)
    layer = model.model.layers[1]

    class Halved(type(layer)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs) / 2

    layer.__class__ = Halved
    return model


def forgetful() -> Any:
    """A Llama whose layers do something else each time."""
    model = tiny_model("llama", num_hidden_layers=2)
    layer, times = model.model.layers[1].mlp, [0]

    class Forgetful(type(layer)):
        def forward(self, hidden: Any) -> Any:
            times[0] += 1
            return super().forward(hidden) * times[0]

    layer.__class__ = Forgetful
    return model


@pytest.mark.parametrize("make", [halved, forgetful])
def test_layers_that_are_no_sum(make: Callable[[], Any]) -> None:
    with pytest.raises(EngineError, match=r"layer 1"):
        patched(make())
