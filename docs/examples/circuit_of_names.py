"""Which edges of SmolLM2-135M know who is given the drink? A circuit, found in one call.

"When Mary and John went to the store, John gave a drink to" goes on with " Mary", and with Mary in
John's place with " John" (Wang et al., "Interpretability in the Wild", 2022). The circuit is found
on 16 pairs, and tried on other names and in another sentence. Then every edge is measured for one
pair, to see which estimate tells them best.
"""

from __future__ import annotations

import random
from typing import Any

import circuits_found
import smollm2
import telling

from nnpatch_core import PromptPairs

#: Each of one token.
NAMES = (
    "Mary", "John", "Tom", "James", "Dan", "Emma", "Alice", "Sarah", "Anna", "Paul", "Mark", "Kate",
    "Lisa", "Jack", "Bob", "Peter", "Simon", "Laura", "Lucy", "David", "Jane", "Robert", "Henry",
    "Rose",
)  # fmt: skip
#: So many of them are in the pairs that the circuit is found on; the others are kept for the test.
FOUND_ON = 14
TEMPLATE = "When {A} and {B} went to the store, {S2} gave a drink to"
OTHER = "After {A} and {B} left the park, {S2} sent a letter to"
COUNT = 16
SEED = 0


def prompts(
    tokenizer: Any, *, held_out: bool = False, template: str = TEMPLATE, count: int = COUNT
) -> PromptPairs:
    """Pairs that differ in the name that is said again: B in the source, A in the target."""
    draw = random.Random(SEED)
    names = draw.sample(NAMES, len(NAMES))
    names = names[FOUND_ON:] if held_out else names[:FOUND_ON]
    chosen = draw.sample([(a, b) for a in names for b in names if a != b], count)
    return PromptPairs.from_texts(
        [template.format(A=a, B=b, S2=b) for a, b in chosen],
        [template.format(A=a, B=b, S2=a) for a, b in chosen],
        [f" {a}" for a, _ in chosen],
        [f" {b}" for _, b in chosen],
        tokenizer,
    )


def main() -> None:
    """Find the circuit, try it, draw it; measure all edges of the first pair."""
    folder = telling.folder(__doc__)
    model, tokenizer = smollm2.load()
    others = {
        "other names": prompts(tokenizer, held_out=True),
        "another sentence": prompts(tokenizer, held_out=True, template=OTHER),
    }
    pairs = prompts(tokenizer)
    circuits_found.tell(model, pairs, others, folder, "circuit-of-names")


if __name__ == "__main__":
    main()
