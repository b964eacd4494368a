"""The strongest cells as a table: which share a row, and what is said of how sure they are."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nnpatch_core import Outcome, Sites, activation_patching, attribution_patching
from nnpatch_core.errors import NotSweptError, OutcomeError
from nnpatch_core.results.neighbours import distinct_cells
from nnpatch_core.results.top import Top
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.samples import ONE, THREE, sample

#: Twelve pairs, which differ in the second token, and after it only from each other.
MANY = sample(
    [[5, 6, 7, last] for last in range(10, 22)],
    [[5, 9, 7, last] for last in range(10, 22)],
    [1] * 12,
    [2] * 12,
)

# Groups -----------------------------------------------------------------------------------------

#: Few numbers, so that there are ties and neighbours within 5 percent.
VALUES = st.sampled_from([0.0, 1.0, 0.96, 0.951, 0.949, -1.0, -0.97, 0.5, math.nan, math.inf])
CELLS = st.dictionaries(
    st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 6)), VALUES, min_size=1, max_size=14
)


def near(value: float, strongest: float) -> bool:
    if math.isnan(strongest) or math.isinf(strongest):
        return repr(value) == repr(strongest)
    return strongest - 0.05 * abs(strongest) <= value <= strongest + 0.05 * abs(strongest)


def size(value: float) -> float:
    return math.inf if math.isnan(value) else abs(value)


def reference(cells: dict[tuple[str, int], float]) -> list[tuple[tuple[str, int], set[Any]]]:
    """The same by looking at every cell each time."""
    left, groups = dict(cells), []
    while left:
        nans = [key for key in left if math.isnan(left[key])]
        strongest = (nans or [max(left, key=lambda key: size(left[key]))])[0]
        value, (other, layer) = left[strongest], strongest
        group = {strongest}
        swept = sorted(each for name, each in cells if name == other)
        for beside in (swept[swept.index(layer) + 1 :], swept[: swept.index(layer)][::-1]):
            for each in beside:
                key = (other, each)
                if key not in left or not near(left[key], value):
                    break
                group.add(key)
        groups.append((strongest, group))
        left = {key: value for key, value in left.items() if key not in group}
    return groups


@given(cells=CELLS, count=st.integers(0, 16))
@settings(deadline=None, max_examples=300)
def test_groups_are_those_of_a_plain_reference(
    cells: dict[tuple[str, int], float], count: int
) -> None:
    keys = list(cells)
    found = distinct_cells(
        list(cells.values()), [layer for _, layer in keys], [other for other, _ in keys], count
    )
    expected = reference(cells)[:count]
    assert [keys[numbers[0]] for numbers in found] == [strongest for strongest, _ in expected]
    assert [{keys[number] for number in numbers} for numbers in found] == [
        group for _, group in expected
    ]
    for numbers in found:
        layers = [keys[number][1] for number in numbers[1:]]
        assert layers == sorted(layers)
        other = keys[numbers[0]][0]
        swept = sorted(layer for name, layer in keys if name == other)
        every = sorted(keys[number][1] for number in numbers)
        first = swept.index(every[0])
        assert every == swept[first : first + len(every)]


@given(cells=CELLS)
@settings(deadline=None)
def test_every_cell_is_in_one_group(cells: dict[tuple[str, int], float]) -> None:
    others: list[Hashable] = [other for other, _ in cells]
    layers = [layer for _, layer in cells]
    found = distinct_cells(list(cells.values()), layers, others, len(cells))
    assert sorted(number for numbers in found for number in numbers) == list(range(len(cells)))
    apart = distinct_cells(list(cells.values()), [None] * len(cells), layers, len(cells))
    assert all(len(numbers) == 1 for numbers in apart)


# Tables -----------------------------------------------------------------------------------------

SITES = Sites(["resid", "k"], seq_pos_type="each")


def sweep(prompts: Any = MANY, kind: Any = activation_patching, **options: Any) -> Outcome:
    source, target, answers = prompts
    sites = options.pop("sites", SITES)
    return kind(
        tiny_model(), tiny_api(), sites, source, target, *answers, progress=False, **options
    )


@pytest.fixture(scope="module")
def out() -> Outcome:
    return sweep()


def test_a_row_is_the_strongest_cell_of_its_layers(out: Outcome) -> None:
    top = out.top(100)
    cells = sum(len(each.index) for each in out.cells.values())
    covered = 0
    for row in top:
        head = [row["head"]] if "head" in row else []
        values = out[row["site"]]
        first, _, last = row["layers"].partition("-")
        layers = range(int(first), int(last or first) + 1)
        assert row["layer"] in layers
        every = [values[(layer, row["position"], *head)].item() for layer in layers]
        covered += len(every)
        assert row["value"] == max(every, key=abs)
        assert all(abs(value - row["value"]) <= 0.05 * abs(row["value"]) for value in every)
        assert row["token"] == out.tokens[row["position"]]
    assert covered == cells
    sizes = [abs(row["value"]) for row in top]
    assert sizes == sorted(sizes, reverse=True)
    assert len(top) < cells
    assert [dict(row) for row in out.top(3)] == [dict(row) for row in top[:3]]


def test_each_cell_may_have_a_row(out: Outcome) -> None:
    top = out.top(20, distinct=False)
    plain = out.strongest(20)
    assert len(top) == 20
    for row, expected in zip(top, plain, strict=True):
        assert "layers" not in row
        assert {name: row[name] for name in expected} == expected


def test_intervals_and_p_values_are_those_of_the_outcome(out: Outcome) -> None:
    family = out.pvalues(["resid", "k"], "max_t")
    for row in out.top(30):
        head = [row["head"]] if "head" in row else []
        place = (row["layer"], row["position"], *head)
        low, high = out.interval(row["site"])
        assert row["low"] == pytest.approx(low[place].item(), rel=1e-9, abs=1e-12)
        assert row["high"] == pytest.approx(high[place].item(), rel=1e-9, abs=1e-12)
        p_value = family[row["site"]][place].item()
        assert row["p_value"] == pytest.approx(p_value, nan_ok=True)
    alone = out.pvalues(["k"], "max_t")["k"]
    for row in out.top(3, "k"):
        assert row["p_value"] == alone[row["layer"], row["position"], row["head"]].item()


def test_the_words_below_say_what_is_assumed(out: Outcome) -> None:
    told = " ".join(out.top().notes)
    for words in ("95 % interval", "BCa", "max-T", "drawn independently", "these 12"):
        assert words in told
    ran = sum(int((each.exact & ~each.known.all(1)).sum()) for each in out.cells.values())
    assert f"any of the {ran} cells" in told
    assert str(out.top()).endswith(out.top().notes[-1])


def test_one_prompt_has_no_intervals() -> None:
    top = sweep(ONE).top()
    assert not {"low", "high", "p_value"} & set(top.columns)
    assert top.notes == (
        "Of one prompt: nothing tells how much other prompts would change a value.",
    )


def test_means_alone_have_an_interval_by_student(out: Outcome) -> None:
    means = sweep(keep="means")
    top = means.top(4)
    assert "p_value" not in top.columns
    assert "Student's t" in top.notes[0]
    assert "no p-values" in top.notes[0]
    for row in top:
        head = [row["head"]] if "head" in row else []
        place = (row["layer"], row["position"], *head)
        error = out.standard_error(row["site"])[place].item()
        low, high = stats.t.interval(0.95, 11, loc=out[row["site"]][place].item(), scale=error)
        assert (row["low"], row["high"]) == pytest.approx((low, high), rel=1e-5, abs=1e-6)


def test_sizes_of_means_alone_have_none() -> None:
    sizes = attrs.evolve(sweep().magnitudes())
    joined = sweep(kind=attribution_patching, grad_drop=True, keep="means")
    assert "low" in sizes.top().columns
    assert "low" not in joined.top().columns
    assert "no intervals" in joined.top().notes[0]


def test_estimates_say_so() -> None:
    top = sweep(kind=attribution_patching).top(5)
    assert {"exact", "low", "high"} <= set(top.columns)
    assert "p_value" not in top.columns
    assert any("estimate" in words and "no p-value" in words for words in top.notes)


def test_a_screen_has_both() -> None:
    top = sweep(screen="attribution", top_k=3, spot_checks=0).top(50)
    assert {row["exact"] for row in top} == {True, False}
    for row in top:
        assert row["exact"] or math.isnan(row["p_value"])
    assert any(not math.isnan(row["p_value"]) for row in top)


def test_nan_comes_first(out: Outcome) -> None:
    values = out.raw[out.metric]["k"].clone()
    values[7] = math.nan
    raw = {out.metric: {**out.raw[out.metric], "k": values}}
    broken = attrs.evolve(out, raw=raw)
    first = broken.top(1)[0]
    layer, position, head = out.cells["k"].index[7].tolist()
    assert (first["site"], first["layer"], first["position"], first["head"]) == (
        *("k", layer, position, head),
    )
    assert math.isnan(first["value"])
    assert "nan" in str(broken.top(1))


def test_a_list_of_sites_has_labels() -> None:
    sites = SITES.get_sites_dict(tiny_model(), tiny_api(), MANY.source)["resid"][:4]
    listed = sweep(sites=Sites.from_sites(sites))
    top = listed.top()
    assert [set(row) & {"layer", "layers", "label"} for row in top] == [{"label"}] * 4


# As it is printed --------------------------------------------------------------------------------


def test_columns_stand_below_each_other(out: Outcome) -> None:
    top = out.top(5)
    title, head, *lines = str(top).split("\n")
    cells = sum(len(each.index) for each in out.cells.values())
    about = "activation, logit_difference, restored (0 target, 1 source), 12 prompts"
    assert title == f"The strongest of {cells} cells: {about}"
    assert top[:2].title == title
    end = head.index("value") + len("value")
    for row, line in zip(top, lines[:5], strict=True):
        assert line[:end].endswith(f"{row['value']:.3f}")
    assert repr(top) == str(top)


def test_wide_letters_take_two_columns() -> None:
    rows = (
        {"site": "q", "token": "日本", "value": 0.5},
        {"site": "q", "token": "e\u0301a", "value": 2.0},
    )
    _, head, wide, plain = str(Top(rows, "", ())).split("\n")
    assert head == "site  token   value"
    assert wide == "q     '日本'  0.500"
    assert plain == "q     'e\u0301a'    2.000"


def test_what_a_terminal_would_obey_is_escaped() -> None:
    rows = ({"site": "q", "token": "\x1b[31m", "value": 1e-5},)
    assert "\x1b" not in str(Top(rows, "", ()))
    assert "1.0e-05" in str(Top(rows, "", ()))


def test_a_data_frame_of_it(out: Outcome) -> None:
    top = out.top(6)
    frame = top.to_dataframe()
    assert tuple(frame) == top.columns
    assert len(frame) == 6
    np.testing.assert_array_equal(frame["value"], [row["value"] for row in top])
    assert str(frame["head"].dtype) == "Int64"


def test_no_rows(out: Outcome) -> None:
    empty = out.top(0)
    assert (len(empty), empty.columns) == (0, ())
    assert list(out.top(name=[])) == []
    assert str(empty) == f"{out.top().title}\n"
    assert len(empty.to_dataframe()) == 0


@pytest.mark.parametrize("n", [-1, 1.5, "3", True, None])
def test_a_number_of_rows_is_a_count(out: Outcome, n: Any) -> None:
    with pytest.raises(OutcomeError, match="n must be"):
        out.top(n)


def test_a_site_name_that_was_not_swept(out: Outcome) -> None:
    with pytest.raises(NotSweptError, match=r"'resit' was not swept \(did you mean resid\?\)"):
        out.top(name="resit")


def test_synonyms_name_a_site(out: Outcome) -> None:
    assert [row["site"] for row in out.top(2, "resid_post")] == ["resid"] * 2


def test_what_is_doubtful_is_told_below(out: Outcome) -> None:
    unsteady = torch.tensor([1.0, -0.9, 0.3] * 4)
    baseline = attrs.evolve(out.baseline, source=out.baseline.target + unsteady)
    odd = attrs.evolve(out, baselines={out.metric: baseline})
    top = odd.top(3)
    assert all(row["low"] == -math.inf and row["high"] == math.inf for row in top)
    assert top.notes[-1].startswith("Beware: the source and the target run may not differ")
    few = sweep(THREE).top(3)
    assert few.notes[-1].startswith("Beware: 3 prompts are too few")
    assert "With 3 prompts no p-value can be below 0.25, whatever the effect: take 6 or more." in (
        few.notes
    )


def test_a_difference_has_a_table_too(out: Outcome) -> None:
    estimate = sweep(kind=attribution_patching)
    top = (estimate - out).top(5, "k")
    assert {row["site"] for row in top} == {"k"}
    assert "attribution - activation" in top.title
    difference = estimate["k"] - out["k"]
    low, high = (estimate - out).interval("k")
    for row in top:
        place = (row["layer"], row["position"], row["head"])
        assert row["value"] == pytest.approx(difference[place].item(), rel=1e-4, abs=1e-6)
        assert (row["low"], row["high"]) == pytest.approx((low[place].item(), high[place].item()))


def test_outcomes_of_other_prompts_have_no_p_values(out: Outcome) -> None:
    source, target, answers = MANY
    other = sweep((source[:8] + 1, target[:8] + 1, (answers[0][:8], answers[1][:8])))
    top = (out - other).top(3)
    assert "p_value" not in top.columns
    assert any(words.startswith("There are no p-values: the sides") for words in top.notes)


@pytest.mark.parametrize("count", [6, 7, 12])
def test_rows_whose_interval_and_p_value_disagree_are_named(count: int) -> None:
    few = sample(*(side[:count].tolist() for side in (*MANY[:2], *MANY.answers)))
    top = sweep(few).top(20)
    apart, rare = [], []
    for number, row in enumerate(top, 1):
        clear = row["low"] > 0 or row["high"] < 0
        if clear and row["p_value"] > 0.05:
            apart.append(number)
        if math.isfinite(row["low"]) and not clear and row["p_value"] <= 0.05:
            rare.append(number)
    told = [words for words in top.notes if words.startswith("Row")]
    assert len(told) == bool(apart) + bool(rare)
    assert any(apart)
    named = told[0].partition(":")[0].removeprefix("Rows ").removeprefix("Row ")
    spans = [part.split("-") for part in named.split(", ")]
    assert [n for ends in spans for n in range(int(ends[0]), int(ends[-1]) + 1)] == apart
