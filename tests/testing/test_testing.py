"""What a plugin's tests are given: hypothesis strategies, the law of positions, tiny models."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

import nnpatch_core.testing
from nnpatch_core import Component, DecoderAPI, Site
from nnpatch_core.batch import make_batch
from nnpatch_core.errors import AdapterError, PositionError, UnknownNameError
from nnpatch_core.seq_pos import AllPositions, Custom, CustomConstant, Each, Last, LastK
from nnpatch_core.site import check_site
from nnpatch_core.testing import (
    CheckError,
    causal_model_types,
    check_seq_pos,
    run_checks,
    tiny_api,
    tiny_model,
    tiny_tokenizer,
)
from nnpatch_core.testing.strategies import positions, seq_pos_strategies, sites, token_batches

BUILT_IN = (AllPositions, Each, Last, LastK, Custom, CustomConstant)
MODEL = tiny_model("llama", num_hidden_layers=2)

# Hypothesis strategies.


@given(st.data(), st.integers(1, 9))
def test_positions(data: st.DataObject, seq_len: int) -> None:
    found = data.draw(positions(seq_len))
    assert found
    assert all(-seq_len <= position < seq_len for position in found)
    assert len({position % seq_len for position in found}) == len(found)
    largest = data.draw(st.integers(1, 3))
    assert 1 <= len(data.draw(positions(seq_len, max_size=largest))) <= largest


@pytest.mark.parametrize(
    "wanted",
    [
        lambda found: len(found) == 4,
        lambda found: found == [-4],
        lambda found: found == [3],
        lambda found: len(found) > 1 and found != sorted(found),
        lambda found: min(found) < 0 <= max(found),
    ],
)
def test_positions_of_every_kind_are_drawn(wanted: Any) -> None:
    assert wanted(find(positions(4), wanted))


@given(st.data(), st.integers(1, 9))
def test_position_strategies_fit_the_prompt(data: st.DataObject, seq_len: int) -> None:
    strategy = data.draw(seq_pos_strategies(seq_len))
    assert isinstance(strategy, BUILT_IN)
    check_seq_pos(strategy, [seq_len])


@pytest.mark.parametrize("kind", BUILT_IN)
def test_every_position_strategy_is_drawn(kind: type) -> None:
    assert isinstance(find(seq_pos_strategies(3), lambda found: isinstance(found, kind)), kind)


@given(sites(tiny_api(), n_layers=2, n_heads=2, seq_len=5))
def test_sites_are_those_of_the_model(site: Site) -> None:
    assert isinstance(site, Site)
    check_site(site, MODEL, 5)


@given(sites(tiny_api(), n_layers=2))
def test_sites_of_all_heads_and_positions(site: Site) -> None:
    assert site.head is None
    assert site.seq_pos is None
    check_site(site, MODEL, 5)


@pytest.mark.parametrize(
    "wanted",
    [
        *(lambda site, name=name: site.name == name for name in tiny_api().components),
        lambda site: site.layer == 1 and site.head == 1,
        lambda site: site.component in "qkvo" and site.head is None,
        lambda site: site.seq_pos is None,
        lambda site: site.seq_pos is not None and len(site.seq_pos) > 1,
    ],
)
def test_sites_of_every_kind_are_drawn(wanted: Any) -> None:
    drawn = sites(tiny_api(), n_layers=2, n_heads=2, seq_len=5)
    assert wanted(find(drawn, wanted, settings=settings(max_examples=2000, database=None)))


@given(token_batches(vocab_size=9, max_batch=4, max_len=5))
def test_token_batches(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    tokens, mask = batch
    assert tokens.dtype == mask.dtype == torch.int64
    assert tokens.shape == mask.shape
    assert 1 <= tokens.shape[0] <= 4
    assert 1 <= tokens.shape[1] <= 5
    # It is what nnpatch takes for a batch.
    packed = make_batch("tokens", tokens, mask, vocab_size=9, pad_id=None)
    assert packed.mask.sum() == mask.sum()


@given(token_batches(vocab_size=3, padding=False))
def test_token_batches_without_padding(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    tokens, mask = batch
    assert tokens.max() < 3
    assert mask.all()


@pytest.mark.parametrize(
    "wanted",
    [
        lambda tokens, mask: tokens.shape == (2, 3),
        lambda tokens, mask: bool(mask.all()),
        lambda tokens, mask: mask.tolist() == [[0, 1]],
        lambda tokens, mask: mask.tolist() == [[1, 0]],
        lambda tokens, mask: mask.tolist() == [[1, 0, 1]],
        lambda tokens, mask: mask.shape == (2, 2) and mask[0].sum() != mask[1].sum(),
        lambda tokens, mask: 8 in tokens,
    ],
)
def test_token_batches_of_every_kind_are_drawn(wanted: Any) -> None:
    drawn = token_batches(vocab_size=9, max_batch=2, max_len=3)
    many = settings(max_examples=2000, database=None)
    assert wanted(*find(drawn, lambda batch: wanted(*batch), settings=many))


# The law of positions.


@pytest.mark.parametrize(
    "strategy",
    [
        AllPositions(),
        Each(),
        Last(),
        LastK(1),
        LastK(5),
        Custom([0]),
        Custom([-3, 2, -1]),
        CustomConstant([-1, 0]),
    ],
    ids=repr,
)
def test_built_in_strategies_keep_the_law(strategy: Any) -> None:
    if isinstance(strategy, Custom | CustomConstant) and len(strategy.positions) > 1:
        # Two spellings may meet in a short prompt, which is then refused.
        check_seq_pos(strategy, range(6, 20))
    else:
        check_seq_pos(strategy)


class Strategy:
    """A third party's strategy: what it gives is written in a test."""

    def __init__(self, expand: Any, one_by_one: Any = True) -> None:
        self.expand, self.one_by_one = expand, one_by_one

    def __repr__(self) -> str:
        return "Strategy()"


