"""How does SmolLM2-135M end a war after it began? Sets of answers, and a layout.

"The war lasted from the year 1732 to the year 17" may go on with any year after 32: the task of
Hanna et al., "How does GPT-2 compute greater-than?" (2023). This tokenizer has a token for each
digit, so that the next one is the tens digit: it has to be above 3, may be 3, and is wrong below.
In the target run the war began in 1701, so that any digit will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import smollm2
import telling

from nnpatch_core import Outcome, PromptPairs, Sites, activation_patching

EVENTS = ("war", "siege", "campaign", "project")
YEARS = ((17, 32), (16, 54), (17, 43), (18, 61))
COMPONENTS = ("resid", "attn", "mlp")


def prompts(tokenizer: Any) -> PromptPairs:
    """One pair for each event, from a table as EAP-IG has it."""
    text = "The {} lasted from the year {}{:02} to the year {}"
    rows = [
        {
            "clean": text.format(event, century, year, century),
            "corrupted": text.format(event, century, 1, century),
            "label": f"{year}",
            "event": event,
        }
        for event, (century, year) in zip(EVENTS, YEARS, strict=True)
    ]
    return PromptPairs.from_table(rows, tokenizer, layout="greater-than")


def sweep(model: Any, pairs: PromptPairs, layers: Sequence[int] | None = None) -> Outcome:
    """Patch the stream, the attention blocks and the MLPs at each token."""
    return activation_patching(
        model,
        None,
        Sites(list(COMPONENTS), layers, seq_pos_type="each"),
        pairs,
        metric="answer_set_difference",
    )


def main() -> None:
    """Load, sweep, print, draw."""
    folder = telling.folder(__doc__)
    model, tokenizer = smollm2.load()
    pairs = prompts(tokenizer)
    out = sweep(model, pairs)
    telling.say(f"source {out.baseline.source.tolist()}\ntarget {out.baseline.target.tolist()}")
    resid = out["resid"]
    tens, ones, last = (out.prompts.label(at, strip=True) for at in (9, 10, -1))
    telling.say(f"\nresid, by layer: {tens}, {ones}, {last}")
    for layer, values in enumerate(resid[:, [9, 10, -1]].tolist()):
        telling.row(str(layer), values)
    telling.say("\nStrongest blocks")
    for cell in out.strongest(12, sites=["attn", "mlp"]):
        telling.say(str(cell))
    telling.draw(out, folder / "greater-than.png")


if __name__ == "__main__":
    main()
