"""The same sweep on a model however it is wrapped, cast, placed or set, and what is left of it."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import attrs
import psutil
import pytest
import torch
from nnsight import NNsight, TransformersModel
from torch import nn

from nnpatch_core import (
    DecoderAPI,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    decoder_components,
)
from nnpatch_core.adapters import Heads
from nnpatch_core.errors import EngineError, MetricError
from nnpatch_core.testing import tiny_model, tiny_tokenizer
from nnpatch_llama import Llama3
from nnpatch_mistral import Mistral
from tests.helpers.oracle import COMPONENTS, Oracle, Place, lay_out, random_prompts

#: Padding is what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

FAMILIES = ("llama", "mistral", "gemma2")
#: One of the prompts has padding at the last of these positions.
EVERYTHING = Sites(COMPONENTS, seq_pos_type="custom", seq_pos=[-1, -2, -5])
POSITIONS = (2, 5, 6)
#: Rounding of float32 on the logits of a tiny model, where the same sums are added otherwise.
ROUNDING = 5e-6
SOURCE = random_prompts((7, 5, 4), seed=1)
TARGET = random_prompts((7, 5, 4), seed=2)
SOURCE_TOKENS, MASK = lay_out(SOURCE, "mixed", seed=3)
TARGET_TOKENS, _ = lay_out(TARGET, "mixed", seed=3)
SOURCE_ANSWERS, TARGET_ANSWERS = torch.tensor([5, 11, 40]), torch.tensor([9, 30, 3])


def sweep(nnmodel: Any, sites: Any = EVERYTHING, api: Any = None, **options: Any) -> Any:
    prompts = (SOURCE_TOKENS, TARGET_TOKENS, SOURCE_ANSWERS, TARGET_ANSWERS)
    options = {"attention_mask": MASK, "progress": False, **options}
    return activation_patching(nnmodel, api, sites, *prompts, **options)


def estimated(nnmodel: Any, sites: Any, **options: Any) -> Any:
    prompts = (SOURCE_TOKENS, TARGET_TOKENS, SOURCE_ANSWERS, TARGET_ANSWERS)
    options = {"attention_mask": MASK, "progress": False, **options}
    return attribution_patching(nnmodel, None, sites, *prompts, **options)


@functools.cache
def reference(family: str) -> Any:
    """The sweep on a plain model, which test_oracle.py holds to the oracle."""
    return sweep(tiny_model(family))


def swept(out: Any, name: str) -> torch.Tensor:
    """The metric of each patched run, `[cells, batch]`."""
    return out.patched(name)[out.swept(name)]


def assert_same(out: Any, expected: Any, atol: float = ROUNDING) -> None:
    assert list(out) == list(expected)
    for name in expected:
        assert torch.equal(out.swept(name), expected.swept(name))
        torch.testing.assert_close(swept(out, name), swept(expected, name), atol=atol, rtol=0)
    # A sweep in which nothing moved would be the same as anything.
    assert (swept(expected, "resid") - expected.baseline.target).abs().max() > 0.1


@functools.cache
def tokenizer() -> Any:
    return tiny_tokenizer([" ".join(f"word{number}" for number in range(60))])


# However it is wrapped.


def lazily_loaded(model: nn.Module, folder: Path) -> TransformersModel:
    """As from the hub: the weights are read when the first trace runs."""
    model.save_pretrained(folder)
    return TransformersModel(str(folder), task="text-generation", tokenizer=tokenizer())


WRAPPERS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "NNsight": lambda model, _: NNsight(model),
    "NNsight of a wrapped model": lambda model, _: NNsight(NNsight(model)._module),
    "TransformersModel": lambda model, _: TransformersModel(model, tokenizer=tokenizer()),
    "TransformersModel, lazily": lazily_loaded,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_wrapped_models_give_the_same_numbers(family: str, wrapper: str, tmp_path: Path) -> None:
    nnmodel = WRAPPERS[wrapper](tiny_model(family), tmp_path)
    assert_same(sweep(nnmodel), reference(family))
    # And again, now that it has been traced.
    assert_same(sweep(nnmodel), reference(family))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_give_the_same_estimates(wrapper: str, tmp_path: Path) -> None:
    """The QK fix calls a module by itself, which each wrapper must let it do."""
    repairs = {"qk_fix": True, "grad_drop": True}
    sites = Sites(["q", "k", "mlp"], seq_pos_type="each")
    expected = estimated(tiny_model("llama"), sites, **repairs)
    out = estimated(WRAPPERS[wrapper](tiny_model("llama"), tmp_path), sites, **repairs)
    for name in expected:
        torch.testing.assert_close(out[name], expected[name], atol=ROUNDING, rtol=0)
        assert expected[name].max() > 0.01


def test_one_model_may_be_given_plain_and_wrapped_in_turn() -> None:
    model = tiny_model("llama")
    nnmodel = NNsight(model)
    for given in (model, nnmodel, model, TransformersModel(model, tokenizer=tokenizer()), nnmodel):
        assert_same(sweep(given), reference("llama"))


@pytest.mark.parametrize("api", [None, "Llama3", Llama3])
def test_an_adapter_may_be_found_named_or_given(api: Any) -> None:
    assert_same(sweep(tiny_model("llama"), api=api), reference("llama"))


def test_both_adapters_agree_on_the_same_weights() -> None:
    llama = tiny_model("llama")
    mistral = tiny_model("mistral", sliding_window=None)
    mistral.load_state_dict(llama.state_dict())
    one, other = sweep(llama, api=Llama3), sweep(mistral, api=Mistral)
    assert_same(other, one)
    assert (one.info["adapter"], other.info["adapter"]) == ("Llama3", "Mistral")


def test_text_in_ones_own_trace_of_a_transformers_model() -> None:
    """Sites work where nnsight tokenises, too."""
    text = "word3 word1 word4 word1 word5"
    model = tiny_model("llama")
    nnmodel = TransformersModel(model, tokenizer=tokenizer())
    site = Site.get_site("Llama3", "o", layer=1, head=2, seq_pos=[-1])
    with torch.no_grad(), nnmodel.trace(text):
        site.cache(nnmodel)
    oracle = Oracle(tiny_model("llama"), "llama")
    place = Place("o", 1, 2)
    expected = oracle.part(oracle.activation(tuple(tokenizer()(text).input_ids), "o", 1), place)
    torch.testing.assert_close(site.value[0], expected[-1:], atol=ROUNDING, rtol=0)


# However its prompts come.


@pytest.mark.parametrize("side", ["left", "right"])
def test_two_tokenised_prompts_of_different_length(side: str) -> None:
    words = tokenizer()
    words.padding_side = side
    texts = {
        "source": ["word7 word2 word9 word4", "word1 word8"],
        "target": ["word7 word3 word9 word4", "word6 word8"],
    }
    source, target = (words(text, padding=True, return_tensors="pt") for text in texts.values())
    assert source.attention_mask.sum(1).tolist() == [4, 2]
    model = tiny_model("mistral")
    oracle = Oracle(model, "mistral")
    answers = torch.tensor([5, 11]), torch.tensor([9, 30])
    out = activation_patching(
        TransformersModel(model, tokenizer=words),
        None,
        Sites("resid", seq_pos_type="each"),
        source.input_ids,
        target.input_ids,
        *answers,
        attention_mask=source.attention_mask,
        progress=False,
    )
    alone = [[tuple(words(text).input_ids) for text in column] for column in texts.values()]
    for row, (one, other) in enumerate(zip(*alone, strict=True)):
        for layer in range(3):
            for position in range(4):
                logits = oracle.patched(other, one, Place("resid", layer, None, (4 - position,)))
                expected = logits[answers[0][row]] - logits[answers[1][row]]
                found = out.patched("resid")[layer, position, row]
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_and_tokens_of_other_types(dtype: torch.dtype) -> None:
    out = activation_patching(
        tiny_model("llama"),
        None,
        EVERYTHING,
        SOURCE_TOKENS.int(),
        TARGET_TOKENS.int(),
        SOURCE_ANSWERS.int(),
        TARGET_ANSWERS.int(),
        attention_mask=MASK.to(dtype),
        progress=False,
    )
    assert_same(out, reference("llama"))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_size_changes_nothing(family: str, batch_size: int) -> None:
    assert_same(sweep(tiny_model(family), batch_size=batch_size), reference(family), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"method": "zero"}, {"method": "mean"}, {"method": "mean", "per_position": True}],
)
def test_a_batch_size_changes_no_ablation(options: dict[str, Any]) -> None:
    model = tiny_model("gemma2")
    arguments = (SOURCE_TOKENS, SOURCE_ANSWERS, TARGET_ANSWERS)
    options = {**options, "attention_mask": MASK, "progress": False}
    whole = ablation_patching(model, None, EVERYTHING, *arguments, **options)
    for batch_size in (1, 2):
        parts = ablation_patching(
            model, None, EVERYTHING, *arguments, batch_size=batch_size, **options
        )
        assert_same(parts, whole, atol=2e-5)


# However it is set or placed.


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("llama", "eager"),
        ("llama", "sdpa"),
        ("mistral", "eager"),
        ("mistral", "sdpa"),
        # transformers has no sdpa for Gemma 2, whose scores are soft-capped.
        ("gemma2", "eager"),
        ("gemma", "eager"),
        ("gemma", "sdpa"),
        ("gemma3_text", "eager"),
        ("gemma3_text", "sdpa"),
    ],
)
def test_both_implementations_of_attention(family: str, attention: str) -> None:
    model = tiny_model(family, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    oracle = Oracle(model, family)
    out = sweep(model)
    check_against(out, oracle, atol=1e-4)


def check_against(out: Any, oracle: Oracle, atol: float) -> None:
    """Every other cell: what cells there are is test_oracle.py's matter."""
    for component in COMPONENTS:
        cells = [
            (layer, position, head)
            for layer in range(oracle.n_layers)
            for position in POSITIONS
            for head in oracle.heads(component)
        ]
        for layer, position, head in cells[::2]:
            place = Place(component, layer, head, (7 - position,))
            index = (layer, position, *(() if head is None else (head,)))
            for row, (source, target) in enumerate(zip(SOURCE, TARGET, strict=True)):
                logits = oracle.patched(target, source, place)
                expected = logits[SOURCE_ANSWERS[row]] - logits[TARGET_ANSWERS[row]]
                found = out.patched(component)[index][row]
                torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family: str) -> None:
    """Close to plain hooks in bfloat16, and exact where nothing is rounded."""
    model = tiny_model(family).to(torch.bfloat16)
    oracle = Oracle(model, family)
    out = sweep(model)
    scale = (swept(out, "resid") - out.baseline.target).abs().max()
    check_against(out, oracle, atol=0.05 * float(scale))
    assert out["resid"][-1, -1] == 1
    assert out.info["dtype"] == "torch.bfloat16"
    # The first prompt is patched with itself.
    same = TARGET_TOKENS.clone()
    same[1:] = SOURCE_TOKENS[1:]
    identity = activation_patching(
        model,
        None,
        EVERYTHING,
        same,
        TARGET_TOKENS,
        SOURCE_ANSWERS,
        TARGET_ANSWERS,
        attention_mask=MASK,
        progress=False,
    )
    for component in COMPONENTS:
        patched = swept(identity, component)[:, 0]
        assert torch.equal(patched, identity.baseline.target[0].expand_as(patched))


