"""Which cells stay among the strongest when prompts are drawn again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nnpatch_core.errors import NotSweptError, OutcomeError
from nnpatch_core.results import means_of
from tests.helpers.made import made

RANDOM = np.random.default_rng(4)
PROMPTS = 16
WHOLE = RANDOM.normal(4, 0.3, PROMPTS)
#: Two clear cells, two that may change places, and one that does nothing.
CHANGES = np.array([[4.0], [3.0], [1.5], [1.4], [0.0]]) + RANDOM.normal(0, 0.5, (5, PROMPTS))


def plain(k: int, cells: list[int]) -> dict[int, float]:
    """The shares of draws in which a cell is one of the k largest, by a loop of a test's own."""
    random = np.random.default_rng(8)
    seen = dict.fromkeys(cells, 0)
    for _ in range(4000):
        drawn = random.integers(0, PROMPTS, PROMPTS)
        sizes = {cell: abs(CHANGES[cell, drawn].mean() / WHOLE[drawn].mean()) for cell in cells}
        for cell in sorted(cells, key=lambda each: -sizes[each])[:k]:
            seen[cell] += 1
    return {cell: count / 4000 for cell, count in seen.items()}


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_shares_are_those_of_a_loop(k: int) -> None:
    found = made(CHANGES, WHOLE).stability(k)
    expected = plain(k, list(range(5)))
    assert [row["layer"] for row in found.rows] == list(range(k))
    for row in (*found.rows, *found.others):
        assert row["share"] == pytest.approx(expected[row["layer"]], abs=0.03)
    assert found.kept == pytest.approx(np.mean([expected[cell] for cell in range(k)]), abs=0.02)
    told = {row["layer"] for row in found.others}
    assert {cell for cell in range(k, 5) if expected[cell] > 0.08} <= told
    assert not {cell for cell in told if expected[cell] < 0.02}


def test_one_fact_counts_once() -> None:
    twice = np.vstack([CHANGES[0], CHANGES[0] * 1.01, CHANGES[2:]])
    out = made(twice, WHOLE)
    assert [row["layer"] for row in out.stability(2).rows] == [1, 2]
    assert [row["layer"] for row in out.stability(2, distinct=False).rows] == [1, 0]


def test_several_names_are_ranked_together() -> None:
    out = made({"mlp": CHANGES[:2], "attn": CHANGES[2:]}, WHOLE)
    rows = out.stability(3).rows
    assert [(row["site"], row["layer"]) for row in rows] == [("mlp", 0), ("mlp", 1), ("attn", 0)]
    assert {row["site"] for row in out.stability(3, "attn_out").rows} == {"attn"}


def test_more_places_than_cells_are_all_kept() -> None:
    found = made(CHANGES, WHOLE).stability(9)
    assert len(found.rows) == 5
    assert found.kept == 1
    assert not found.others


def test_a_cell_without_a_number_takes_no_place() -> None:
    changes = CHANGES.copy()
    changes[0, 3] = np.nan
    found = made(changes, WHOLE).stability(2)
    assert [row["layer"] for row in found.rows] == [1, 2]
    for shown in (str(found), found._repr_html_()):
        assert "1 cell has no number" in shown
    assert "no number" not in str(made(CHANGES, WHOLE).stability(2))


def test_differences_have_one_too() -> None:
    more = made(CHANGES + CHANGES[::-1], WHOLE) - made(CHANGES, WHOLE)
    assert [row["layer"] for row in more.stability(2).rows] == [4, 3]


def test_it_is_read_and_shown() -> None:
    found = made(CHANGES, WHOLE).stability(3)
    text, page = str(found), found._repr_html_()
    for row in (*found.rows, *found.others):
        assert f"mlp L{row['layer']}" in text
        assert f"mlp L{row['layer']}" in page
        assert f"{row['share']:.0%}" in text
    assert repr(found) == f"Stability(3 cells keep {found.kept:.0%} of their places)"
    assert "10000 draws" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"k": 1.5}, "k must be"),
        ({"resamples": 10}, "resamples must be from 100"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"name": []}, "no site name"),
        ({"distinct": "no"}, "distinct must be True or False"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        made(CHANGES, WHOLE).stability(**arguments)


def test_an_unknown_name_and_means_are_refused() -> None:
    with pytest.raises(NotSweptError):
        made(CHANGES, WHOLE).stability(2, "attn")
    with pytest.raises(OutcomeError, match="keep='prompts'"):
        means_of(made(CHANGES, WHOLE)).stability(2)
