"""Does SmolLM2-135M decide on "Reykjavik" at once? Answers of one to four tokens, measured whole.

The capital of Iceland has four tokens. The metric is the log-probability of all of them, each after
those before it; beside it stands the logit difference, which sees the first token alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import smollm2
import telling

from nnpatch_core import Outcome, PromptPairs, Sites, activation_patching

#: By how many tokens both answers have: the source country and the target country.
PAIRS = {
    1: ((("France", "Paris"), ("Japan", "Tokyo")), (("Italy", "Rome"), ("Greece", "Athens"))),
    2: (
        (("Argentina", "Buenos Aires"), ("Latvia", "Riga")),
        (("Turkey", "Ankara"), ("Uruguay", "Montevideo")),
    ),
    3: (
        (("Vietnam", "Hanoi"), ("Croatia", "Zagreb")),
        (("Colombia", "Bogotá"), ("Nepal", "Kathmandu")),
    ),
    4: (
        (("Iceland", "Reykjavik"), ("Ethiopia", "Addis Ababa")),
        (("Cambodia", "Phnom Penh"), ("Iceland", "Reykjavik")),
    ),
}
WHOLE, FIRST = "sequence_log_probability_difference", "logit_difference"


def prompts(tokenizer: Any) -> PromptPairs:
    """Two pairs for each number of tokens."""
    rows = [(tokens, *pair) for tokens, pairs in PAIRS.items() for pair in pairs]
    return PromptPairs.from_template(
        "The capital of {country} is",
        [{"country": country} for _, (country, _), _ in rows],
        [{"country": country} for _, _, (country, _) in rows],
        [f" {capital}" for _, (_, capital), _ in rows],
        [f" {capital}" for _, _, (_, capital) in rows],
        tokenizer,
        multi_token="all",
        extra={"tokens": [tokens for tokens, *_ in rows]},
    )


def sweep(model: Any, pairs: PromptPairs, layers: Sequence[int] | None = None) -> Outcome:
    """Patch the stream, the attention blocks and the MLPs at the country and at the last token."""
    names = ["resid", "attn", "mlp"]
    sites = Sites(names, layers, seq_pos_type="spans", seq_pos=["country", "last"])
    return activation_patching(model, None, sites, pairs, metric=[WHOLE, FIRST])


def main() -> None:
    """Load, sweep, print, draw."""
    folder = telling.folder(__doc__)
    model, tokenizer = smollm2.load()
    pairs = prompts(tokenizer)
    out = sweep(model, pairs)
    telling.say(f"source {out.baseline.source.tolist()}\ntarget {out.baseline.target.tolist()}")
    groups = out.by_group("tokens")
    telling.say(
        f"\nresid at the last token, by layer: all; of {', '.join(map(str, groups))} tokens"
    )
    for layer, value in enumerate(out["resid"][:, -1].tolist()):
        own = [group["resid"][layer, -1].item() for group in groups.values()]
        telling.row(str(layer), [value, *own])
    telling.say("\nresid at the country, by layer")
    for layer, value in enumerate(out["resid"][:, 0].tolist()):
        own = [group["resid"][layer, 0].item() for group in groups.values()]
        telling.row(str(layer), [value, *own])
    first = out.for_metric(FIRST)["resid"]
    telling.say(f"\nby their first tokens, last layer: {first[-1].tolist()}")
    telling.draw(out, folder / "long-answers.png")


if __name__ == "__main__":
    main()