def refusing(error: Exception, when: Any) -> Any:
    def expand(seq_len: int) -> list[tuple[int, ...]]:
        if when(seq_len):
            raise error
        return [(0,)]

    return expand


@pytest.mark.parametrize(
    "strategy",
    [
        Strategy(lambda seq_len: [(0,)]),
        Strategy(lambda seq_len: [(0,)], one_by_one=False),
        Strategy(lambda seq_len: [tuple(range(seq_len))], one_by_one=False),
        # Lists, iterators and numpy's integers will do.
        Strategy(lambda seq_len: ([position] for position in range(seq_len))),
        Strategy(lambda seq_len: [np.arange(seq_len)]),
        # Groups may overlap, as long as their first positions differ.
        Strategy(lambda seq_len: [tuple(range(first, seq_len)) for first in range(seq_len)]),
        Strategy(refusing(PositionError("too short"), lambda seq_len: seq_len < 7)),
    ],
)
def test_other_strategies_that_keep_the_law(strategy: Any) -> None:
    check_seq_pos(strategy)


def forgetful() -> Any:
    answers: Iterator[int] = iter(range(1000))
    return lambda seq_len: [(next(answers) % seq_len,)]


def tired() -> Any:
    asked: set[int] = set()

    def expand(seq_len: int) -> list[tuple[int, ...]]:
        if seq_len in asked:
            raise PositionError("once is enough")
        asked.add(seq_len)
        return [(0,)]

    return expand


