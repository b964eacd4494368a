"""The parts of an outcome: the cells that were swept, the unpatched runs, the prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import attrs
import torch
from torch import Tensor

from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.axes import are_axes
from nnpatch_core.results.formats import (
    COLUMNS,
    FLAGS,
    IDS,
    NUMBERS,
    PLACES,
    STRINGS,
    Array,
    Json,
    stored,
)
from nnpatch_core.sites import Axis, Grid

Scale: TypeAlias = Literal["restored", "change"]
_AXES = Json(
    are_axes,
    packed=lambda axes: [[axis.name, list(axis.labels)] for axis in axes],
    unpacked=lambda axes: tuple(Axis(name, tuple(labels)) for name, labels in axes),
)
#: A tensor of up to so many numbers is made of a few cells too; one GiB of float32.
_NUMBERS = 2**28
#: A larger one must be filled to this share.
_FILLED = 1 / 64


def check_size(shape: tuple[int, ...], values: int) -> None:
    """Raise `OutcomeError` for a tensor of which only a tiny part would be filled.

    Args:
        shape: of the tensor.
        values: how many numbers would be put into it.
    """
    if math.prod(shape) > max(_NUMBERS, values / _FILLED):
        raise OutcomeError(
            f"a tensor {list(shape)} for {values} numbers is too large to be made: read "
            "cells[name].index and raw[metric][name], which have the cells alone"
        )


@attrs.frozen(eq=False)
class Baseline:
    """A metric of the unpatched runs, `[batch]` each, in its unit.

    Args:
        source: of the run where activations were taken.
        target: of the run that was patched; an ablation's one run is both.

    Examples:
        >>> import torch
        >>> Baseline(source=torch.tensor([2.0]), target=torch.tensor([-1.0])).target
        tensor([-1.])
    """

    source: Tensor = attrs.field(metadata=stored(Array(NUMBERS, ("batch",))))
    target: Tensor = attrs.field(metadata=stored(Array(NUMBERS, ("batch",))))


@attrs.frozen(eq=False)
class Prompts:
    """The prompts as they were run: left-padded, `[batch, seq]`; an ablation's are both.

    Args:
        source_tokens, target_tokens: token ids, int64 or int32.
        source_mask, target_mask: 1 for a token, 0 for padding, int64.
        strings: the text of each token id that occurs, where a tokenizer was at hand.
        columns: further columns of the user's table, one value for each prompt.
        answers: `"source"` and `"target"`, each to the text of each prompt's answer, or its token
            id; several that count as one are joined by ` or `. What is not known is left out.

    Examples:
        >>> import torch
        >>> source, target = torch.tensor([[0, 5, 6]]), torch.tensor([[4, 5, 7]])
        >>> mask = torch.tensor([[0, 1, 1]])
        >>> texts = {5: "of", 6: " France", 7: " Japan"}
        >>> prompts = Prompts(source, mask, target, mask, texts)
        >>> prompts.text(0)
        ("'of France'", "'of Japan'")
        >>> [prompts.label(position) for position in range(3)]
        ['(padding)', 'of', ' France| Japan']
        >>> prompts.same()
        tensor([ True,  True, False])
    """

    source_tokens: Tensor = attrs.field(metadata=stored(Array(IDS, ("batch", "seq"))))
    source_mask: Tensor = attrs.field(metadata=stored(Array(PLACES, ("batch", "seq"))))
    target_tokens: Tensor = attrs.field(metadata=stored(Array(IDS, ("batch", "seq"))))
    target_mask: Tensor = attrs.field(metadata=stored(Array(PLACES, ("batch", "seq"))))
    strings: Mapping[int, str] = attrs.field(factory=dict, metadata=stored(STRINGS))
    columns: Mapping[str, tuple[Any, ...]] = attrs.field(factory=dict, metadata=stored(COLUMNS))
    answers: Mapping[str, tuple[Any, ...]] = attrs.field(factory=dict, metadata=stored(COLUMNS))

    def text(self, prompt: int) -> tuple[str, str]:
        """A prompt of the source run and of the target run; token ids where no text is known."""
        sides = ((self.source_tokens, self.source_mask), (self.target_tokens, self.target_mask))
        source, target = (tokens[prompt][mask[prompt].bool()].tolist() for tokens, mask in sides)
        return self._spelled(source), self._spelled(target)

    def same(self) -> Tensor:
        """`[seq]`, bool: where the two runs have had the same tokens so far, in all prompts."""
        # What is masked is not looked at.
        differ = self.source_tokens * self.source_mask != self.target_tokens * self.target_mask
        differ |= self.source_mask != self.target_mask
        return ~differ.any(0).cumsum(0).bool()

    def label(self, position: int, *, strip: bool = False) -> str:
        """The tokens that the prompts have at a position: two of them, and a sign of more.

        `strip` leaves out the spaces around each, for a picture.
        """
        found = [text.replace("\n", "\\n") for text in self._at(position)]
        texts = list(
            dict.fromkeys((text.strip() or repr(text)) if strip else text for text in found)
        )
        if not texts:
            return "(padding)"
        return "|".join(texts[:2]) + ("|…" if len(texts) > 2 else "")

    def texts(self, position: int) -> frozenset[str]:
        """The texts by which a position may be named: its labels, and the token of each prompt.

        Each also without the spaces around it.
        """
        labels = [self.label(position), self.label(position, strip=True)]
        tokens = self._at(position)
        written = [text.replace("\n", "\\n") for text in tokens]
        names = [*labels, *tokens, *written]
        return frozenset([*names, *(name.strip() for name in names if name.strip())])

    def _at(self, position: int) -> list[str]:
        """The text of each token that a prompt has at a position, each once."""
        sides = ((self.source_tokens, self.source_mask), (self.target_tokens, self.target_mask))
        return [
            self.strings.get(token, str(token))
            for tokens, mask in sides
            for token in dict.fromkeys(tokens[mask[:, position].bool(), position].tolist())
        ]

    def _spelled(self, tokens: list[int]) -> str:
        if not self.strings:
            return str(tokens)
        return repr("".join(self.strings[token] for token in tokens))


@attrs.frozen(eq=False)
class Cells:
    """The cells of one site name that were swept.

    Args:
        axes: the axes of the result.
        index: `[cells, axes]`, int64, the place of each swept cell: its index on the axes.
        present: `[cells, batch]`, bool: where a prompt has a token that the cell patches.
        elided: `[cells, batch]`, bool: where what would be put is, bitwise, what was there, so that
            the patched run is the unpatched one. A prompt without a token there counts.
        unread: `[cells, batch]`, bool: where nothing that the answer depends on reads what the cell
            patches, or what of it would change. A prompt without a token there does not count. Only
            estimates mark it.
        exact: `[cells]`, bool: the cells that were measured, or are known without; the others are
            estimates.

    Examples:
        >>> import torch
        >>> from nnpatch_core.sites import Axis
        >>> present = torch.ones(1, 2, dtype=torch.bool)
        >>> cells = Cells(
        ...     axes=(Axis("layer", (0, 1)), Axis("position", (0, 1, 2))),
        ...     index=torch.tensor([[1, 2]]),
        ...     present=present,
        ...     elided=~present,
        ...     unread=~present,
        ...     exact=torch.tensor([True]),
        ... )
        >>> cells.shape
        (2, 3)
        >>> cells.place(torch.tensor([0.5]), fill=0.0)
        tensor([[0.0000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.5000]])
    """

    axes: tuple[Axis, ...] = attrs.field(metadata=stored(_AXES))
    index: Tensor = attrs.field(metadata=stored(Array(PLACES, ("cells", "axes"))))
    present: Tensor = attrs.field(metadata=stored(Array(FLAGS, ("cells", "batch"))))
    elided: Tensor = attrs.field(metadata=stored(Array(FLAGS, ("cells", "batch"))))
    unread: Tensor = attrs.field(metadata=stored(Array(FLAGS, ("cells", "batch"))))
    exact: Tensor = attrs.field(metadata=stored(Array(FLAGS, ("cells",))))

    @classmethod
    def of(
        cls, grid: Grid, present: Tensor, elided: Tensor, unread: Tensor, exact: Tensor
    ) -> Cells:
        """The cells of a grid, with their masks in its order."""
        return cls(grid.axes, torch.from_numpy(grid.index), present, elided, unread, exact)

    @property
    def known(self) -> Tensor:
        """`[cells, batch]`, bool: where a patch is known to change no answer, without a run."""
        return self.elided | self.unread

    @property
    def shape(self) -> tuple[int, ...]:
        """The result's shape."""
        return tuple(len(axis.labels) for axis in self.axes)

    def only(self, rows: Tensor) -> Cells:
        """Some of the cells, by number or as bool, on the same axes."""
        parts = ("index", "present", "elided", "unread", "exact")
        return attrs.evolve(self, **{name: getattr(self, name)[rows] for name in parts})

    def place(self, values: Tensor, fill: float) -> Tensor:
        """`values` `[cells, ...]` as `[*shape, ...]`, with `fill` where nothing was swept.

        Raises:
            OutcomeError: that would be far larger than what there is to put into it.
        """
        check_size((*self.shape, *values.shape[1:]), values.numel())
        grid = torch.full((*self.shape, *values.shape[1:]), fill, dtype=values.dtype, device="cpu")
        grid[tuple(self.index.T)] = values
        return grid
