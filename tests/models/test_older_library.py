"""Scripts as the older library's page has them, on SmolLM2: its names, arguments and forms."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from nnsight import NNsight

from nnpatch import Site, Sites, activation_patching, attribution_patching
from nnpatch.api.llama import Llama3
from tests.helpers.oracle import Place
from tests.models.real import Real, smollm2_135m

#: Of float32, as in the tests of real models.
ATOL = 1e-4
START = "<|im_start|>assistant\n"
CAPITALS = {"France": "Paris", "Italy": "Rome"}
NAMES = ["resid", "attn", "mlp", "o", "k", "q", "v"]
LAYERS = [1, 2, 3, 4]


@pytest.fixture(scope="module")
def known() -> Real:
    return smollm2_135m()


@pytest.fixture(scope="module")
def script(known: Real) -> dict[str, Any]:
    """What the first lines of a script make: the model and the data, target tokens as they come."""
    tokenizer, device = known.tokenizer, "cpu"
    tokenizer.padding_side = "left"
    nnmodel = NNsight(known.model)

    def asked(country: str) -> str:
        content = f"One word answers! What is the capital of {country}?"
        turn = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(turn, tokenize=False) + START

    data = pd.DataFrame(
        {
            "source_prompts": [asked(country) for country in CAPITALS],
            "source_answers": [*CAPITALS.values()],
            "target_prompts": [asked(country) for country in reversed(CAPITALS)],
            "target_answers": [*reversed(CAPITALS.values())],
        }
    )
    source_answer_index, target_answer_index = (
        torch.tensor([tokenizer.encode(a, add_special_tokens=False)[0] for a in answers]).to(device)
        for answers in (data.source_answers, data.target_answers)
    )
    source = tokenizer(data.source_prompts.tolist(), return_tensors="pt", padding=True)
    target = tokenizer(data.target_prompts.tolist(), return_tensors="pt", padding=True).to(device)
    return {
        "nnmodel": nnmodel,
        "source_prompts": source["input_ids"].to(device),
        "attention_mask": source["attention_mask"].to(device),
        "target_prompts": target,
        "answers": (source_answer_index, target_answer_index),
    }


def differences(script: dict[str, Any], logits: torch.Tensor) -> torch.Tensor:
    """`[batch]`, of logits `[batch, vocab]`."""
    source, target = script["answers"]
    rows = torch.arange(len(logits))
    return logits[rows, source] - logits[rows, target]


def expected(known: Real, script: dict[str, Any], place: Place) -> torch.Tensor:
    """What plain hooks make of a cell, on the same scale."""
    oracle, target = known.oracle, script["target_prompts"]["input_ids"]
    runs = [tuple(each.tolist()) for each in script["source_prompts"]]
    others = [tuple(each.tolist()) for each in target]
    patched = [
        oracle.replaced(other, [place], oracle.of_prompt(run))
        for run, other in zip(runs, others, strict=True)
    ]
    means = [
        differences(script, torch.stack(logits)).double().mean()
        for logits in (patched, [*map(oracle.logits, runs)], [*map(oracle.logits, others)])
    ]
    return (means[0] - means[2]) / (means[1] - means[2])


def test_automated_patching(known: Real, script: dict[str, Any]) -> None:
    nnmodel, mask = script["nnmodel"], script["attention_mask"]
    tokens = script["source_prompts"], script["target_prompts"]
    assert mask.all()
    (place,) = set((tokens[0] != tokens[1]["input_ids"]).nonzero()[:, 1].tolist())
    country = mask.shape[1] - place
    # By position, all at once, the last one, the last ones, two at once; then each of two.
    for options in (
        {"seq_pos_type": "each"},
        {"seq_pos_type": None},
        {"seq_pos_type": "last"},
        {"seq_pos_type": "lastk", "seq_pos": 10},
        {"seq_pos_type": "custom_constant", "seq_pos": [-3, -country]},
    ):
        assert Sites(site_names=NAMES, layers=LAYERS, **options).layers == (1, 2, 3, 4)
    sites = Sites(site_names=NAMES, layers=LAYERS, seq_pos_type="custom", seq_pos=[-3, -country])
    out = activation_patching(
        nnmodel, Llama3, sites, *tokens, *script["answers"], attention_mask=mask
    )
    seq = mask.shape[1]
    assert out["resid"].shape == (30, seq)
    assert (out["q"].shape, out["k"].shape) == ((30, seq, 9), (30, seq, 3))
    for name in NAMES:
        swept = torch.zeros(out[name].shape, dtype=torch.bool)
        swept[1:5, [place, seq - 3]] = True
        assert not out[name][~swept].any()
        assert torch.isfinite(out[name]).all()
    for name, head in (("resid", None), ("attn", None), ("mlp", None), ("o", 4), ("k", 1)):
        at = (3, place) if head is None else (3, place, head)
        wanted = expected(known, script, Place(name, 3, head, (country,)))
        torch.testing.assert_close(out[name][at].double(), wanted, atol=ATOL, rtol=0)
    assert out["resid"][3, place] > 0.5
    estimate = attribution_patching(
        nnmodel, Llama3, sites, *tokens, *script["answers"], attention_mask=mask
    )
    assert estimate.agreement(out).cells > 0


def test_own_traces(known: Real, script: dict[str, Any]) -> None:
    nnmodel, attention_mask = script["nnmodel"], script["attention_mask"]
    source_prompts = script["source_prompts"]
    target_prompts = script["target_prompts"]["input_ids"]
    grid = Sites(site_names=NAMES, layers=LAYERS, seq_pos_type="each")
    found = grid.get_sites_dict(nnmodel, Llama3, source_prompts)
    assert {name: len(cells) for name, cells in found.items()} == {
        name: 4 * source_prompts.shape[1] * {"q": 9, "o": 9, "k": 3, "v": 3}.get(name, 1)
        for name in NAMES
    }
    sites = [Site.get_site(Llama3, site_name="q", layer=12, head=7, seq_pos=[-1])]

    with nnmodel.trace(source_prompts, attention_mask=attention_mask) as invoker:
        for site in sites:
            site.cache(nnmodel)

    with nnmodel.trace(target_prompts, attention_mask=attention_mask) as invoker:
        for site in sites:
            site.patch(nnmodel)
        patched = nnmodel.output.logits[:, -1].detach().save()

    with nnmodel.trace(target_prompts, attention_mask=attention_mask) as invoker:  # noqa: F841
        for site in sites:
            site.patch(nnmodel)
            site.patch(nnmodel, zero=True)
        zeroed = nnmodel.output.logits[:, -1].detach().save()

    oracle, place = known.oracle, Place("q", 12, 7, (1,))
    runs = [tuple(each.tolist()) for each in source_prompts]
    others = [tuple(each.tolist()) for each in target_prompts]
    for row, (run, other) in enumerate(zip(runs, others, strict=True)):
        for logits, donor in ((patched, oracle.of_prompt(run)), (zeroed, oracle.zeros)):
            hooked = oracle.replaced(other, [place], donor)
            torch.testing.assert_close(logits[row], hooked, atol=ATOL, rtol=0)
    assert (patched - zeroed).abs().max() > 1e-3
