"""Prompts alone, without answers, off a table: a data set for means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nnpatch_core.errors import TokensError
from nnpatch_core.prompts.encoding import make_encoder
from nnpatch_core.prompts.files import raw_file
from nnpatch_core.prompts.making import padded
from nnpatch_core.prompts.names import ColumnsError, find_names
from nnpatch_core.prompts.reading import encoded_prompt, is_messages
from nnpatch_core.prompts.rows import COLUMNS, Fault, UnusableError, error_of_rows, place
from nnpatch_core.prompts.tables import prompts_of


def read_prompts(
    path: Any,
    tokenizer: Any,
    *,
    columns: Mapping[str, str] | None = None,
    chat: bool = False,
    system: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokenise the source prompts of a table's file; its other columns are not looked at.

    Args:
        path: as for `PromptPairs.from_table`.
        tokenizer: a Hugging Face tokenizer.
        columns: the user's names; that of `source` counts.
        chat: whether texts are put into the chat template.
        system: a system message before each text.

    Returns:
        Tokens and mask, `[prompts, seq]`, left-padded.

    Raises:
        PatchingError: one of its kinds, naming all faulty lines and columns.
    """
    raw = raw_file(path)
    chosen = {name: own for name, own in (columns or {}).items() if name == "source"}
    rows = prompts_of(raw)
    present = list(dict.fromkeys([*raw.columns, *(name for row in rows for name in row.cells)]))
    try:
        (name,) = find_names(chosen, present, COLUMNS[:1])
    except ColumnsError as error:
        raise TokensError(f"{raw.where}{error}{raw.note}") from None
    values = [row.cells.get(name) for row in rows]
    encoder = make_encoder(
        tokenizer, chat=chat, system=system, options=None, messages=any(map(is_messages, values))
    )
    prompts, faulty = [], []
    for row, value in zip(rows, values, strict=True):
        if row.faults:
            faulty.append(list(row.faults))
            continue
        try:
            prompts.append(encoded_prompt(encoder, value).tokens)
        except UnusableError as error:
            where = place(raw.kind, str(row.label), name)
            faulty.append([Fault(where, error.message, error.error, error.advice)])
    if faulty:
        raise error_of_rows(faulty, len(rows), raw.kind)
    if not prompts:
        raise TokensError(f"{path} has no prompts")
    return padded(prompts, getattr(tokenizer, "pad_token_id", None) or 0)
