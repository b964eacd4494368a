"""The user's prompts, checked against the model and packed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._models import module_of, most_tokens, pad_id, vocab_size
from nnpatch_core._printable import shown
from nnpatch_core.adapters import Location
from nnpatch_core.batch import Batch, has_numbers, make_batch, unpack, where_of
from nnpatch_core.errors import MaskError, PositionError, TokensError
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.seq_pos import LAST, NONE, Span


def read_batch(
    nnmodel: Any,
    name: str,
    tokens: Any,
    mask: Any = None,
    remedy: str = "pass attention_mask=",
) -> Batch:
    """Tokens and mask of the argument `name`, left-padded; `remedy` is how to give a mask.

    A tokenizer's output has both.

    Raises:
        TokensError, MaskError: they are malformed, not of the model's vocabulary, or longer than
            its table of positions.
    """
    model = module_of(nnmodel)
    tokens, mask = unpack(name, tokens, mask)
    sizes = {"vocab_size": vocab_size(model), "pad_id": pad_id(nnmodel, model)}
    batch = make_batch(name, tokens, mask, remedy=remedy, **sizes)
    most, longest = most_tokens(model), int(batch.mask.sum(1).max())
    if most is not None and longest > most:
        raise TokensError(
            f"{name} has a prompt of {longest} tokens, and {type(model).__name__} has positions "
            f"for {most}: give shorter prompts"
        )
    return batch


@attrs.frozen(eq=False)
class Remembered:
    """A data set that several sweeps take a mean over, which is made once.

    Args:
        given: the data set, as the user passed it.
        means: of each activation, once it is known.
    """

    given: Any
    means: dict[Location, Tensor] = attrs.field(factory=dict, init=False)


def read_batches(nnmodel: Any, name: str, batches: Any) -> Iterable[Batch]:
    """The batches of a data set: checked at once if it is in memory, else one at a time.

    `batches` is one batch, or an iterable of them: tokens `[batch, seq]`, a tuple `(tokens, mask)`,
    or a mapping with `input_ids` and `attention_mask`. `name` is what errors call them.
    """

    def read(batch: Any) -> Batch:
        if isinstance(batch, tuple) and len(batch) == 2:
            return read_batch(nnmodel, name, *batch)
        whole = isinstance(batch, Mapping)
        remedy = "give its 'attention_mask', too" if whole else "give a batch as (tokens, mask)"
        return read_batch(nnmodel, name, batch, remedy=remedy)

    if isinstance(batches, PromptPairs):
        raise TokensError(
            f"{name} is a PromptPairs, which has two runs: pass the tokens and the mask of one, "
            "(pairs.source_tokens, pairs.source_attention_mask), or a list of such tuples"
        )
    if isinstance(batches, Tensor | tuple | Mapping):
        return [read(batches)]
    if isinstance(batches, Sequence):
        if not batches:
            raise TokensError(f"{name} is empty; give at least one batch")
        return [read(batch) for batch in batches]
    if not isinstance(batches, Iterable) or getattr(batches, "ndim", 1) == 0:
        raise TokensError(
            f"{name} must be tokens [batch, seq] or an iterable of batches, got {shown(batches)}"
        )
    return map(read, batches)


def one_mask(run: str, both: Tensor | None, own: Tensor | None) -> Tensor | None:
    """The mask of one run, given that of both runs or its own.

    Raises:
        MaskError: both were given.
    """
    if both is not None and own is not None:
        raise MaskError(
            f"attention_mask= and {run}_attention_mask= were both given; "
            "the first is for both runs, so give one of them"
        )
    return both if own is None else own


def read_spans(spans: Any, batch: int, seq_len: int) -> dict[str, Span]:
    """Parts of the prompts by name, as a `PromptPairs` has them, checked.

    Raises:
        PositionError: they are no spans of these prompts.
    """
    if spans is None:
        return {}
    if not isinstance(spans, Mapping):
        raise PositionError(f"spans must be a mapping from names to Span, got {shown(spans)}")
    for name, span in spans.items():
        if not isinstance(name, str) or not name or name == LAST:
            raise PositionError(
                f"a span is named by a text, and not {LAST!r}, which is each prompt's last token: "
                f"got {shown(name)}"
            )
        if not isinstance(span, Span):
            raise PositionError(f"span {name!r} must be a Span, got {shown(span)}")
        for side, ends in (("source", span.source), ("target", span.target)):
            if not isinstance(ends, Tensor) or ends.shape != (batch, 2):
                got = list(ends.shape) if isinstance(ends, Tensor) else type(ends).__name__
                raise PositionError(
                    f"span {name!r} must have the shape [batch, 2] = [{batch}, 2] in the {side} "
                    f"prompts, got {got}"
                )
            if not has_numbers(ends):
                raise PositionError(
                    f"span {name!r} cannot be read in the {side} prompts: {where_of(ends)}"
                )
            if ends.is_floating_point() or ends.is_complex() or ends.dtype == torch.bool:
                raise PositionError(
                    f"span {name!r} must be integers in the {side} prompts, got {ends.dtype}"
                )
            lacks = (ends == NONE).all(1)
            inside = (ends[:, 0] >= 0) & (ends[:, 0] < ends[:, 1]) & (ends[:, 1] <= seq_len)
            wrong = (~(lacks | inside)).nonzero().flatten().tolist()
            if wrong:
                raise PositionError(
                    f"span {name!r} is {ends[wrong[0]].tolist()} in {side} prompt {wrong[0]} of "
                    f"{seq_len} tokens; it must be the first token and the one behind the last"
                )
    # As positions are: whoever looks at them finds them on the CPU.
    return {
        name: Span(*(ends.to("cpu", torch.int64) for ends in (span.source, span.target)))
        for name, span in spans.items()
    }
