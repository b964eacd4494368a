"""Metrics of every kind on prompts of several lengths, each beside the same in plain Python.

A metric here is computed from whole logits `[seq, vocab]` of each prompt, run alone and unpadded by
plain torch hooks on a copy of the model. It knows a token by its number from the prompt's end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nnpatch_core import (
    MetricContext,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    per_prompt,
    reads_positions,
    reads_tokens,
)
from nnpatch_core.metrics import answer_sets
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.oracle import Donor, Oracle, Place, Prompt

TARGETS: list[Prompt] = [(5, 9, 7, 8, 9, 4), (5, 6, 7, 3, 9, 14), (9, 8, 7, 16), (9, 4, 3, 12, 11)]
SOURCES: list[Prompt] = [(5, 6, 7, 8, 9, 24), (5, 6, 7, 8, 9, 4), (9, 8, 27, 6), (9, 4, 3, 12, 7)]
WIDTH, BATCH = 6, 4
ANSWERS = torch.tensor([1, 2, 3, 4]), torch.tensor([4, 5, 6, 7])
DATA = {
    "source_answers": torch.tensor([[7, 8, 9], [9, 10, -1], [11, -1, -1], [13, 14, 2]]),
    "target_answers": torch.tensor([[1, -1], [2, 3], [4, 5], [6, -1]]),
    "weight": torch.tensor([0.5, 1.0, -2.0, 3.0]),
    #: Each prompt's own two positions, counted from its end.
    "own": torch.tensor([[-1, -4], [-3, -2], [-4, -1], [-2, -5]]),
}
SITES = Sites(["q", "mlp", "resid"], layers=[1, 2], seq_pos_type="lastk", seq_pos=4)

#: The logits of each prompt, `[seq, vocab]`, and its tokens.
Rows: TypeAlias = Sequence[tuple[Tensor, Prompt]]


def laid(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Left-padded tokens and mask."""
    spare = [WIDTH - len(prompt) for prompt in prompts]
    tokens = torch.tensor([[0] * n + [*each] for n, each in zip(spare, prompts, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (WIDTH - n) for n in spare])
    return tokens, mask


# Metrics of a user's own -------------------------------------------------------------------------


def own_losses(logits: Tensor, context: MetricContext) -> Tensor:
    """-log p of the next token at each position declared, `[batch, positions]`."""
    assert context.tokens is not None
    assert context.positions is not None
    following = context.tokens.gather(1, context.positions + 1)
    return -logits.log_softmax(-1).gather(-1, following[..., None])[..., 0]


@per_prompt
@reads_positions(range(-4, -1))
def late_loss(logits: Tensor, context: MetricContext) -> Tensor:
    """The loss of the last three tokens, as in induction over a second half."""
    return own_losses(logits, context).mean(1)


@reads_positions([-3, -1])
def below_mean(logits: Tensor, context: MetricContext) -> Tensor:
    """By what the other prompts have."""
    own = (logits[:, 0, 3] - logits[:, 1, 5]).tanh()
    return own - 0.5 * own.mean() + 0.1 * own * own.max()


@per_prompt
@reads_positions(lambda context: context.data["own"])
@reads_tokens(lambda context: torch.tensor([[3, 30]]))
def at_own(logits: Tensor, context: MetricContext) -> Tensor:
    """Two tokens' logits at positions of each prompt's own."""
    return (logits[..., 3] - logits[..., 30]).sum(1) * context.data["weight"]


@reads_positions(lambda context: context.data["own"][:, :1])
@reads_tokens(lambda context: context.source_answer_index[:, None])
def ranked(logits: Tensor, context: MetricContext) -> Tensor:
    """One token's logit at a position of each prompt's own, by its rank in the batch."""
    own = logits[:, 0].gather(1, context.source_answer_index[:, None])[:, 0]
    return own * (1 + (own[:, None] > own).sum(1))


@per_prompt
@reads_positions([-2, -1])
def moved(logits: Tensor, context: MetricContext) -> Tensor:
    """How far the source run is away, at two positions."""
    return (logits - context.source_logits).square().mean((1, 2)) + logits[:, 0, 2]


@per_prompt
def weighted(logits: Tensor, context: MetricContext) -> Tensor:
    """One logit at the last token, by a number of each prompt's own."""
    return logits[:, 4] * context.data["weight"]


def plain_loss(logits: Tensor, prompt: Prompt, last: int | None = None) -> Tensor:
    """The mean of -log p over the last tokens of a prompt, or over all after its first."""
    log_probabilities = logits.double().log_softmax(-1)
    first = 1 if last is None else len(prompt) - last
    own = [log_probabilities[place - 1, prompt[place]] for place in range(first, len(prompt))]
    return -torch.stack(own).mean()


def plain_below_mean(own: Tensor) -> Tensor:
    return own - 0.5 * own.mean() + 0.1 * own * own.max()


def plain_moved(rows: Rows) -> Tensor:
    found = []
    for (logits, _), source in zip(rows, SOURCES, strict=True):
        gap = logits[-2:] - oracle().logits_at_each(source)[-2:]
        found.append(gap.square().mean() + logits[-2, 2])
    return torch.stack(found)


def plain_sets(rows: Rows, how: Callable[[Tensor], Tensor]) -> Tensor:
    found = []
    for row, (logits, _) in enumerate(rows):
        right, wrong = (
            [token for token in DATA[name][row].tolist() if token >= 0]
            for name in ("source_answers", "target_answers")
        )
        found.append(how(logits[-1][right]) - how(logits[-1][wrong]))
    return torch.stack(found)


def plain_at_own(rows: Rows) -> Tensor:
    return torch.stack(
        [
            sum((logits[at, 3] - logits[at, 30] for at in DATA["own"][row].tolist()), start=0.0)
            * float(DATA["weight"][row])
            for row, (logits, _) in enumerate(rows)
        ]
    )


def plain_ranked(rows: Rows) -> Tensor:
    own = torch.stack(
        [
            logits[int(DATA["own"][row, 0]), int(ANSWERS[0][row])]
            for row, (logits, _) in enumerate(rows)
        ]
    )
    return own * (1 + (own[:, None] > own).sum(1))


#: Name: the metric, and the same from `Rows`.
METRICS: dict[str, tuple[Any, Callable[[Rows], Tensor]]] = {
    "loss": ("loss", lambda rows: torch.stack([plain_loss(*each) for each in rows])),
    "late_loss": (late_loss, lambda rows: torch.stack([plain_loss(*each, 3) for each in rows])),
    "below_mean": (
        below_mean,
        lambda rows: plain_below_mean(
            torch.stack([(logits[-3, 3] - logits[-1, 5]).tanh() for logits, _ in rows])
        ),
    ),
    "at_own": (at_own, plain_at_own),
    "ranked": (ranked, plain_ranked),
    "moved": (moved, plain_moved),
    "weighted": (
        weighted,
        lambda rows: torch.stack([logits[-1, 4] for logits, _ in rows]) * DATA["weight"],
    ),
    "answer_set_difference": (
        "answer_set_difference",
        lambda rows: plain_sets(rows, lambda logits: logits.logsumexp(0)),
    ),
    "mean_of_sets": (answer_sets("mean"), lambda rows: plain_sets(rows, lambda each: each.mean())),
    "logit_difference": (
        "logit_difference",
        lambda rows: torch.stack(
            [
                logits[-1, one] - logits[-1, other]
                for (logits, _), one, other in zip(
                    rows, ANSWERS[0].tolist(), ANSWERS[1].tolist(), strict=True
                )
            ]
        ),
    ),
}
EVERY = {name: metric for name, (metric, _) in METRICS.items()}


# What must come out ------------------------------------------------------------------------------


@functools.cache
def oracle() -> Oracle:
    """The model by plain hooks, on a copy."""
    return Oracle(tiny_model("llama"), "llama")


def places_of(out: Any) -> Iterator[tuple[str, int, Place]]:
    """Each cell of an outcome: its name and number, and where it is."""
    for name, cells in out.cells.items():
        for number, index in enumerate(cells.index.tolist()):
            layer, position, *head = index
            yield name, number, Place(name, layer, *(head or [None]), (WIDTH - position,))


def donor_of(entry: str, row: int) -> Donor:
    """What is put into a prompt."""
    if entry == "zero":
        return oracle().zeros
    if entry == "mean":
        return oracle().mean(TARGETS)
    return oracle().of_prompt(SOURCES[row])


@functools.cache
def patched_rows(entry: str, place: Place) -> Rows:
    """The patched runs of one cell."""
    return [
        (oracle().replaced_at_each(prompt, [place], donor_of(entry, row)), prompt)
        for row, prompt in enumerate(TARGETS)
    ]


def unpatched_rows(prompts: Sequence[Prompt]) -> Rows:
    """The runs with nothing patched."""
    return [(oracle().logits_at_each(prompt), prompt) for prompt in prompts]


def run(entry: str, **options: Any) -> Any:
    """A sweep by one of the entry points."""
    options = {
        "sites": SITES,
        "metric": EVERY,
        "metric_data": DATA,
        "progress": False,
        **options,
    }
    model, sites = options.pop("model", None) or tiny_model("llama"), options.pop("sites")
    tokens, mask = laid(TARGETS)
    if entry in ("zero", "mean"):
        return ablation_patching(
            model, tiny_api(), sites, tokens, *ANSWERS, method=entry, attention_mask=mask, **options
        )
    if entry == "screened":
        options = {"screen": "attribution", "top_k": 1000, **options}
    if entry in ("attribution", "steps"):
        options |= {"steps": 3} if entry == "steps" else {}
        options.pop("engine", None)
    patch = activation_patching if entry in ("activation", "screened") else attribution_patching
    source, own = laid(SOURCES)
    return patch(
        model,
        tiny_api(),
        sites,
        source,
        tokens,
        *ANSWERS,
        source_attention_mask=own,
        target_attention_mask=mask,
        **options,
    )
