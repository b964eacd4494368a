"""The context of steering: what it leaves behind, what stands around it, what it refuses."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from nnsight import NNsight
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor, nn

from nnpatch_core import Add, MultiSite, Scale, Set, Site, steer
from nnpatch_core.errors import (
    AdapterError,
    EngineError,
    HeadError,
    LayerError,
    MaskError,
    PaddingWarning,
    PositionError,
    SteeringError,
    SubspaceError,
)
from nnpatch_core.spaces import SiteRecord, Subspace
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer

API, MODEL = tiny_api(), tiny_model("llama")
SPACE = Subspace.random(32, seed=1)
TOKENS = torch.tensor([[5, 6, 7, 8], [9, 4, 7, 3]])
VALUES = torch.tensor([20.0, -30.0])
#: What the cache is called, in arguments and in what a forward gives.
NAMES = inspect.signature(type(MODEL).forward).parameters
CACHE = "cache" if "cache" in NAMES else "past_key_values"


def site(seq_pos: Any = (-1,), name: str = "resid", layer: int = 1, **options: Any) -> Site:
    options = {"subspace": SPACE, **options}
    positions = None if seq_pos is None else list(seq_pos)
    return Site.get_site(API, name, layer, seq_pos=positions, **options)


def texts(model: Any = MODEL, tokens: Tensor = TOKENS, **options: Any) -> list[list[int]]:
    options = {"do_sample": False, "attention_mask": torch.ones_like(tokens), **options}
    made = model.generate(input_ids=tokens, max_new_tokens=5, pad_token_id=0, **options)
    return made[:, tokens.shape[1] :].tolist()


PLAIN = texts()


def state(model: nn.Module) -> list[Any]:
    """All that a module keeps, but for its weights: hooks, flags, and what others put there."""
    return [
        (path, {name: copy.copy(each) for name, each in vars(module).items() if name != "_modules"})
        for path, module in model.named_modules()
    ]


# What it leaves behind.


@pytest.mark.parametrize("name", ["resid", "resid_pre", "q", "o", "mlp"])
def test_the_model_is_as_it_was(name: str) -> None:
    before = state(MODEL)
    width = 16 if name == "q" else 32
    with steer(MODEL, site(name=name, subspace=None), Add(torch.full([32], 50.0))):
        assert texts() != PLAIN, width
        assert str(state(MODEL)) != str(before)
    assert str(state(MODEL)) == str(before)
    assert texts() == PLAIN


def test_the_model_is_as_it_was_after_an_error() -> None:
    before = str(state(MODEL))
    with pytest.raises(KeyError), steer(MODEL, site(), 3.0):
        raise KeyError
    assert str(state(MODEL)) == before

    def fails(*_: Any) -> None:
        raise KeyError

    with steer(MODEL, site(), 20.0):
        hook = MODEL.model.layers[2].register_forward_hook(fails)
        with pytest.raises(KeyError):
            MODEL(TOKENS)
        hook.remove()
        # A forward that fails leaves nothing that another would go on from.
        with pytest.raises(SteeringError, match="runs outside of a forward"):
            MODEL.model(TOKENS)
        assert texts() == steered(20.0)
    assert str(state(MODEL)) == before
    with pytest.raises(SteeringError, match="rows run together"), steer(MODEL, site(), [1.0] * 3):
        MODEL(TOKENS)
    assert str(state(MODEL)) == before
    assert texts() == PLAIN


def steered(value: Any, seq_pos: Any = (-1,), model: Any = MODEL, **options: Any) -> Any:
    with steer(model, site(seq_pos), value):
        return texts(model, **options)


def test_an_error_before_anything_runs_leaves_nothing() -> None:
    before = str(state(MODEL))
    with pytest.raises(SteeringError), steer(MODEL, site(), "x"):
        raise AssertionError
    assert str(state(MODEL)) == before


def test_what_is_there_already_changes_nothing() -> None:
    seen: list[Tensor] = []
    hook = MODEL.model.layers[1].register_forward_hook(lambda *each: seen.append(each[2]))
    plain = MODEL(TOKENS).logits
    hook.remove()
    there = seen[0][:, -1]
    for value in (Set(SPACE.project(there)), Add(0), Scale(1)):
        with steer(MODEL, site(), value):
            assert torch.equal(MODEL(TOKENS).logits, plain)
    for whole in (Set(there), Add(torch.zeros(32)), Scale(1.0)):
        with steer(MODEL, site(subspace=None), whole):
            assert torch.equal(MODEL(TOKENS).logits, plain)


# Rows.


@pytest.mark.parametrize("cache", [True, False])
def test_different_values_are_as_one_by_one(cache: bool) -> None:
    both = steered(VALUES, use_cache=cache)
    alone = [steered(float(VALUES[row]), tokens=TOKENS[row : row + 1])[0] for row in (0, 1)]
    assert both == alone
    assert both[0] != PLAIN[0]
    assert both[1] != PLAIN[1]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("seq_pos", [None, [-1], [[-1, -2], [-3, 0]]])
def test_beams_are_as_one_by_one(seq_pos: Any, cache: bool) -> None:
    with steer(MODEL, site(seq_pos), VALUES):
        both = texts(num_beams=3, use_cache=cache)
    for row in (0, 1):
        own = [seq_pos[row]] if seq_pos and isinstance(seq_pos[0], list) else seq_pos
        with steer(MODEL, site(own), float(VALUES[row])):
            assert texts(tokens=TOKENS[row : row + 1], num_beams=3, use_cache=cache) == [both[row]]


def test_sequences_of_a_prompt_have_its_value() -> None:
    options = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}
    rows = steered(VALUES, **options)
    greedy = steered(VALUES)
    assert rows == [greedy[0]] * 3 + [greedy[1]] * 3


def test_rows_that_are_not_the_prompts_are_an_error() -> None:
    with steer(MODEL, site(), VALUES):
        with pytest.raises(SteeringError, match=r"values or positions of 2 prompts, and 3 rows"):
            MODEL(TOKENS[[0, 1, 0]])
        with pytest.raises(SteeringError, match="not each prompt 2 times over"):
            MODEL(TOKENS[[0, 1, 0, 1]])
        MODEL(TOKENS[[0, 0, 1, 1]])


def test_nested_ones_stack() -> None:
    """In the order in which they were entered: a sum, then its double; or a double, then a sum."""
    v, w = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    place = site(None, subspace=None)
    with steer(MODEL, place, Add(v)), steer(MODEL, place, Scale(2.0)):
        first = MODEL(TOKENS).logits
    with steer(MODEL, place, Scale(2.0)), steer(MODEL, place, Add(2 * v)):
        second = MODEL(TOKENS).logits
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    with steer(MODEL, place, Add(v)), steer(MODEL, site(None, "mlp", 2, subspace=None), Add(w)):
        both = texts()
    with steer(MODEL, site(None, "mlp", 2, subspace=None), Add(w)), steer(MODEL, place, Add(v)):
        assert texts() == both


def test_one_is_off_and_the_other_still_on() -> None:
    with steer(MODEL, site(), 20.0):
        with steer(MODEL, site(name="mlp"), -10.0):
            pass
        assert texts() == steered_alone()


def steered_alone() -> Any:
    model = tiny_model("llama")
    with steer(model, site(), 20.0):
        return texts(model)


# Around it.


def test_nnsight_steers_too() -> None:
    expected = steered(VALUES)
    traced = NNsight(tiny_model("llama"))
    with steer(traced, site(), VALUES):
        assert texts(traced._module) == expected
    with steer(MODEL, site(), VALUES):
        logits = MODEL(TOKENS).logits
    with steer(traced, site(), VALUES), torch.no_grad():  # noqa: SIM117 - nnsight's own block
        with traced.trace(TOKENS):
            found = traced.output.logits.save()
    assert torch.equal(found, logits)
    whole = TransformersModel(tiny_model("llama"), tokenizer=tiny_tokenizer(["a b c d e f g h"]))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with steer(whole, site(), VALUES):  # noqa: SIM117
        with whole.generate(TOKENS, **options) as tracer:
            made = tracer.result.save()
    assert made[:, 4:].tolist() == expected


def test_a_compiled_model_is_steered_and_is_as_it_was() -> None:
    inside = tiny_model("llama")
    compiled = torch.compile(inside, backend="eager")
    plain = compiled(TOKENS).logits
    with steer(compiled, site(), VALUES):
        steered_logits = compiled(TOKENS).logits
    with steer(MODEL, site(), VALUES):
        assert torch.equal(steered_logits, MODEL(TOKENS).logits)
    assert torch.equal(compiled(TOKENS).logits, plain)
    # As transformers' pages advise.
    inside.forward = torch.compile(inside.forward, backend="eager")
    inside(TOKENS)
    with steer(inside, site(), VALUES):
        assert torch.equal(inside(TOKENS).logits, steered_logits)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_peft_is_looked_through() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model("llama"), config)
    with steer(model, site(), VALUES):
        assert texts(model) == steered(VALUES)
        logits = model(input_ids=TOKENS).logits
    with steer(MODEL, site(), VALUES):
        torch.testing.assert_close(logits, MODEL(TOKENS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    """The coordinate is set in the model's own type, of which it keeps the rounding."""
    model = tiny_model("llama").to(dtype)
    seen: list[Tensor] = []
    with steer(model, site(), VALUES):
        hook = model.model.layers[1].register_forward_hook(lambda *each: seen.append(each[2]))
        assert model(TOKENS).logits.dtype == dtype
        hook.remove()
    found = SPACE.project(seen[0].double())[:, -1, 0]
    torch.testing.assert_close(
        found.float(), VALUES, rtol=torch.finfo(dtype).eps * 8 + 1e-6, atol=0
    )


