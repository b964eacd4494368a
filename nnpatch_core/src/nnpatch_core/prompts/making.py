"""Makes the tensors of prompt pairs from a table of prompts and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._arguments import check_flags
from nnpatch_core._printable import shown
from nnpatch_core.errors import PositionError, TokensError, UnknownNameError
from nnpatch_core.prompts.encoding import make_encoder
from nnpatch_core.prompts.names import IDS
from nnpatch_core.prompts.reading import Read, Reader, is_messages
from nnpatch_core.prompts.rows import COLUMNS, PROMPTS, Table, joined_places
from nnpatch_core.prompts.spans import LACKING, with_spans
from nnpatch_core.prompts.subsets import filled
from nnpatch_core.seq_pos import Span

_CHOICES = {
    "answers": ("auto", "ids", "texts"),
    "multi_token": ("raise", "first", "drop", "all"),
    "faulty": ("raise", "drop"),
}


def tokenised(
    table: Table,
    tokenizer: Any,
    *,
    chat: bool = False,
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    answers: str = "auto",
    space: bool = True,
    multi_token: str = "raise",
    faulty: str = "raise",
    spans: Any = None,
) -> dict[str, Any]:
    """The fields of a `PromptPairs`; arguments, errors and warnings are those of `from_texts`."""
    try:
        table = with_spans(table, spans)
    except PositionError as error:
        if table.kind == "pair":
            raise
        # The rows are looked at all the same, and all is told at once.
        table = attrs.evolve(table, faults=(*table.faults, error))
    check_flags(chat=chat, space=space)
    chosen = {"answers": answers, "multi_token": multi_token, "faulty": faulty}
    for name, value in chosen.items():
        if not isinstance(value, str) or value not in _CHOICES[name]:
            raise UnknownNameError(
                f"unknown {name} {shown(value)}; there are {', '.join(_CHOICES[name])}"
            )
    messages = {
        name: [row for row in table.rows if is_messages(row.values[at])]
        for at, name in enumerate(PROMPTS)
    }
    encoder = make_encoder(
        tokenizer,
        chat=chat,
        system=system,
        options=chat_template_kwargs,
        messages=any(messages.values()),
    )
    if system is not None and any(messages.values()):
        raise TokensError(
            "system= is for prompts that are texts; messages have a system message of their "
            f"own: put it into them ({joined_places(table, messages)})"
        )
    texts = frozenset(COLUMNS[2:] if answers == "texts" else ()) - table.ids
    ids = {
        name
        for name, own in zip(COLUMNS, table.names, strict=True)
        if answers == "ids" or str(own).endswith(IDS)
    }
    reader = Reader(
        encoder,
        ids=frozenset(ids - texts | table.ids),
        texts=texts,
        space=space,
        several=multi_token,
        drop=faulty == "drop" or multi_token == "drop",
    )
    kept, dropped = reader.read(table)
    prompts = [read.prompts[name].tokens for name in PROMPTS for read in kept]
    tokens, mask = padded(prompts, getattr(tokenizer, "pad_token_id", None) or 0)
    n = len(kept)
    first = {
        name: torch.tensor([read.answers[name][0].token for read in kept], device="cpu")
        for name in PROMPTS
    }
    sets: dict[str, Tensor] = {}
    if any(read.has_sets for read in kept):
        for name in PROMPTS:
            of = [[answer.token for answer in read.answers[name]] for read in kept]
            sets[name] = filled(of)
    whole: dict[str, Tensor] = {}
    if multi_token == "all":
        for name in PROMPTS:
            whole[name] = filled([read.answers[name][0].tokens for read in kept])
    return {
        "pairs": tuple(read.pair for read in kept),
        "dropped": tuple(dropped),
        "source_tokens": tokens[:n],
        "target_tokens": tokens[n:],
        "source_attention_mask": mask[:n],
        "target_attention_mask": mask[n:],
        "source_answer_index": first["source"],
        "target_answer_index": first["target"],
        "tokenizer": tokenizer,
        "spans": _spans(kept, tokens.shape[1]),
        "columns": {name: tuple(read.row.others[name] for read in kept) for name in table.others},
        "source_answer_sets": sets.get("source"),
        "target_answer_sets": sets.get("target"),
        "source_answer_tokens": whole.get("source"),
        "target_answer_tokens": whole.get("target"),
    }


def _spans(kept: Sequence[Read], width: int) -> dict[str, Span]:
    """The spans of all prompts, as tokens of the left-padded batch."""

    def ends(name: str, side: str) -> Tensor:
        rows = []
        for read in kept:
            padding = width - len(read.prompts[side].tokens)
            found = read.spans[side].get(name)
            start, stop = LACKING if found is None else found.ends
            rows.append([start, stop] if start < 0 else [start + padding, stop + padding])
        return torch.tensor(rows, device="cpu")

    names = dict.fromkeys(name for read in kept for name in read.row.spans)
    return {name: Span(*(ends(name, side) for side in PROMPTS)) for name in names}


def padded(prompts: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left: tokens and mask, `[prompts, seq]`."""
    width = max(map(len, prompts))
    tokens = [[filler] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(tokens, device="cpu"), torch.tensor(mask, device="cpu")
