"""A population of prompts of a real model, each swept exactly: what statistics are measured on.

SmolLM2-135M completes "When Mary and John went to the store, John gave a drink to" by the name that
was said once; the task is that of Wang et al., "Interpretability in the Wild" (2022). The source
and the target run differ in the second subject alone.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs" / "examples"))

import smollm2  # noqa: E402 - found by the line above

from nnpatch_core import Outcome, PromptPairs, Sites, activation_patching  # noqa: E402


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


SIZE = 1000
SEED = 14
BATCH = 20
SITES = ("resid", "attn", "mlp")
SPANS = ("S2", "verb", "object", "last")
TEMPLATES = (
    "When {A} and {B} went to the {place}, {S2} {verb} a {object} to",
    "Then {A} and {B} had a long day at the {place}, and {S2} {verb} the {object} to",
    "After {A} and {B} came back from the {place}, {S2} {verb} one {object} to",
)
NAMES = words(
    "Mary John Tom Anna Peter Sarah Jack Emma Paul Lucy Mark David Michael James Robert William "
    "Richard Thomas Charles Daniel Matthew Anthony Steven Andrew Joshua Kevin Brian George Edward "
    "Jason Ryan Jacob Gary Eric Jonathan Scott Frank Adam Henry Carl Arthur Roger Alan Bruce Billy "
    "Joe Philip Harry Bob Jim Ben Sam Max Leo Luke Simon Martin Linda Susan Karen Lisa Nancy Betty "
    "Sandra Emily Michelle Carol Amanda Laura Sharon Amy Angela Helen Nicole Samantha Katherine "
    "Rachel Maria Heather Diane Ruth Julie Olivia Victoria Kelly Joan Judith Alice Ann Jean "
    "Frances Grace Jane Sophia Rose Claire Kate Julia Martha Ellen Sophie Lily Eva Diana Clara "
    "Elizabeth Jennifer Jessica Margaret Rebecca"
)
PLACES = words(
    "store park school hospital restaurant office house station market garden library museum "
    "church beach farm bank hotel airport theater zoo gym mall river lake forest village city "
    "kitchen shop bar club court castle studio"
)
VERBS = words("gave sent handed passed offered brought lent threw showed")
OBJECTS = words(
    "drink ball letter book ring gift phone key map bag coat cake basket pen hat coin card photo "
    "computer watch camera necklace flower"
)


def prompts(tokenizer: Any, size: int = SIZE) -> PromptPairs:
    """Pairs drawn by a fixed seed, without any twice; the first ones are those of a smaller size.

    Raises:
        ValueError: a word is not one token, so that its span would have several.
    """
    for word in (*NAMES, *PLACES, *VERBS, *OBJECTS):
        if len(tokenizer.encode(f" {word}", add_special_tokens=False)) != 1:
            raise ValueError(f"{word!r} is not one token")
    chance = random.Random(SEED)
    drawn: dict[tuple[str, ...], None] = {}
    while len(drawn) < size:
        a, b = chance.sample(NAMES, 2)
        fillings = (PLACES, VERBS, OBJECTS)
        # Either name may be the one that is said again.
        again = chance.choice((a, b))
        drawn[chance.choice(TEMPLATES), a, b, *map(chance.choice, fillings), again] = None
    source, target, answers, others = [], [], [], []
    for _, a, b, place, verb, thing, again in drawn:
        once = a if again == b else b
        fill = {"A": a, "B": b, "place": place, "verb": verb, "object": thing}
        source.append({**fill, "S2": again})
        target.append({**fill, "S2": once})
        answers.append(f" {once}")
        others.append(f" {again}")
    templates = [template for template, *_ in drawn]
    return PromptPairs.from_template(templates, source, target, answers, others, tokenizer)


def sweep(size: int = SIZE, batch: int = BATCH) -> Outcome:
    """Measure every layer at each span, batch after batch of prompts."""
    model, tokenizer = smollm2.load()
    model.requires_grad_(False)
    pairs = prompts(tokenizer, size)
    sites = Sites(list(SITES), seq_pos_type="spans", seq_pos=list(SPANS))
    return activation_patching(
        model, "Llama3", sites, pairs.batches(batch), engine="cone", keep="prompts"
    )


def load(file: Path) -> Outcome:
    """The population as a file has it; made, and kept there, where there is none."""
    if not file.exists():
        sweep().save(file)
    return Outcome.load(file)


def main() -> None:
    """Sweep, and keep what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="where the outcome is kept")
    parser.add_argument("--size", type=int, default=SIZE, help="how many prompts")
    parser.add_argument("--batch", type=int, default=BATCH, help="how many run together")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out = sweep(arguments.size, arguments.batch)
    out.save(arguments.file)
    sys.stdout.write(f"{out}\n")


if __name__ == "__main__":
    main()
