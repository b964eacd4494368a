"""Each kind of bad input gets its own clear error, and gets it before a forward is wasted on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from nnpatch_core import (
    Component,
    DecoderAPI,
    Fused,
    Interleaved,
    PartOfHead,
    Site,
    Sites,
    activation_patching,
    cache_average,
    decoder_components,
)
from nnpatch_core.errors import (
    AdapterError,
    AdapterWarning,
    AnswerError,
    ConfidenceError,
    MaskError,
    MetricError,
    PaddingWarning,
    PatchingError,
    TokensError,
    UnknownNameError,
)
from nnpatch_core.metrics import logit_difference
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer
from tests.helpers import refusals
from tests.helpers.refusals import (
    ONES,
    SOURCE,
    SOURCE_ANSWERS,
    TARGET,
    TARGET_ANSWERS,
    Counted,
    cases,
    last,
    raises,
    site,
)


@pytest.fixture(scope="module")
def counted() -> Counted:
    return Counted(tiny_model())


def test_what_the_rejected_calls_are_variations_of_is_accepted(counted: Counted) -> None:
    before = counted.forwards
    counted.activation()
    # The source run, the target run, and one for all cells.
    assert counted.forwards == before + 3
    counted.ablation()


# Names ------------------------------------------------------------------------------------------


@cases(
    ("metric", "parts"),
    [
        ("logit_diff", ["'logit_diff'", "answer_probability", "kl_divergence", "logit_difference"]),
        ("", ["''", "logit_difference"]),
        (["logit_difference", "kl"], ["'kl'", "kl_divergence"]),
        ({"mine": "kl"}, ["'kl'", "kl_divergence"]),
    ],
)
@pytest.mark.parametrize("sweep", [Counted.activation, Counted.ablation])
def test_unknown_metric(
    counted: Counted, sweep: Callable[..., Any], metric: str | list[str], parts: list[str]
) -> None:
    with counted.rejects(UnknownNameError, *parts):
        sweep(counted, metric=metric)


@pytest.mark.parametrize("engine", ["fast", "", None, ["full"]])
@pytest.mark.parametrize("sweep", [Counted.activation, Counted.ablation])
def test_unknown_engine(counted: Counted, sweep: Callable[..., Any], engine: str | None) -> None:
    with counted.rejects(UnknownNameError, repr(engine), "full"):
        sweep(counted, engine=engine)


@pytest.mark.parametrize("method", ["median", "", None, ["zero"]])
def test_unknown_ablation_method(counted: Counted, method: str | None) -> None:
    with counted.rejects(UnknownNameError, repr(method), "zero, mean, resample"):
        counted.ablation(method=method)


@cases(
    ("options", "parts"),
    [
        ({"reference": SOURCE}, ["reference=", "'zero'"]),
        ({"per_position": True}, ["per_position=True", "'zero'"]),
        ({"method": "resample", "per_position": True}, ["per_position=True", "'resample'"]),
    ],
)
def test_ablation_option_that_means_nothing(
    counted: Counted, options: Any, parts: list[str]
) -> None:
    with counted.rejects(PatchingError, *parts):
        counted.ablation(**options)


@cases(
    ("options", "parts"),
    [
        ({"batch_size": 0}, ["batch_size", "at least 1", "0"]),
        ({"batch_size": -2}, ["batch_size", "at least 1", "-2"]),
        ({"batch_size": True}, ["batch_size", "True"]),
        ({"batch_size": 1.0}, ["batch_size", "1.0"]),
        ({"method": "resample", "reference": [SOURCE, SOURCE]}, ["one batch", "2"]),
        ({"method": "resample", "reference": SOURCE + 60}, ["reference", "72", "0 to 63"]),
        ({"method": "mean", "reference": SOURCE + 60}, ["reference", "72", "0 to 63"]),
        ({"method": "mean", "reference": SOURCE.float()}, ["reference", "float32"]),
        ({"method": "mean", "reference": []}, ["empty"]),
    ],
)
def test_ablation_options(counted: Counted, options: Any, parts: list[str]) -> None:
    with counted.rejects(TokensError, *parts):
        counted.ablation(**options)


def test_resample_needs_another_prompt(counted: Counted) -> None:
    with counted.rejects(TokensError, "resample", "one", "reference="):
        counted.ablation(
            tokens=SOURCE[:1],
            answer_index=SOURCE_ANSWERS[:1],
            other_answer_index=TARGET_ANSWERS[:1],
            method="resample",
        )


@pytest.mark.parametrize(
    "metric", ["logit_difference", {"mine": "logit_difference"}, logit_difference]
)
def test_ablation_by_two_answers_of_which_one_is_missing(
    counted: Counted, metric: str | Callable[..., Any] | dict[str, str]
) -> None:
    with counted.rejects(AnswerError, "'logit_difference'", "other_answer_index="):
        counted.ablation(other_answer_index=None, metric=metric)


# Tokens, answers, masks -------------------------------------------------------------------------


def _with(value: int) -> torch.Tensor:
    """`SOURCE` with another id in its last place."""
    tokens = SOURCE.clone()
    tokens[1, 3] = value
    return tokens


TOKENS = [
    (SOURCE.tolist(), ["tensor", "list"]),
    (SOURCE.numpy(), ["tensor", "ndarray"]),
    ("The capital of France is", ["tensor", "str"]),
    (None, ["tensor", "NoneType"]),
    (BatchEncoding({"input_ids": SOURCE.tolist()}), ["'input_ids'", "list", "tokenizer", "'pt'"]),
    ({"input_ids": None}, ["'input_ids'", "NoneType", "tokenizer", "'pt'"]),
    ({"ids": SOURCE}, ["no 'input_ids'", "['ids']"]),
    (BatchEncoding({"input_ids": SOURCE.float()}), ["int64", "float32"]),
    (SOURCE.float(), ["int64", "float32"]),
    (SOURCE.bool(), ["int64", "bool"]),
    (SOURCE.to(torch.int16), ["int64", "int16"]),
    (SOURCE[0], ["[batch, seq]", "[4]"]),
    (SOURCE[None], ["[batch, seq]", "[1, 2, 4]"]),
    (torch.tensor(5), ["[batch, seq]", "[]"]),
    (SOURCE[:0], ["empty", "[0, 4]"]),
    (SOURCE[:, :0], ["empty", "[2, 0]"]),
    (_with(64), ["64", "0 to 63"]),
    (_with(10**9), ["1000000000", "0 to 63"]),
    (_with(-1), ["-1", "0 to 63"]),
]


@cases(("tokens", "parts"), TOKENS)
def test_tokens(counted: Counted, tokens: Any, parts: list[str]) -> None:
    for name in ("source_tokens", "target_tokens"):
        with counted.rejects(TokensError, name, *parts):
            counted.activation(**{name: tokens})
    with counted.rejects(TokensError, "tokens", *parts):
        counted.ablation(tokens=tokens)


@cases(
    ("target", "parts"),
    [
        (TARGET[:1], ["[2, 4]", "[1, 4]", "the same"]),
        (TARGET[:, 1:], ["[2, 4]", "[2, 3]", "pad"]),
        (TARGET.int(), ["int64", "int32", "the same"]),
    ],
)
def test_tokens_that_do_not_pair_up(
    counted: Counted, target: torch.Tensor, parts: list[str]
) -> None:
    with counted.rejects(TokensError, "source_tokens", "target_tokens", *parts):
        counted.activation(target_tokens=target)


@cases(
    ("answers", "parts"),
    [
        ([21, 22], ["tensor", "list"]),
        (21, ["tensor", "int"]),
        (None, ["tensor", "NoneType"]),
        (np.array([21, 22]), ["tensor", "ndarray"]),
        (torch.tensor([21.0, 22.0]), ["int64", "float32"]),
        (torch.tensor([True, False]), ["int64", "bool"]),
        (torch.tensor(21), ["[2]", "[]"]),
        (torch.tensor([21]), ["[2]", "[1]"]),
        (torch.tensor([21, 22, 23]), ["[2]", "[3]"]),
        (torch.tensor([[21], [22]]), ["[2]", "[2, 1]"]),
        (torch.tensor([21, 64]), ["64", "0 to 63"]),
        (torch.tensor([-1, 22]), ["-1", "0 to 63"]),
    ],
)
def test_answers(
    counted: Counted, answers: int | torch.Tensor | list[int] | None, parts: list[str]
) -> None:
    for name in ("source_answer_index", "target_answer_index"):
        with counted.rejects(AnswerError, name, *parts):
            counted.activation(**{name: answers})
    with counted.rejects(AnswerError, "answer_index", *parts):
        counted.ablation(answer_index=answers)
    if answers is not None:
        with counted.rejects(AnswerError, "other_answer_index", *parts):
            counted.ablation(other_answer_index=answers)


def _mask(row: int, column: int | slice, value: float, like: torch.Tensor = ONES) -> torch.Tensor:
    mask = like.clone()
    mask[row, column] = value
    return mask


MASKS = [
    (ONES.tolist(), ["tensor", "list"]),
    (ONES.numpy(), ["tensor", "ndarray"]),
    (ONES[:1], ["[2, 4]", "[1, 4]"]),
    (ONES[:, 1:], ["[2, 4]", "[2, 3]"]),
    (ONES[0], ["[2, 4]", "[4]"]),
    (ONES[:, None, None], ["[2, 4]", "[2, 1, 1, 4]"]),
    (_mask(0, 0, 2), ["0 and 1", "2"]),
    (_mask(1, 2, -1), ["0 and 1", "-1"]),
    (_mask(0, 1, 0.5, ONES.float()), ["0 and 1", "0.5"]),
    (_mask(0, 1, torch.nan, ONES.float()), ["0 and 1", "nan"]),
    (_mask(0, 1, -torch.inf, ONES.float()), ["0 and 1", "-inf"]),
    (_mask(1, slice(None), 0), ["row 1", "at least one 1"]),
    (torch.zeros_like(ONES), ["row 0", "at least one 1"]),
]


@cases(("mask", "parts"), MASKS)
def test_masks(counted: Counted, mask: Any, parts: list[str]) -> None:
    for run in ("source", "target"):
        with counted.rejects(MaskError, f"{run}_tokens", *parts):
            counted.activation(**{f"{run}_attention_mask": mask})
    for sweep, name in ((counted.activation, "source_tokens"), (counted.ablation, "tokens")):
        with counted.rejects(MaskError, name, *parts):
            sweep(attention_mask=mask)


@pytest.mark.parametrize("run", ["source", "target"])
def test_two_masks_for_one_run(counted: Counted, run: str) -> None:
    with counted.rejects(MaskError, "attention_mask=", f"{run}_attention_mask=", "one of them"):
        counted.activation(**{"attention_mask": ONES, f"{run}_attention_mask": ONES})


@pytest.mark.parametrize("mask", [ONES.bool(), ONES.float(), ONES.int(), ONES.to(torch.uint8)])
def test_masks_of_every_dtype_are_taken(counted: Counted, mask: torch.Tensor) -> None:
    expected = counted.activation()["resid"]
    torch.testing.assert_close(counted.activation(attention_mask=mask)["resid"], expected)


# Padding without a mask -------------------------------------------------------------------------


PADDED = {
    "left": [[0, 0, 7, 8], [9, 10, 11, 12]],
    "left by one": [[0, 6, 7, 8], [9, 10, 11, 12]],
    "right": [[5, 6, 7, 0], [9, 10, 11, 12]],
    "all rows": [[0, 0, 7, 8], [0, 0, 11, 12]],
}


@pytest.mark.parametrize("rows", PADDED.values(), ids=PADDED)
def test_padding_without_a_mask_is_a_warning(counted: Counted, rows: list[list[int]]) -> None:
    tokens = torch.tensor(rows)
    with pytest.warns(PaddingWarning, match=r"source_tokens.*token 0.*attention_mask=") as caught:
        counted.activation(source_tokens=tokens)
    # It points at the line that called nnpatch, and the other run is fine.
    assert [warning.filename for warning in caught] == [refusals.__file__]
    with pytest.warns(PaddingWarning, match=r"target_tokens.*token 0.*attention_mask="):
        counted.activation(target_tokens=tokens)
    with pytest.warns(PaddingWarning, match=r"tokens.*token 0.*attention_mask=") as caught:
        counted.ablation(tokens=tokens)
    assert [warning.filename for warning in caught] == [refusals.__file__]


def test_padding_of_a_data_set_without_a_mask_is_a_warning(counted: Counted) -> None:
    tokens = torch.tensor(PADDED["left"])
    with pytest.warns(PaddingWarning, match=r"token 0.*mask") as caught:
        cache_average(counted.model, [site("mlp", 0)], tokens)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(PaddingWarning, match=r"reference.*token 0.*mask") as caught:
        counted.ablation(method="mean", reference=tokens)
    assert [warning.filename for warning in caught] == [refusals.__file__]


def test_padding_with_a_mask_is_no_warning(counted: Counted) -> None:
    tokens = torch.tensor(PADDED["left"])
    counted.activation(source_tokens=tokens, source_attention_mask=(tokens != 0).long())


def test_the_padding_token_inside_a_prompt_is_no_warning(counted: Counted) -> None:
    counted.activation(source_tokens=_mask(0, 1, 0, SOURCE))


def test_a_bos_token_that_pads_as_well_is_no_warning(counted: Counted) -> None:
    bos = torch.zeros(2, 1, dtype=torch.int64)
    source, target = (torch.cat([bos, tokens], 1) for tokens in (SOURCE, TARGET))
    counted.activation(source_tokens=source, target_tokens=target)


def test_without_a_padding_token_nothing_looks_padded() -> None:
    unpadded = Counted(tiny_model(pad_token_id=None))
    unpadded.activation(source_tokens=torch.tensor(PADDED["left"]))


# Models and adapters ----------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["Llama", None, 5, tiny_tokenizer(["a"])], ids=repr)
def test_no_model(model: Any) -> None:
    with raises(AdapterError, type(model).__name__, "Hugging Face model"):
        activation_patching(
            model, None, last(), SOURCE, TARGET, SOURCE_ANSWERS, TARGET_ANSWERS, progress=False
        )


def test_model_without_adapter() -> None:
    martian = Counted(tiny_model())
    martian.model.config.model_type = "martian"
    says = "'martian'.* was inferred .*infer_adapter.model. once .* api="
    for call in (martian.activation, martian.ablation):
        with pytest.warns(AdapterWarning, match=says):
            assert call().info["adapter"] == "Martian"


def test_model_without_adapter_because_no_plugin_is_loaded(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NNPATCH_PLUGINS", "")
    with pytest.warns(AdapterWarning, match="'llama'.*nnpatch-llama has one.*NNPATCH_PLUGINS=''"):
        assert counted.activation().info["adapter"] == "Llama"


def test_model_without_config() -> None:
    with raises(AdapterError, "config.model_type", "Linear", "name an adapter"):
        last().grids(torch.nn.Linear(1, 1), None, 4)


class _WithArguments(DecoderAPI):
    """An adapter's class that cannot be made without arguments."""