def test_what_stands_around_changes_nothing() -> None:
    expected = steered(VALUES)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        assert steered([20.0, -30.0]) == expected
        assert steered(VALUES) == expected
    finally:
        torch.set_default_device("cpu")
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        assert steered(VALUES) == expected


def test_autocast_is_for_the_model() -> None:
    seen: list[Tensor] = []
    hook = MODEL.model.layers[1].register_forward_hook(lambda *each: seen.append(each[2]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        MODEL(TOKENS)
        hook.remove()
        with steer(MODEL, site(), VALUES):
            hook = MODEL.model.layers[1].register_forward_hook(lambda *each: seen.append(each[2]))
            MODEL(TOKENS)
            hook.remove()
    plain, found = (SPACE.project(each[:, -1].double())[:, 0] for each in seen)
    assert (plain - VALUES).abs().min() > 1
    torch.testing.assert_close(found.float(), VALUES, rtol=0.02, atol=0)
    torch.testing.assert_close(seen[1][:, :-1], seen[0][:, :-1], rtol=0, atol=0)


def test_inference_mode_leaves_a_subspace_that_has_gradients() -> None:
    # In another type than the subspace, which is converted then.
    space, model = Subspace.random(32, seed=3), tiny_model("llama").double()
    model.requires_grad_(requires_grad=True)
    own = site(None, subspace=space)
    with torch.inference_mode(), steer(model, own, 3.0):
        model(TOKENS)
    with steer(model, own, 3.0):
        loss = model(TOKENS).logits.sum()
    loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_gradients_flow_into_a_vector() -> None:
    vector = torch.zeros(32, requires_grad=True)
    with steer(MODEL, site(subspace=None), Add(vector)):
        loss = MODEL(TOKENS).logits[:, -1, 3].sum()
    loss.backward()
    seen: list[Tensor] = []
    hook = MODEL.model.layers[1].register_forward_hook(lambda *each: seen.append(each[2]))
    with torch.enable_grad():
        plain = MODEL(TOKENS).logits[:, -1, 3].sum()
    hook.remove()
    (gradient,) = torch.autograd.grad(plain, seen)
    torch.testing.assert_close(vector.grad, gradient[:, -1].sum(0))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_checkpointed_layer_is_steered_again() -> None:
    def gradient(checkpointed: bool) -> Tensor:
        model = tiny_model("llama").train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        with steer(model, site(None, "mlp"), 3.0):
            loss = model(TOKENS, use_cache=False).logits[:, -1, 3].sum()
            loss.backward()
        found: Tensor = model.model.layers[0].mlp.up_proj.weight.grad
        return found

    assert torch.equal(gradient(checkpointed=True), gradient(checkpointed=False))


def test_another_thread_may_not_use_the_model_meanwhile() -> None:
    import threading

    raised: list[BaseException] = []

    def other() -> None:
        try:
            with steer(MODEL, site(), 1.0):
                pass
        except EngineError as error:
            raised.append(error)

    with steer(MODEL, site(), 1.0):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(raised) == 1


# Passes.


def test_a_kept_prefix_is_gone_on_from() -> None:
    kept = MODEL(TOKENS[:, :2], use_cache=True)[CACHE]
    with steer(MODEL, site(), VALUES):
        assert texts(**{CACHE: kept}) == steered(VALUES)
    kept = MODEL(TOKENS[:, :2], use_cache=True)[CACHE]
    with (
        steer(MODEL, site([-1, -3]), VALUES),
        pytest.raises(PositionError, match="position -3 of prompt 0 is among the 2 tokens whose"),
    ):
        texts(**{CACHE: kept})


def test_embeddings_are_prompts_too() -> None:
    embedded = MODEL.get_input_embeddings()(TOKENS)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for cache in (True, False):
        with steer(MODEL, site(), VALUES):
            mask = torch.ones_like(TOKENS)
            made = MODEL.generate(
                inputs_embeds=embedded, attention_mask=mask, use_cache=cache, **options
            )
        assert made.tolist() == steered(VALUES)


SEVENS = Set(torch.full([32], 7.0))


@contextmanager
def noting(model: Any = MODEL) -> Iterator[list[Tensor]]:
    """Of each forward `[rows, tokens]`, bool: where a layer gives sevens."""
    seen: list[Tensor] = []
    layer = model.model.layers[1]
    hook = layer.register_forward_hook(lambda *each: seen.append((each[2] == 7.0).all(-1)))
    yield seen
    hook.remove()


def test_a_prompt_after_a_prompt_that_it_goes_on_from_is_new_in_generate() -> None:
    """The second prompt is the first one and a token more; it is no step of the first."""
    one = TOKENS[:1]
    with steer(MODEL, site([-2], subspace=None), SEVENS), noting() as seen:
        MODEL(one[:, :3], use_cache=False)
        MODEL.generate(one, max_new_tokens=2, pad_token_id=0, do_sample=False, use_cache=False)
    assert [each[0].int().tolist() for each in seen] == [
        [0, 1, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 0, 0],
    ]


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("eager", [True, False])
def test_padding_is_never_steered_in_generation(options: Any, eager: bool) -> None:
    model = tiny_model("llama", attn_implementation="eager" if eager else "sdpa")
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with steer(model, site(None, subspace=None), SEVENS), noting(model) as seen:
        texts(model, attention_mask=mask, **options)
    assert torch.equal(seen[0], mask.bool())
    last = torch.cat([mask, torch.ones(2, 4)], 1).bool()
    assert torch.equal(seen[-1], last if "use_cache" in options else last[:, -1:])


def test_a_loop_of_ones_own_goes_on() -> None:
    expected = steered(VALUES)
    with steer(MODEL, site(), VALUES):
        tokens = TOKENS
        for _ in range(5):
            tokens = torch.cat([tokens, MODEL(tokens).logits[:, -1:].argmax(-1)], 1)
        assert tokens[:, 4:].tolist() == expected
        out = MODEL(TOKENS, use_cache=True)
        made = [out.logits[:, -1:].argmax(-1)]
        for _ in range(4):
            out = MODEL(made[-1], use_cache=True, **{CACHE: out[CACHE]})
            made.append(out.logits[:, -1:].argmax(-1))
    assert torch.cat(made, 1).tolist() == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt_lookup_num_tokens": 2}, "assisted decoding runs the prompt together"),
        ({"prefill_chunk_size": 2}, "the prompt runs in several parts, by prefill_chunk_size="),
    ],
)
def test_where_a_prompt_ends_must_be_known(options: Any, words: str) -> None:
    one = TOKENS[:1]
    with steer(MODEL, site(), 20.0), pytest.raises(SteeringError, match=words):
        texts(tokens=one, **options)
    # Every token is one whatever it belongs to.
    assert steered(20.0, None, tokens=one, **options) == steered(20.0, None, tokens=one)


