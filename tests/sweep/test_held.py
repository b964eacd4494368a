"""A process that measures several shares records once, and takes unpatched runs from others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nnpatch_core import Outcome, Sites, ablation_patching, activation_patching
from nnpatch_core.scale import merge_shards
from nnpatch_core.sweep import Held, Logits, Share, ShareFile, ShareMeasured, UnpatchedRun
from nnpatch_core.testing import Trace, tiny_api, tiny_model, traces
from tests.helpers.samples import THREE

SOURCE, TARGET, ANSWERS = THREE
SITES = Sites(["resid", "o"], seq_pos_type="each")
#: Prompts that run together, and one by one.
TOGETHER, APART = {"batch_size": None}, {"batch_size": 1}


def activation(model: Any, **options: Any) -> Outcome:
    return activation_patching(
        model, tiny_api(), SITES, SOURCE, TARGET, *ANSWERS,
        progress=False, memory_budget="1 GiB", **options,
    )  # fmt: skip


def ablation(model: Any, **options: Any) -> Outcome:
    return ablation_patching(
        model, tiny_api(), SITES, TARGET, *ANSWERS, method="mean",
        progress=False, memory_budget="1 GiB", **options,
    )  # fmt: skip


SWEEPS = {"activation": activation, "ablation": ablation}


def whole(seen: list[Trace]) -> list[Trace]:
    """The forwards of all tokens."""
    return [each for each in seen if each.tokens == SOURCE.shape[1]]


def shares(kind: str, folder: Path, count: int, held: Held, **options: Any) -> list[list[Trace]]:
    """Measure all shares in this process, and give the forwards of each."""
    model, found = tiny_model("llama"), []
    for number in range(1, count + 1):
        file = ShareFile(folder / str(number), Share(number, count), held=held)
        with traces(model) as seen, pytest.raises(ShareMeasured):
            SWEEPS[kind](model, checkpoint=file, **options)
        found.append(seen)
    return found


def merged(kind: str, folder: Path, count: int, **options: Any) -> Outcome:
    files = [folder / str(number) for number in range(1, count + 1)]
    file = merge_shards(files, folder / "all")
    return SWEEPS[kind](tiny_model("llama"), checkpoint=file, **options)


@pytest.mark.parametrize("kind", SWEEPS)
def test_what_is_recorded_is_kept_for_the_next_share(kind: str, tmp_path: Path) -> None:
    held, anew = Held(keeps=True), tmp_path / "anew"
    anew.mkdir()
    own = sum(map(len, shares(kind, tmp_path, 3, held, **TOGETHER)))
    # Recorded runs of a source and a target, or of the one run; means are made anew each time.
    recorded = {"activation": 2, "ablation": 1}[kind]
    assert sum(map(len, shares(kind, anew, 3, Held(), **TOGETHER))) - own == 2 * recorded
    out, one = merged(kind, tmp_path, 3), SWEEPS[kind](tiny_model("llama"))
    for name in one:
        assert torch.equal(out[name], one[name])


def test_a_share_that_is_kept_runs_no_prompt_again(tmp_path: Path) -> None:
    model, held = tiny_model("llama"), Held(keeps=True)
    seen: list[list[Trace]] = []
    for number in (1, 2):
        file = ShareFile(tmp_path / str(number), Share(number, 50_000), held=held)
        with traces(model) as found, pytest.raises(ShareMeasured):
            activation_patching(
                model, tiny_api(), Sites("resid", [2], seq_pos_type="last"),
                SOURCE, TARGET, *ANSWERS,
                progress=False, memory_budget="1 GiB", checkpoint=file,
            )  # fmt: skip
        seen.append(whole(found))
    assert [len(each) for each in seen] == [2, 0]


@pytest.mark.parametrize("kind", SWEEPS)
def test_unpatched_runs_of_others_are_taken(kind: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    parts: dict[int, Logits] = {}
    for number in (1, 2):
        file = ShareFile(tmp_path / "none", None, held=Held(wanted=Share(number, 2)))
        with traces(model) as seen, pytest.raises(UnpatchedRun) as run:
            SWEEPS[kind](model, checkpoint=file, **APART)
        runs = {"activation": 2, "ablation": 1}[kind]
        assert len(seen) == runs * len(run.value.logits)
        parts.update(run.value.logits)
    assert [*sorted(parts)] == [0, 1, 2]
    held = Held(keeps=True, unpatched=parts)
    own = sum(map(len, shares(kind, tmp_path, 2, held, **APART)))
    folder = tmp_path / "anew"
    folder.mkdir()
    anew = sum(map(len, shares(kind, folder, 2, Held(), **APART)))
    # Each of the two shares has run all prompts unpatched.
    assert anew - own == 2 * runs * len(SOURCE)
    out, one = merged(kind, tmp_path, 2, **APART), SWEEPS[kind](model, **APART)
    for name in one:
        assert torch.equal(out[name], one[name])


def test_prompts_that_run_together_have_no_unpatched_runs(tmp_path: Path) -> None:
    model = tiny_model("llama")
    file = ShareFile(tmp_path / "none", None, held=Held(wanted=Share(1, 2)))
    with traces(model) as seen, pytest.raises(UnpatchedRun) as run:
        activation(model, checkpoint=file)
    assert run.value.logits == {}
    assert seen == []
