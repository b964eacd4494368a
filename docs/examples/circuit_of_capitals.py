"""Which edges of SmolLM2-135M fetch a capital? A circuit, found in one call.

"The capital of France is" goes on with " Paris", "The capital of Japan is" with " Tokyo". The
circuit is found on 16 pairs, and tried on other countries and in another sentence. Then every edge
is measured for one pair, to see which estimate tells them best.
"""

from __future__ import annotations

import random
from typing import Any

import circuits_found
import smollm2
import telling

from nnpatch_core import PromptPairs

#: Countries and capitals, each of one token; the model knows them all, in both sentences.
CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Germany": "Berlin", "Greece": "Athens", "Italy": "Rome",
    "Spain": "Madrid", "Russia": "Moscow", "China": "Beijing", "Portugal": "Lisbon",
    "Austria": "Vienna", "Ireland": "Dublin", "Norway": "Oslo", "Denmark": "Copenhagen",
    "Cuba": "Havana", "Kenya": "Nairobi", "Canada": "Ottawa", "Chile": "Santiago",
    "England": "London", "Scotland": "Edinburgh",
}  # fmt: skip
#: So many of them are in the pairs that the circuit is found on; the others are kept for the test.
FOUND_ON = 11
TEMPLATE = "The capital of {} is"
OTHER = "In {}, the capital is"
COUNT = 16
SEED = 0


def prompts(
    tokenizer: Any, *, held_out: bool = False, template: str = TEMPLATE, count: int = COUNT
) -> PromptPairs:
    """Pairs of two countries."""
    draw = random.Random(SEED)
    countries = draw.sample([*CAPITALS], len(CAPITALS))
    countries = countries[FOUND_ON:] if held_out else countries[:FOUND_ON]
    chosen = draw.sample([(a, b) for a in countries for b in countries if a != b], count)
    return PromptPairs.from_texts(
        [template.format(one) for one, _ in chosen],
        [template.format(other) for _, other in chosen],
        [f" {CAPITALS[one]}" for one, _ in chosen],
        [f" {CAPITALS[other]}" for _, other in chosen],
        tokenizer,
    )


def main() -> None:
    """Find the circuit, try it, draw it; measure all edges of the first pair."""
    folder = telling.folder(__doc__)
    model, tokenizer = smollm2.load()
    others = {
        "other countries": prompts(tokenizer, held_out=True),
        "another sentence": prompts(tokenizer, held_out=True, template=OTHER),
    }
    pairs = prompts(tokenizer)
    circuits_found.tell(model, pairs, others, folder, "circuit-of-capitals")


if __name__ == "__main__":
    main()