def on_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)


def one_layer_on_disk(model: nn.Module, folder: Path) -> nn.Module:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places["model.rotary_emb"] = "cpu"
    places |= {f"model.layers.{layer}": "disk" if layer == 1 else "cpu" for layer in range(3)}
    return accelerate.dispatch_model(
        model, device_map=places, offload_dir=folder, main_device="cpu", force_hooks=True
    )


@pytest.mark.parametrize("dispatch", [on_cpu, one_layer_on_disk])
@pytest.mark.parametrize("wrap", [lambda model: model, NNsight])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_dispatched_by_accelerate(
    family: str, wrap: Callable, dispatch: Callable, tmp_path: Path
) -> None:
    model = dispatch(tiny_model(family), tmp_path)
    on_disk = {name for name, weight in model.named_parameters() if weight.is_meta}
    assert any(name.startswith("model.layers.1.") for name in on_disk) == (
        dispatch is one_layer_on_disk
    )
    nnmodel = wrap(model)
    assert_same(sweep(nnmodel), reference(family))
    assert_same(sweep(nnmodel), reference(family))
    # Weights that were brought in for a forward have gone out again.
    assert {name for name, weight in model.named_parameters() if weight.is_meta} == on_disk


def test_weights_without_gradients() -> None:
    model = tiny_model("llama").requires_grad_(False)
    assert_same(sweep(model), reference("llama"))
    assert not any(weight.requires_grad for weight in model.parameters())


