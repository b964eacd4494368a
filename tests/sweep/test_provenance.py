"""Where an outcome comes from: weights, adapter, what was known, when, on which machine."""

from __future__ import annotations

import platform
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nnpatch_core import (
    DecoderAPI,
    Outcome,
    PromptPairs,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    decoder_components,
)
from nnpatch_core.plugins import source_of
from nnpatch_core.results import Joined
from nnpatch_core.sweep import provenance
from nnpatch_core.sweep.checksum import _Factors, _sum, _sums, checksum
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer
from nnpatch_llama import Llama3
from tests.helpers import checkpoints
from tests.helpers.faults import broken_after
from tests.helpers.samples import THREE

SITES = Sites(["resid", "q"], seq_pos_type="each")


def patch(model: Any = None, api: Any = None, **options: Any) -> Outcome:
    source, target, answers = THREE
    call = options.pop("call", activation_patching)
    sites = options.pop("sites", SITES)
    return call(
        model or tiny_model("llama"),
        api or tiny_api(),
        sites,
        source,
        target,
        *answers,
        progress=False,
        **options,
    )


def ablate(model: Any = None, **options: Any) -> Outcome:
    source, _, (answers, others) = THREE
    return ablation_patching(
        *(model or tiny_model("llama"), tiny_api(), SITES, source, answers, others),
        progress=False,
        **options,
    )


SCREEN = {"screen": "attribution", "top_k": 4, "spot_checks": 2}
SWEEPS: dict[str, Callable[..., Outcome]] = {
    "activation": patch,
    "full": lambda **options: patch(engine="full", **options),
    "attribution": lambda **options: patch(call=attribution_patching, **options),
    "screened": lambda **options: patch(**SCREEN, seed=5, **options),
    "screened by atp*": lambda **options: patch(**{**SCREEN, "screen": "atp*"}, **options),
    "ablation": ablate,
    "resample": lambda **options: ablate(method="resample", seed=7, **options),
    "means": lambda **options: patch(keep="means", **options),
}
every = pytest.mark.parametrize("name", SWEEPS)


@every
def test_every_sweep_says_where_it_comes_from(name: str) -> None:
    model = tiny_model("llama")
    before = datetime.now(UTC)
    out = SWEEPS[name](model=model)
    taken = datetime.now(UTC) - before
    info = out.info
    assert {type(words) for words in info.values()} == {str}
    assert info["weights"] == checksum(model)
    assert info["adapter_from"] == source_of(tiny_api())
    started = datetime.fromisoformat(info["started"])
    assert started.utcoffset() == timedelta(0)
    assert before - timedelta(seconds=1) <= started <= before + taken
    assert 0 < float(info["seconds"]) <= taken.total_seconds() + 0.001
    threads = torch.get_num_threads()
    for words in (f"Python {platform.python_version()}", platform.platform(), "cpu ("):
        assert words in info["environment"]
    assert info["environment"].endswith(f"{threads} thread{'s' if threads > 1 else ''}")
    assert "resumed" not in info


@every
def test_a_seed_is_told_where_something_is_drawn(name: str) -> None:
    seeds = {"screened": "5", "screened by atp*": "0", "resample": "7"}
    assert SWEEPS[name]().info.get("seed") == seeds.get(name)


@every
def test_what_was_known_is_counted(name: str) -> None:
    out = SWEEPS[name]()
    if name == "means":
        out = attrs.evolve(patch(), info=out.info)
    known = sum(int((cells.elided | cells.unread).sum()) for cells in out.cells.values())
    runs = sum(out.patched(each).numel() for each in out)
    assert runs == 3 * 3 * 6 * 5
    assert out.info["elided"] == f"{known} of {runs} patched runs were known without running"
    assert (known == 0) == (name in ("full", "ablation"))


# Weights ----------------------------------------------------------------------------------------


def test_other_weights_are_told_however_they_were_changed() -> None:
    model = tiny_model("llama")
    before = patch(model).info["weights"]
    assert patch(tiny_model("llama")).info["weights"] == before
    weight = model.model.layers[1].mlp.up_proj.weight
    # Which no count of versions sees.
    weight.data[3, 2] += 1
    changed = patch(model).info["weights"]
    assert changed != before
    weight.data[3, 2] -= 1
    assert patch(tiny_model("llama", seed=1)).info["weights"] not in (before, changed)


