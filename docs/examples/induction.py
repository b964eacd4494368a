"""Which heads of SmolLM2-135M repeat what it has read? A metric over the second half of a prompt.

Of random tokens that are said twice, the second time can only be known by looking at the first:
the task of Olsson et al., "In-context Learning and Induction Heads" (2022). Each head is ablated at
all tokens, by its mean, and the loss of the second half is measured, and that of each token in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import smollm2
import telling
import torch
from torch import Tensor

from nnpatch_core import (
    MetricContext,
    Outcome,
    Sites,
    ablation_patching,
    per_prompt,
    reads_positions,
)
from nnpatch_core.metrics import Metric

#: How many sequences there are, and how many tokens are said twice in each.
SEQUENCES, HALF = 4, 16


def prompts(tokenizer: Any, seed: int = 0) -> Tensor:
    """`[SEQUENCES, 1 + 2 * HALF]`: a beginning of sequence, and random tokens twice."""
    random = torch.Generator().manual_seed(seed)
    half = torch.randint(1000, 20000, (SEQUENCES, HALF), generator=random)
    return torch.cat([torch.full((SEQUENCES, 1), tokenizer.bos_token_id), half, half], 1)


def log_probabilities(logits: Tensor, context: MetricContext) -> Tensor:
    """log p of the token that follows each position read, `[batch, positions]`."""
    assert context.tokens is not None
    assert context.positions is not None
    following = context.tokens.gather(1, context.positions + 1)
    return logits.log_softmax(-1).gather(-1, following[..., None])[..., 0]


@per_prompt
@reads_positions(range(-HALF, -1))
def second_half(logits: Tensor, context: MetricContext) -> Tensor:
    """The mean over the second half, but for its first token, which nobody can know."""
    return log_probabilities(logits, context).mean(1)


def of_token(number: int) -> Metric:
    """The same of one token of the second half, counted from 0."""

    @per_prompt
    @reads_positions([number - HALF - 1])
    def log_probability(logits: Tensor, context: MetricContext) -> Tensor:
        return log_probabilities(logits, context)[:, 0]

    return log_probability


def sweep(model: Any, tokens: Tensor, layers: Sequence[int] | None = None) -> Outcome:
    """Ablate each head at all tokens."""
    each = {f"token {number}": of_token(number) for number in range(HALF)}
    return ablation_patching(
        model,
        None,
        Sites("o", layers, seq_pos_type=None),
        tokens,
        tokens[:, -1],
        method="mean",
        metric={"second half": second_half, **each},
    )


def main() -> None:
    """Load, sweep, print, draw."""
    folder = telling.folder(__doc__)
    model, tokenizer = smollm2.load()
    out = sweep(model, prompts(tokenizer))
    telling.say(f"second half: {out.baseline.target.mean():.3f} nats a token")
    strongest = out.strongest(8)
    for cell in strongest:
        telling.say(str(cell))
    layer, head = strongest[0]["layer"], strongest[0]["head"]
    telling.say(f"\nlog p of each token, and without head {head} of layer {layer}")
    for number in range(HALF):
        token = out.for_metric(f"token {number}")
        before = token.baseline.target.mean().item()
        telling.row(str(number), [before, before + token["o"][layer, head].item()])
    telling.draw(out, folder / "induction.png")


if __name__ == "__main__":
    main()