def test_under_inference_mode() -> None:
    model = tiny_model("mistral")
    with torch.inference_mode():
        out = sweep(model)
    assert_same(out, reference("mistral"))
    # Nothing of inference mode sticks: the model can still be trained.
    assert_same(sweep(model), reference("mistral"))
    model(input_ids=SOURCE_TOKENS).logits.sum().backward()


# What is left of it.


@attrs.frozen
class State:
    """All that a sweep might have changed of a model."""

    logits: torch.Tensor
    weights: dict[str, torch.Tensor]
    flags: dict[str, tuple[bool, int]]

    @classmethod
    def of(cls, model: nn.Module) -> State:
        with torch.no_grad():
            logits = model(input_ids=SOURCE_TOKENS, attention_mask=MASK).logits
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return cls(
            logits,
            {name: weight.clone() for name, weight in model.state_dict().items()},
            {
                name: (module.training, sum(len(getattr(module, hook)) for hook in hooks))
                for name, module in model.named_modules()
            },
        )

    def check(self, model: nn.Module) -> None:
        now = State.of(model)
        assert torch.equal(now.logits, self.logits)
        assert now.flags == self.flags
        assert now.weights.keys() == self.weights.keys()
        assert all(torch.equal(now.weights[name], self.weights[name]) for name in now.weights)
        assert all(weight.grad is None for weight in model.parameters())
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("wrap", [lambda model: model, NNsight])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_leaves_the_model_as_it_was(family: str, wrap: Callable) -> None:
    model = tiny_model(family)
    before = State.of(model)
    assert all(hooks == 0 for _, hooks in before.flags.values())
    nnmodel = wrap(model)
    sweep(nnmodel)
    before.check(model)
    ablation_patching(
        nnmodel,
        None,
        EVERYTHING,
        SOURCE_TOKENS,
        SOURCE_ANSWERS,
        TARGET_ANSWERS,
        method="mean",
        attention_mask=MASK,
        progress=False,
    )
    before.check(model)