@cases(
    ("api", "error", "parts"),
    [
        (
            "Llama4",
            UnknownNameError,
            ["'Llama4'", "Gemma, Gemma2, Gemma3, Gemma3Vision, Llama3, Mistral"],
        ),
        (5, AdapterError, ["5", "n_heads"]),
        (object(), AdapterError, ["object", "model_types", "components"]),
        (dict, AdapterError, ["dict", "components"]),
        (_WithArguments, AdapterError, ["_WithArguments", "arguments"]),
    ],
)
def test_no_adapter(
    counted: Counted, api: int | object | str, error: type[Exception], parts: list[str]
) -> None:
    with counted.rejects(error, *parts):
        counted.activation(api=api)
    with raises(error, *parts):
        Site.get_site(api, "resid", 0)


def _misfit(**changed: Any) -> DecoderAPI:
    return DecoderAPI(
        **{
            "name": "Misfit",
            "model_types": ("llama",),
            "components": decoder_components(),
            **changed,
        }
    )


@cases(
    ("api", "parts"),
    [
        (_misfit(layers="transformer.h"), ["list of layers", "'transformer.h'"]),
        (_misfit(layers="model.norm"), ["list of layers", "'model.norm'"]),
        (_misfit(layers="model"), ["list of layers", "'model'"]),
        (_misfit(layers=""), ["list of layers", "''"]),
        (
            _misfit(components=decoder_components(attn="attention")),
            ["'attn'", "'attention'", "layer 0", "self_attn, mlp, input_layernorm"],
        ),
        (
            _misfit(components={**decoder_components(), "q": Component("self_attn.query")}),
            ["'q'", "'self_attn.query'", "layer 0", "self_attn, mlp"],
        ),
        # Three heads do not divide a width of 32.
        (_misfit(query_heads="num_hidden_layers"), ["'q'", "32", "3 heads"]),
        (_misfit(key_value_heads="num_hidden_layers"), ["'k'", "16", "3 heads"]),
        (_misfit(query_heads="n_head"), ["config.n_head", "'llama'"]),
    ],
)
@pytest.mark.parametrize("sweep", [Counted.activation, Counted.ablation])
def test_adapter_that_does_not_fit(
    counted: Counted, sweep: Callable[..., Any], api: DecoderAPI, parts: list[str]
) -> None:
    with counted.rejects(AdapterError, "'Misfit'", *parts):
        sweep(counted, last, api)
    with counted.rejects(AdapterError, "'Misfit'", *parts):
        sweep(counted, lambda: Sites.from_sites([Site.get_site(api, "resid", 0)]))


