"""Where does SmolLM2-135M keep who is given the drink? Spans, over templates of four lengths.

"When Mary and John went to the store, John gave a drink to" goes on with " Mary": the task of Wang
et al., "Interpretability in the Wild" (2022). In GPT-2 small the second mention of the subject, S2,
tells which name is the repeated one, and heads at the last token move the other one there. The
source and the target run differ in S2 alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import smollm2
import telling

from nnpatch_core import Outcome, PromptPairs, Sites, activation_patching

#: Each with its verb, and with what {place} is for one pair after the other.
TEMPLATES = {
    "When {A} and {B} went to the {place}, {S2} {verb} a drink to": (
        "gave",
        ("store", "grocery store"),
    ),
    "Then {A} and {B} had a long day at the {place}, and in the evening {S2} {verb} a letter to": (
        "sent",
        ("store",),
    ),
    "After {A} and {B} came back from the {place}, {S2} {verb} the ball to": (
        "threw",
        ("grocery store",),
    ),
}
NAMES = (("Mary", "John"), ("Tom", "Anna"), ("Peter", "Sarah"), ("Jack", "Emma"))
SPANS = ("S2", "verb", "last")


def prompts(tokenizer: Any) -> PromptPairs:
    """Four pairs of each template: S2 is one of the two names, and in the target the other."""
    templates, source, target, answers, others = [], [], [], [], []
    for template, (verb, places) in TEMPLATES.items():
        for number, (a, b) in enumerate(NAMES):
            fill = {"A": a, "B": b, "verb": verb, "place": places[number % len(places)]}
            # Either name may be the one that is said again.
            again, once = (b, a) if number < len(NAMES) // 2 else (a, b)
            templates.append(template)
            source.append({**fill, "S2": again})
            target.append({**fill, "S2": once})
            answers.append(f" {once}")
            others.append(f" {again}")
    return PromptPairs.from_template(templates, source, target, answers, others, tokenizer)


def by_span(model: Any, pairs: PromptPairs, layers: Sequence[int] | None = None) -> Outcome:
    """Patch the stream, the attention blocks and the MLPs at each span."""
    names = ["resid", "attn", "mlp"]
    sites = Sites(names, layers, seq_pos_type="spans", seq_pos=list(SPANS))
    return activation_patching(model, None, sites, pairs, force_model_confidence=True)


def by_head(model: Any, pairs: PromptPairs, layers: Sequence[int] | None = None) -> Outcome:
    """Patch what each head gives at the last token."""
    return activation_patching(model, None, Sites("o", layers, seq_pos_type="last"), pairs)


def main() -> None:
    """Load, sweep, print, draw."""
    folder = telling.folder(__doc__)
    model, tokenizer = smollm2.load()
    pairs = prompts(tokenizer)
    lengths = sorted(set(pairs.source_attention_mask.sum(1).tolist()))
    telling.say(f"{len(pairs)} pairs of {', '.join(map(str, lengths))} tokens")
    out, heads = by_span(model, pairs), by_head(model, pairs)
    telling.say(f"\nresid, by layer: {', '.join(SPANS)}")
    for layer, values in enumerate(out["resid"].tolist()):
        telling.row(str(layer), values)
    telling.say("\nresid at S2 and at the last token, by template")
    for template, group in out.by_group("template").items():
        telling.row(template.split()[0], group["resid"][[0, 18, 21, 24], 0].tolist())
        telling.row("last", group["resid"][[0, 18, 21, 24], -1].tolist())
    telling.say("\nStrongest")
    strongest = out.strongest(6, sites=["attn", "mlp"]) + heads.strongest(6)
    for cell in strongest:
        telling.say(str(cell))
    telling.draw(out, folder / "repeated-names.png")
    telling.draw(heads, folder / "repeated-names-heads.png")


if __name__ == "__main__":
    main()
