"""Circuits of many families, run, against plain hooks that share no code with nnpatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.circuit_cases import (
    DENSITIES,
    DONOR,
    LOGITS,
    NEAR,
    PAIRS,
    drawn,
    measured,
    subject,
)
from tests.helpers.edge_families import REFUSED
from tests.helpers.edge_oracle import WIRINGS
from tests.helpers.family_oracle import Prompt

#: What is outside, and the arguments that say so.
OUTSIDE: dict[str, dict[str, Any]] = {
    "target": {},
    "zero": {"ablation": "zero"},
    "mean": {"ablation": "mean"},
    "mean per position": {"ablation": "mean", "per_position": True},
    "another prompt": {"ablation": "resample", "reference": torch.tensor([DONOR])},
}


def outside(name: str, pairs: Sequence[Any], what: str) -> Any:
    """For each pair what the oracle takes as the value of what is outside."""
    oracle = subject(name)[2]
    targets = [target for _, target in pairs]

    def one(prompt: Prompt, sender: Any) -> Tensor:
        """`[seq, columns]`."""
        found = oracle.activation(prompt, *oracle._place(sender))
        return found[:, oracle._columns(sender)]

    def of(target: Prompt) -> Any:
        def value(sender: Any) -> Tensor:
            own = one(target, sender)
            if what == "mean":
                return torch.cat([one(each, sender) for each in targets]).mean(0)[None]
            if what == "another prompt":
                mixed = own.clone()
                mixed[-len(DONOR) :] = one(DONOR, sender)
                return mixed
            found: list[Tensor] = []
            for back in range(1, len(target) + 1):
                rows = [one(each, sender)[-back] for each in targets if len(each) >= back]
                found.insert(0, torch.stack(rows).mean(0))
            return torch.stack(found)

        return what if what in ("target", "zero") else value

    return [of(target) for target in targets]


def expected(
    name: str, circuits: Sequence[Sequence[str]], pairs: Sequence[Any], what: str = "target"
) -> Tensor:
    """The same, by the oracle: each prompt alone."""
    oracle = subject(name)[2]
    values = outside(name, pairs, what)
    rows = [
        torch.stack(
            [
                oracle.circuit(*pair, edges, value=value)[list(LOGITS)].float()
                for pair, value in zip(pairs, values, strict=True)
            ]
        )
        for edges in circuits
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("name", sorted(set(WIRINGS) - set(REFUSED)))
@pytest.mark.parametrize("padded", [False, True])
def test_circuits_equal_plain_hooks(name: str, padded: bool) -> None:
    """Several together, outside of which the target run is, or zeros."""
    pairs = PAIRS if padded else PAIRS[:1]
    circuits = drawn(subject(name)[2], DENSITIES)
    for what in ("target", "zero"):
        found = measured(name, circuits, pairs, **OUTSIDE[what])
        torch.testing.assert_close(found, expected(name, circuits, pairs, what), **NEAR, msg=what)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "gpt_neox", "granite", "llama", "mistral"])
@pytest.mark.parametrize("what", OUTSIDE)
def test_whatever_is_outside_and_however_it_is_cut(name: str, what: str) -> None:
    circuits = drawn(subject(name)[2], DENSITIES)
    wanted = expected(name, circuits, PAIRS, what)
    for cut in ({}, {"batch_size": 1}, {"memory_budget": "300 KiB"}):
        found = measured(name, circuits, PAIRS, **OUTSIDE[what], **cut)
        torch.testing.assert_close(found, wanted, **NEAR, msg=f"{cut}")
    for circuit, own in zip(circuits, wanted, strict=True):
        found = measured(name, [circuit], PAIRS, **OUTSIDE[what])
        torch.testing.assert_close(found[0], own, **NEAR)


@pytest.mark.parametrize("name", ["gemma2", "llama", "mixtral"])
def test_wherever_the_prompts_differ(name: str) -> None:
    """In the first token, in the last one alone, or in all; and where they are one prompt."""
    pairs = [
        ((5, 9, 4, 17), (2, 9, 4, 17)),
        ((5, 9, 4, 17), (5, 9, 4, 30)),
        ((5, 9, 4, 17), (2, 7, 30, 8)),
        ((5, 9, 4, 17), (5, 9, 4, 17)),
    ]
    circuits = drawn(subject(name)[2], DENSITIES)
    wanted = expected(name, circuits, pairs)
    for some in ([0, 3], [1], [1, 3], [2, 1], [0, 1, 2, 3]):
        found = measured(name, circuits, [pairs[number] for number in some])
        torch.testing.assert_close(found, wanted[:, some], **NEAR, msg=f"pairs {some}")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prompts_of_one_token(name: str) -> None:
    circuits = drawn(subject(name)[2], DENSITIES)
    pairs = [((5,), (9,)), ((3,), (7,))]
    for some in (pairs, pairs[:1]):
        found = measured(name, circuits, some)
        torch.testing.assert_close(found, expected(name, circuits, some), **NEAR)


def test_a_circuit_runs_on_the_target_prompts_when_they_are_swapped() -> None:
    circuits = drawn(subject("llama")[2], DENSITIES)
    swapped = [pair[::-1] for pair in PAIRS]
    found = measured("llama", circuits, PAIRS, swap=True)
    torch.testing.assert_close(found, expected("llama", circuits, swapped), **NEAR)
