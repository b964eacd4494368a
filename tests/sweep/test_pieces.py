"""Prompts that are too long to be run at once are run in pieces, and nothing else changes."""

from __future__ import annotations

import copy
import functools
import gc
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnsight import NNsight
from torch import Tensor, nn

from nnpatch_core import Sites, ablation_patching, activation_patching, plan_sweep
from nnpatch_core._upstream import recorded
from nnpatch_core.batch import Batch
from nnpatch_core.engine import Plan
from nnpatch_core.engine.cone import ascent
from nnpatch_core.errors import EngineError, EngineWarning, MemoryBudgetError
from nnpatch_core.memory import Pieces
from nnpatch_core.scale import measure_shard, merge_shards
from nnpatch_core.testing import tiny_model, traces
from nnpatch_core.tracing import begin, forward, with_cache
from nnpatch_gemma import Gemma2, Gemma3
from nnpatch_llama import Llama3
from nnpatch_mistral import Mistral
from tests.helpers.pretended import device_of, pretending, put_on

pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

#: Some of their layers have a window, which is shorter than these prompts.
ADAPTERS = {"llama": Llama3, "mistral": Mistral, "gemma2": Gemma2, "gemma3_text": Gemma3}
TOKENS = 160


@functools.cache
def model_of(family: str) -> Any:
    return tiny_model(family)


@functools.cache
def plain_of(family: str) -> Any:
    """A copy that nnsight never sees."""
    return copy.deepcopy(tiny_model(family))