def spent() -> Any:
    groups = iter([(0,)])
    return lambda seq_len: groups


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (Strategy(lambda seq_len: [(0, 0)]), r"positions \[0, 0\] .* without duplicates"),
        (Strategy(lambda seq_len: [(seq_len - 1, 0)]), r"must be ascending"),
        (Strategy(lambda seq_len: [(seq_len,)]), r"positions \[1\] for a prompt of 1 tokens"),
        (Strategy(lambda seq_len: [(-1,)]), r"positions \[-1\] .* inside the prompt"),
        (Strategy(lambda seq_len: [(3,)]), r"positions \[3\] for a prompt of 1 tokens"),
        (Strategy(lambda seq_len: [()]), r"positions \[\]"),
        (Strategy(lambda seq_len: []), "no positions"),
        (Strategy(lambda seq_len: None), "must give groups"),
        (Strategy(lambda seq_len: [0]), "must give groups"),
        (Strategy(lambda seq_len: [(0.0,)]), "must be an integer, got 0.0"),
        (Strategy(lambda seq_len: [(False,)]), "must be an integer, got False"),
        (Strategy(lambda seq_len: ["0"]), "must be an integer, got '0'"),
        (
            Strategy(lambda seq_len: [(position,) for position in reversed(range(seq_len))]),
            "in the order of their first positions",
        ),
        (Strategy(lambda seq_len: [(0,), (0,)]), "share a place in the outcome"),
        (
            Strategy(lambda seq_len: [(each,) for each in range(seq_len)], one_by_one=False),
            "share a place in the outcome",
        ),
        (Strategy(forgetful()), "other groups when it is asked again"),
        (Strategy(tired()), "other groups when it is asked again"),
        (Strategy(spent()), "no positions"),
        (
            Strategy(refusing(ValueError("too short"), lambda seq_len: seq_len < 3)),
            "refuses a prompt of 1 tokens with ValueError, not PositionError: too short",
        ),
        (
            Strategy(refusing(PositionError("too long"), lambda seq_len: seq_len > 3)),
            "refuses a prompt of 4 tokens, but not one of 3",
        ),
        (
            Strategy(refusing(PositionError("never"), lambda seq_len: True)),
            "refuses prompts of every length",
        ),
        (Strategy(lambda: [(0,)]), "with TypeError, not PositionError"),
        (Strategy(lambda seq_len: [(0,)], one_by_one=1), "one_by_one of .* must be True or False"),
        (Strategy(lambda seq_len: [(0,)], one_by_one=None), "must be True or False"),
        (LastK, "is an object with one_by_one, and expand or place, got <class"),
        (Last, "is an object with one_by_one, and expand or place, got <class"),
        ("last", "is an object with one_by_one, and expand or place, got 'last'"),
        (lambda seq_len: [(0,)], "is an object with one_by_one, and expand or place"),
        (None, "is an object with one_by_one, and expand or place, got None"),
    ],
)
def test_strategies_that_break_the_law(strategy: Any, words: str) -> None:
    with pytest.raises(CheckError, match=words):
        check_seq_pos(strategy)


def test_only_the_given_lengths_are_tried() -> None:
    asked: list[int] = []

    def expand(seq_len: int) -> list[tuple[int, ...]]:
        asked.append(seq_len)
        return [(0,)]

    strategy = Strategy(expand)
    check_seq_pos(strategy, iter([7, 3, 7]))
    assert sorted(set(asked)) == [3, 7]
    with pytest.raises(CheckError, match="refuses prompts of every length"):
        check_seq_pos(LastK(5), [2, 3])
    check_seq_pos(LastK(5), [2, 3, 5])


# Tiny models.

#: Of other shapes: fused, parallel, mixtures of experts, hybrid, without attention, encoders that
#: are told to be decoders, halves of larger models, and some that are too large or too special.
SAMPLE = (
    "bart",
    "bert",
    "bloom",
    "blt",
    "dbrx",
    "deepseek_v3",
    "falcon",
    "gemma3",
    "gemma3n",
    "gpt2",
    "mamba",
    "mixtral",
    "opt",
    "qwen3_next",
    "zamba2",
)
WITHOUT = ("blt", "dbrx", "gemma3n", "zamba2")


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_family_gives_a_tiny_model_or_a_reason(model_type: str) -> None:
    assert model_type in causal_model_types()
    if model_type in WITHOUT:
        with pytest.raises(AdapterError, match=rf"type '{model_type}' .*with generic settings"):
            tiny_model(model_type)
        return
    model = tiny_model(model_type)
    assert model.config.model_type == model_type
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False).logits
    assert logits.shape == (1, 4, 64)
    assert logits.isfinite().all()
    # No token is like another to it.
    assert logits[0].std(0).min() > 0


