"""What is no plain language model: looked through where its numbers stay, refused where not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight import NNsight, TransformersModel
from torch import nn
from transformers import LlamaForSequenceClassification, pipeline

from nnpatch_core import (
    DecoderAPI,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    cache_average,
    decoder_components,
    infer_adapter,
    plan_sweep,
)
from nnpatch_core.errors import AdapterError
from nnpatch_core.testing import tiny_model, tiny_tokenizer

SITES = Sites(["resid", "q"], seq_pos_type="last")
SOURCE, TARGET = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 16, 7, 8]])
ANSWERS = torch.tensor([20]), torch.tensor([30])
PROMPTS = (SITES, SOURCE, TARGET, *ANSWERS)
BARE = DecoderAPI("Bare", ("llama",), decoder_components(), layers="layers")

ENTRIES: dict[str, Callable[[Any, Any], Any]] = {
    "activation": lambda it, api: activation_patching(it, api, *PROMPTS, progress=False),
    "ablation": lambda it, api: ablation_patching(it, api, SITES, TARGET, *ANSWERS, progress=False),
    "attribution": lambda it, api: attribution_patching(it, api, *PROMPTS, progress=False),
    "means": lambda it, api: cache_average(it, [Site.get_site(api or "Llama3", "mlp", 1)], SOURCE),
}
PLANS: dict[str, Callable[[Any, Any], Any]] = {
    "plan": lambda it, api: plan_sweep(it, api, SITES, SOURCE, TARGET),
    "inference": lambda it, api: infer_adapter(it),
}


def refused(nnmodel: Any, match: str, api: Any = None, entries: Any = None) -> None:
    for run in ({**ENTRIES, **PLANS} if entries is None else entries).values():
        with pytest.raises(AdapterError, match=match):
            run(nnmodel, api)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (None, "NNsight.*got NoneType"),
        ("gpt2", "got str; load it first, by AutoModelForCausalLM.from_pretrained"),
        (nn.Linear, "got type$"),
        ({"model": 1}, "got dict$"),
    ],
)
def test_no_model(given: Any, match: str) -> None:
    refused(given, match)


def test_a_pipeline_has_a_model() -> None:
    found = pipeline(
        "text-generation", model=tiny_model("llama"), tokenizer=tiny_tokenizer(["a b"])
    )
    refused(found, "got TextGenerationPipeline; it has a model, so pass its .model")
    assert ENTRIES["activation"](found.model, None).info["engine"] == "cone"


@pytest.mark.parametrize("wrap", [lambda model: model, NNsight])
@pytest.mark.parametrize("api", [None, "Llama3"])
def test_data_parallel(wrap: Any, api: Any) -> None:
    model = nn.DataParallel(tiny_model("llama"))
    nnmodel = wrap(model)
    refused(nnmodel, "DataParallel .*pass the model inside, nnmodel.module", api)
    found = ENTRIES["activation"](nnmodel.module, api)
    assert found.info["engine"] == "cone"


@pytest.mark.parametrize("wrap", [lambda model: model, NNsight])
@pytest.mark.parametrize("api", [None, "Llama3"])
def test_a_compiled_model_is_run_as_it_is_written(wrap: Any, api: Any) -> None:
    """Its wrapper takes no keys and values by name, and compiles anew for each trace."""
    nnmodel = wrap(torch.compile(tiny_model("llama"), backend="eager"))
    for name, run in ENTRIES.items():
        found, expected = run(nnmodel, api), run(tiny_model("llama"), api)
        if name != "means":
            assert found.info["engine"] == expected.info["engine"] != "full"
            torch.testing.assert_close(found["q"], expected["q"], atol=1e-5, rtol=1e-5)
    assert infer_adapter(nnmodel).layers == "model.layers"


@pytest.mark.parametrize("wrap", [lambda model: model, NNsight])
def test_a_model_without_a_head_gives_no_logits(wrap: Any) -> None:
    """Its hidden states would be taken for logits: ids of answers fit both."""
    model = wrap(tiny_model("llama").model)
    refused(model, "LlamaModel gives hidden states, .*AutoModelForCausalLM", BARE, ENTRIES)


def test_a_classifier_gives_no_logits_of_tokens() -> None:
    model = LlamaForSequenceClassification(tiny_model("llama").config)
    refused(
        model,
        r"LlamaForSequenceClassification gives \[1, 2\], .*\[batch, seq, vocab\]",
        None,
        ENTRIES,
    )


def test_a_model_that_is_loaded_only_when_it_is_needed(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)

    def lazily(**options: Any) -> TransformersModel:
        tokenizer = tiny_tokenizer(["a b"])
        return TransformersModel(
            str(tmp_path), task="text-generation", tokenizer=tokenizer, **options
        )

    expected = ENTRIES["activation"](tiny_model("llama"), None)
    found = ENTRIES["activation"](lazily(), None)
    torch.testing.assert_close(found["q"], expected["q"], atol=1e-5, rtol=1e-5)
    assert infer_adapter(lazily()).layers == "model.layers"
    # What transformers' pipeline does not take, as it stands; loaded by itself it would do.
    nowhere = lazily(device_map={"model": "disk", "lm_head": "disk"}, offload_folder=tmp_path / "o")
    refused(nowhere, "cannot load its weights: .*pass that", None, {"a": ENTRIES["activation"]})


def test_a_module_that_is_no_language_model() -> None:
    refused(nn.Linear(3, 4), "'Llama3' does not fit Linear", "Llama3", {"a": ENTRIES["activation"]})
    refused(nn.Linear(3, 4), "model_type.*Linear", None, {"a": ENTRIES["activation"]})


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma3"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_the_embedding_and_one_that_is_not(family: str, tied: bool) -> None:
    text = {"tie_word_embeddings": tied}
    model = tiny_model(family, **text)
    found = {
        engine: activation_patching(model, None, *PROMPTS, engine=engine, progress=False)
        for engine in ("cone", "full")
    }
    same = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert same == tied
    for name in found["full"]:
        torch.testing.assert_close(
            found["cone"].patched(name),
            found["full"].patched(name),
            atol=1e-5,
            rtol=0,
            equal_nan=True,
        )