def test_adapter_that_does_not_fit_every_layer() -> None:
    model = tiny_model()
    del model.model.layers[2].mlp
    with raises(AdapterError, "'Llama3'", "LlamaForCausalLM", "'mlp'", "layer 2"):
        Counted(model).activation()


@cases(
    ("columns", "parts"),
    [
        (lambda width, heads: torch.arange(width), ["[4 heads, dim]", "[32]"]),
        (lambda width, heads: torch.arange(width).view(2, -1), ["[4 heads, dim]", "[2, 16]"]),
        (lambda width, heads: torch.arange(1, width + 1).view(4, -1), ["32 wide", "[1, 2, 3"]),
        (lambda width, heads: torch.arange(-1, width - 1).view(4, -1), ["32 wide", "[-1, 0, 1"]),
        (lambda width, heads: torch.zeros(4, 2, dtype=torch.int64), ["twice", "[0, 0]"]),
        (lambda width, heads: torch.zeros(4, 0, dtype=torch.int64), ["[4 heads, dim]", "[4, 0]"]),
        (lambda width, heads: torch.rand(4, 8), ["32 wide"]),
        (lambda width, heads: torch.arange(width).view(5, -1), ["does not split", "4 heads"]),
        (Fused("q"), ["does not split", "4 heads"]),
        (Interleaved("q"), ["does not split", "4 heads"]),
        (PartOfHead(0, 3), ["does not split", "4 heads"]),
    ],
)
def test_adapter_whose_columns_of_the_heads_are_none(
    counted: Counted, columns: Interleaved | Callable[..., Any], parts: list[str]
) -> None:
    """A head that is read and written at the wrong columns would be another's."""
    row = Component("self_attn.q_proj", heads="query", columns=columns)
    model_api = _misfit(components={**decoder_components(), "q": row}, key_value_heads=1)
    with counted.rejects(AdapterError, "'Misfit'", "'q'", *parts):
        counted.activation(lambda: Sites("q"), model_api)


