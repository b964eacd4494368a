"""Shards of a sweep: for any number of them, in any order, merged they are one process's sweep."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnpatch_core import Outcome, activation_patching
from nnpatch_core.errors import CheckpointError, ShardError
from nnpatch_core.scale import measure_shard, merge_shards
from nnpatch_core.testing import tiny_api, tiny_model, traces
from tests.helpers.checkpoints import BUDGET, SITES, SOURCE, TARGET, done, numbers
from tests.helpers.engines import from_the_middle
from tests.helpers.faults import broken_after
from tests.helpers.killed import killed
from tests.helpers.paths import ROOT
from tests.helpers.samples import THREE
from tests.helpers.shards import SWEEPS, measured, swept

ANSWERS = THREE.answers


@pytest.fixture(scope="module", params=SWEEPS)
def whole(request: Any) -> tuple[str, Outcome]:
    return request.param, swept(request.param)


@given(data=st.data())
@settings(deadline=None, max_examples=4)
@pytest.mark.filterwarnings("ignore")
def test_merged_shards_are_the_sweep_of_one_process(
    whole: tuple[str, Outcome], data: st.DataObject
) -> None:
    kind, one = whole
    count = data.draw(st.sampled_from([1, 2, 3, 7]))
    order = data.draw(st.permutations(range(1, count + 1)))
    with TemporaryDirectory() as folder:
        shards = [measured(kind, f"{n}/{count}", Path(folder, f"{n}.ckpt")) for n in order]
        merged = merge_shards(shards, Path(folder, "whole"))
        # Nothing was measured twice.
        assert sum(each.measured for each in shards) == done(merged)
        with traces(tiny_model("llama")):
            out = swept(kind, checkpoint=merged)
    assert numbers(out).equal(numbers(one))
    for name in one.cells:
        assert out.cells[name].elided.equal(one.cells[name].elided)
        assert out.cells[name].present.equal(one.cells[name].present)


@pytest.mark.filterwarnings("ignore")
def test_a_merged_sweep_patches_nothing(tmp_path: Path) -> None:
    shards = [measured("activation", f"{n}/2", tmp_path / str(n)) for n in (2, 1)]
    merged = merge_shards([each.path for each in shards], tmp_path / "whole")
    model = tiny_model("llama")
    with traces(model) as seen:
        function, arguments, _ = SWEEPS["activation"]
        function(model, tiny_api(), *arguments, memory_budget=BUDGET, checkpoint=merged)
    assert seen
    assert from_the_middle(seen) == []


def test_shards_have_about_the_same_work(tmp_path: Path) -> None:
    model, work = tiny_model("llama"), []
    for number in (1, 2, 3):
        with traces(model) as seen:
            measure_shard(
                activation_patching, model, tiny_api(), SITES, SOURCE, TARGET, *ANSWERS,
                shard=f"{number}/3", checkpoint=tmp_path / str(number), memory_budget=BUDGET,
                progress=False,
            )  # fmt: skip
        work.append(len(from_the_middle(seen)))
    assert max(work) <= 1.34 * sum(work) / 3 + 1


@pytest.mark.parametrize("stop", [1, 3])
def test_a_stopped_shard_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    one = swept("activation")
    first = measured("activation", "1/2", tmp_path / "1")
    mend = broken_after(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        measured("activation", "2/2", tmp_path / "2")
    mend()
    with pytest.raises(ShardError, match=r"begun, but not finished: shard 2 \(of 2\)$"):
        merge_shards([first, tmp_path / "2"], tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    second = measured("activation", "2/2", tmp_path / "2")
    assert second.measured > done(first.path) - second.measured
    merged = merge_shards([second, first], tmp_path / "whole")
    assert numbers(swept("activation", checkpoint=merged)).equal(numbers(one))


SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {folder!r})
from tests.helpers.faults import slow_down
from tests.helpers.shards import measured
slow_down(0.05)
measured("activation", {shard!r}, {path!r})
print("finished")
"""


def test_a_shard_survives_sigkill(tmp_path: Path) -> None:
    one, path = swept("activation"), tmp_path / "1"
    code = SCRIPT.format(folder=str(ROOT), path=str(path), shard="1/2")
    before = 0
    for _ in range(2):
        before = killed(code, path, before)
    shards = [measured("activation", f"{n}/2", tmp_path / str(n)) for n in (1, 2)]
    merged = merge_shards(shards, tmp_path / "whole")
    assert numbers(swept("activation", checkpoint=merged)).equal(numbers(one))


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_belong_is_named(tmp_path: Path) -> None:
    files = [measured("activation", f"{n}/3", tmp_path / str(n)).path for n in (1, 2, 3)]
    to = tmp_path / "whole"
    with pytest.raises(
        ShardError, match=r"^not all shards are measured; missing: shards 1, 3 \(of 3\)$"
    ):
        merge_shards(files[1:2], to)
    with pytest.raises(ShardError, match=r"2 is shard 2/3, which is there twice$"):
        merge_shards([*files, files[1]], to)
    other = measured("activation", "1/2", tmp_path / "half").path
    with pytest.raises(ShardError, match=r"half is one of 2 shards, and .*2 is one of 3$"):
        merge_shards([files[1], other], to)
    plain = tmp_path / "plain"
    swept("activation", checkpoint=plain)
    with pytest.raises(ShardError, match="plain is no shard, but of the whole sweep, and"):
        merge_shards([*files, plain], to)
    padded = measured("padded", "3/3", tmp_path / "padded").path
    with pytest.raises(ShardError, match=r"padded is a shard of another sweep than .*prompts"):
        merge_shards([*files[:2], padded], to)
    with pytest.raises(CheckpointError, match="there is no such file"):
        merge_shards([*files, tmp_path / "nowhere"], to)
    with pytest.raises(ShardError, match="takes the checkpoints of all shards, got"):
        merge_shards([], to)
    assert not to.exists()


@pytest.mark.parametrize(
    "shard", ["3", "0/2", "3/2", "a/b", "1/0", "", None, 3, "1/-2", "１/２", "1/999999999"]
)
def test_a_shard_that_there_is_not(shard: Any, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="shard"):
        measured("activation", shard, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_another_shards_file(tmp_path: Path) -> None:
    path = measured("activation", "1/3", tmp_path / "c").path
    with pytest.raises(ShardError, match=re.escape("of shard 1/3, not of 2/3")):
        measured("activation", "2/3", path)
    # The plain call goes on from a shard, and measures the rest.
    assert numbers(swept("activation", checkpoint=path)).equal(numbers(swept("activation")))


def test_the_file_of_a_whole_sweep_is_no_shards(tmp_path: Path) -> None:
    """Shards that begin with what others have could never be merged."""
    swept("activation", checkpoint=tmp_path / "c")
    with pytest.raises(ShardError, match=r"checkpoint of a whole sweep, not of shard 1/2: name"):
        measured("activation", "1/2", tmp_path / "c")


def test_a_shard_names_its_budget(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="memory_budget= must be named for a shard"):
        measured("activation", "1/2", tmp_path / "c", memory_budget=None)


def test_what_has_no_cells_to_share(tmp_path: Path) -> None:
    with pytest.raises((ShardError, TypeError)):
        measure_shard(
            lambda **_: swept("full"), shard="1/2", checkpoint=tmp_path / "c", memory_budget=BUDGET
        )