@attrs.frozen
class Pairs:
    """Prompts that differ in one token near their end.

    Args:
        source: `[batch, seq]`.
        target: the same.
        mask: 1 for a token.
    """

    source: Tensor
    target: Tensor
    mask: Tensor

    @classmethod
    def of(cls, lengths: tuple[int, ...], changed: int, seed: int = 0) -> Pairs:
        drawn = torch.Generator().manual_seed(seed)
        source = torch.randint(5, 60, (len(lengths), max(lengths)), generator=drawn)
        mask = torch.ones_like(source)
        for row, length in enumerate(lengths):
            mask[row, : max(lengths) - length] = 0
        target = source.clone()
        target[:, -changed] = (target[:, -changed] + 7) % 60
        return cls(source, target, mask)

    def rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each pair alone, without padding."""
        for source, target, mask in zip(self.source, self.target, self.mask.bool(), strict=True):
            yield source[mask][None], target[mask][None]

    def given(self, family: str) -> tuple[Any, ...]:
        """Tokens, and as answers those in which the two runs are furthest apart."""
        with torch.no_grad():
            one, two = (
                torch.cat([plain_of(family)(row[run]).logits[:, -1] for row in self.rows()])
                for run in (0, 1)
            )
        return self.source, self.target, (one - two).argmax(-1), (one - two).argmin(-1)

    def swept(self, family: str, sites: Sites, model: Any = None, **options: Any) -> Any:
        model = model_of(family) if model is None else model
        adapter = ADAPTERS[family]
        return activation_patching(
            model,
            adapter,
            sites,
            *self.given(family),
            attention_mask=self.mask,
            progress=False,
            **options,
        )

    def planned(self, family: str, sites: Sites, memory_budget: int, model: Any = None) -> Plan:
        return plan_sweep(
            model_of(family) if model is None else model,
            ADAPTERS[family],
            sites,
            self.source,
            self.target,
            attention_mask=self.mask,
            memory_budget=memory_budget,
        )

    def budgets(self, family: str, sites: Sites) -> list[int]:
        """Budgets in which not even one prompt fits, but in pieces."""
        found: list[int] = []
        budget = 2**23
        while True:
            try:
                plan = self.planned(family, sites, budget)
            except MemoryBudgetError:
                return found
            if plan.pieces is not None:
                found.append(budget)
            budget = budget * 2 // 3


def last(count: int, *names: str) -> Sites:
    return Sites([*names] or ["resid"], seq_pos_type="lastk", seq_pos=count)


def by_hooks(family: str, pairs: Pairs, layer: int, back: int) -> float:
    """The value of `resid` of a layer, so many tokens from the end, by plain hooks."""
    plain = plain_of(family)
    block = plain.model.layers[layer]
    found: list[list[float]] = []
    _, _, *answers = pairs.given(family)
    for row, (source, target) in enumerate(pairs.rows()):
        kept: list[Tensor] = []

        def note(_: Any, __: Any, output: Any, kept: list[Tensor] = kept) -> None:
            kept.append((output[0] if isinstance(output, tuple) else output)[0, -back].clone())

        def put(_: Any, __: Any, output: Any, kept: list[Tensor] = kept) -> None:
            (output[0] if isinstance(output, tuple) else output)[0, -back] = kept[0]

        logits = []
        for tokens, hook in ((source, note), (target, None), (target, put)):
            handle = None if hook is None else block.register_forward_hook(hook)
            with torch.no_grad():
                logits.append(plain(tokens).logits[0, -1])
            if handle is not None:
                handle.remove()
        right, wrong = (int(each[row]) for each in answers)
        found.append([float(each[right] - each[wrong]) for each in logits])
    one, other, patched = torch.tensor(found, dtype=torch.float64).mean(0)
    return float((patched - other) / (one - other))


# The numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ADAPTERS)
def test_a_long_prompt_in_pieces_gives_what_plain_hooks_give(family: str) -> None:
    pairs, sites = Pairs.of((TOKENS, TOKENS - 31), changed=3), last(4)
    budget = pairs.budgets(family, sites)[-1]
    with traces(model_of(family)) as seen:
        out = pairs.swept(family, sites, memory_budget=budget)
    assert "pieces" in out.info
    # No forward is whole.
    assert max(each.tokens for each in seen) < TOKENS / 2
    value = out["resid"]
    for layer in range(len(value)):
        for back in range(1, 5):
            expected = by_hooks(family, pairs, layer, back)
            assert float(value[layer, -back]) == pytest.approx(expected, abs=1e-4)


@settings(max_examples=12)
@given(data=st.data())
def test_pieces_change_no_value_and_no_elision(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from([*ADAPTERS]))
    lengths = data.draw(st.lists(st.integers(60, TOKENS), min_size=1, max_size=3))
    changed = data.draw(st.integers(1, 6))
    count = data.draw(st.integers(1, 6))
    names = data.draw(st.sampled_from([("resid",), ("attn", "mlp"), ("o", "v"), ("resid_pre",)]))
    pairs, sites = Pairs.of(tuple(lengths), changed, seed=len(lengths)), last(count, *names)
    budgets = pairs.budgets(family, sites)
    if not budgets:
        return
    whole = pairs.swept(family, sites, memory_budget="1 GiB")
    out = pairs.swept(family, sites, memory_budget=data.draw(st.sampled_from(budgets)))
    assert "pieces" not in whole.info
    assert out.info["pieces"].startswith("recorded runs in ")
    assert out.info["elided"] == whole.info["elided"]
    assert out.info["engine"] == whole.info["engine"] == "cone"
    for name in names:
        assert torch.allclose(out[name], whole[name], atol=1e-4)


@settings(max_examples=4)
@given(shards=st.sampled_from([2, 3]), rest=st.integers(0, 2))
def test_shards_in_pieces_have_the_bits_of_one_process(
    tmp_path_factory: pytest.TempPathFactory, shards: int, rest: int
) -> None:
    folder: Path = tmp_path_factory.mktemp("shards")
    pairs, sites = Pairs.of((TOKENS, TOKENS - rest), changed=2), last(3, "o", "resid")
    budget = pairs.budgets("llama", sites)[rest]
    files = [folder / str(number) for number in range(shards)]
    for number, file in enumerate(files):
        with warnings.catch_warnings():
            measure_shard(
                activation_patching,
                model_of("llama"),
                Llama3,
                sites,
                *pairs.given("llama"),
                attention_mask=pairs.mask,
                shard=f"{number + 1}/{shards}",
                checkpoint=file,
                memory_budget=budget,
            )
    out = pairs.swept("llama", sites, checkpoint=merge_shards(files, folder / "all"))
    one = pairs.swept("llama", sites, memory_budget=budget)
    for name in ("o", "resid"):
        assert torch.equal(out[name], one[name])
    assert out.info["pieces"] == one.info["pieces"]


def test_metrics_that_read_several_tokens_read_them_in_the_last_piece() -> None:
    pairs, sites = Pairs.of((TOKENS,), changed=2), last(2)
    budget = pairs.budgets("llama", sites)[-1] * 3 // 2
    several = {
        "metric": "sequence_log_probability",
        "source_answer_tokens": torch.tensor([[2, 9, 11]]),
        "target_answer_tokens": torch.tensor([[22, 4, -1]]),
    }
    whole = pairs.swept("llama", sites, **several)
    out = pairs.swept("llama", sites, memory_budget=budget, **several)
    assert "pieces" in out.info
    assert torch.allclose(out["resid"], whole["resid"], atol=1e-4)


def test_ablations_by_zeros_run_in_pieces_too() -> None:
    pairs, sites = Pairs.of((TOKENS, TOKENS - 20), changed=2), last(3, "attn", "o")
    budget = pairs.budgets("llama", sites)[-1]

    def ablated(**options: Any) -> Any:
        _, _, *answers = pairs.given("llama")
        return ablation_patching(
            model_of("llama"), Llama3, sites, pairs.target, *answers,
            attention_mask=pairs.mask, progress=False, **options,
        )  # fmt: skip

    with traces(model_of("llama")) as seen:
        out = ablated(memory_budget=budget)
    assert "pieces" in out.info
    assert max(each.tokens for each in seen) < TOKENS
    whole = ablated(engine="full")
    for name in ("attn", "o"):
        assert torch.allclose(out[name], whole[name], atol=1e-4)
    # Means need whole runs of the prompts.
    with pytest.raises(MemoryBudgetError):
        ablated(memory_budget=budget, method="mean")


# The plan -----------------------------------------------------------------------------------------


def test_the_plan_tells_the_pieces() -> None:
    pairs, sites = Pairs.of((TOKENS,), changed=2), last(2)
    plan = pairs.planned("llama", sites, pairs.budgets("llama", sites)[-1])
    assert plan.pieces is not None
    assert plan.pieces.until == TOKENS - 2
    assert f"recorded runs in {plan.pieces}" in plan.describe()
    assert pairs.planned("llama", sites, 2**30).pieces is None


@given(until=st.integers(1, 300), tokens=st.integers(1, 300))
def test_pieces_are_all_tokens_once_and_about_even(until: int, tokens: int) -> None:
    edges = Pieces(until, tokens).edges
    assert [0, *(end for _, end in edges)] == [*(start for start, _ in edges), until]
    sizes = [end - start for start, end in edges]
    assert max(sizes) <= tokens
    assert max(sizes) - min(sizes) <= 1


def test_what_fits_at_once_runs_at_once() -> None:
    pairs, sites = Pairs.of((TOKENS,), changed=2), last(2)
    with traces(model_of("llama")) as seen:
        out = pairs.swept("llama", sites, memory_budget="64 MiB")
    assert "pieces" not in out.info
    assert [each.tokens for each in seen][:2] == [TOKENS, TOKENS]


# Memory -------------------------------------------------------------------------------------------


def live_bytes(kind: str = "cpu") -> int:
    """What all tensors on devices of a kind take, each piece of memory once."""
    gc.collect()
    tensors = (each for each in gc.get_objects() if type(each) is Tensor)
    # Other tests may have left some that are not of one piece.
    dense = (each for each in tensors if each.layout is torch.strided)
    found = [each for each in dense if device_of(each).type == kind]
    rooms = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found}
    return sum(rooms.values())


@pytest.mark.parametrize("padding", [0, 70, 120])
def test_what_is_held_to_its_halves_has_room_where_a_prompt_has(padding: int) -> None:
    """Keys and values are there twice then, of a piece that is most of the prompt as well."""
    until, layers = 129, 12
    model = tiny_model("llama", num_hidden_layers=layers, num_key_value_heads=4)
    tokens = torch.randint(5, 60, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[:, :padding] = 0
    peaks: list[int] = []
    handle = model.model.norm.register_forward_pre_hook(lambda *_: peaks.append(live_bytes()))
    before = live_bytes()
    try:
        begun = begin(NNsight(model), Batch(tokens, mask), [(0, until)], layers)
    finally:
        handle.remove()
    kept = [each for pair in begun.kept if pair is not None for each in pair]
    each_token = sum(each.nbytes for each in kept) / until
    assert begun.start == until
    # Beside them the residual stream of a few layers' width, and masks.
    assert max(peaks) - before <= 1.1 * TOKENS * each_token


@pytest.mark.parametrize("edges", [[(0, 70), (70, 129)], []], ids=["pieces", "at once"])
def test_what_lies_in_host_memory_leaves_its_device(edges: list[tuple[int, int]]) -> None:
    """As each layer has run: not those of all layers are there, which the budget does not count."""
    layers, model = 24, tiny_model("llama", num_hidden_layers=24, num_key_value_heads=4)
    for weight in (*model.parameters(), *model.buffers()):
        put_on(weight, "cuda:0")
    tokens = torch.randint(5, 60, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    batch, nnmodel, peaks = Batch(tokens, torch.ones_like(tokens)), NNsight(model), [0]
    handle = model.model.norm.register_forward_pre_hook(lambda *_: peaks.append(live_bytes("cuda")))
    try:
        with pretending():
            before = live_bytes("cuda")
            if edges:
                kept = begin(nnmodel, batch, edges, layers, torch.device("cpu")).kept
            else:
                run = functools.partial(forward, nnmodel, batch)
                _, _, cache = with_cache(
                    nnmodel, layers, lambda given: run(cache=given), torch.device("cpu")
                )
                kept = recorded(cache)
    finally:
        handle.remove()
    tensors = [each for pair in kept if pair is not None for each in pair]
    assert {device_of(each).type for each in tensors} == {"cpu"}
    # Beside the residual stream and a mask, there is room for those of a layer or two.
    assert len(peaks) > 1
    assert max(peaks) - before < sum(each.nbytes for each in tensors) / 4


def test_no_piece_is_longer_than_half_of_a_prompt() -> None:
    pairs = Pairs.of((TOKENS, TOKENS - 40), changed=1)
    sites = Sites("resid", seq_pos_type="custom_constant", seq_pos=[-30, -1])
    budgets = pairs.budgets("llama", sites)
    plans = [pairs.planned("llama", sites, budget) for budget in budgets]
    longest = [plan.pieces.tokens for plan in plans if plan.pieces is not None]
    assert max(longest) == TOKENS // 2


# Refusals -----------------------------------------------------------------------------------------


def test_whole_forwards_that_do_not_fit_are_refused() -> None:
    pairs, sites = Pairs.of((TOKENS,), changed=2), last(2)
    budget = pairs.budgets("llama", sites)[0]
    with pytest.raises(MemoryBudgetError, match="a sweep of one prompt of 160 tokens needs"):
        pairs.swept("llama", sites, memory_budget=budget, engine="full")


def test_all_positions_are_never_run_in_pieces() -> None:
    pairs = Pairs.of((TOKENS,), changed=2)
    assert pairs.budgets("llama", Sites("resid", seq_pos_type="each")) == []


class Changed(nn.Module):
    """An MLP that does what no model does: it goes by what runs together."""

    def __init__(self, inner: Any, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.inner(hidden)
        if self.how == "how many":
            return out + hidden.shape[1] / 100
        if self.how == "the first":
            return torch.cat([out[:, :1] * 0, out[:, 1:]], 1)
        before = torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], 1)
        return out + before


@pytest.mark.parametrize("padded", [0, 60])
@pytest.mark.parametrize("tight", [0, -1])
@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("how", ["how many", "the first", "the token before"])
def test_a_model_that_is_another_one_in_pieces_is_refused(
    how: str, layer: int, tight: int, padded: int
) -> None:
    """In whichever layer it is, in pieces of few tokens, behind a piece of padding alone."""
    pairs = Pairs.of((TOKENS,), changed=1)
    wide = [torch.nn.functional.pad(each, (padded, 0)) for each in attrs.astuple(pairs)]
    pairs, sites = Pairs(*wide), last(1)
    budget = pairs.budgets("llama", sites)[tight]
    model = tiny_model("llama")
    model.model.layers[layer].mlp = Changed(model.model.layers[layer].mlp, how)
    # What the last layer does shows in the logits alone.
    what = "logits" if layer else "keys and values"
    assert pairs.planned("llama", sites, budget, model).pieces is not None
    for engine in ("auto", "cone"):
        with pytest.raises(MemoryBudgetError, match=f"gives other {what} than run at once"):
            pairs.swept("llama", sites, model, memory_budget=budget, engine=engine)


def test_what_whole_forwards_need_is_told_where_the_cone_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The advice works: with what is named there is room."""
    pairs, sites = Pairs.of((TOKENS,), changed=1), last(1)
    monkeypatch.setattr(ascent.Ascent, "run", unfit)
    budget = pairs.budgets("llama", sites)[-1]
    told = r"a whole forward of 160 tokens needs ([\d.]+) (KiB|MiB) with .* this sweep, as .*unfit"
    with pytest.raises(MemoryBudgetError, match=told) as caught:
        pairs.swept("llama", sites, memory_budget=budget)
    number, unit = re.search(told, str(caught.value)).groups()
    # What is named is rounded.
    named = int((float(number) + 0.1) * 2 ** {"KiB": 10, "MiB": 20}[unit])
    with pytest.warns(EngineWarning, match="unfit"):
        out = pairs.swept("llama", sites, memory_budget=named)
    assert out.info["engine"] == "full"


