"""Strategies that place cells by the prompts: the laws, and who breaks them."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch

from nnpatch_core import Custom, CustomConstant, PlacedCell, PromptBatch, Sites, Span, Spans
from nnpatch_core.batch import pack_left
from nnpatch_core.conformance import CheckError
from nnpatch_core.errors import PositionError
from nnpatch_core.testing import check_seq_pos, tiny_api, tiny_model

TOKENS = torch.tensor([[4, 7, 5, 6], [9, 5, 7, 8]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])


def batch(source: bool = True, **spans: Span) -> PromptBatch:
    target = pack_left(TOKENS, MASK)
    return PromptBatch(target, pack_left(TOKENS.flip(0), MASK) if source else None, spans)


@attrs.frozen
class First:
    """Each prompt's first token."""

    one_by_one = True

    def place(self, prompts: PromptBatch) -> list[PlacedCell]:
        firsts = prompts.target.mask.argmax(1).tolist()
        return [PlacedCell("first", tuple((first,) for first in firsts))]


@attrs.frozen
class Gives:
    """Whatever it is made of."""

    cells: Any
    one_by_one: bool = True

    def place(self, prompts: PromptBatch) -> Any:
        return self.cells


def test_strategies_that_keep_the_laws() -> None:
    check_seq_pos(First())
    check_seq_pos(Custom([[1, -1], [0, 2]]), prompts=[batch(), batch(source=False)])
    check_seq_pos(CustomConstant([[-1], [0]], [[-2], [-1]]), prompts=[batch()])
    span = Span(torch.tensor([[1, 3], [0, 2]]), torch.tensor([[2, 4], [1, 3]]))
    check_seq_pos(Spans(["a", "last"], token="all"), prompts=[batch(a=span)])


def test_a_placed_strategy_sweeps() -> None:
    model, api = tiny_model("llama"), tiny_api()
    sites = Sites("mlp", layers=[1], seq_pos_type=First())
    found = sites.get_sites_dict(model, api, TOKENS)["mlp"]
    assert [site.seq_pos for site in found] == [((0,), (0,))]
    assert found[0].label == "mlp L1 'first'"
    with pytest.raises(PositionError, match="places its cells by the prompts: pass them"):
        sites.grids(model, api, 4)


BROKEN: dict[str, tuple[Any, str]] = {
    "nothing": (Gives([]), "at least one PlacedCell"),
    "other things": (Gives([(0,)]), "at least one PlacedCell"),
    "one name twice": (
        Gives([PlacedCell("a", ((1,), (1,))), PlacedCell("a", ((2,), (2,)))]),
        "a name of its own, got 'a'",
    ),
    "several cells": (
        Gives([PlacedCell("a", ((1,), (1,))), PlacedCell("b", ((2,), (2,)))], one_by_one=False),
        "2 cells that would share a place",
    ),
    "another number of prompts": (Gives([PlacedCell("a", ((1,),))]), "of 1 prompts, and .* 2"),
    "padding": (Gives([PlacedCell("a", ((0,), (0,)))]), "position 0 is padding in prompt 0, whose"),
    "outside": (Gives([PlacedCell("a", ((1,), (4,)))]), "position 4 for prompt 1 of 4 tokens"),
    "no number": (Gives([PlacedCell("a", ((1,), (1.5,)))]), "must be an integer"),
    "twice": (Gives([PlacedCell("a", ((1, 1), (1,)))]), r"positions \[1, 1\] for prompt 0"),
    "none": (Gives([PlacedCell("a", ((), (1,)))]), r"positions \[\] for prompt 0"),
    "fewer sources": (
        Gives([PlacedCell("a", ((1, 2), (1, 2)), ((1,), (1, 2)))]),
        "2 positions of prompt 0 and 1 of its source",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_law_is_told(case: str) -> None:
    strategy, match = BROKEN[case]
    with pytest.raises(CheckError, match=match):
        check_seq_pos(strategy, prompts=[batch()])


def test_sources_in_an_ablation_are_refused() -> None:
    given = Gives([PlacedCell("a", ((1,), (1,)), ((2,), (2,)))])
    check_seq_pos(given, prompts=[batch()])
    with pytest.raises(CheckError, match="an ablation has none"):
        check_seq_pos(given, prompts=[batch(source=False)])


def test_one_that_refuses_everything_is_told() -> None:
    with pytest.raises(CheckError, match="refuses every batch"):
        check_seq_pos(Spans(["name"]), prompts=[batch()])


def test_one_that_changes_its_mind_is_told() -> None:
    class Moody:
        one_by_one = True
        asked = 0

        def place(self, prompts: PromptBatch) -> list[PlacedCell]:
            self.asked += 1
            return [PlacedCell(str(self.asked), ((1,), (1,)))]

    with pytest.raises(CheckError, match="other cells when it is asked again"):
        check_seq_pos(Moody(), prompts=[batch()])