@pytest.mark.parametrize("name", ["activation", "attribution", "screened by atp*", "resample"])
def test_weights_are_read_once_in_a_call(
    monkeypatch: pytest.MonkeyPatch, name: str, tmp_path: Path
) -> None:
    read = []

    def word(model: nn.Module) -> str:
        read.append(model)
        return "word"

    monkeypatch.setattr(provenance, "checksum", word)
    assert SWEEPS[name]().info["weights"] == "word"
    assert len(read) == 1
    if name in ("activation", "resample"):
        SWEEPS[name](checkpoint=tmp_path / "f")
        assert len(read) == 2


def test_weights_that_cannot_be_read_lose_no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: nn.Module) -> str:
        raise RuntimeError("no\nsuch storage")

    monkeypatch.setattr(provenance, "checksum", refuse)
    assert patch().info["weights"] == "could not be read (RuntimeError: no such storage)"


class Holder(nn.Module):
    """A module with some weights."""

    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        for number, weight in enumerate(weights):
            self.register_buffer(f"weight{number}", weight)


def by_hand(weight: Tensor, piece: int = 2**18) -> int:
    """The sum that stands for a weight, number by number."""
    octets = weight.contiguous().flatten().view(torch.uint8).tolist()
    octets += [0] * (-len(octets) % 4)
    numbers = [
        int.from_bytes(bytes(octets[first : first + 4]), "little", signed=True)
        for first in range(0, len(octets), 4)
    ]
    factors = np.random.PCG64(0).random_raw(min(len(numbers), piece)).tolist()
    total = 0
    for first in range(0, len(numbers), piece):
        some = numbers[first : first + piece]
        own = sum(number * (factor | 1) for number, factor in zip(some, factors, strict=False))
        # What torch sums up has a sign.
        total = total * 0x9E3779B1 + own
    return total % 2**64


KINDS = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool]


@given(
    kind=st.sampled_from(KINDS), size=st.integers(0, 40), seed=st.integers(0, 99), at=st.integers(0)
)
@settings(deadline=None, max_examples=80)
def test_a_bit_more_is_another_word(kind: torch.dtype, size: int, seed: int, at: int) -> None:
    random.seed(seed)
    octets = torch.tensor([random.randrange(256) for _ in range(size * 8)], dtype=torch.uint8)
    octets = octets % 2 if kind == torch.bool else octets
    weight = octets.view(kind)
    word = checksum(Holder(weight))
    assert word == checksum(Holder(weight.clone()))
    # A part of a larger one, which begins anywhere.
    larger = torch.cat([torch.zeros(1, dtype=kind), weight])
    assert checksum(Holder(larger[1:])) == word
    assert checksum(Holder(weight.reshape(1, -1).expand(2, -1)[1])) == word
    if size:
        changed = octets.clone()
        changed[at % len(changed)] ^= 1 if kind == torch.bool else 1 << (at % 8)
        assert checksum(Holder(changed.view(kind))) != word
    assert _sum(weight, _Factors()) == by_hand(weight)


@pytest.mark.parametrize("together", [1, 2, 16])
@pytest.mark.parametrize("size", [0, 1, 2**18, 2**18 + 1, 5 * 2**18, 5 * 2**18 + 3])
def test_pieces_that_a_device_sums_up_together_are_those_of_the_cpu(
    size: int, together: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (size,), dtype=torch.int32, generator=generator)
    factors = np.random.PCG64(0).random_raw(2**18).astype(np.uint64) | np.uint64(1)
    expected = []
    for piece in np.split(bits.numpy(), range(2**18, size, 2**18)) if size else []:
        products = piece.astype(np.int64).view(np.uint64) * factors[: len(piece)]
        expected.append(int(products.sum().view(np.int64)))
    assert _sums(bits, _Factors(), together) == expected


def test_pieces_that_change_places_are_told() -> None:
    weight = torch.arange(3 * 2**19, dtype=torch.float32)
    pieces = weight.split(2**19)
    assert checksum(Holder(weight)) != checksum(
        Holder(torch.cat([pieces[1], pieces[0], pieces[2]]))
    )
    one, other = torch.ones(4), torch.zeros(4)
    assert checksum(Holder(one, other)) != checksum(Holder(other, one))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "where", [(slice(None),), (slice(None), 3), (slice(None), slice(32)), (5,), ([0, 9], [7, 7])]
)
def test_signs_that_change_are_told(kind: torch.dtype, where: Any) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64).to(kind)
    word = checksum(Holder(weight))
    weight[where] *= -1
    assert checksum(Holder(weight)) != word