def unfit(*_: Any) -> Any:
    raise EngineError("unfit")


@pytest.mark.parametrize("engine", ["auto", "cone"])
def test_a_model_with_hooks_is_refused_without_advice_that_does_not_work(engine: str) -> None:
    """No engine runs it in pieces, and none is named as if it did."""
    pairs, sites = Pairs.of((TOKENS,), changed=1), last(1)
    budget, model = pairs.budgets("llama", sites)[-1], tiny_model("llama")
    model.model.layers[1].register_forward_hook(lambda _, __, output: output)
    with traces(model) as seen, pytest.raises(MemoryBudgetError) as caught:
        pairs.swept("llama", sites, model, memory_budget=budget, engine=engine)
    assert not seen
    assert "it cannot run in pieces, as the model has the forward hook" in str(caught.value)
    assert "engine=" not in str(caught.value)


def test_a_lasting_edit_of_a_token_is_refused() -> None:
    """It would be made in each piece."""
    pairs, sites = Pairs.of((TOKENS,), changed=1), last(1)
    budget = pairs.budgets("llama", sites)[-1]
    nnmodel = NNsight(tiny_model("llama"))
    with nnmodel.edit(inplace=True):
        nnmodel.model.layers[2].mlp.output[:, 0] = 0
    with pytest.raises(MemoryBudgetError, match="gives other logits than run at once"):
        pairs.swept("llama", sites, nnmodel, memory_budget=budget)