@pytest.mark.parametrize("padded", ["source", "target", "both"])
def test_padding_where_the_adapter_says_that_masked_tokens_are_seen(
    counted: Counted, padded: str
) -> None:
    api, mask = _misfit(padding=False), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    name = "attention_mask" if padded == "both" else f"{padded}_attention_mask"
    with counted.rejects(MaskError, "'Misfit'", "masked", "[1]", "one length"):
        counted.activation(api=api, **{name: mask})
    with counted.rejects(MaskError, "'Misfit'", "[1]"):
        counted.ablation(api=api, attention_mask=mask)
    with counted.rejects(MaskError, "'Misfit'", "[1]"):
        counted.ablation(api=api, method="mean", reference=[SOURCE, (SOURCE, mask)])
    counted.activation(api=api)


def test_heads_that_do_not_divide_what_a_module_of_unknown_width_gives(counted: Counted) -> None:
    table = {"mlp": Component("mlp", heads="query")}
    api = _misfit(components=table, query_heads="num_hidden_layers")
    with counted.rejects(AdapterError, "'Misfit'", "3 heads", "32", forwards=3):
        counted.activation(lambda: Sites("mlp"), api)


def test_model_types_are_several() -> None:
    # A single string would be taken for its letters, and never match a model.
    with pytest.raises((AdapterError, TypeError), match="llama"):
        _misfit(model_types="llama")


