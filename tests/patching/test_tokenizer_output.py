"""A tokenizer's output stands for tokens and their mask, wherever tokens are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from nnpatch_core import (
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    plan_sweep,
)
from nnpatch_core.errors import MaskError, PaddingWarning, PromptWarning
from nnpatch_core.testing import tiny_model
from tests.helpers.refusals import raises

SOURCE = torch.tensor([[5, 6, 7, 8], [63, 10, 11, 12]])
TARGET = torch.tensor([[5, 16, 7, 8], [63, 20, 11, 12]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
OTHER = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
ANSWERS = {
    "source_answer_index": torch.tensor([21, 22]),
    "target_answer_index": torch.tensor([31, 32]),
}
SITES = Sites(["resid", "k"], seq_pos_type="each")
#: Two lengths are compared position by position, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")


def encoded(tokens: torch.Tensor, mask: torch.Tensor | None = MASK, kind: Any = dict) -> Any:
    return kind({"input_ids": tokens} | ({} if mask is None else {"attention_mask": mask}))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def numbers(out: Any) -> list[torch.Tensor]:
    return [out.patched(name) for name in out]


def of_two(call: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda model, **given: numbers(
        call(model, None, SITES, **{**ANSWERS, "progress": False, **options, **given})
    )


def ablated(model: Any, source_tokens: Any, target_tokens: Any, **masks: Any) -> Any:
    answers = ANSWERS.values()
    options = {"method": "resample", "reference": source_tokens, "progress": False}
    mask = masks.get("attention_mask", masks.get("target_attention_mask"))
    if masks and not hasattr(source_tokens, "keys"):
        options["reference"] = (source_tokens, mask)
    out = ablation_patching(
        model, None, SITES, target_tokens, *answers, attention_mask=mask, **options
    )
    return numbers(out)


def planned(model: Any, **given: Any) -> Any:
    plan = plan_sweep(model, None, SITES, **given)
    return [torch.tensor([plan.cells, plan.elided, plan.token_layers])]


ENTRIES = {
    "activation": of_two(activation_patching),
    "screen": of_two(activation_patching, screen="attribution", top_k=3),
    "attribution": of_two(attribution_patching),
    "ablation": ablated,
    "plan": planned,
}


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
@pytest.mark.parametrize("entry", ENTRIES)
def test_it_is_its_tokens_and_its_mask(model: Any, entry: str, kind: Any) -> None:
    call = ENTRIES[entry]
    source, target = (encoded(each, kind=kind) for each in (SOURCE, TARGET))
    expected = call(model, source_tokens=SOURCE, target_tokens=TARGET, attention_mask=MASK)
    ways = [
        {"source_tokens": source, "target_tokens": target},
        # Its mask once more, as a mask of both runs or of one, and of another type.
        {"source_tokens": source, "target_tokens": target, "attention_mask": MASK.bool()},
        {"source_tokens": SOURCE, "target_tokens": target, "attention_mask": MASK},
        {
            "source_tokens": encoded(SOURCE, None, kind),
            "target_tokens": target,
            "source_attention_mask": MASK,
            "target_attention_mask": MASK.int(),
        },
    ]
    for given in ways[: 2 if entry == "ablation" else None]:
        for found, wanted in zip(call(model, **given), expected, strict=True):
            assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))


@pytest.mark.parametrize("entry", ENTRIES)
def test_another_mask_is_refused(model: Any, entry: str) -> None:
    source, target = encoded(SOURCE), encoded(TARGET)
    with raises(MaskError, "mask of its own", "row 1", "leave that out"):
        ENTRIES[entry](model, source_tokens=source, target_tokens=target, attention_mask=OTHER)


@pytest.mark.parametrize(
    ("own", "given", "part"),
    [
        (MASK, MASK[:1], "[1, 4]"),
        (MASK, [[1]], "list"),
        (MASK[:1], MASK, "[1, 4]"),
        (MASK.tolist(), MASK, "list"),
        (MASK + 1, None, "only 0 and 1"),
        (MASK + 1, MASK + 1, "only 0 and 1"),
        (MASK.to("meta"), MASK, "meta"),
    ],
)
def test_a_malformed_mask_is_told_as_ever(model: Any, own: Any, given: Any, part: str) -> None:
    with raises(MaskError, "the attention mask of target_tokens", part):
        ENTRIES["activation"](
            model,
            source_tokens=SOURCE,
            source_attention_mask=MASK,
            target_tokens=encoded(TARGET, own),
            target_attention_mask=given,
        )


def test_without_a_mask_padding_is_told(model: Any) -> None:
    model.config.pad_token_id = 63
    with pytest.warns(PaddingWarning, match="target_tokens has rows that begin"):
        ENTRIES["activation"](
            model,
            source_tokens=encoded(SOURCE),
            target_tokens=encoded(TARGET, None),
        )


def test_sites_of_its_width(model: Any) -> None:
    found = SITES.get_sites_dict(model, None, encoded(SOURCE, kind=BatchEncoding))
    assert found == SITES.get_sites_dict(model, None, SOURCE)
    listed = Sites.from_sites(found["resid"])
    assert listed.get_sites_dict(model, None, encoded(SOURCE)) == {"resid": found["resid"]}


def test_prompts_of_two_lengths_are_seen(model: Any) -> None:
    with pytest.warns(PromptWarning, match="prompts have"):
        ENTRIES["activation"](model, source_tokens=encoded(SOURCE), target_tokens=encoded(TARGET))
