"""Layers and heads are one list, positions one or one for each prompt: nothing is flattened."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nnpatch_core import Custom, CustomConstant, LastK, Site, Sites
from nnpatch_core.errors import HeadError, LayerError, PositionError
from nnpatch_core.testing import tiny_api

#: `[batch, k]`, in each form that positions of each prompt come in.
ROWS = [
    torch.tensor([[1], [2]]),
    torch.tensor([[1, 2]]),
    np.array([[1], [2]]),
    [[1], [2]],
    [(1, 2)],
    [torch.tensor([1]), torch.tensor([2])],
    (np.array([1]), range(2, 3)),
]
#: Other shapes, which positions do not have either.
NESTED = [torch.ones(1, 1, 1, dtype=torch.int64), (np.array([1]), 2), [[1], [[2]]], [[1, 2], [3]]]


API = tiny_api()


def site(**options: Any) -> Site:
    return Site.get_site(API, "q", **{"layer": 0, **options})


MAKERS = {
    "custom": (PositionError, Custom),
    "constant": (PositionError, CustomConstant),
    "named": (PositionError, lambda x: Sites("q", seq_pos_type="custom", seq_pos=x)),
    "site": (PositionError, lambda x: site(seq_pos=x)),
    "layers": (LayerError, lambda x: Sites("q", layers=x)),
    "heads": (HeadError, lambda x: Sites("q", heads=x)),
}


def tuples(values: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, row)) for row in values)


@pytest.mark.parametrize("values", NESTED, ids=lambda x: f"{type(x).__name__}")
@pytest.mark.parametrize("maker", MAKERS)
def test_other_shapes_are_refused(maker: str, values: Any) -> None:
    error, make = MAKERS[maker]
    match = "must be one list of integers, got"
    if error is PositionError:
        match = r"seq_pos (of prompt \d )?must be (\[k\] or \[batch, k\]|integers)"
    with pytest.raises(error, match=match) as caught:
        make(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", ROWS, ids=lambda x: f"{type(x).__name__}")
@pytest.mark.parametrize("maker", ["layers", "heads"])
def test_layers_and_heads_are_one_list(maker: str, values: Any) -> None:
    error, make = MAKERS[maker]
    with pytest.raises(error, match="must be one list of integers, got"):
        make(values)


@pytest.mark.parametrize("values", ROWS, ids=lambda x: f"{type(x).__name__}")
def test_positions_of_each_prompt_are_read_in_every_form(values: Any) -> None:
    rows = tuples(values)
    assert Custom(values).positions == rows
    assert CustomConstant(values, values).source == rows
    assert site(seq_pos=values).seq_pos == rows
    both = site(seq_pos=values, source_seq_pos=values)
    assert both.source_seq_pos == rows
    assert both != site(seq_pos=values)


@pytest.mark.parametrize("maker", MAKERS)
def test_a_scalar_is_no_list(maker: str) -> None:
    error, make = MAKERS[maker]
    for value in (torch.tensor(1), np.array(1), np.int64(1), 1):
        with pytest.raises(error, match="must be a list of integers, got"):
            make(value)


@pytest.mark.parametrize("values", [torch.tensor([1, 2]), np.array([1, 2]), [1, 2], range(1, 3)])
def test_one_list_is_what_it_was(values: Any) -> None:
    assert Custom(values).positions == (1, 2)
    assert site(seq_pos=values).seq_pos == (1, 2)
    assert Sites("q", layers=values, heads=values).layers == (1, 2)
    scalars = [torch.tensor(1), np.int64(2)]
    assert Custom(scalars).positions == (1, 2)


@pytest.mark.parametrize("value", [torch.tensor([1]), np.array([1]), torch.tensor([[1]]), [1]])
def test_one_number_with_an_axis_is_no_number(value: Any) -> None:
    with pytest.raises(LayerError, match="a layer must be an integer"):
        site(layer=value)
    with pytest.raises(HeadError, match="a head must be an integer"):
        site(head=value)
    with pytest.raises(PositionError, match="must be an integer"):
        LastK(value)
    assert site(layer=torch.tensor(1), head=np.int64(2)) == site(layer=1, head=2)