# Metrics ----------------------------------------------------------------------------------------


def _first(logits: Tensor) -> Tensor:
    return logits[:, 0]


@cases(
    ("metric", "parts"),
    [
        ([], ["empty"]),
        ({}, ["empty"]),
        (None, ["None"]),
        (5, ["5", "callable"]),
        ([5], ["5", "callable"]),
        ({"mine": 5}, ["5", "callable"]),
        ({7.5: _first}, ["7.5", "name"]),
        (["kl_divergence", "kl_divergence"], ["'kl_divergence'", "dict"]),
        ([_first, _first], ["'_first'", "dict"]),
    ],
)
@pytest.mark.parametrize("sweep", [Counted.activation, Counted.ablation])
def test_metrics_that_are_none(
    counted: Counted,
    sweep: Callable[..., Any],
    metric: dict[str, int] | dict[Any, Any] | list[Any] | None,
    parts: list[str],
) -> None:
    with counted.rejects(MetricError, *parts):
        sweep(counted, metric=metric)


@pytest.mark.parametrize(
    ("metric", "got"),
    [
        (lambda logits: logits, "(2, 64)"),
        (lambda logits: logits.sum(), "()"),
        (lambda logits: logits[:, :1], "(2, 1)"),
        (lambda logits: 3.0, "float"),
        (lambda logits: [0.0, 1.0], "list"),
        (lambda logits: logits[:, 0].numpy(), "ndarray"),
        (lambda logits: None, "NoneType"),
    ],
)
@pytest.mark.parametrize("sweep", [Counted.activation, Counted.ablation])
def test_metric_of_the_wrong_output(
    counted: Counted, sweep: Callable[..., Any], metric: Callable[..., Any], got: str
) -> None:
    # What a metric gives is known only by running it, on the two unpatched runs.
    with counted.rejects(MetricError, "'mine'", "[2]", got, forwards=2):
        sweep(counted, metric={"mine": metric})


