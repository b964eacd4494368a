"""Hypothesis strategies for position strategies, sites and batches of tokens."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from nnpatch_core.adapters import ModelAPI, check_layer, component_names, find_component
from nnpatch_core.seq_pos import AllPositions, Custom, CustomConstant, Each, Last, LastK, SeqPos
from nnpatch_core.site import Site


def positions(seq_len: int, *, max_size: int | None = None) -> st.SearchStrategy[list[int]]:
    """Different positions of a prompt of `seq_len` tokens, in any order, from either end.

    Examples:
        >>> from hypothesis import given
        >>> @given(positions(5))
        ... def test(chosen):
        ...     assert len({position % 5 for position in chosen}) == len(chosen)
        >>> test()
    """
    anywhere = st.integers(-seq_len, seq_len - 1)
    return st.lists(
        anywhere, min_size=1, max_size=max_size or seq_len, unique_by=lambda each: each % seq_len
    )


def seq_pos_strategies(seq_len: int) -> st.SearchStrategy[SeqPos]:
    """Built-in position strategies that fit a prompt of `seq_len` tokens.

    Examples:
        >>> from hypothesis import given
        >>> @given(seq_pos_strategies(5))
        ... def test(strategy):
        ...     assert strategy.expand(5)
        >>> test()
    """
    return st.one_of(
        st.just(AllPositions()),
        st.just(Each()),
        st.just(Last()),
        st.integers(1, seq_len).map(LastK),
        positions(seq_len).map(Custom),
        positions(seq_len).map(CustomConstant),
    )


@st.composite
def sites(
    draw: st.DrawFn, api: ModelAPI, *, n_layers: int, n_heads: int = 0, seq_len: int | None = None
) -> Site:
    """Sites of an adapter.

    Args:
        draw: given by hypothesis.
        api: the adapter.
        n_layers: how many layers the model has.
        n_heads: how many heads each component with heads has at least; 0 is for sites of all heads
            together.
        seq_len: tokens of a prompt; None is for sites of all positions.

    Examples:
        >>> from hypothesis import given
        >>> from nnpatch_core.testing import tiny_api
        >>> @given(sites(tiny_api(), n_layers=3, n_heads=2, seq_len=5))
        ... def test(site):
        ...     assert site.layer < 3
        >>> test()
    """
    name = draw(st.sampled_from(component_names(api)))
    layer = check_layer(draw(st.integers(0, n_layers - 1)), n_layers)
    head = None
    if n_heads and find_component(api, name).heads is not None:
        head = draw(st.none() | st.integers(0, n_heads - 1))
    seq_pos = None if seq_len is None else draw(st.none() | positions(seq_len))
    return Site.get_site(api, name, layer, head, seq_pos)


@st.composite
def token_batches(
    draw: st.DrawFn,
    *,
    vocab_size: int,
    max_batch: int = 3,
    max_len: int = 8,
    padding: bool = True,
) -> tuple[Tensor, Tensor]:
    """Batches of tokens and their mask, both `[batch, seq]`, with padding anywhere in a row.

    Args:
        draw: given by hypothesis.
        vocab_size: token ids are below it.
        max_batch: prompts, at most.
        max_len: tokens of a row, at most, padding included.
        padding: whether there may be any.

    Examples:
        >>> from hypothesis import given
        >>> @given(token_batches(vocab_size=64))
        ... def test(batch):
        ...     tokens, mask = batch
        ...     assert tokens.shape == mask.shape and mask.any(1).all()
        >>> test()
    """
    batch = draw(st.integers(1, max_batch))
    length = draw(st.integers(1, max_len))
    row = st.lists(st.integers(0, vocab_size - 1), min_size=length, max_size=length)
    tokens = draw(st.lists(row, min_size=batch, max_size=batch))
    real = st.lists(st.integers(0, 1), min_size=length, max_size=length).filter(any)
    mask = (
        draw(st.lists(real, min_size=batch, max_size=batch)) if padding else [[1] * length] * batch
    )
    return torch.tensor(tokens, device="cpu"), torch.tensor(mask, device="cpu")
