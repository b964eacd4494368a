"""`nnpatch run --shard` and `nnpatch merge`: the files are those of one run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.commands import Command
from tests.helpers.runs import Files

pytestmark = pytest.mark.filterwarnings("ignore::nnpatch_core.errors.StatisticsWarning")

BUDGET = ["--memory-budget", "300 KiB"]
SITES = ["--sites", "resid", "--sites", "q", "--positions", "each"]


def shard(
    nnpatch: Command, files: Files, which: str, *more: str, options: list[str] | None = None
) -> None:
    own = [*SITES, *BUDGET] if options is None else options
    done = nnpatch("run", *files.arguments, *own, "--shard", which, *more)
    assert (done.code, done.err) == (0, "")
    number, _, count = which.partition("/")
    assert f"shard {which}: " in done.out
    assert "nnpatch merge nnpatch-pairs puts all shards together" in done.out
    folder = Path("nnpatch-pairs", f"shard-{number}-of-{count}")
    assert {each.name for each in folder.iterdir()} == {"run.toml", "checkpoint"}


def test_merged_shards_are_one_run(files: Files, nnpatch: Command) -> None:
    one = nnpatch("run", *files.arguments, *SITES, *BUDGET, "--out", "one")
    assert one.code == 0
    for which in ("2/3", "3/3", "1/3"):
        shard(nnpatch, files, which)
    done = nnpatch("merge", "nnpatch-pairs")
    assert (done.code, done.err) == (0, "")
    folder = Path("nnpatch-pairs")
    assert (folder / "report.html").exists()
    outcome = "outcome.safetensors"
    assert (folder / outcome).read_bytes() == Path("one", outcome).read_bytes()
    # A run that is finished is not merged over, unless that is said.
    again = nnpatch("merge", "nnpatch-pairs")
    assert again.code == 2
    assert "has a finished run" in again.err
    assert nnpatch("merge", "nnpatch-pairs", "--overwrite").code == 0
    assert (folder / outcome).read_bytes() == Path("one", outcome).read_bytes()


ROOMY = ["--memory-budget", "20 MiB"]
ESTIMATES = {
    "attribution": [*SITES, *ROOMY, "--method", "attribution", "--batch-size", "2"],
    "paths": [*SITES, *ROOMY, "--method", "attribution", "--steps", "2"],
    "edges": [*ROOMY, "--method", "edges", "--estimate", "eap-ig-activations", "--steps", "2"],
}


@pytest.mark.parametrize("kind", ESTIMATES)
def test_merged_estimates_are_one_run(files: Files, nnpatch: Command, kind: str) -> None:
    options = ESTIMATES[kind]
    one = nnpatch("run", *files.arguments, *options, "--out", "one")
    assert (one.code, one.err) == (0, "")
    for which in ("2/2", "1/2"):
        shard(nnpatch, files, which, options=options)
    done = nnpatch("merge", "nnpatch-pairs")
    assert (done.code, done.err) == (0, "")
    written = {each.name for each in Path("one").iterdir() if each.suffix == ".safetensors"}
    assert written
    for name in written:
        assert Path("nnpatch-pairs", name).read_bytes() == Path("one", name).read_bytes()


def test_a_shard_of_an_estimate_says_what_it_did(files: Files, nnpatch: Command) -> None:
    options = [*SITES, *ROOMY, "--method", "attribution"]
    told = [
        nnpatch("run", *files.arguments, *options, "--shard", f"{number}/2").out
        for number in (1, 2)
    ]
    assert "estimates are made" in told[0]
    assert (
        "shard 2/2: it has nothing to do: the estimate has 1 part that can be made apart" in told[1]
    )
    assert nnpatch("merge", "nnpatch-pairs").code == 0


def test_shards_of_several_folders(files: Files, nnpatch: Command) -> None:
    for number in (1, 2):
        shard(nnpatch, files, f"{number}/2")
    Path("there").mkdir()
    Path("nnpatch-pairs/shard-2-of-2").rename("there/shard-2-of-2")
    both = "nnpatch-pairs/shard-1-of-2", "there"
    told = nnpatch("merge", *both)
    assert told.code == 2
    assert "out: name a folder, as the shards are in 2 of them" in told.err
    assert nnpatch("merge", *both, "--out", "whole").code == 0
    assert Path("whole", "outcome.safetensors").exists()
    # One of them under two names is one.
    named = Path("nnpatch-pairs/shard-1-of-2").resolve()
    assert nnpatch("merge", *both, named, "--out", "again").code == 0


def test_merging_elsewhere_than_the_shards_were_run(
    files: Files, nnpatch: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, *others = files.arguments
    Path("pairs.csv").write_bytes(Path(table).read_bytes())
    assert nnpatch("run", "pairs.csv", *others, *SITES, *BUDGET, "--shard", "1/1").code == 0
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    done = nnpatch("merge", "../nnpatch-pairs")
    assert done.code == 2
    assert f"table is pairs.csv, and {Path.cwd()} has no such file" in done.err.replace("\n", " ")
    assert "merge in the folder in which the shards were run" in done.err


def test_merging_elsewhere_than_the_model_is(
    files: Files, nnpatch: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is no folder here may be one of the hub, which does not have it."""
    table, flag, model, *others = files.arguments
    assert flag == "--model"
    Path("own").symlink_to(Path(model).resolve())
    arguments = [str(Path(table).resolve()), flag, "own", *others, *SITES, *BUDGET]
    assert nnpatch("run", *arguments, "--shard", "1/1").code == 0
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    done = nnpatch("merge", "../nnpatch-pairs")
    assert done.code == 2
    assert "'own' cannot be loaded" in done.err
    assert "if it is in the folder in which the shards were run, merge there" in done.err


