"""How well an estimate agrees with what is exact: figures, tables and pictures of known cells."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnpatch_core import MultiSite, Outcome, Site, Sites, activation_patching
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results import Baseline, Cells, Prompts
from nnpatch_core.sites import Axis
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer(["<s> $x$ of France Japan is"])
SOURCE = torch.tensor([TOKENIZER("<s> $x$ of France is").input_ids])
TARGET = torch.tensor([TOKENIZER("<s> $x$ of Japan is").input_ids])
TOKENS = ("<s>", " $x$", " of", " France| Japan", " is")
POSITIONS = 4
FIGURES = ("rank_correlation", "rank_correlation_of_sizes", "recall", "sign_agreement", "cells")


def made(
    values: dict[str, torch.Tensor], *, swept: Any = None, exact: Any = None, **options: Any
) -> Outcome:
    """An outcome of known values: site name to `[layers, positions]`, or a batch of prompts."""
    cells, raw = {}, {}
    for name, numbers in values.items():
        numbers = torch.as_tensor(numbers, dtype=torch.float32)
        numbers = numbers.unsqueeze(-1) if numbers.ndim == 2 else numbers
        layers, positions, batch = numbers.shape
        axes = (Axis("layer", tuple(range(layers))), Axis("position", tuple(range(positions))))
        index = (torch.ones(layers, positions) if swept is None else swept[name]).nonzero()
        places = tuple(index.T)
        everywhere = torch.ones(len(index), batch, dtype=torch.bool)
        sure = torch.ones(len(index), dtype=torch.bool) if exact is None else exact[name][places]
        cells[name] = Cells(axes, index, everywhere, ~everywhere, ~everywhere, sure)
        raw[name] = numbers[places]
    tokens = torch.arange(positions).expand(batch, -1)
    arguments = {
        "kind": "activation",
        "scale": "change",
        "cells": cells,
        "raw": {"logit_difference": raw},
        "baselines": {"logit_difference": Baseline(torch.ones(batch), torch.zeros(batch))},
        "prompts": Prompts(tokens, torch.ones_like(tokens), tokens, torch.ones_like(tokens)),
        "metric": "logit_difference",
        "info": {"model": "somewhere/my-model/"},
    }
    return Outcome(**{**arguments, **options})


def row(*numbers: Any) -> torch.Tensor:
    """The values of one layer, one position a number."""
    return torch.tensor([numbers], dtype=torch.float32)


def agreement(estimate: torch.Tensor, exact: torch.Tensor, top_k: int = 20) -> Any:
    return made({"mlp": estimate}).agreement(made({"mlp": exact}), top_k)


def sweep(sites: Any) -> Outcome:
    answers = (torch.tensor([1]), torch.tensor([2]))
    return activation_patching(
        tiny_model("llama"),
        tiny_api(),
        sites,
        SOURCE,
        TARGET,
        *answers,
        tokenizer=TOKENIZER,
        progress=False,
    )


def altered(out: Outcome, change: Callable[..., Any]) -> Outcome:
    """The outcome as an estimate: `change` takes the site name and its `[cells, batch]` values."""
    raw = {metric: dict(values) for metric, values in out.raw.items()}
    raw[out.metric] = {
        name: change(name, numbers.clone()) for name, numbers in raw[out.metric].items()
    }
    return attrs.evolve(out, raw=raw, kind="attribution")


@pytest.fixture(scope="module")
def out() -> Outcome:
    return sweep(Sites(["resid", "q", "k"], seq_pos_type="each"))


@pytest.fixture(scope="module")
def estimate(out: Outcome) -> Outcome:
    """One that misses two cells by far: the first of `resid`, and more so the last of `k`."""

    def change(name: Any, numbers: Any) -> Any:
        if name != "q":
            place, by = {"resid": (0, 2.0), "k": (-1, -3.0)}[name]
            numbers[place] += by * (out.baseline.source - out.baseline.target)
        return numbers

    return altered(out, change)


@pytest.fixture(scope="module")
def listed() -> Outcome:
    parts = [Site.get_site(tiny_api(), name, 1, seq_pos=[-1]) for name in ("attn", "mlp")]
    return sweep(Sites.from_sites([*parts, MultiSite(parts, name="both")]))


def same(one: Any, other: Any) -> None:
    for figure in (*FIGURES, "left_out", "top_k"):
        assert getattr(one, figure) == pytest.approx(getattr(other, figure), nan_ok=True)


# Figures ----------------------------------------------------------------------------------------


def test_figures_of_known_cells() -> None:
    """Of the three largest cells, the estimate has two, and one of them with its sign."""
    found = agreement(row(-9, 6, 1, 7, 0), row(10, 8, -6, 1, 0), top_k=3)
    # The ranks are 1 4 3 5 2 and 5 4 1 3 2, and of the sizes 5 3 2 4 1 and 5 4 3 2 1.
    assert found.rank_correlation == pytest.approx(1 - 6 * (16 + 4 + 4) / (5 * 24))
    assert found.rank_correlation_of_sizes == pytest.approx(1 - 6 * (1 + 1 + 4) / (5 * 24))
    assert found.recall == pytest.approx(2 / 3)
    assert found.sign_agreement == pytest.approx(1 / 3)
    assert (found.cells, found.top_k, found.left_out) == (5, 3, 0)


def test_top_k_is_at_most_the_cells() -> None:
    found = agreement(row(1, 2, 3), row(-3, 2, 1), top_k=20)
    assert found.recall == 1
    assert found.sign_agreement == pytest.approx(2 / 3)
    assert found.top_k == 20
    assert "of 3," in repr(found)


def test_default_is_the_top_20() -> None:
    values = torch.arange(1.0, 41.0).reshape(5, 8)
    found = made({"mlp": values.flip(0)}).agreement(made({"mlp": values}))
    assert found.top_k == 20
    # The upper half of the cells in the one is the lower half in the other, but for one layer.
    assert found.recall == pytest.approx(4 / 20)


def test_ties_at_the_edge_share_its_places() -> None:
    # The places are 1 1/3 1/3 1/3 and 1/4 of a place each, twice.
    assert agreement(row(1, 1, 1, 1), row(3, 1, 1, 1), top_k=2).recall == pytest.approx(
        (1 / 2 + 3 * 1 / 3) / 2
    )
    # A constant estimate finds what chance does.
    values = torch.arange(1.0, 41.0).reshape(5, 8)
    assert agreement(torch.full((5, 8), 7.0), values, top_k=10).recall == pytest.approx(10 / 40)
    # Signs are weighed alike: that of the 3 is right, and one of the three that tie.
    found = agreement(row(1, 1, -1, -1), row(3, 1, 1, 1), top_k=2)
    assert found.sign_agreement == pytest.approx((1 + 1 / 3) / 2)


def test_ties_have_the_mean_of_their_ranks() -> None:
    found = agreement(row(1, 2, 2, 4), row(1, 1, 5, 9))
    frame = pd.DataFrame({"estimate": [1, 2.5, 2.5, 4], "exact": [1.5, 1.5, 3, 4]})
    assert found.rank_correlation == pytest.approx(frame.corr().iloc[0, 1])


@pytest.mark.parametrize(
    ("estimate", "exact"),
    [(row(1), row(1)), (row(2, 2, 2), row(1, 2, 3)), (row(1, 2, 3), row(0, 0, 0))],
)
def test_rank_correlation_of_a_constant_is_nan(estimate: torch.Tensor, exact: torch.Tensor) -> None:
    found = agreement(estimate, exact)
    assert math.isnan(found.rank_correlation)
    assert math.isnan(found.rank_correlation_of_sizes)
    assert found.recall == 1


def test_rank_correlation_of_sizes_is_of_sizes() -> None:
    found = agreement(row(-1, 2, -3), row(1, -2, 3))
    assert found.rank_correlation == pytest.approx(-1)
    assert found.rank_correlation_of_sizes == 1


def test_zeros_have_no_sign() -> None:
    # Where the exact value is 0, nothing can be wrong; where the estimate is, the sign is missed.
    assert agreement(row(5, 1, 0), row(3, 0, 2), top_k=3).sign_agreement == 0.5
    assert math.isnan(agreement(row(5, 1, 0), row(0, 0, 0)).sign_agreement)


# Properties -------------------------------------------------------------------------------------

# Whole numbers of which cubes are exact in float32; few, so that ties are common.
numbers = st.integers(-60, 60) | st.integers(-2, 2)
tables = st.integers(1, 5).flatmap(
    lambda layers: st.lists(
        st.tuples(numbers, numbers), min_size=layers * POSITIONS, max_size=layers * POSITIONS
    )
)
tops = st.integers(1, 30)


def pair(table: list[tuple[int, int]]) -> list[dict[str, torch.Tensor]]:
    """Two outcomes of two sites each; the values of the second site are those of the first."""
    values = torch.tensor(table, dtype=torch.float32).reshape(-1, POSITIONS, 2)
    return [{"mlp": values[..., side], "attn": values[..., side] * 2} for side in (0, 1)]


@given(tables, tops)
def test_an_outcome_agrees_with_itself(table: Any, top_k: int) -> None:
    values, _ = pair(table)
    found = made(values).agreement(made(values), top_k)
    assert found.recall == pytest.approx(1)
    different = len(np.unique(np.concatenate([each.numpy().ravel() for each in values.values()])))
    if different > 1:
        assert found.rank_correlation == 1
    if any(each.any() for each in values.values()):
        assert found.sign_agreement == 1


@given(tables, tops)
def test_figures_are_within_their_bounds(table: Any, top_k: int) -> None:
    estimate, exact = pair(table)
    found = made(estimate).agreement(made(exact), top_k)
    assert 0 <= found.recall <= 1
    for figure, low in (
        (found.sign_agreement, 0),
        (found.rank_correlation, -1),
        (found.rank_correlation_of_sizes, -1),
    ):
        assert math.isnan(figure) or low - 1e-9 <= figure <= 1 + 1e-9


@given(tables)
def test_rank_correlations_are_those_of_pandas(table: Any) -> None:
    estimate, exact = pair(table)
    found = made(estimate).agreement(made(exact))
    columns = [
        torch.cat([values[name].flatten() for name in ("mlp", "attn")]).numpy()
        for values in (estimate, exact)
    ]
    frame = pd.DataFrame(dict(zip(("estimate", "exact"), columns, strict=True)))
    for figure, values in (
        (found.rank_correlation, frame),
        (found.rank_correlation_of_sizes, frame.abs()),
    ):
        expected = values.corr(method="spearman").iloc[0, 1]
        assert figure == pytest.approx(expected, nan_ok=True)


@given(tables, tops)
def test_only_the_order_matters(table: Any, top_k: int) -> None:
    """A monotone and odd change of either side changes nothing."""
    estimate, exact = pair(table)
    cubed = {name: values**3 + values for name, values in estimate.items()}
    found = made(cubed).agreement(made(exact), top_k)
    same(found, made(estimate).agreement(made(exact), top_k))
    constant = len(np.unique(torch.cat([*estimate.values()]).numpy())) == 1
    if not constant:
        assert made(cubed).agreement(made(estimate)).rank_correlation == 1
        assert made(cubed).agreement(made(estimate)).rank_correlation_of_sizes == 1 or (
            len(np.unique(torch.cat([*estimate.values()]).abs().numpy())) == 1
        )


@given(tables, tops, st.randoms(use_true_random=False))
def test_the_order_of_cells_does_not_matter(table: Any, top_k: int, random: Any) -> None:
    shuffled = random.sample(table, len(table))
    one, other = (
        made(estimate).agreement(made(exact), top_k)
        for estimate, exact in (pair(table), pair(shuffled))
    )
    same(one, other)


@given(tables, tops)
def test_recall_is_the_same_both_ways(table: Any, top_k: int) -> None:
    one, other = map(made, pair(table))
    assert one.agreement(other, top_k).recall == pytest.approx(other.agreement(one, top_k).recall)


@given(tables, tops)
def test_by_site_is_each_site_alone(table: Any, top_k: int) -> None:
    estimate, exact = pair(table)
    found = made(estimate).agreement(made(exact), top_k)
    sites = found.by_site()
    assert list(sites) == ["mlp", "attn"]
    assert sum(one.cells for one in sites.values()) == found.cells
    for name, one in sites.items():
        alone = made({name: estimate[name]}).agreement(made({name: exact[name]}), top_k)
        same(one, alone)
        assert list(one.by_site()) == [name]


# Which cells ------------------------------------------------------------------------------------


def test_cells_that_both_swept_are_compared() -> None:
    one, other = torch.tensor([[1, 1, 0, 1]]), torch.tensor([[0, 1, 1, 1]])
    found = made({"mlp": row(1, 2, 3, 4)}, swept={"mlp": one}).agreement(
        made({"mlp": row(10, 20, 30, 40)}, swept={"mlp": other})
    )
    assert found.to_dataframe()["position"].tolist() == [1, 3]
    assert found.to_dataframe()["estimate"].tolist() == [2, 4]
    assert found.to_dataframe()["exact"].tolist() == [20, 40]
    assert found.left_out == 0


def test_cells_are_matched_by_their_place(out: Outcome) -> None:
    """The same cells in another order, as a list of cells, are the same cells."""
    cells = {
        name: attrs.evolve(
            each, **{key: getattr(each, key).flip(0) for key in ("index", "present", "exact")}
        )
        for name, each in out.cells.items()
    }
    turned = attrs.evolve(altered(out, lambda _, values: values.flip(0)), cells=cells)
    frame = turned.agreement(out).to_dataframe()
    assert frame["estimate"].equals(frame["exact"])


def test_sites_of_both_are_compared(out: Outcome) -> None:
    found = out.agreement(sweep(Sites(["mlp", "k", "resid"], layers=[1], seq_pos_type="each")))
    assert list(found.by_site()) == ["resid", "k"]
    assert found.cells == 5 + 5 * 2
    assert found.to_dataframe()["layer"].unique().tolist() == [1]


def test_nan_is_left_out_and_counted() -> None:
    nan, inf = float("nan"), float("inf")
    found = agreement(row(1, nan, 3, 4, inf, 6), row(1, 2, nan, 4, 5, -6), top_k=3)
    without = agreement(row(1, 4, 6), row(1, 4, -6), top_k=3)
    assert [getattr(found, name) for name in FIGURES] == [
        getattr(without, name) for name in FIGURES
    ]
    assert (found.cells, found.left_out) == (3, 3)
    assert found.sign_agreement == pytest.approx(2 / 3)
    assert found.to_dataframe()["position"].tolist() == [0, 3, 5]
    assert [one.left_out for one in found.by_site().values()] == [3]


def test_nothing_but_nan() -> None:
    found = agreement(row(float("nan"), 1), row(1, float("nan")))
    assert (found.cells, found.left_out) == (0, 2)
    for figure in FIGURES[:-1]:
        assert math.isnan(getattr(found, figure))
    assert found.worst() == []
    assert found.to_dataframe().empty
    assert str(found).splitlines()[1].split() == ["all", "0", "2", "0", *["nan"] * 4]
    for interactive in (False, True):
        with pytest.raises(OutcomeError, match="no cells to draw"):
            found.plot(interactive=interactive)


def test_estimates_in_the_exact_outcome_do_not_count() -> None:
    sure = {"mlp": torch.tensor([[True, False, True, True]])}
    exact = made({"mlp": row(1, 99, 3, 4)}, exact=sure)
    found = made({"mlp": row(1, 2, 3, -4)}).agreement(exact)
    assert found.to_dataframe()["exact"].tolist() == [1, 3, 4]
    assert (found.cells, found.left_out) == (3, 0)
    # What an estimate knows agrees by itself: the one cell that it estimates is compared.
    plain = made({"mlp": row(1, 2, 3, 4)})
    swapped = exact.agreement(plain)
    assert swapped.cells == 1
    assert swapped.to_dataframe()["exact"].tolist() == [2]


def test_sizes_are_compared_with_sizes() -> None:
    """Two prompts of opposite sign: their mean is 0, and the mean of their sizes is not."""
    values = torch.tensor([[[3.0, -3.0], [1.0, 1.0], [-2.0, -2.0]]])
    out = made({"mlp": values})
    for one, other in (
        (out.magnitudes(), out),
        (out, out.magnitudes()),
        (out.magnitudes(), out.magnitudes()),
    ):
        found = one.agreement(other)
        assert found.magnitude
        frame = found.to_dataframe()
        assert frame["estimate"].tolist() == frame["exact"].tolist() == [3, 1, 2]
        assert math.isnan(found.sign_agreement)
        assert found.rank_correlation == found.rank_correlation_of_sizes == 1
    plain = out.agreement(out)
    assert not plain.magnitude
    assert plain.to_dataframe()["exact"].tolist() == [0, 1, -2]
    assert plain.sign_agreement == 1


# Errors -----------------------------------------------------------------------------------------


def renamed(
    out: Outcome, number: int, *, name: str = "position", labels: Any = range(5)
) -> Outcome:
    """The outcome, one axis of its `mlp` another."""
    axes = list(out.cells["mlp"].axes)
    axes[number] = Axis(name, tuple(labels))
    return attrs.evolve(out, cells={"mlp": attrs.evolve(out.cells["mlp"], axes=tuple(axes))})


PLAIN = made({"mlp": row(1, 2, 3, 4, 5)})


@pytest.mark.parametrize(
    ("exact", "says"),
    [
        (made({"attn": row(1), "v": row(1)}), r"sites \['mlp'\] .* \['attn', 'v'\]: none is in"),
        (attrs.evolve(PLAIN, scale="restored"), "scale 'change' and .* 'restored'"),
        (
            attrs.evolve(PLAIN, metric="mine", raw={"mine": PLAIN.raw["logit_difference"]}),
            "metric 'logit_difference' and .* 'mine'",
        ),
        (renamed(PLAIN, 1, name="head"), "'mlp' has the axes layer, position .* layer, head in"),
        (made({"mlp": row(1, 2)}), "axis position of 'mlp' has 5 places .* and 2 in"),
        (renamed(PLAIN, 1, labels=(0, 1, 2, 9, 4)), "axis position of 'mlp' has 3 .* has 9"),
        (
            made({"mlp": row(*range(5))}, exact={"mlp": torch.zeros(1, 5, dtype=torch.bool)}),
            r"no cell of \['mlp'\] was both",
        ),
    ],
)
def test_outcomes_that_cannot_be_compared(exact: Outcome, says: str) -> None:
    with pytest.raises(OutcomeError, match=says):
        PLAIN.agreement(exact)


def test_no_cell_in_both() -> None:
    one, other = torch.tensor([[1, 0]]), torch.tensor([[0, 1]])
    first, second = (made({"mlp": row(1, 2)}, swept={"mlp": swept}) for swept in (one, other))
    with pytest.raises(OutcomeError, match=r"no cell of \['mlp'\] was both"):
        first.agreement(second)


def test_lists_of_other_sites(listed: Outcome) -> None:
    axes = (Axis("site", ("attn L2 [-1]",)),)
    other = attrs.evolve(
        listed, cells={**listed.cells, "attn": attrs.evolve(listed.cells["attn"], axes=axes)}
    )
    with pytest.raises(OutcomeError, match=r"axis site of 'attn' .*'attn L1 \[-1\]'.*'attn L2"):
        listed.agreement(other)


@pytest.mark.parametrize(
    ("top_k", "says"),
    [(0, "at least 1, got 0"), (-3, "got -3"), (2.0, "integer, got 2.0"), (True, "integer, got")],
)
def test_bad_top_k(top_k: float, says: str) -> None:
    with pytest.raises(OutcomeError, match=f"top_k must be .*{says}"):
        PLAIN.agreement(PLAIN, top_k)


# Tables -----------------------------------------------------------------------------------------


def test_worst_cells_are_those_that_differ_most(out: Outcome, estimate: Outcome) -> None:
    found = estimate.agreement(out)
    first, second, *_ = rows = found.worst(10**6)
    assert len(rows) == found.cells == 3 * 5 * (1 + 4 + 2)
    assert list(first) == ["site", "layer", "position", "head", "token", "estimate", "exact"]
    assert (first["site"], first["layer"], first["position"], first["head"]) == ("k", 2, 4, 1)
    assert first["token"] == " is"
    assert first["exact"] == out["k"][2, 4, 1].item()
    assert first["estimate"] == estimate["k"][2, 4, 1].item()
    assert first["estimate"] - first["exact"] == pytest.approx(-3, abs=1e-5)
    assert list(second) == ["site", "layer", "position", "token", "estimate", "exact"]
    assert (second["site"], second["layer"], second["position"]) == ("resid", 0, 0)
    missed = [abs(each["estimate"] - each["exact"]) for each in rows]
    assert missed == sorted(missed, reverse=True)
    assert found.worst(2) == [first, second]
    assert len(found.worst()) == 10


def test_worst_cells_are_not_those_of_the_largest_values() -> None:
    found = agreement(row(9, 1, -2, 0), row(9, 0, 3, -1.5))
    assert [each["position"] for each in found.worst()] == [2, 3, 1, 0]


def test_dataframe(out: Outcome, estimate: Outcome) -> None:
    frame = estimate.agreement(out).to_dataframe()
    expected = out.to_dataframe(level=None).rename(columns={"value": "exact"})
    expected.insert(
        expected.columns.get_loc("exact"), "estimate", estimate.to_dataframe(level=None)["value"]
    )
    pd.testing.assert_frame_equal(frame, expected)
    assert frame["token"].unique().tolist() == list(TOKENS)


def test_tables_of_a_list_of_sites(listed: Outcome) -> None:
    found = listed.agreement(listed)
    frame = found.to_dataframe()
    assert list(frame.columns) == ["site", "label", "estimate", "exact"]
    assert frame["label"].tolist() == ["attn L1 [-1]", "mlp L1 [-1]", "attn L1 [-1] + mlp L1 [-1]"]
    assert {each["label"] for each in found.worst()} == set(frame["label"])


def test_pandas_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = PLAIN.agreement(PLAIN)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(OutcomeError, match=r"pip install 'nnpatch-core\[pandas\]'"):
        found.to_dataframe()


def test_text_is_a_table() -> None:
    estimate = made({"mlp": row(-9, 6, 1, 7, 0), "resid": row(1, 2, 3, 4, float("nan"))})
    exact = made({"mlp": row(10, 8, -6, 1, 0), "resid": row(1, 2, 3, 4, 5)})
    found = estimate.agreement(exact, top_k=3)
    head, *lines = str(found).splitlines()
    assert head.split("  ")[-1].endswith("recall signs rank corr. rank corr. of sizes")
    assert [line.split()[0] for line in lines] == ["all", "mlp", "resid"]
    # cells, left out, top, recall, signs, and the rank correlations
    assert lines[1].split()[1:] == ["5", "0", "3", "0.67", "0.33", "-0.20", "0.70"]
    assert lines[2].split()[1:] == ["4", "1", "3", "1.00", "1.00", "1.00", "1.00"]
    assert lines[0].split()[1:4] == ["9", "1", "3"]
    assert {len(line) for line in lines} == {len(head)}
    assert repr(found) == (
        f"Agreement(logit_difference, 9 cells: recall {found.recall:.2f} of 3, "
        f"rank correlation {found.rank_correlation:.2f})"
    )


# Pictures ---------------------------------------------------------------------------------------


def drawn(figure: Any) -> dict[str, tuple[Any, tuple[Any, Any, Any]]]:
    """Site name to its points `[cells, (exact, estimate)]` and colour, of a matplotlib figure."""
    return {
        points.get_label(): (points.get_offsets(), tuple(points.get_facecolor()[0][:3]))
        for points in figure.axes[0].collections
    }


def notes(figure: Any) -> list[Any]:
    return [note.get_text() for note in figure.axes[0].texts]


def test_plot(out: Outcome, estimate: Outcome) -> None:
    figure = estimate.agreement(out).plot(label=2)
    points = drawn(figure)
    assert list(points) == ["resid", "q", "k"]
    for name, (places, _) in points.items():
        assert np.allclose(places[:, 0], out[name].flatten())
        assert np.allclose(places[:, 1], estimate[name].flatten())
    assert len({colour for _, colour in points.values()}) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["resid", "q", "k"]
    axis = figure.axes[0]
    assert axis.get_xlabel() == "exact: activation (restored)"
    assert axis.get_ylabel() == "estimate: attribution (restored)"
    assert figure.get_suptitle() == (
        "LlamaForCausalLM: attribution and activation, logit_difference"
    )
    # The diagonal is where both are equal; every point is within the picture.
    (diagonal,) = (line for line in axis.lines if line.get_linestyle() == "--")
    assert (diagonal.get_xy1(), diagonal.get_slope()) == ((0, 0), 1)
    for number, limits in enumerate((axis.get_xlim(), axis.get_ylim())):
        every = np.concatenate([places[:, number] for places, _ in points.values()])
        assert limits[0] < every.min() < every.max() < limits[1]


def test_worst_cells_have_their_names_beside_them(out: Outcome, estimate: Outcome) -> None:
    found = estimate.agreement(out)
    figure = found.plot(label=2)
    assert notes(figure) == ["k L2 H1 [4] ' is'", "resid L0 [0] '<s>'"]
    worst = found.worst(2)
    assert [note.xy for note in figure.axes[0].texts] == [
        (each["exact"], each["estimate"]) for each in worst
    ]
    assert len(notes(found.plot())) == 5
    assert notes(found.plot(label=0)) == []


@pytest.mark.parametrize("count", [2, 5, 40])
def test_names_do_not_cover_each_other(count: int) -> None:
    """Of points that are close together, and at the top of the picture."""
    estimate = torch.full((1, 50), 10.0) + torch.arange(50) * 1e-4
    found = agreement(estimate, torch.zeros(1, 50))
    heights = np.array([note.xyann[1] for note in found.plot(label=count).axes[0].texts])
    assert len(heights) == count
    assert (np.diff(np.sort(heights)) > 0.9 * min(0.06, 1 / count)).all()
    assert heights.min() >= 0
    assert heights.max() <= 1
    # The higher the point, the higher its name.
    assert (np.diff(heights) < 0).all()
    interactive = found.plot(label=count, interactive=True).layout
    low, high = interactive.yaxis.range
    area = interactive.height - 140
    shown = [(note.y - low) / (high - low) - note.ay / area for note in interactive.annotations]
    assert np.allclose(shown, heights)


def test_a_name_is_as_high_as_its_point_where_there_is_room() -> None:
    found = agreement(row(0, 5, -5), row(0, 0, 0))
    figure = found.plot(label=2)
    axis = figure.axes[0]
    low, high = axis.get_ylim()
    for note in axis.texts:
        assert note.xyann[1] == pytest.approx((note.xy[1] - low) / (high - low))


def test_interactive_plot_says_the_same(out: Outcome, estimate: Outcome) -> None:
    figure = estimate.agreement(out).plot(interactive=True, label=2, title="Mine")
    page = json.loads(figure.to_json())
    assert page["layout"]["title"]["text"] == "Mine"
    assert [trace["name"] for trace in page["data"]] == ["resid", "q", "k"]
    assert len({trace["marker"]["color"] for trace in page["data"]}) == 3
    for trace in page["data"]:
        assert np.allclose(trace["x"], out[trace["name"]].flatten())
        assert np.allclose(trace["y"], estimate[trace["name"]].flatten())
        assert "%{text}" in trace["hovertemplate"]
    # plotly would read <s> as markup, and $x$ as a formula.
    assert page["data"][0]["text"][:2] == [
        "resid L0 [0] &#x27;&lt;s&gt;&#x27;",
        "resid L0 [1] &#x27; &#36;x&#36;&#x27;",
    ]
    assert page["data"][2]["text"][-1] == "k L2 H1 [4] &#x27; is&#x27;"
    first, second = page["layout"]["annotations"]
    assert first["text"] == page["data"][2]["text"][-1]
    assert second["text"] == page["data"][0]["text"][0]
    assert (first["x"], first["y"]) == (page["data"][2]["x"][-1], page["data"][2]["y"][-1])
    assert page["layout"]["xaxis"]["title"]["text"] == "exact: activation (restored)"
    assert page["layout"]["yaxis"]["title"]["text"] == "estimate: attribution (restored)"
    (diagonal,) = page["layout"]["shapes"]
    assert (diagonal["x0"], diagonal["x1"]) == (diagonal["y0"], diagonal["y1"])
    assert diagonal["x0"] <= min(page["layout"]["yaxis"]["range"])
    assert diagonal["x1"] >= max(page["layout"]["xaxis"]["range"])


def test_interactive_plot_of_many_cells_is_drawn_by_webgl() -> None:
    small, large = torch.rand(20, 20), torch.rand(80, 80)
    for values, kind in ((small, "scatter"), (large, "scattergl")):
        (trace,) = agreement(values, values).plot(interactive=True).data
        assert trace.type == kind


def test_files(tmp_path: Path, out: Outcome, estimate: Outcome) -> None:
    """Every cell of the token `$x$`, which is no formula, is named."""
    found = estimate.agreement(out)
    figure = found.plot(label=found.cells)
    assert "resid L0 [1] ' $x$'" in notes(figure)
    assert not any(note.get_parse_math() for note in figure.axes[0].texts)
    figure.savefig(tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    found.plot(interactive=True).write_html(tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "France| Japan" in page
    assert 'src="http' not in page, "the page must be readable without a network"


def test_plot_of_names_of_ones_own(tmp_path: Path) -> None:
    """More names than there are colours in the list, and one that would be a broken formula."""
    sites = [
        MultiSite([Site.get_site(tiny_api(), "mlp", 1, seq_pos=[-1])], name=f"$\\{number}$<b>")
        for number in range(12)
    ]
    out = sweep(Sites.from_sites(sites))
    found = out.agreement(out)
    figure = found.plot(label=1)
    assert len({colour for _, colour in drawn(figure).values()}) == 12
    assert notes(figure) == ["mlp L1 [-1]"]
    figure.savefig(tmp_path / "out.png")
    names = [trace.name for trace in found.plot(interactive=True).data]
    assert names[0] == "&#36;\\0&#36;&lt;b&gt;"


def test_plot_of_sizes_says_so() -> None:
    found = PLAIN.magnitudes().agreement(PLAIN)
    assert found.plot().axes[0].get_xlabel() == "exact: activation (change, as sizes)"
    title = "my-model: activation and activation, logit_difference"
    assert found.plot().get_suptitle() == title
    assert found.plot(interactive=True).layout.title.text == title


@pytest.mark.parametrize("interactive", [False, True])
def test_plot_where_all_is_0(interactive: bool) -> None:
    agreement(row(0, 0), row(0, 0)).plot(interactive=interactive)


@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize(
    ("label", "says"), [(-1, "at least 0, got -1"), (1.5, "an integer, got 1.5")]
)
def test_bad_label(interactive: bool, label: float, says: str) -> None:
    with pytest.raises(OutcomeError, match=f"label must be {says}"):
        PLAIN.agreement(PLAIN).plot(interactive=interactive, label=label)


@pytest.mark.parametrize(("library", "interactive"), [("matplotlib", False), ("plotly", True)])
def test_library_that_is_not_installed(
    library: str, interactive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = PLAIN.agreement(PLAIN)
    for module in ("matplotlib.figure", "plotly.graph_objects"):
        if module.partition(".")[0] == library:
            monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OutcomeError, match=rf"needs {library}: pip install 'nnpatch-core\[plot\]'"):
        found.plot(interactive=interactive)


@pytest.mark.parametrize("k", [-1, 1.5, "3", True, None])
def test_a_number_of_worst_cells_is_a_count(k: Any) -> None:
    with pytest.raises(OutcomeError, match="k must be"):
        agreement(row(1, 2), row(2, 1)).worst(k)


def test_names_of_users_are_shown_in_one_short_line() -> None:
    long = "\x1b[31m" + "x" * 5000
    one, other = made({long: row(1, 2)}), made({"mlp": row(1, 2)})
    for left, right in ((one, other), (one, made({long: row(1, 2, 3)}))):
        with pytest.raises(OutcomeError) as caught:
            left.agreement(right)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 600
    for call in (lambda: other.for_metric(long), lambda: other[long], lambda: one["mlp"]):
        with pytest.raises(OutcomeError) as caught:
            call()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 600
    with pytest.raises(OutcomeError, match="title must be a text, got 5"):
        other.agreement(other).plot(title=5)