def test_the_model_that_guesses_is_not_steered() -> None:
    guesses = tiny_model("llama")
    one = TOKENS[:1]
    found = steered(20.0, None, tokens=one, assistant_model=guesses)
    assert found == steered(20.0, None, tokens=one)


def test_several_tokens_after_kept_ones_are_an_error() -> None:
    with steer(MODEL, site(), 20.0):
        out = MODEL(TOKENS[:, :3], use_cache=True)
        with pytest.raises(SteeringError, match="2 tokens run together after 3 that were kept"):
            MODEL(TOKENS[:, 2:], **{CACHE: out[CACHE]})


def test_packed_prompts_are_an_error() -> None:
    with (
        steer(MODEL, site(), 20.0),
        pytest.raises(SteeringError, match="several prompts run in one row"),
    ):
        MODEL(TOKENS, cu_seq_lens_q=torch.tensor([0, 2, 4]))


# Padding.


def test_padding_without_a_mask_is_told() -> None:
    model = tiny_model("llama", pad_token_id=0)
    padded = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]])
    with steer(model, site(), 20.0), pytest.warns(PaddingWarning, match="what is steered has rows"):
        model(padded)


def test_a_position_that_is_padding_is_an_error() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with (
        steer(MODEL, site([-3]), 20.0),
        pytest.raises(PositionError, match=r"position -3 is padding in prompt 1, whose 2 tokens"),
    ):
        MODEL(TOKENS, attention_mask=mask)
    with steer(MODEL, site([-5]), 20.0), pytest.raises(PositionError, match="position -5 is out"):
        MODEL(TOKENS)


