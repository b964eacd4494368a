"""Pairs of random prompts, for each variant of attention there is a tiny model of."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from nnpatch_core import DecoderAPI, Outcome, ablation_patching, activation_patching
from nnpatch_core.testing import tiny_model
from nnpatch_gemma import Gemma, Gemma2, Gemma3
from nnpatch_llama import Llama3
from nnpatch_mistral import Mistral
from tests.helpers.oracle import Oracle, Prompt, lay_out, random_prompts

LAYERS = 3
LAYOUTS = ("left", "right", "mixed")


class Variant(NamedTuple):
    """An adapter, and a tiny model for it with `key_value` heads."""

    api: DecoderAPI
    family: str
    key_value: int = 2
    config: tuple[tuple[str, Any], ...] = ()


#: The sliding windows are 3 tokens wide, fewer than most prompts have.
VARIANTS = {
    "llama": Variant(Llama3, "llama"),
    "llama, one key": Variant(Llama3, "llama", 1),
    "llama, a key each": Variant(Llama3, "llama", 4),
    "mistral": Variant(Mistral, "mistral"),
    "mistral, no window": Variant(Mistral, "mistral", 2, (("sliding_window", None),)),
    "mistral, one key": Variant(Mistral, "mistral", 1),
    "gemma": Variant(Gemma, "gemma", 1),
    "gemma2": Variant(Gemma2, "gemma2"),
    "gemma3": Variant(Gemma3, "gemma3_text"),
    "gemma3, one key": Variant(Gemma3, "gemma3_text", 1),
}


@functools.cache
def model_and_oracle(variant: str, seed: int = 0) -> tuple[Any, Oracle]:
    _, family, key_value, config = VARIANTS[variant]
    model = tiny_model(family, seed=seed, num_key_value_heads=key_value, **dict(config))
    return model, Oracle(model, family)


@attrs.frozen
class Pairs:
    """Source and target prompts of one variant, and how they stand in their batches."""

    variant: str
    source: list[Prompt]
    target: list[Prompt]
    layout: str = "left"
    spare: int = 0

    @property
    def model(self) -> Any:
        return model_and_oracle(self.variant)[0]

    @property
    def oracle(self) -> Oracle:
        return model_and_oracle(self.variant)[1]

    @property
    def api(self) -> DecoderAPI:
        return VARIANTS[self.variant].api

    @property
    def width(self) -> int:
        return max(map(len, self.source + self.target)) + self.spare

    @property
    def answers(self) -> tuple[Tensor, Tensor]:
        """Each prompt has its own, so that one measured as another is noticed."""
        numbers = torch.arange(len(self.source))
        return 7 + numbers, 50 - numbers

    def difference(self, logits: Tensor) -> Tensor:
        """The logit difference of each prompt, of logits `[batch, vocab]`."""
        numbers = torch.arange(len(self.source))
        return logits[numbers, self.answers[0]] - logits[numbers, self.answers[1]]

    def sweep(self, sites: Any, engine: str, model: Any = None, **options: Any) -> Outcome:
        source, source_mask = lay_out(self.source, self.layout, self.width, seed=3)
        target, target_mask = lay_out(self.target, self.layout, self.width, seed=4)
        return activation_patching(
            self.model if model is None else model,
            options.pop("api", self.api),
            sites,
            source,
            target,
            *self.answers,
            source_attention_mask=source_mask,
            target_attention_mask=target_mask,
            engine=engine,
            progress=False,
            **options,
        )

    def ablate(self, sites: Any, engine: str, model: Any = None, **options: Any) -> Outcome:
        tokens, mask = lay_out(self.target, self.layout, self.width, seed=4)
        return ablation_patching(
            self.model if model is None else model,
            self.api,
            sites,
            tokens,
            *self.answers,
            attention_mask=mask,
            engine=engine,
            progress=False,
            **options,
        )


def unlike(prompts: list[Prompt]) -> list[Prompt]:
    """Prompts as long, with another token everywhere."""
    return [tuple((token + 17) % 61 + 3 for token in prompt) for prompt in prompts]


def unlike_pairs(variant: str, *lengths: int) -> Pairs:
    source = random_prompts(lengths, seed=1)
    return Pairs(variant, source, unlike(source))
