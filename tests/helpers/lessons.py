"""Pairs of prompts for learning, as nnpatch takes them, on tiny models."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nnpatch_core import PromptPairs, Site
from nnpatch_core.subspace import Trained, train_subspace
from nnpatch_core.testing import tiny_api, tiny_tokenizer
from tests.helpers.learning_oracle import Pair, Prompt

#: What is quick.
QUICK: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 4,
    "lr": 0.05,
    "random_labels": False,
    "progress": False,
}


@functools.cache
def tokenizer() -> Any:
    """Its words are `w4` to `w63`, and their numbers the same."""
    return tiny_tokenizer(["".join(f" w{number}" for number in range(4, 64))])


def text(prompt: Sequence[int]) -> str:
    return "".join(f" w{token}" for token in prompt)


def random_pairs(lengths: Sequence[int], seed: int = 0, apart: int = 0) -> list[Pair]:
    """Pairs of random prompts; of each the source is longer by `apart`."""
    draw = random.Random(seed)

    def prompt(length: int) -> Prompt:
        return tuple(draw.randrange(4, 64) for _ in range(length))

    return [
        Pair(prompt(length + apart), prompt(length), *draw.sample(range(4, 64), 2))
        for length in lengths
    ]


def as_pairs(pairs: Sequence[Pair], spans: Mapping[str, Any] | None = None) -> PromptPairs:
    return PromptPairs.from_texts(
        [text(pair.source) for pair in pairs],
        [text(pair.target) for pair in pairs],
        [text((pair.answer,)) for pair in pairs],
        [text((pair.other,)) for pair in pairs],
        tokenizer(),
        spans=spans,
    )


def taught_pairs(lengths: Sequence[int], seed: int = 1) -> list[Pair]:
    """Pairs whose last tokens say what their answers are, so that there is something to learn."""
    draw = random.Random(seed)
    found = []
    for pair in random_pairs(lengths, seed):
        one, other = draw.sample(((10, 60), (20, 61), (30, 62)), 2)
        found.append(
            Pair((*pair.source[:-1], one[0]), (*pair.target[:-1], other[0]), one[1], other[1])
        )
    return found


@functools.cache
def some_pairs(count: int = 12, length: int = 5, seed: int = 1) -> PromptPairs:
    """Pairs of prompts of one length."""
    return as_pairs(taught_pairs([length] * count, seed))


def last(component: str = "resid", layer: int = 1, **more: Any) -> Site:
    return Site.get_site(tiny_api(), component, layer, seq_pos=[-1], **more)


def learned(model: Any, pairs: Any = None, site: Any = None, **options: Any) -> Trained:
    """A subspace, quickly."""
    known = {**QUICK, **options}
    return train_subspace(
        model, known.pop("api", None), site or last(), pairs or some_pairs(), **known
    )


def cosine(one: Tensor, other: Tensor) -> float:
    """|cos| of two vectors; of two bases, of the largest angle between what they span."""
    one, other = (each.double().reshape(len(each), -1) for each in (one, other))
    return float(torch.linalg.svdvals(torch.linalg.qr(one).Q.T @ torch.linalg.qr(other).Q).min())
