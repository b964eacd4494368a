"""Coordinates of a data set, against plain hooks, and their rows and pictures."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nnpatch_core import PromptPairs, Site
from nnpatch_core.errors import (
    MaskError,
    OutcomeError,
    PatchingError,
    PositionError,
    SubspaceError,
    TokensError,
    UnknownNameError,
)
from nnpatch_core.spaces import Subspace
from nnpatch_core.subspace import Collected, collect
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer
from tests.helpers.oracle import Oracle, lay_out, random_prompts

API, MODEL = tiny_api(), tiny_model("llama")
ORACLE = Oracle(MODEL, "llama")
ATOL = 1e-5


def collected(subspace: Any, prompts: Any, **options: Any) -> Collected:
    return collect(MODEL, subspace, prompts, **{"progress": False, **options})


def site(space: Any, seq_pos: Any = None, name: str = "resid", head: Any = None) -> Site:
    return Site.get_site(API, name, 1, head, seq_pos, subspace=space)


@settings(max_examples=25, deadline=None, database=None)
@given(
    st.sampled_from([("resid", None), ("mlp", None), ("q", 3), ("k", 1), ("o", 0), ("v", None)]),
    st.sampled_from([None, (1,), (1, 3), "each"]),
    st.sampled_from(["left", "right", "mixed", "holes"]),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 2**16),
)
def test_coordinates_are_those_of_plain_hooks(
    where: Any, backs: Any, side: str, rank: int, size: int, seed: int
) -> None:
    name, head = where
    prompts = random_prompts((3, 5, 4), seed=seed)
    tokens, mask = lay_out(prompts, side, seed=seed)
    width = ORACLE.activation(prompts[0], name, 1).shape[1]
    width = width if head is None else 8
    space = Subspace.pca(torch.randn(9, width, generator=torch.Generator().manual_seed(seed)), rank)
    own = [[1, 2], [5, 1], [3, 4]] if backs == "each" else None
    seq_pos = backs and ([[-b for b in row] for row in own] if own else [-back for back in backs])
    out = collected(site(space, seq_pos, name, head), (tokens, mask), batch_size=size)
    expected: list[tuple[int, int, int, Tensor]] = []
    for number, prompt in enumerate(prompts):
        chosen = range(1, len(prompt) + 1) if backs is None else own[number] if own else backs
        for back in sorted(chosen, reverse=True):
            whole = ORACLE.activation(prompt, name, 1)[len(prompt) - back]
            part = whole if head is None else whole[head * 8 : head * 8 + 8]
            coordinates = (part - space.mean) @ space.basis
            expected.append((number, -back, prompt[len(prompt) - back], coordinates))
    assert out.prompts == tuple(row[0] for row in expected)
    assert out.positions == tuple(row[1] for row in expected)
    assert out.tokens == tuple(row[2] for row in expected)
    torch.testing.assert_close(
        out.values, torch.stack([row[3] for row in expected]), atol=ATOL, rtol=0
    )


SPACE = Subspace.random(32, seed=4)
TOKENS = torch.tensor([[5, 6, 7, 8], [9, 4, 7, 3], [5, 5, 5, 5]])
LAST = site(SPACE, [-1])


def pairs(**options: Any) -> PromptPairs:
    prompts = ["The capital of France is", "So Japan has the capital"]
    others = ["The capital of Italy is", "Once Spain has the capital"]
    words = tiny_tokenizer([*prompts, *others, " Paris Tokyo Rome Madrid"])
    return PromptPairs.from_texts(
        prompts, others, [" Paris", " Tokyo"], [" Rome", " Madrid"], words, **options
    )


def test_pairs_have_both_runs_and_their_columns() -> None:
    given_pairs = pairs(extra={"template": ["is", "has"]})
    out = collected(LAST, given_pairs, labels={"size": [3, 1]})
    frame = out.to_dataframe()
    assert list(frame.columns) == [
        "prompt", "run", "position", "token", "template", "size", "c0",
    ]  # fmt: skip
    assert frame["run"].tolist() == ["source"] * 2 + ["target"] * 2
    assert frame["prompt"].tolist() == [0, 1, 0, 1]
    assert frame["token"].tolist() == [" is", " capital"] * 2
    assert frame["template"].tolist() == ["is", "has"] * 2
    assert frame["size"].tolist() == [3, 1, 3, 1]
    alone = [
        collected(LAST, (each, mask)).values
        for each, mask in (
            (given_pairs.source_tokens, given_pairs.source_attention_mask),
            (given_pairs.target_tokens, given_pairs.target_attention_mask),
        )
    ]
    torch.testing.assert_close(out.values, torch.cat(alone))


def test_batches_are_as_one() -> None:
    whole = collected(LAST, TOKENS, labels=["a", "b", "a"])
    for batches in ([TOKENS[:2], TOKENS[2:]], iter([TOKENS[:1], TOKENS[1:]])):
        parts = collected(LAST, batches, labels=["a", "b", "a"])
        torch.testing.assert_close(parts.values, whole.values)
        assert (parts.prompts, parts.labels) == ((0, 1, 2), {"label": ("a", "b", "a")})
    assert repr(whole) == (
        "Collected(3 rows of 1 coordinates at resid L1 [-1] in rank 1, labelled by label)"
    )


def test_a_subspace_knows_its_site_or_is_given_one() -> None:
    made = Subspace(SPACE.basis, site=Site.get_site(API, "resid", 1, seq_pos=[-1]))
    known = collected(LAST, TOKENS).values
    assert torch.equal(collected(made, TOKENS, api=API).values, known)
    own = Site.get_site(API, "resid", 1, seq_pos=[-1])
    assert torch.equal(collected(SPACE, TOKENS, site=own).values, known)


def test_the_model_is_in_evaluating_mode_and_back() -> None:
    model = tiny_model("llama", attention_dropout=0.5)
    model.train()
    found = collect(model, LAST, TOKENS, progress=False)
    assert torch.equal(found.values, collected(LAST, TOKENS).values)
    assert model.training


def test_rows_are_counted_by_what_is_real() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    out = collected(site(SPACE), {"input_ids": TOKENS, "attention_mask": mask}, labels=[1, 2, 3])
    assert len(out) == 8
    assert out.labels["label"] == (1, 1, 1, 2, 2, 2, 2, 3)


# Pictures.


def made(rank: int, rows: int = 24) -> Collected:
    return Collected(
        torch.randn(rows, rank, generator=torch.Generator().manual_seed(0)),
        tuple(range(rows)),
        None,
        (-1,) * rows,
        ("$x$",) * rows,
        {"sort": tuple("ab$"[row % 3] for row in range(rows))},
        "resid L1",
    )


def test_a_histogram_counts_each_row() -> None:
    (axis,) = made(1).plot().axes
    assert sum(patch.get_height() for patch in axis.patches) == 24
    assert axis.get_xlabel() == "coordinate"


def test_a_strip_has_each_group_in_its_line() -> None:
    out = made(1)
    (axis,) = out.plot("sort").axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b", "$"]
    for height, points in enumerate(axis.collections):
        x, y = np.asarray(points.get_offsets()).T
        np.testing.assert_allclose(x, out.values[height::3, 0])
        assert (np.abs(y - height) < 0.3).all()
    means = [line.get_xdata()[0] for line in axis.lines[:3]]
    np.testing.assert_allclose(means, [out.values[n::3].mean() for n in range(3)], rtol=1e-5)


def test_a_scatter_has_two_coordinates() -> None:
    out = made(3)
    figure = out.plot("sort")
    (axis,) = figure.axes
    points = np.asarray(axis.collections[1].get_offsets())
    np.testing.assert_allclose(points, out.values[1::3, :2])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "$"]
    assert made(2).plot().legends == []


def test_pictures_that_cannot_be_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="no label 'run'; there are prompt, position, tok"):
        made(1).plot("run")
    with pytest.raises(OutcomeError, match="has 24 values, and a picture tells 12 apart"):
        made(1).plot("prompt")


# What is refused.


def test_what_is_refused() -> None:
    def refused(kind: type[Exception], words: str, *args: Any, **options: Any) -> None:
        with pytest.raises(kind, match=words):
            collected(*args, **options)

    plain = Site.get_site(API, "resid", 1)
    refused(SubspaceError, "has no subspace, of which", plain, TOKENS)
    refused(SubspaceError, "does not know where it was made", SPACE, TOKENS)
    refused(PatchingError, "site= is for a Subspace", LAST, TOKENS, site=plain)
    refused(SubspaceError, "without a subspace of its own", SPACE, TOKENS, site=LAST)
    refused(PositionError, "position -4 is out of", site(SPACE, [-4]), TOKENS[:, :3])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]])
    refused(PositionError, "is padding in prompt 1", site(SPACE, [-3]), (TOKENS, mask))
    refused(
        PositionError, "positions of 2 prompts, and there are 3", site(SPACE, [[1], [2]]), TOKENS
    )
    refused(TokensError, "prompts holds the id", LAST, TOKENS + 100)
    refused(TokensError, "batch_size must be at least 1", LAST, TOKENS, batch_size=0)
    refused(MaskError, "the attention mask of prompts", LAST, (TOKENS, mask[:2]))
    refused(TokensError, "empty", LAST, [])
    refused(TokensError, "tokenizer must be", LAST, TOKENS, tokenizer=3)


def test_labels_are_refused() -> None:
    for labels, words in (
        ([1, 2], "label 'label' has 2 values, and there are 3 prompts"),
        (3, "labels must be a mapping"),
        ({"a": "xyz"}, "labels must be a mapping"),
        ({"run": [1, 2, 3]}, "cannot be called 'run'"),
        ({"c7": [1, 2, 3]}, "cannot be called 'c7'"),
    ):
        with pytest.raises(PatchingError, match=words):
            collected(LAST, TOKENS, labels=labels)
        if "must" not in words:
            with pytest.raises(PatchingError, match=words):
                collected(LAST, iter([TOKENS[:1], TOKENS[1:]]), labels=labels)
    with pytest.raises(PatchingError, match="is a column of the pairs too"):
        collected(LAST, pairs(extra={"sort": [1, 2]}), labels={"sort": [1, 2]})


def test_more_labels_than_prompts_of_a_stream() -> None:
    with pytest.raises(PatchingError, match="has 4 values, and there are 3 prompts"):
        collected(LAST, iter([TOKENS]), labels=[1, 2, 3, 4])


def test_the_original_model_is_untouched() -> None:
    before = copy.deepcopy(MODEL.state_dict())
    collected(LAST, TOKENS)
    assert all(torch.equal(before[name], each) for name, each in MODEL.state_dict().items())
