"""Tables of an outcome: how sure a value is in a frame, Parquet files, and netCDF by xarray."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import torch
import xarray

from nnpatch_core import (
    Outcome,
    PromptPairs,
    Sites,
    activation_patching,
    attribution_patching,
)
from nnpatch_core.errors import OutcomeError, StatisticsWarning
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer

#: With answers of which the model thinks alike in each pair, so that values are steady.
NAMES = ["Anna", "日本", "Zoë", "Peter", "Mary", "Lee", "Tom", "Sue"]
SOURCE = [f"{name} said France is" for name in NAMES]
TARGET = [f"{name} said Japan is" for name in NAMES]
WORDS = " Paris Tokyo Rome Oslo Bern Kiev Lima Doha Cairo Delhi"
TOKENIZER = tiny_tokenizer([*SOURCE, *TARGET, WORDS])
PAIRS = PromptPairs.from_texts(
    SOURCE,
    TARGET,
    [" Doha"] * 8,
    [" Paris"] * 8,
    TOKENIZER,
    spans={"verb": [" is"] * 8, "Länd": [("France", "Japan")] * 8},
)
METRICS = ["logit_difference", "answer_probability"]
EACH = Sites(["resid", "k"], layers=[0, 2], seq_pos_type="each")
SPANS = Sites(["resid", "k"], seq_pos_type="spans", seq_pos=["verb", "Länd"])


def sweep(sites: Any = EACH, kind: Any = activation_patching, **options: Any) -> Outcome:
    pairs = options.pop("pairs", PAIRS)
    return kind(tiny_model(), tiny_api(), sites, pairs, progress=False, **options)


def listed() -> Any:
    sites = EACH.get_sites_dict(tiny_model(), tiny_api(), PAIRS)["resid"]
    return Sites.from_sites(sites[:3])


@pytest.fixture(scope="module")
def out() -> Outcome:
    return sweep(metric=METRICS)


def column(frame: pd.DataFrame, site: str, name: str) -> Any:
    return frame.loc[frame["site"] == site, name].to_numpy(np.float64)


# Frames -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.95, 0.5])
def test_a_frame_says_how_sure_a_value_is(out: Outcome, level: float) -> None:
    frame = out.to_dataframe(level=level)
    assert list(frame)[-4:] == ["value", "low", "high", "p_value"]
    family = out.pvalues(None, "max_t")
    for name in out:
        low, high = out.interval(name, level)
        np.testing.assert_allclose(column(frame, name, "low"), low.flatten(), rtol=1e-9)
        np.testing.assert_allclose(column(frame, name, "high"), high.flatten(), rtol=1e-9)
        np.testing.assert_allclose(column(frame, name, "p_value"), family[name].flatten())
        unswept = ~out.swept(name).flatten().numpy()
        assert np.isnan(column(frame, name, "low")[unswept]).all()


def test_a_difference_has_the_columns_too(out: Outcome) -> None:
    difference = sweep(kind=attribution_patching) - sweep()
    frame = difference.to_dataframe()
    low, _ = difference.interval("k")
    np.testing.assert_allclose(column(frame, "k", "low"), low.flatten(), rtol=1e-9, atol=1e-12)
    assert list(difference.to_dataframe(level=None))[-1] == "value"


def test_one_prompt_says_nothing_of_others() -> None:
    frame = sweep(pairs=PAIRS[:1]).to_dataframe().dropna(subset="value")
    assert (frame["low"] == -math.inf).all()
    assert (frame["high"] == math.inf).all()
    assert frame["p_value"].isna().all()


def test_too_few_prompts_for_an_interval_have_none() -> None:
    out = sweep(pairs=PAIRS[:3])
    frame = out.to_dataframe().dropna(subset="value")
    assert (frame["low"] == -math.inf).all()
    assert (frame["high"] == math.inf).all()
    assert frame["p_value"].notna().any()
    with pytest.warns(StatisticsWarning, match="3 prompts are too few"):
        out.interval()
    assert len(out.to_dataframe(level=None)) == 36


@pytest.mark.parametrize(
    "made",
    [
        lambda: sweep(kind=attribution_patching),
        lambda: sweep().magnitudes(),
        lambda: sweep(keep="means"),
        pytest.param(
            lambda: sweep() - sweep(pairs=PAIRS[:6]),
            marks=pytest.mark.filterwarnings(
                "ignore:6 prompts are in outcomes:nnpatch_core.errors.StatisticsWarning"
            ),
        ),
    ],
    ids=["estimates", "sizes", "means", "other prompts"],
)
def test_where_there_are_no_p_values_there_are_intervals(made: Any) -> None:
    frame = made().to_dataframe().dropna(subset="value")
    assert frame["p_value"].isna().all()
    assert (frame["low"] <= frame["value"] + 1e-6).all()
    assert (frame["value"] <= frame["high"] + 1e-6).all()


def test_means_of_sizes_have_no_interval() -> None:
    kept = sweep(kind=attribution_patching, grad_drop=True, keep="means")
    assert kept.to_dataframe()["low"].isna().all()


@pytest.mark.parametrize("level", [0, 1, -1, "high", True, math.nan])
def test_what_is_no_level_is_told(out: Outcome, level: Any, tmp_path: Path) -> None:
    with pytest.raises(OutcomeError, match="level must be between 0 and 1"):
        out.to_dataframe(level=level)
    with pytest.raises(OutcomeError, match="level must be between 0 and 1"):
        out.to_parquet(tmp_path / "f", level=level)


# netCDF -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["h5netcdf", "scipy"])
@pytest.mark.parametrize("per_prompt", [False, True])
@pytest.mark.parametrize("sites", [EACH, SPANS, listed()], ids=["each", "spans", "list"])
def test_netcdf_keeps_it(sites: Any, per_prompt: bool, engine: Any, tmp_path: Path) -> None:
    out = sweep(sites)
    data = out.to_xarray(per_prompt)
    path = tmp_path / "out.nc"
    data.to_netcdf(path, engine=engine)
    with xarray.open_dataset(path, engine=engine) as found:
        xarray.testing.assert_equal(found, data)
        about = dict(found.attrs)
        assert {name: str(words) for name, words in about.items()} == {
            **out.info,
            "kind": "activation",
            "scale": "restored",
            "metric": "logit_difference",
            "magnitude": "0",
            "prompts": "8",
        }
        if "token" in data.coords:
            assert tuple(map(str, found.coords["token"].values)) == out.tokens
        if "span" in data.coords:
            assert found.coords["span"].values.tolist() == ["verb", "Länd"]


def test_info_that_is_odd_is_written_too(tmp_path: Path) -> None:
    odd = {"model": "日本/模型", "fallback": "a\nb; 'c'", "revision": ""}
    out = attrs.evolve(sweep(), info={**sweep().info, **odd})
    for engine in ("h5netcdf", "scipy"):
        out.to_xarray().to_netcdf(tmp_path / engine, engine=engine)
        with xarray.open_dataset(tmp_path / engine, engine=engine) as found:
            assert {name: found.attrs[name] for name in odd} == odd


# Parquet ----------------------------------------------------------------------------------------


def test_a_row_a_patch_and_a_column_a_metric(out: Outcome, tmp_path: Path) -> None:
    path = tmp_path / "cells.parquet"
    out.to_parquet(path)
    frame = pd.read_parquet(path)
    labels = ["site", "layer", "position", "token", "head"]
    endings = ["", "_low", "_high", "_p"]
    assert list(frame) == [
        *labels,
        "exact",
        "elided",
        *(metric + ending for metric in METRICS for ending in endings),
    ]
    assert len(frame) == sum(len(cells.index) for cells in out.cells.values()) == 24
    assert frame.loc[frame["site"] == "resid", "head"].isna().all()
    assert frame["exact"].all()
    for metric in METRICS:
        seen = out.for_metric(metric)
        intervals, family = seen.interval(), seen.pvalues(None, "max_t")
        for row in frame.to_dict("records"):
            head = [int(row["head"])] if row["site"] == "k" else []
            place = (row["layer"], row["position"], *head)
            assert row["token"] == out.tokens[row["position"]]
            assert row["elided"] == bool(out.elided(row["site"])[place])
            assert row[metric] == seen[row["site"]][place].item()
            low, high = intervals[row["site"]]
            assert row[f"{metric}_low"] == pytest.approx(low[place].item(), rel=1e-9)
            assert row[f"{metric}_high"] == pytest.approx(high[place].item(), rel=1e-9)
            p_value = family[row["site"]][place].item()
            assert row[f"{metric}_p"] == pytest.approx(p_value, nan_ok=True)


def test_a_row_a_cell_and_prompt(out: Outcome, tmp_path: Path) -> None:
    path = tmp_path / "cells.parquet"
    out.to_parquet(path, per_prompt=True)
    frame = pd.read_parquet(path)
    assert len(frame) == 24 * 8
    ends = ["", "_patched", "_source", "_target"]
    columns = [metric + ending for metric in METRICS for ending in ends]
    assert list(frame)[5:] == ["prompt", "exact", "elided", *columns]
    for metric in METRICS:
        seen = out.for_metric(metric)
        for row in frame.sample(60, random_state=0).to_dict("records"):
            name, prompt = row["site"], row["prompt"]
            head = [int(row["head"])] if name == "k" else []
            place = (row["layer"], row["position"], *head)
            assert row[metric] == seen.per_prompt(name)[(*place, prompt)].item()
            assert row[f"{metric}_patched"] == seen.patched(name)[(*place, prompt)].item()
            assert row[f"{metric}_source"] == seen.baseline.source[prompt].item()
            assert row[f"{metric}_target"] == seen.baseline.target[prompt].item()
            cells = out.cells[name]
            (number,) = (cells.index == torch.tensor(place)).all(1).nonzero().flatten().tolist()
            assert row["elided"] == bool(cells.elided[number, prompt])


def test_a_file_says_where_its_numbers_come_from(out: Outcome, tmp_path: Path) -> None:
    path = tmp_path / "cells.parquet"
    for per_prompt in (False, True):
        out.to_parquet(path, per_prompt)
        about = json.loads(pyarrow.parquet.read_schema(path).metadata[b"nnpatch"])
        assert about == {
            "format": "nnpatch cells 1",
            "kind": "activation",
            "scale": "restored",
            "magnitude": False,
            "metrics": METRICS,
            "prompts": 8,
            "level": None if per_prompt else 0.95,
            "info": dict(out.info),
        }


@pytest.mark.parametrize("sites", [SPANS, listed()], ids=["spans", "list"])
def test_other_labels(sites: Any, tmp_path: Path) -> None:
    out = sweep(sites)
    out.to_parquet(tmp_path / "f", level=None)
    frame = pd.read_parquet(tmp_path / "f")
    name = "span" if "span" in frame else "label"
    swept = out.to_dataframe(level=None).dropna(subset="value").reset_index(drop=True)
    assert frame[name].tolist() == swept[name].tolist()
    assert frame["logit_difference"].tolist() == pytest.approx(swept["value"].tolist())
    assert list(frame)[-1] == "logit_difference"


def test_means_and_screens_are_written(tmp_path: Path) -> None:
    sweep(keep="means").to_parquet(tmp_path / "f")
    means = pd.read_parquet(tmp_path / "f")
    assert means["logit_difference_low"].notna().all()
    with pytest.raises(OutcomeError, match="needs the numbers of each prompt"):
        sweep(keep="means").to_parquet(tmp_path / "f", per_prompt=True)
    screened = sweep(screen="attribution", top_k=3, spot_checks=0)
    screened.to_parquet(tmp_path / "f")
    frame = pd.read_parquet(tmp_path / "f")
    assert set(frame["exact"]) == {True, False}
    assert frame.loc[~frame["exact"], "logit_difference_p"].isna().all()


def test_some_cells_alone(out: Outcome, tmp_path: Path) -> None:
    out.sel(site="k", layer=2, head=1).to_parquet(tmp_path / "f", level=None)
    frame = pd.read_parquet(tmp_path / "f")
    assert set(frame["site"]) == {"k"}
    assert frame["position"].tolist() == list(range(4))
    assert set(frame["head"]) == {1}


@pytest.mark.parametrize("name", ["layer", "site", "token", "exact"])
def test_a_metric_of_a_name_that_is_taken(name: str, tmp_path: Path) -> None:
    out = sweep(metric={name: "logit_difference"})
    with pytest.raises(OutcomeError, match=f"metric '{name}' would have a column '{name}', and so"):
        out.to_parquet(tmp_path / "f", level=None)
    twice = sweep(metric={"a": "logit_difference", "a_low": "answer_probability"})
    with pytest.raises(OutcomeError, match="metric 'a_low' would have a column 'a_low'"):
        twice.to_parquet(tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_whole_or_as_it_was(
    out: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    out.to_parquet(path, level=None)
    path.chmod(0o640)
    before = path.read_bytes()

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for owner, name in ((os, "fsync"), (Path, "replace"), (pyarrow.parquet, "write_table")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            with pytest.raises(OutcomeError, match="f could not be written: No space left"):
                out.for_metric("answer_probability").magnitudes().to_parquet(path, level=None)
        assert path.read_bytes() == before
        assert [each.name for each in tmp_path.iterdir()] == ["f"]
    (tmp_path / "link").symlink_to(path)
    out.magnitudes().to_parquet(tmp_path / "link", level=None)
    assert (tmp_path / "link").is_symlink()
    assert path.read_bytes() != before
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("place", "told"), [("folder", "it is a folder"), ("none/f", "there is no folder")]
)
def test_where_no_file_can_be(out: Outcome, tmp_path: Path, place: str, told: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutcomeError, match=told):
        out.to_parquet(tmp_path / place, level=None)


def test_pyarrow_is_an_extra(out: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(OutcomeError, match=r"pip install 'nnpatch-core\[parquet\]'"):
        out.to_parquet(tmp_path / "f")