def test_a_table_that_was_changed_meanwhile(files: Files, nnpatch: Command) -> None:
    """The file that differs is named by no option, and what helps is told."""
    for number in (1, 2):
        shard(nnpatch, files, f"{number}/2")
    table = Path(files.arguments[0])
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *reversed(lines[1:])]))
    done = nnpatch("merge", "nnpatch-pairs")
    assert done.code == 2
    assert "table or model are others than when the shards were measured" in done.err
    assert "name another file" not in done.err
    again = nnpatch("run", *files.arguments, *SITES, *BUDGET, "--shard", "1/2", "--resume")
    assert again.code == 2
    assert "--overwrite begins anew" in again.err
    for number in (1, 2):
        shard(nnpatch, files, f"{number}/2", "--overwrite")
    assert nnpatch("merge", "nnpatch-pairs").code == 0


def test_what_is_missing_is_named(files: Files, nnpatch: Command) -> None:
    shard(nnpatch, files, "2/3")
    done = nnpatch("merge", "nnpatch-pairs")
    assert done.code == 2
    assert "not all shards are measured; missing: shards 1, 3 (of 3)" in done.err
    assert "Traceback" not in done.err
    # The rest is measured, and all is merged after all.
    for which in ("1/3", "3/3"):
        shard(nnpatch, files, which)
    assert nnpatch("merge", "nnpatch-pairs").code == 0


def test_zeros_before_a_number_name_no_other_shard(files: Files, nnpatch: Command) -> None:
    for which in ("01/2", "2/02"):
        assert nnpatch("run", *files.arguments, *SITES, *BUDGET, "--shard", which).code == 0
    folders = sorted(each.name for each in Path("nnpatch-pairs").iterdir())
    assert folders == ["shard-1-of-2", "shard-2-of-2"]


def test_a_shard_again(files: Files, nnpatch: Command) -> None:
    shard(nnpatch, files, "1/2")
    again = nnpatch("run", *files.arguments, *SITES, *BUDGET, "--shard", "1/2")
    assert again.code == 2
    assert "has this shard, and it is measured: nnpatch merge" in again.err
    # As a queue does that begins jobs anew.
    shard(nnpatch, files, "1/2", "--resume")
    shard(nnpatch, files, "1/2", "--overwrite")
    told = Path("nnpatch-pairs/shard-1-of-2/run.toml")
    assert nnpatch("run", "--config", str(told), "--resume").code == 0
    assert not Path("nnpatch-pairs/shard-1-of-2/shard-1-of-2").exists()


def test_shards_of_other_runs(files: Files, nnpatch: Command) -> None:
    shard(nnpatch, files, "1/2")
    done = nnpatch("run", *files.arguments, *SITES, *BUDGET, "--shard", "2/2", "--layers", "0")
    assert done.code == 0
    told = nnpatch("merge", "nnpatch-pairs")
    assert told.code == 2
    assert "layers is ['0'], and None in nnpatch-pairs/shard-1-of-2" in told.err


def test_shards_of_two_cuts(files: Files, nnpatch: Command) -> None:
    """As after an array that was begun anew with another count of jobs."""
    for which in ("1/2", "1/3", "2/3", "3/3"):
        shard(nnpatch, files, which)
    told = nnpatch("merge", "nnpatch-pairs")
    assert told.code == 2
    assert (
        "the shards are of 2 cuts (nnpatch-pairs/shard-1-of-2 is one of 2, "
        "nnpatch-pairs/shard-1-of-3 is one of 3): name those of one, such as "
        "nnpatch-pairs/shard-*-of-2"
    ) in told.err
    assert nnpatch("merge", *Path("nnpatch-pairs").glob("shard-*-of-3")).code == 0
    assert Path("nnpatch-pairs", "outcome.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_shard_that_finds_nothing_left_says_why(files: Files, nnpatch: Command) -> None:
    for which in ("1/2", "2/2"):
        done = nnpatch("run", *files.arguments, "--sites", "resid", *ROOMY, "--shard", which)
        assert (done.code, done.err) == (0, "")
    assert "shard 2/2: it has nothing to do: what runs in one trace is measured by one" in done.out
    assert "a smaller memory budget makes more traces" in done.out
    assert nnpatch("merge", "nnpatch-pairs").code == 0


FAULTS = {
    "no budget": (
        ["--shard", "1/2"],
        "--shard: needs a memory budget (memory_budget, as '4 GiB'), the same for all shards",
    ),
    "none": (["--shard", "3/2", *BUDGET], "--shard: there is no shard 3/2"),
    "words": (["--shard", "first", *BUDGET], "--shard: a shard is K/N, such as 3/16"),
    "method": (["--shard", "1/2", *BUDGET, "--method", "circuit"], "means nothing with"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(files: Files, nnpatch: Command, fault: str) -> None:
    options, told = FAULTS[fault]
    done = nnpatch("run", *files.arguments, *options)
    assert done.code == 2
    assert told in done.err
    assert not Path("nnpatch-pairs").exists()


def test_nothing_to_merge(
    nnpatch: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for folder in ("empty", "nowhere"):
        done = nnpatch("merge", folder)
        assert done.code == 2
        assert f"{folder}: there is no shard of a run (nnpatch run --shard K/N)" in done.err
