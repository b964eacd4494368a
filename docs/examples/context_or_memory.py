"""A knob in SmolLM2-135M: does it answer from the context, or from memory?

"In the novel, the capital of France is Athens. In the novel, the capital of France is" goes on with
" Athens", which the context says. "In reality" in place of the second "In the novel" goes on with
" Paris", which the model knows. "Controllable Context Sensitivity and the Knob Behind It" (arXiv
2411.07404) found one direction in one layer of larger models that decides between the two. Here it
is looked for, learned, checked and turned in a small one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import smollm2
import telling
import torch
from torch import Tensor

from nnpatch_core import Outcome, PromptPairs, Sites, activation_patching
from nnpatch_core.subspace import (
    SteeringCurve,
    SubspaceSweep,
    Trained,
    collect,
    steer,
    sweep_steering,
    sweep_subspaces,
)

#: Countries and capitals, each of one token.
CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Germany": "Berlin", "Greece": "Athens", "Italy": "Rome",
    "Spain": "Madrid", "Russia": "Moscow", "Egypt": "Cairo", "China": "Beijing", "India": "Delhi",
    "Portugal": "Lisbon", "Austria": "Vienna", "Ireland": "Dublin", "Norway": "Oslo",
    "Denmark": "Copenhagen", "Finland": "Helsinki", "Poland": "Warsaw", "Cuba": "Havana",
    "Peru": "Lima", "Kenya": "Nairobi", "Canada": "Ottawa", "Chile": "Santiago",
    "Belgium": "Brussels", "England": "London", "Scotland": "Edinburgh",
}  # fmt: skip
FICTIONS = ("novel", "film", "dream", "play")
#: The layer where both the subspace and the whole stream carry it; see `main`.
LAYER = 20
CANDIDATES = 500
SEED = 0


def candidates(count: int = CANDIDATES) -> list[tuple[str, str, str, str]]:
    """Source prompt, target prompt, and the answer that each calls for."""
    draw = random.Random(SEED)
    every = [
        (fiction, country, other)
        for fiction in FICTIONS
        for country in CAPITALS
        for other in CAPITALS
        if other != country
    ]
    rows = []
    for fiction, country, other in draw.sample(every, count):
        said = f"In the {fiction}, the capital of {country} is {CAPITALS[other]}."
        rows.append(
            (
                f"{said} In the {fiction}, the capital of {country} is",
                f"{said} In reality, the capital of {country} is",
                f" {CAPITALS[other]}",
                f" {CAPITALS[country]}",
            )
        )
    return rows


def prompts(model: Any, tokenizer: Any, count: int = CANDIDATES) -> PromptPairs:
    """The pairs of which the model answers both prompts as they call for."""
    pairs = PromptPairs.from_texts(*map(list, zip(*candidates(count), strict=True)), tokenizer)
    source = answers(model, pairs.source_tokens, pairs.source_attention_mask)
    target = answers(model, pairs.target_tokens, pairs.target_attention_mask)
    right = (source == pairs.source_answer_index) & (target == pairs.target_answer_index)
    return pairs[right]


@torch.no_grad()
def answers(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """The most likely next tokens, `[batch]`, of left-padded prompts `[batch, seq]`."""
    parts = []
    for some, own in zip(tokens.split(50), mask.split(50), strict=True):
        positions = (own.cumsum(-1) - 1).clamp(min=0)
        out = model(some, attention_mask=own, position_ids=positions, logits_to_keep=1)
        parts.append(out.logits[:, -1].argmax(-1))
    return torch.cat(parts)


def where(model: Any, pairs: PromptPairs) -> Outcome:
    """Patch the stream at the last token of every layer."""
    return activation_patching(model, None, Sites("resid", seq_pos_type="last"), pairs)


def learn(model: Any, pairs: PromptPairs, layers: Sequence[int], rank: int = 1) -> SubspaceSweep:
    """Learn a subspace in some layers, at the last token."""
    sites = Sites("resid", list(layers), seq_pos_type="last")
    return sweep_subspaces(model, None, sites, pairs, rank, epochs=10, held_out=0.3, seed=SEED)


def turn(model: Any, learned: Trained, values: Sequence[float]) -> SteeringCurve:
    """Set the coordinate of each prompt held out to one value after the other."""
    return sweep_steering(model, learned.subspace, values, learned.held_out_pairs)


def ends(model: Any, learned: Trained) -> tuple[float, float]:
    """The mean coordinate of the target prompts held out, and that of the source prompts."""
    rows = collect(model, learned.subspace, learned.held_out_pairs, progress=False)
    frame = rows.to_dataframe()
    means = frame.groupby("run")["c0"].mean()
    return float(means["target"]), float(means["source"])


def generated(model: Any, tokenizer: Any, learned: Trained, text: str, value: float) -> str:
    """What the model goes on with, once its knob is set."""
    given = tokenizer(text, return_tensors="pt")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    with steer(model, learned.subspace, value):
        (tokens,) = model.generate(**given, **options)
    return str(tokenizer.decode(tokens[given.input_ids.shape[1] :]))


def main() -> None:
    """Find the layer, learn, check, steer; print and draw."""
    folder = telling.folder(__doc__)
    model, tokenizer = smollm2.load()
    pairs = prompts(model, tokenizer)
    telling.say(f"{len(pairs)} of {CANDIDATES} pairs are answered both ways")
    out = where(model, pairs)
    telling.say("\nresid at the last token, by layer")
    for layer, value in enumerate(out["resid"].tolist()):
        telling.say(f"{layer:>14} {value:6.3f}")
    found = learn(model, pairs, range(8, 30, 2))
    telling.say(f"\n{found}\n")
    draw(found.plot(), folder / "context-or-memory-layers.png")
    learned = next(each for label, each in found.items() if f"L{LAYER} " in label)
    telling.say(f"\n{learned}\n")
    draw(learned.plot(), folder / "context-or-memory-learning.png")
    wide = learn(model, pairs, [LAYER], rank=8)
    telling.say(f"\n{next(iter(wide.values()))}\n")
    check(model, tokenizer, learned, folder)


def check(model: Any, tokenizer: Any, learned: Trained, folder: Path) -> None:
    """Coordinates, a curve, and text."""
    rows = collect(model, learned.subspace, learned.held_out_pairs)
    draw(rows.plot(by="run"), folder / "context-or-memory-coordinates.png")
    memory, context = ends(model, learned)
    telling.say(f"mean coordinate: {context:.1f} in source runs, {memory:.1f} in target runs")
    curve = turn(model, learned, [float(value) for value in range(-60, 61, 10)])
    telling.say(curve.to_dataframe().round(3).to_string())
    draw(curve.plot(), folder / "context-or-memory-knob.png")
    for pair in learned.held_out_pairs.pairs[:2]:
        for value in (memory, context):
            telling.say(f"{pair.source} -> {value:.1f}:")
            telling.say(generated(model, tokenizer, learned, str(pair.source), value))


def draw(figure: Any, path: Path) -> None:
    """Write a picture."""
    figure.savefig(path, dpi=80)
    telling.say(f"Picture: {path}")


if __name__ == "__main__":
    main()