def test_padding_is_never_steered() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]])
    with steer(MODEL, site(None, subspace=None), SEVENS), noting() as seen:
        MODEL(TOKENS, attention_mask=mask)
    assert torch.equal(seen[0], mask.bool())


def test_a_mask_that_cannot_be_read_is_an_error() -> None:
    kept = MODEL(TOKENS, use_cache=True)[CACHE]
    with steer(MODEL, site(), 1.0), pytest.raises(MaskError, match=r"\[batch, seq\] = \[2, 5\]"):
        MODEL(TOKENS[:, :1], attention_mask=torch.ones(2, 3), **{CACHE: kept})


# A subspace by itself.


def test_a_subspace_is_steered_where_it_was_made() -> None:
    own = Subspace(SPACE.basis, site=site(subspace=None))
    with steer(MODEL, own, VALUES, api=API):
        assert texts() == steered(VALUES)
    last = Subspace(SPACE.basis, site=SiteRecord("resid", 1, where="'last'"))
    with steer(MODEL, last, VALUES, api=API):
        assert texts() == steered(VALUES)


# What is refused.

RANK2 = Subspace.random(32, rank=2)
REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "number without a subspace": (
        SteeringError,
        r"value 2\.0 alone is the coordinate of a subspace, and site resid L1 \[-1\] has none",
        lambda: (site(subspace=None), 2.0),
    ),
    "Add of a number without one": (
        SteeringError,
        r"values of Add must be a vector \[width\] .* such as torch\.full\(\[32\], 2\)",
        lambda: (site(subspace=None), Add(2.0)),
    ),
    "Scale of a vector": (
        SteeringError,
        r"the factor of Scale must be a number",
        lambda: (site(subspace=None), Scale(torch.ones(32))),
    ),
    "vector of another width": (
        SteeringError,
        r"shape \[width = 32\] or \[batch, width = 32\], got \[31\]",
        lambda: (site(subspace=None), Add(torch.ones(31))),
    ),
    "vector of the component for a head": (
        SteeringError,
        r"\[width = 8\]",
        lambda: (site(name="q", head=1, subspace=None), Add(torch.ones(32))),
    ),
    "other rank": (
        SteeringError,
        r"shape \[rank = 2\] or \[batch, rank = 2\], got \[3\]",
        lambda: (site(subspace=RANK2), Set(torch.ones(3))),
    ),
    "number for rank 2": (
        SteeringError,
        "value 2 alone is the coordinate of a subspace of rank 1, and the one of site",
        lambda: (site(subspace=RANK2), 2),
    ),
    "matrix alone": (SteeringError, r"a number or a tensor \[batch\]", lambda: (site(), [[1.0]])),
    "nan": (SteeringError, "must be finite, got nan", lambda: (site(), float("nan"))),
    "text": (SteeringError, "must be a number, or a tensor of them", lambda: (site(), "2")),
    "truth": (SteeringError, "must be real numbers", lambda: (site(), True)),
    "the class": (SteeringError, "is the class Add", lambda: (site(), Add)),
    "nothing": (SteeringError, "got None", lambda: (site(), None)),
    "empty": (SteeringError, r"got \[0, 1\]", lambda: (site(), [])),
    "meta": (
        SteeringError,
        "no numbers that can be read",
        lambda: (site(), torch.ones(1, device="meta")),
    ),
    "three prompts, two": (
        SteeringError,
        "values of 3 prompts, and site .* has positions of 2",
        lambda: (site([[-1], [-2]]), [1.0, 2.0, 3.0]),
    ),
    "MultiSite": (
        SteeringError,
        "MultiSite of 2 sites",
        lambda: (MultiSite([site(), site(name="mlp")]), 1.0),
    ),
    "no site": (SteeringError, "must be a Site, or a Subspace", lambda: ("resid", 1.0)),
    "subspace from nowhere": (
        SubspaceError,
        "does not know where it was made",
        lambda: (SPACE, 1.0),
    ),
    "subspace of other positions": (
        SubspaceError,
        "was made at positions of each prompt",
        lambda: (Subspace(SPACE.basis, site=site([[-1], [-2]])), 1.0),
    ),
    "subspace of another width": (
        SubspaceError,
        "32 wide, and head 0 of q",
        lambda: (site(name="q", head=0), 1.0),
    ),
    "source positions": (
        PositionError,
        "steering takes no values from a source",
        lambda: (site(source_seq_pos=[-2]), 1.0),
    ),
    "layer": (LayerError, "layer 7 is out of range", lambda: (site(layer=7), 1.0)),
    "head": (HeadError, "head 9", lambda: (site(name="q", head=9, subspace=None), Scale(1.0))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    kind, words, make = REFUSED[name]
    given, value = make()
    with pytest.raises(kind, match=words), steer(MODEL, given, value):
        raise AssertionError


def test_an_adapter_beside_a_site_and_models_that_are_none() -> None:
    with (
        pytest.raises(SteeringError, match="api= is for a Subspace"),
        steer(MODEL, site(), 1.0, api=API),
    ):
        pass
    with pytest.raises(AdapterError), steer("gpt2", site(), 1.0):
        pass
    gpt2 = tiny_model("gpt2")
    with pytest.raises(AdapterError, match="does not fit"), steer(gpt2, site(), 1.0):
        pass


def test_a_width_that_is_known_is_looked_at_first() -> None:
    """GPT-2's projections say how wide they are under a name of their own."""
    from tests.helpers.kit import GPT2

    model = tiny_model("gpt2")
    head = Site.get_site(GPT2, "q", 1, head=0, seq_pos=[-1])
    with pytest.raises(SteeringError, match="width = 8"), steer(model, head, Add(torch.ones(7))):
        pass
    with steer(model, head, Add(torch.ones(8))):
        model(TOKENS)


def test_a_width_that_only_a_run_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["nnpatch_core.steering.steer"], "_width", lambda *_: None)
    model = tiny_model("llama")
    head = Site.get_site(tiny_api(), "q", 1, head=0, seq_pos=[-1])
    with steer(model, head, Add(torch.ones(7))), pytest.raises(SteeringError, match="7 wide, and"):
        model(TOKENS)
    with steer(model, head, Add(torch.ones(8))):
        model(TOKENS)


def test_a_module_that_runs_alone_is_an_error() -> None:
    with steer(MODEL, site(), 1.0), pytest.raises(SteeringError, match="outside of a forward"):
        MODEL.model(TOKENS)


def test_the_values_of_a_sum_are_those_of_its_parts() -> None:
    """Add is additive, Scale multiplicative, in coordinates."""
    run = functools.partial(_coordinates, MODEL)
    start = run(Add(0.0))
    torch.testing.assert_close(run(Add(2.0)), start + 2.0, atol=1e-5, rtol=0)
    torch.testing.assert_close(run(Scale(3.0)), start * 3.0, atol=1e-5, rtol=1e-5)


def _coordinates(model: Any, value: Any) -> Tensor:
    seen: list[Tensor] = []
    with steer(model, site(), value):
        hook = model.model.layers[1].register_forward_hook(lambda *each: seen.append(each[2]))
        model(TOKENS)
        hook.remove()
    return SPACE.project(seen[0][:, -1]).detach()
