"""Real models, from their PyPI packages; docs/examples has the code that loads them."""

from __future__ import annotations

import sys
from typing import Any

import attrs
from transformers import MistralConfig, MistralForCausalLM

from nnpatch_core import DecoderAPI
from nnpatch_gemma import Gemma3
from nnpatch_llama import Llama3
from nnpatch_mistral import Mistral
from tests.helpers.oracle import Oracle
from tests.helpers.paths import ROOT

sys.path.insert(0, str(ROOT / "docs" / "examples"))

import gemma3
import smollm2


@attrs.frozen(eq=False)
class Real:
    """A model with its tokenizer, and what is expected of it.

    Args:
        model: the plain Hugging Face model.
        tokenizer: its tokenizer.
        api: the adapter that `api=None` must find.
        layers: the layers to patch: the first, the last and some between.
        oracle: plain hooks on a copy that nnsight has never seen.
    """

    model: Any
    tokenizer: Any
    api: DecoderAPI
    layers: list[int]
    oracle: Oracle


def smollm2_135m() -> Real:
    model, tokenizer = smollm2.load()
    return Real(model, tokenizer, Llama3, [0, 15, 29], Oracle(model, "llama"))


def gemma3_270m() -> Real:
    model, tokenizer = gemma3.load()
    # Layers 5, 11 and 17 attend to everything, the others to a window.
    return Real(model, tokenizer, Gemma3, [0, 5, 16, 17], Oracle(model, "gemma3_text"))


def as_mistral(known: Real) -> Real:
    """A Llama's weights in another class: without a window, Mistral computes what Llama does."""
    settings = {**known.model.config.to_dict(), "model_type": "mistral", "sliding_window": None}
    model = MistralForCausalLM(MistralConfig.from_dict(settings))
    model.load_state_dict(known.model.state_dict())
    return attrs.evolve(known, model=model.eval(), api=Mistral)