def test_denominator_zero(counted: Counted) -> None:
    with counted.rejects(MetricError, "'logit_difference'", "divide by 0", forwards=2):
        counted.activation(target_tokens=SOURCE)


def test_denominator_zero_of_a_second_metric(counted: Counted) -> None:
    with counted.rejects(MetricError, "'constant'", " 2 ", "divide by 0", forwards=2):
        counted.activation(
            metric={"good": "logit_difference", "constant": lambda logits: 0 * logits[:, 0] + 2}
        )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_metric_that_is_not_finite(counted: Counted, value: float) -> None:
    def mine(logits: Tensor) -> Tensor:
        return torch.full_like(logits[:, 0], value)

    with counted.rejects(MetricError, "'mine'", str(value), "source run", forwards=2):
        counted.activation(metric=mine)
    with counted.rejects(MetricError, "'mine'", str(value), "unablated run", forwards=1):
        counted.ablation(metric=mine)


def test_model_with_nan_weights() -> None:
    broken = Counted(tiny_model())
    with torch.no_grad():
        broken.model.model.layers[1].mlp.up_proj.weight.fill_(torch.nan)
    with broken.rejects(MetricError, "'logit_difference'", "nan", "source run", forwards=2):
        broken.activation()
    with broken.rejects(MetricError, "'logit_difference'", "nan", "unablated run", forwards=1):
        broken.ablation()
    with broken.rejects(MetricError, "nan", "source run", forwards=2):
        broken.activation(force_model_confidence=True)