class InterruptedSweepError(Exception):
    """What the tests throw into a sweep."""


def fails_at(call: int, error: type[BaseException]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A metric that raises at its nth call; the first two are the unpatched runs'."""
    calls = iter(range(1, 10_000))

    def metric(logits: torch.Tensor) -> torch.Tensor:
        if next(calls) == call:
            raise error
        return logits[:, 5] - logits[:, 9]

    return metric


@pytest.mark.parametrize("error", [InterruptedSweepError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 3, 40])
def test_a_metric_that_raises_leaves_the_model_as_it_was(
    call: int, error: type[BaseException]
) -> None:
    model = tiny_model("llama")
    model.train()
    before = State.of(model)
    # What an exception of the metric's own is the cause of.
    raised = error if error is KeyboardInterrupt else MetricError
    with pytest.raises(raised):
        sweep(model, metric=fails_at(call, error), engine="full")
    before.check(model)
    assert_same(sweep(model), reference("llama"))


def api_that_fails_at(call: int) -> DecoderAPI:
    """An adapter whose columns raise at their nth call, in the middle of a trace."""
    calls = iter(range(1, 10_000))

    def columns(width: int, heads: Heads) -> torch.Tensor:
        if next(calls) == call:
            raise InterruptedSweepError
        return torch.arange(width).view(heads.key_value, -1)

    table = decoder_components()
    table["v"] = attrs.evolve(table["v"], columns=columns)
    return DecoderAPI("Failing", ("llama",), table)


@pytest.mark.parametrize("wrap", [lambda model: model, NNsight])
# The first three calls are a check of the table, before there is a trace; then each layer's columns
# are asked for once, in the first trace that patches there.
@pytest.mark.parametrize("call", [4, 5, 6])
def test_an_error_inside_a_trace_leaves_the_model_as_it_was(call: int, wrap: Callable) -> None:
    model = tiny_model("llama")
    before = State.of(model)
    nnmodel = wrap(model)
    sites = Sites(["resid_pre", "v"], seq_pos_type="each")
    with pytest.raises(InterruptedSweepError):
        sweep(nnmodel, sites, api_that_fails_at(call), engine="full")
    before.check(model)
    assert_same(sweep(nnmodel), reference("llama"))


class Breaking(nn.Module):
    """A layer's MLP that raises at its nth forward."""

    def __init__(self, inner: nn.Module, call: int) -> None:
        super().__init__()
        self.inner = inner
        self.left = call

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if not self.left:
            raise InterruptedSweepError
        return self.inner(hidden)


@pytest.mark.parametrize("call", [1, 2, 3, 4, 20])
def test_an_error_of_the_model_itself(call: int) -> None:
    """Such as running out of memory."""
    model = tiny_model("llama")
    before = State.of(model)
    inner = model.model.layers[1].mlp
    model.model.layers[1].mlp = Breaking(inner, call)
    with pytest.raises(InterruptedSweepError):
        sweep(model, engine="full")
    model.model.layers[1].mlp = inner
    before.check(model)
    assert_same(sweep(model), reference("llama"))


@pytest.mark.parametrize("call", [2, 3, 4])
def test_an_error_of_the_model_in_the_cone_engine(call: int) -> None:
    """The source run is the first forward; the engine's own are named in its error."""
    model = tiny_model("llama")
    before = State.of(model)
    inner = model.model.layers[1].mlp
    model.model.layers[1].mlp = Breaking(inner, call)
    with pytest.raises(EngineError, match="InterruptedSweepError"):
        sweep(model, engine="cone", memory_budget=800_000)
    model.model.layers[1].mlp = inner
    before.check(model)
    assert_same(sweep(model), reference("llama"))


def test_dropout_is_off_and_training_flags_stay() -> None:
    model = tiny_model("llama", attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    assert len(set(flags.values())) == 2
    with torch.no_grad():
        once, again = (model(input_ids=SOURCE_TOKENS).logits for _ in range(2))
    assert not torch.equal(once, again), "dropout does nothing: this test tests nothing"
    for nnmodel in (model, NNsight(model)):
        assert_same(sweep(nnmodel), reference("llama"))
        assert {name: module.training for name, module in model.named_modules()} == flags


def test_a_model_that_was_swept_can_be_copied_and_saved(tmp_path: Path) -> None:
    """The copy is a model of its own, whatever nnsight has left in the first."""
    model = tiny_model("llama")
    logits = State.of(model).logits
    sweep(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    assert not State.of(twin).logits.any()
    assert torch.equal(State.of(model).logits, logits)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(State.of(loaded).logits, logits, atol=ROUNDING, rtol=0)


def endless(nnmodel: Any, error: bool) -> Iterator[None]:
    sites = Sites(["resid", "q"], layers=[1], seq_pos_type="last")
    while True:
        if error:
            with pytest.raises(MetricError, match="InterruptedSweepError"):
                sweep(nnmodel, sites, Llama3, metric=fails_at(3, InterruptedSweepError))
        else:
            sweep(nnmodel, sites, Llama3)
        yield


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("wrap", [lambda model: model, NNsight])
def test_memory_does_not_grow_over_200_sweeps(wrap: Callable, error: bool) -> None:
    sweeps = endless(wrap(tiny_model("llama")), error)

    def used(count: int) -> tuple[int, int]:
        for _ in range(count):
            next(sweeps)
        gc.collect()
        return psutil.Process().memory_info().rss, len(gc.get_objects())

    # Caches of torch, nnsight and the allocator fill up first. After thousands of other tests the
    # allocator takes longer; a leak grows for ever.
    seen = [used(30)]
    grown = []
    for _ in range(3):
        seen.append(used(200))
        grown.append(seen[-1][0] - seen[-2][0])
        # One leaked forward would be more than 50 kB.
        if grown[-1] < 5_000_000:
            break
    assert grown[-1] < 5_000_000
    # Less than one object a sweep.
    assert seen[-1][1] - seen[-2][1] < 100
