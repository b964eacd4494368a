"""Positions by name: spans of the prompts, one cell a name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import attrs
from torch import Tensor

from nnpatch_core._arguments import listed
from nnpatch_core._hints import did_you_mean
from nnpatch_core._printable import shown
from nnpatch_core._ranges import ranges
from nnpatch_core.errors import PositionError, UnknownNameError
from nnpatch_core.seq_pos.positions import Group, PromptGroups
from nnpatch_core.seq_pos.prompts import PromptBatch
from nnpatch_core.seq_pos.strategies import PlacedCell

#: The name that stands for each prompt's last token.
LAST = "last"
_TOKENS = ("last", "first", "all")


def _names(value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else listed(value)
    if not names or not all(isinstance(name, str) for name in names):
        raise PositionError(f"seq_pos of 'spans' must be names of spans, got {shown(value)}")
    for name in names:
        if names.count(name) > 1:
            raise PositionError(f"seq_pos of 'spans' names {name!r} more than once")
    return names


def _is_token(_: Any, __: Any, token: Any) -> None:
    if not isinstance(token, str) or token not in _TOKENS:
        raise UnknownNameError(f"unknown token {shown(token)}; there are {', '.join(_TOKENS)}")


@attrs.frozen
class Spans:
    """Spans of the prompts, by name: each prompt is patched where its own span is.

    Values come from the span of the same name in the source prompt, wherever it stands there. So
    prompts of different lengths line up.

    Args:
        names: the spans, each one cell; `"last"` is each prompt's last token.
        token: which of a span's tokens: its `"last"`, its `"first"`, or `"all"` of them together,
            for which source and target must have as many.

    Examples:
        >>> import torch
        >>> from nnpatch_core.batch import pack_left
        >>> from nnpatch_core.seq_pos import PromptBatch, Span
        >>> batch = pack_left(torch.tensor([[7, 8, 9], [7, 9, 8]]), torch.ones(2, 3))
        >>> places = torch.tensor([[0, 1], [1, 2]])
        >>> prompts = PromptBatch(batch, batch, {"name": Span(places, places)})
        >>> [(cell.name, cell.positions) for cell in Spans(["name", "last"]).place(prompts)]
        [('name', ((0,), (1,))), ('last', ((2,), (2,)))]
    """

    names: tuple[str, ...] = attrs.field(converter=_names)
    token: Literal["last", "first", "all"] = attrs.field(default="last", validator=_is_token)
    one_by_one = True

    def place(self, prompts: PromptBatch) -> list[PlacedCell]:
        """A cell for each name.

        Raises:
            PositionError: no such span; a prompt that lacks it; with `token="all"`, a pair in which
                it has more tokens in one prompt than in the other.
        """
        return [self._cell(name, prompts) for name in self.names]

    def _cell(self, name: str, prompts: PromptBatch) -> PlacedCell:
        if name == LAST:
            last = ((prompts.seq_len - 1,),) * len(prompts)
            return PlacedCell(name, last)
        if name not in prompts.spans:
            raise PositionError(_unknown(name, prompts.spans))
        span = prompts.spans[name]
        target = self._groups(name, "target" if prompts.source else "", span.target)
        if prompts.source is None:
            return PlacedCell(name, target)
        source = self._groups(name, "source", span.source)
        uneven = [
            number
            for number, (one, other) in enumerate(zip(source, target, strict=True))
            if len(one) != len(other)
        ]
        if uneven:
            first = uneven[0]
            raise PositionError(
                f"span {name!r} has {len(source[first])} tokens in the source and "
                f"{len(target[first])} in the target of pair {first}; token='all' patches them "
                "together and needs as many: take token='last', or leave out "
                f"{_pairs('pair', uneven)}"
            )
        return PlacedCell(name, target, None if source == target else source)

    def _groups(self, name: str, side: str, span: Tensor) -> PromptGroups:
        ends = span.tolist()
        lacking = [number for number, (start, _) in enumerate(ends) if start < 0]
        if lacking:
            raise PositionError(
                f"span {name!r} is missing in the {side + ' ' if side else ''}prompt of "
                f"{_pairs('pair', lacking)}: leave them out, or name another span"
            )
        return tuple(self._of(start, stop) for start, stop in ends)

    def _of(self, start: int, stop: int) -> Group:
        if self.token == "all":
            return tuple(range(start, stop))
        return (start,) if self.token == "first" else (stop - 1,)


def _pairs(what: str, numbers: Sequence[int]) -> str:
    return f"{what}{'s' * (len(numbers) > 1)} {ranges(numbers, ' to ')}"


def _unknown(name: str, spans: Any) -> str:
    if not spans:
        return (
            f"no span {name!r}: these prompts have no spans. PromptPairs.from_template gives them, "
            "and spans= of the other constructors"
        )
    hint = did_you_mean(name, [*spans, LAST])
    return f"no span {name!r}{hint}; there are {', '.join(spans)}, and {LAST!r}"
