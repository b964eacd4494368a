"""A second knob in SmolLM2-135M: the first or the second name?

"When Mary and John went to the store, John gave a drink to" goes on with " Mary", and with Mary in
John's place with " John" (Wang et al., "Interpretability in the Wild", 2022). Here the source
prompts call for the name that comes first, the target prompts for the second. In which layer does
one direction of the stream at the last token decide between them?
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import smollm2
import telling
from context_or_memory import answers, draw

from nnpatch_core import PromptPairs, Sites, activation_patching
from nnpatch_core.subspace import (
    SteeringCurve,
    SubspaceSweep,
    Trained,
    sweep_steering,
    sweep_subspaces,
)

NAMES = (
    "Mary", "John", "Tom", "Anna", "Peter", "Sarah", "Jack", "Emma", "Paul", "Alice", "Mark",
    "Lucy", "James", "Kate", "David", "Jane", "Robert", "Laura", "Henry", "Rose",
)  # fmt: skip
TEMPLATES = (
    "When {A} and {B} went to the {place}, {S2} gave a {object} to",
    "After {A} and {B} left the {place}, {S2} sent a {object} to",
)
PLACES = ("store", "park", "school", "office", "beach", "station")
OBJECTS = ("drink", "book", "letter", "ball", "ring")
#: Where one direction decides; see `main`.
LAYER = 22
CANDIDATES = 140
SEED = 0


def prompts(model: Any, tokenizer: Any, count: int = CANDIDATES) -> PromptPairs:
    """The pairs of which the model answers both prompts as they call for."""
    draws = random.Random(SEED)
    templates, source, target, first, second = [], [], [], [], []
    for _ in range(count):
        a, b = draws.sample(NAMES, 2)
        fill = {"A": a, "B": b, "place": draws.choice(PLACES), "object": draws.choice(OBJECTS)}
        templates.append(draws.choice(TEMPLATES))
        source.append({**fill, "S2": b})
        target.append({**fill, "S2": a})
        first.append(f" {a}")
        second.append(f" {b}")
    pairs = PromptPairs.from_template(templates, source, target, first, second, tokenizer)
    one = answers(model, pairs.source_tokens, pairs.source_attention_mask)
    other = answers(model, pairs.target_tokens, pairs.target_attention_mask)
    return pairs[(one == pairs.source_answer_index) & (other == pairs.target_answer_index)]


def learn(model: Any, pairs: PromptPairs, layers: Sequence[int], rank: int = 1) -> SubspaceSweep:
    """Learn a subspace in some layers, at the last token."""
    sites = Sites("resid", list(layers), seq_pos_type="last")
    return sweep_subspaces(model, None, sites, pairs, rank, epochs=10, held_out=0.3, seed=SEED)


def turn(model: Any, learned: Trained, values: Sequence[float]) -> SteeringCurve:
    """Set the coordinate of each prompt held out to one value after the other."""
    return sweep_steering(model, learned.subspace, values, learned.held_out_pairs)


def main() -> None:
    """Find the layer, learn, check, steer; print and draw."""
    folder = telling.folder(__doc__)
    model, tokenizer = smollm2.load()
    pairs = prompts(model, tokenizer)
    telling.say(f"{len(pairs)} of {CANDIDATES} pairs are answered both ways")
    sites = Sites("resid", seq_pos_type="spans", seq_pos=["S2", "last"])
    out = activation_patching(model, None, sites, pairs)
    telling.say("\nresid at S2 and at the last token, by layer")
    for layer, values in enumerate(out["resid"].tolist()):
        telling.row(str(layer), values)
    for rank in (1, 8):
        found = learn(model, pairs, (18, 20, 22, 24, 26), rank)
        telling.say(f"\nrank {rank}\n{found}")
        draw(found.plot(), folder / f"first-or-second-layers-{rank}.png")
        if rank == 1:
            learned = next(each for label, each in found.items() if f"L{LAYER} " in label)
            telling.say(f"\n{learned}\n")
            curve = turn(model, learned, [float(value) for value in range(-60, 61, 10)])
            telling.say(curve.to_dataframe().round(3).to_string())
            draw(curve.plot(), folder / "first-or-second-knob.png")


if __name__ == "__main__":
    main()
