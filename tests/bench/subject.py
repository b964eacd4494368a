"""What every contestant is given: the model, and the prompts."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jobs import SMOLLM2, Job, Shape
from torch import Tensor

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


@dataclass(frozen=True, eq=False)
class Subject:
    """A model on its device, ready to run.

    Args:
        model: a Hugging Face causal language model.
        name: what it was loaded from, for those who want it.
    """

    model: Any
    name: str

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.model.device

    @property
    def shape(self) -> Shape:
        """Its layers and heads."""
        config = self.model.config
        return Shape(
            config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
        )

    @property
    def layers(self) -> Any:
        """Its decoder layers."""
        return self.model.model.layers


@dataclass(frozen=True, eq=False)
class Prompts:
    """Pairs of prompts, `[prompts, length]`, and the tokens whose logits are compared."""

    source: Tensor
    target: Tensor
    source_answer: Tensor
    target_answer: Tensor

    def metric(self, logits: Tensor) -> Tensor:
        """The logit difference of `[prompts, vocab]`, in float32."""
        rows = torch.arange(len(logits), device=logits.device)
        difference = logits[rows, self.source_answer].float() - logits[rows, self.target_answer]
        return difference.float()


def load(name: str, device: str, dtype: str) -> Subject:
    """SmolLM2-135M-Instruct, or a folder of a model with Llama's modules.

    A folder with a configuration alone gives random weights, always the same: enough for time.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if name == SMOLLM2:
        sys.path.insert(0, str(EXAMPLES))
        import smollm2

        model, folder = smollm2.load()[0], str(smollm2.default_cache())
    elif any(Path(name).glob("*.safetensors")):
        model, folder = AutoModelForCausalLM.from_pretrained(name, local_files_only=True), name
    else:
        torch.manual_seed(0)
        # Made where they will lie, and in their type: of a large model twice of them has no room.
        with torch.device(device):
            config = AutoConfig.from_pretrained(name)
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        folder = name
    model = model.to(device=device, dtype=getattr(torch, dtype)).eval()
    return Subject(model, folder)


def prompts(job: Job, subject: Subject, seed: int) -> Prompts:
    """Random tokens, the first quarter of which comes again at the end.

    What followed it the first time is where source and target differ, and what a language model
    expects to follow again: so the two runs give different answers, and patches move them.
    """
    draw = random.Random(f"{seed} {job.length}")
    # The first hundred are special tokens and bytes in many vocabularies.
    vocabulary = range(100, subject.model.config.vocab_size)
    place = job.divergence
    source = [draw.sample(vocabulary, job.length) for _ in range(job.prompts)]
    target = [list(row) for row in source]
    for row in target:
        row[place] = draw.choice(vocabulary)
    for row in (*source, *target):
        row[-place:] = row[:place]
    answers = ([row[place] for row in rows] for rows in (source, target))
    return Prompts(
        *(torch.tensor(numbers, device=subject.device) for numbers in (source, target, *answers))
    )