def test_settings_that_are_too_large_or_do_not_fit() -> None:
    with pytest.raises(AdapterError, match=r"type 'llama' has \d+ parameters .* at most 3000000"):
        tiny_model("llama", vocab_size=200_000)
    with pytest.raises(AdapterError, match=r"no tiny model of type 'bert' .*\(33\)"):
        tiny_model("bert", hidden_size=33)


@pytest.mark.parametrize("model_type", ["lama", "", "t5", None])
def test_what_is_no_causal_language_model(model_type: Any) -> None:
    with pytest.raises(UnknownNameError) as error:
        tiny_model(model_type)
    assert repr(model_type) in str(error.value)
    assert "llama" in str(error.value)


def test_weights_come_from_the_seed() -> None:
    one, same, other = (tiny_model("gpt2", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if one[name].numel() > 1)


def test_settings_override() -> None:
    default = tiny_model("mixtral").config
    assert (default.num_hidden_layers, default.hidden_size, default.vocab_size) == (3, 32, 64)
    assert (default.num_attention_heads, default.num_key_value_heads) == (4, 2)
    assert (default.num_local_experts, default.sliding_window) == (4, 3)
    model = tiny_model("mixtral", num_hidden_layers=1, num_local_experts=3, vocab_size=20)
    assert len(model.model.layers) == 1
    assert model.config.num_local_experts == 3
    assert model.lm_head.out_features == 20
    # Under the family's own name for it, or the one that other families have.
    assert len(tiny_model("gpt2", n_layer=1).transformer.h) == 1
    assert len(tiny_model("gpt2", num_hidden_layers=1).transformer.h) == 1
    assert tiny_model().config.model_type == "llama"


def test_the_tiny_adapter_is_for_tiny_models() -> None:
    for model_type in tiny_api().model_types:
        model = tiny_model(model_type, num_hidden_layers=1)
        assert all(result.ok for result in run_checks(tiny_api(), model))


def test_the_tiny_tokenizer() -> None:
    text = "The capital of France is"
    tokenizer = tiny_tokenizer([text, " Paris"], chat_template="{{ messages[0].content }}")
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["The", " capital", " of", " France", " is"]
    assert tokenizer.decode(ids) == text
    assert tokenizer("Rome").input_ids == [tokenizer.unk_token_id]
    assert len(tokenizer(" Paris").input_ids) == 1
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert [*special, tokenizer.unk_token_id] == [0, 1, 2, 3]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


# Without the extra.


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The rooms of nnpatch_core.testing are imported anew, and as they were afterwards."""
    monkeypatch.setattr(nnpatch_core, "testing", nnpatch_core.testing)
    for name in list(sys.modules):
        if name.startswith("nnpatch_core.testing"):
            monkeypatch.delitem(sys.modules, name)
    return monkeypatch


@pytest.mark.parametrize("missing", [("pytest",), ("pytest", "hypothesis")])
def test_the_checks_run_without_pytest(
    forgotten: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    for name in missing:
        forgotten.setitem(sys.modules, name, None)
    testing = importlib.import_module("nnpatch_core.testing")
    api = DecoderAPI("Mine", ("llama",), {"mlp": Component("mlp")})
    results = testing.run_checks(api, testing.tiny_model("llama", num_hidden_layers=1))
    assert {result.status for result in results} == {"passed", "skipped"}
    with pytest.raises(ImportError, match=r"needs pytest: pip install 'nnpatch-core\[testing\]'"):
        testing.parametrize_with_checks  # noqa: B018
    with pytest.raises(ImportError, match=r"nnpatch-core\[testing\]"):
        from nnpatch_core.testing import parametrize_with_checks  # noqa: F401
    if "hypothesis" in missing:
        with pytest.raises(ImportError, match="hypothesis"):
            importlib.import_module("nnpatch_core.testing.strategies")


def test_what_the_module_does_not_have() -> None:
    with pytest.raises(AttributeError, match="no attribute 'parametrise_with_checks'"):
        nnpatch_core.testing.parametrise_with_checks  # noqa: B018
    assert set(nnpatch_core.testing.__all__) <= {
        *dir(nnpatch_core.testing),
        "parametrize_with_checks",
    }
    assert callable(nnpatch_core.testing.parametrize_with_checks)