# Confidence -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def confident(counted: Counted) -> dict[str, torch.Tensor]:
    """The answers that the model itself would give to the two runs."""
    with torch.no_grad():
        source, target = (counted.model(run).logits[:, -1].argmax(-1) for run in (SOURCE, TARGET))
    assert (source != target).all()
    return {"source_answer_index": source, "target_answer_index": target}


def test_model_that_is_confident(counted: Counted, confident: dict[str, torch.Tensor]) -> None:
    counted.activation(force_model_confidence=True, **confident)


def _swap(confident: dict[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    source, target = (answers.clone() for answers in confident.values())
    source[rows], target[rows] = target[rows], source[rows]
    return {"source_answer_index": source, "target_answer_index": target}


@pytest.mark.parametrize(("rows", "named"), [([0], "0"), ([1], "1"), ([0, 1], "01")])
def test_model_that_is_not_confident(
    counted: Counted, confident: dict[str, torch.Tensor], rows: list[int], named: str
) -> None:
    answers = _swap(confident, torch.tensor(rows))
    prompts = [f"prompt {row}: " for row in named]
    with counted.rejects(
        ConfidenceError, f"{len(named)} of 2", *prompts, "above 0", "below 0", forwards=2
    ):
        counted.activation(force_model_confidence=True, **answers)
    with pytest.raises(ConfidenceError) as caught:
        counted.activation(force_model_confidence=True, **answers)
    assert str(caught.value).count("prompt ") == len(named)


def test_confidence_is_asked_of_the_target_run_too(
    counted: Counted, confident: dict[str, torch.Tensor]
) -> None:
    # Both runs are the source run, whose own answer is the right one of the source run alone.
    with counted.rejects(ConfidenceError, "2 of 2", "prompt 0", "target run", forwards=2):
        counted.activation(target_tokens=SOURCE, force_model_confidence=True, **confident)


def test_confidence_is_not_asked_for_by_default(
    counted: Counted, confident: dict[str, torch.Tensor]
) -> None:
    counted.activation(**_swap(confident, torch.tensor([0, 1])))


# Adapters of another family -----------------------------------------------------------------------


def test_adapter_of_another_family_warns(counted: Counted) -> None:
    """It fits by its names, and yet Gemma 2's blocks end in norms that Llama's do not have."""
    gemma = tiny_model("gemma2")
    arguments = (SOURCE, TARGET, torch.tensor([1, 2]), torch.tensor([3, 4]))
    with pytest.warns(AdapterWarning, match="'TinyLlama' is for model_type llama, mistral.*gemma2"):
        activation_patching(gemma, tiny_api(), Sites("resid"), *arguments, progress=False)