def test_tokens_that_are_too_few_to_tell_are_refused() -> None:
    """Before anything runs, whatever prompts there are beside."""
    pairs, sites = Pairs.of((TOKENS, TOKENS), changed=1), last(1)
    budget = pairs.budgets("llama", sites)[-1]
    for tokens, told in ((1, "1 token"), (2, "2 tokens")):
        pairs.mask[1] = 0
        pairs.mask[1, -1 - tokens :] = 1
        for run in (pairs.planned, pairs.swept):
            with pytest.raises(MemoryBudgetError, match=rf"in pieces, as prompt 1 has {told} left"):
                run("llama", sites, memory_budget=budget)


@pytest.mark.parametrize("before", [0, 17, 156])
def test_a_prompt_of_few_tokens_runs_in_pieces_wherever_it_lies(before: int) -> None:
    """Three of them are enough; padding is on both sides of them."""
    pairs, sites = Pairs.of((TOKENS,), changed=1), last(1)
    pairs.mask[:, :-1] = 0
    pairs.mask[:, before : before + 3] = 1
    for budget in pairs.budgets("llama", sites):
        out = pairs.swept("llama", sites, memory_budget=budget)
        assert "pieces" in out.info
        for layer, value in enumerate(out["resid"][:, -1].tolist()):
            assert value == pytest.approx(by_hooks("llama", pairs, layer, 1), abs=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_go_by_the_length_of_a_run_are_refused(kind: str) -> None:
    pairs, sites = Pairs.of((TOKENS,), changed=2), last(2)
    budget = pairs.budgets("llama", sites)[0]
    model = tiny_model("llama")
    model.model.rotary_emb.rope_type = kind
    with pytest.raises(MemoryBudgetError, match="a sweep of one prompt"):
        pairs.planned("llama", sites, budget, model)