# Adapters ---------------------------------------------------------------------------------------


def test_the_plugin_of_an_adapter_is_named() -> None:
    told = patch(api="Llama3").info["adapter_from"]
    assert told.startswith("nnpatch-llama ")
    assert patch(api=Llama3).info["adapter_from"] == told
    source, target, answers = THREE
    found = activation_patching(
        tiny_model("llama"), None, SITES, source, target, *answers, progress=False
    )
    assert found.info["adapter_from"] == told


def test_an_adapter_of_one_s_own_is_of_no_plugin() -> None:
    assert source_of(tiny_api()).startswith("no plugin: ")
    # The same name does not make it the plugin's.
    mine = DecoderAPI("Llama3", ("llama",), decoder_components(), cone=False)
    assert source_of(mine).startswith("no plugin: ")
    assert source_of(attrs.evolve(Llama3)) == source_of(Llama3)


# Several calls ----------------------------------------------------------------------------------


def test_batches_add_up() -> None:
    joined = Joined("prompts")
    infos = [
        {"started": "2026-01-02T03:04:05+00:00", "seconds": "1.500", "environment": "here, a"},
        {"started": "2026-01-02T03:05:05+00:00", "seconds": "2.250", "environment": "there, b"},
    ]
    outs = [attrs.evolve(patch(), info={**patch().info, **info}) for info in infos]
    for out in outs:
        joined.add(out)
    info = joined.outcome().info
    assert (info["started"], info["seconds"]) == ("2026-01-02T03:04:05+00:00", "3.750")
    assert info["environment"] == "here, a; there, b"
    known, _, every, *_ = patch().info["elided"].split()
    assert info["elided"].startswith(f"{2 * int(known)} of {2 * int(every)} patched runs")
    assert info["weights"] == outs[0].info["weights"]


@pytest.mark.parametrize("keep", ["prompts", "means"])
def test_a_stream_of_batches_is_one_sweep(keep: str) -> None:
    texts = ["a b c", "a b d", "e b c", "e b d"]
    tokenizer = tiny_tokenizer([*texts, " x y"])
    batches = [
        PromptPairs.from_texts(texts[:1], texts[1:2], [" x"], [" y"], tokenizer),
        PromptPairs.from_texts(texts[2:3], texts[3:], [" x"], [" y"], tokenizer),
    ]
    model = tiny_model("llama")
    before = datetime.now(UTC)
    out = activation_patching(model, tiny_api(), SITES, batches, keep=keep, progress=False)
    assert out.info["weights"] == checksum(model)
    assert before - timedelta(seconds=1) <= datetime.fromisoformat(out.info["started"])
    # The first two tokens are alike in each, and of the layers there are three.
    assert (
        out.info["elided"]
        == f"{2 * 2 * 15} of {2 * 3 * 15} patched runs were known without running"
    )


def test_a_sweep_that_goes_on_began_with_its_first_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    model = tiny_model("llama")
    mend = broken_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.sweep(path, model)
    mend()
    there = checkpoints.done(path)
    assert there > 0
    monkeypatch.setattr(provenance, "environment", lambda model: "another machine")
    first = checkpoints.header(path)["call"]
    later = checkpoints.sweep(path, model).info
    every = checkpoints.numbers(checkpoints.sweep(model=model)).numel()
    assert later["resumed"] == f"{there} of {every} patched runs were measured by an earlier call"
    assert later["started"] == first["started"]
    assert float(later["seconds"]) > first["seconds"] > 0
    assert later["environment"] == f"{first['environment']}; another machine"
    # And once more, now that all is there.
    again = checkpoints.sweep(path, model).info
    assert again["started"] == first["started"]
    assert again["resumed"].startswith(f"{checkpoints.done(path)} of {every}")
    assert float(again["seconds"]) > float(later["seconds"])


def test_a_checkpoint_that_nobody_had_begun_is_no_other_call(tmp_path: Path) -> None:
    assert "resumed" not in checkpoints.sweep(tmp_path / "f").info


def test_a_file_keeps_it(tmp_path: Path) -> None:
    out = patch()
    out.save(tmp_path / "f")
    assert dict(Outcome.load(tmp_path / "f").info) == dict(out.info)


def test_a_revision_is_told_where_there_is_one() -> None:
    model = tiny_model("llama")
    assert "revision" not in patch(model).info
    model.config._commit_hash = "0123abc"
    assert patch(model).info["revision"] == "0123abc"
