"""Where files are written: links, modes, folders, full disks, what a kill leaves behind."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import nnpatch_core
from nnpatch_core import Outcome, Sites, _safetensors, activation_patching
from nnpatch_core.errors import CheckpointError, CheckpointWarning, OutcomeError
from nnpatch_core.sweep import checkpoint as checkpoint_module
from nnpatch_core.sweep import stored
from nnpatch_core.testing import tiny_api, tiny_model, traces
from tests.helpers.samples import ONE

SOURCE, TARGET, ANSWERS = ONE
#: Small enough for several parts.
BUDGET = 70_000


def sweep(path: Any = None, model: Any = None, **options: Any) -> Outcome:
    sites = options.pop("sites", Sites(["mlp", "resid"], seq_pos_type="each"))
    return activation_patching(
        model or tiny_model("llama"), tiny_api(), sites, SOURCE, TARGET, *ANSWERS,
        checkpoint=path, progress=False, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def out() -> Outcome:
    return sweep()


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is written after each part."""
    monkeypatch.setattr(checkpoint_module, "_SHARE", 1e9)


#: What writes a file: an outcome, or a sweep with a checkpoint.
WRITERS = {"outcome": lambda path: sweep().save(path), "checkpoint": sweep}
ERRORS = {"outcome": OutcomeError, "checkpoint": CheckpointError}
both = pytest.mark.parametrize("kind", list(WRITERS))


# Modes and links --------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_mode_is_what_the_mask_of_the_process_leaves(tmp_path: Path, kind: str, mask: int) -> None:
    before = os.umask(mask)
    try:
        WRITERS[kind](tmp_path / "f")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o666 & ~mask


def test_a_file_that_is_replaced_hands_its_mode_on(tmp_path: Path, out: Outcome) -> None:
    (tmp_path / "f").touch()
    (tmp_path / "f").chmod(0o640)
    out.save(tmp_path / "f")
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


@both
@pytest.mark.parametrize("there", [True, False], ids=["file", "no file yet"])
def test_a_link_is_followed_and_stays(tmp_path: Path, kind: str, there: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "f", tmp_path / "link"
    if there:
        WRITERS[kind](target)
    link.symlink_to(target)
    WRITERS[kind](link)
    assert link.is_symlink()
    assert target.is_file()
    assert not target.is_symlink()
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["elsewhere", "f", "link"]


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path, out: Outcome) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "c").symlink_to(tmp_path / "missing" / "f")
    with pytest.raises(OutcomeError, match="a' is not a file"):
        out.save(tmp_path / "a")
    with pytest.raises(OutcomeError, match=r"there is no folder .*missing"):
        out.save(tmp_path / "c")


# Places where there is no file ------------------------------------------------------------------


def fifo(path: Path) -> None:
    os.mkfifo(path)


NO_FILES = {
    "folder": (Path.mkdir, "it is a folder"),
    "pipe": (fifo, "is not a file"),
    "below a file": (lambda path: path.parent.joinpath("g").touch(), "Not a directory|no folder"),
}


@both
@pytest.mark.parametrize("place", list(NO_FILES))
def test_what_is_no_file_is_an_error_before_anything_runs(
    tmp_path: Path, kind: str, place: str, out: Outcome
) -> None:
    make, told = NO_FILES[place]
    make(tmp_path / "f")
    path = tmp_path / "g" / "f" if place == "below a file" else tmp_path / "f"
    model = tiny_model("llama")
    write = out.save if kind == "outcome" else functools.partial(sweep, model=model)
    with traces(model) as seen, pytest.raises(ERRORS[kind], match=told):
        write(path)
    assert seen == []


@pytest.mark.parametrize("path", [None, 5, b"f", True, "", "a\0b", "\ud800" * 300, "x" * 5000, []])
def test_what_is_no_path_is_an_error(path: bytes | int | str | None, out: Outcome) -> None:
    with pytest.raises(OutcomeError, match=r"a file is named by|is not a file"):
        out.save(path)
    with pytest.raises(OutcomeError, match=r"a file is named by|is not a file"):
        Outcome.load(path)
    if path is not None:
        with pytest.raises(CheckpointError, match=r"a file is named by|is not a file"):
            sweep(path)


# Disks that do not take it ----------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this process cannot mount a disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    with (folder / "big").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)


def test_saving_on_a_full_disk(disk: Path, out: Outcome) -> None:
    out.save(disk / "f")
    before = (disk / "f").read_bytes()
    fill(disk)
    with pytest.raises(OutcomeError, match=f"{disk}/f could not be written: .*No space left"):
        out.save(disk / "f")
    assert (disk / "f").read_bytes() == before
    assert sorted(each.name for each in disk.iterdir()) == ["big", "f"]


def test_a_sweep_goes_on_where_its_checkpoint_does_not_fit(
    disk: Path, out: Outcome, often: None
) -> None:
    fill(disk)
    expected = sweep(memory_budget=BUDGET)
    with pytest.warns(CheckpointWarning, match=f"{disk}/f could not be written") as told:
        found = sweep(disk / "f", memory_budget=BUDGET)
    assert len(told) == 1
    assert found["resid"].equal(expected["resid"])
    # Once there is room, the same call goes on.
    (disk / "big").unlink()
    assert sweep(disk / "f", memory_budget=BUDGET)["mlp"].equal(expected["mlp"])
    assert (disk / "f").exists()


FAILURES = {
    "full": OSError(28, "No space left on device"),
    "quota": OSError(122, "Disk quota exceeded"),
    "permission": PermissionError(13, "Permission denied"),
    "safetensors": SafetensorError("I/O error: No space left on device (os error 28)"),
}


#: Gives what counts the writes.
Failing = Callable[[int], list[int]]


@pytest.fixture(params=FAILURES)
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Failing:
    """From the nth write on none succeeds."""

    def from_write(count: int) -> list[int]:
        real, written = _safetensors.save_file, [0]

        def save(*arguments: Any, **options: Any) -> Any:
            written[0] += 1
            if written[0] >= count:
                raise FAILURES[request.param]
            return real(*arguments, **options)

        monkeypatch.setattr(_safetensors, "save_file", save)
        return written

    return from_write


@pytest.mark.parametrize("first", [1, 3])
def test_no_write_of_a_checkpoint_loses_the_sweep(
    tmp_path: Path, failing: Failing, often: None, first: int
) -> None:
    expected = sweep(memory_budget=BUDGET)
    written = failing(first)
    with pytest.warns(CheckpointWarning, match="the sweep goes on") as told:
        found = sweep(tmp_path / "f", memory_budget=BUDGET)
    assert len(told) == 1
    assert written[0] > 3
    assert found["resid"].equal(expected["resid"])


def test_nor_does_the_last_one(tmp_path: Path, failing: Failing) -> None:
    written = failing(1)
    with pytest.warns(CheckpointWarning, match="could not be written"):
        found = sweep(tmp_path / "f")
    assert written[0] >= 1
    assert found["resid"].equal(sweep()["resid"])


def test_the_last_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: Outcome) -> None:
    """The content is there, but cannot be put in its place, or is not on the disk yet."""

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    out.save(tmp_path / "f")
    before = (tmp_path / "f").read_bytes()
    for owner, name in ((os, "fsync"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            with pytest.raises(OutcomeError, match="No space left"):
                out.for_metric("logit_difference").magnitudes().save(tmp_path / "f")
        assert (tmp_path / "f").read_bytes() == before
        assert [each.name for each in tmp_path.iterdir()] == ["f"]


def test_the_folder_goes_away_while_the_sweep_runs(
    tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    real, left = stored.write_file, [2]

    def write(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            (folder / "f").unlink()
            folder.rmdir()
        return real(*arguments)

    monkeypatch.setattr(stored, "write_file", write)
    with pytest.warns(CheckpointWarning, match="there is no folder") as told:
        found = sweep(folder / "f", memory_budget=BUDGET)
    assert len(told) == 1
    assert found["resid"].equal(sweep(memory_budget=BUDGET)["resid"])


def test_a_folder_that_nothing_can_be_written_in_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    model = tiny_model("llama")
    told = r"nothing can be written in .*Permission denied"
    with traces(model) as seen, pytest.raises(CheckpointError, match=told):
        sweep(tmp_path / "f", model)
    assert seen == []


def test_a_finished_checkpoint_is_read_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sweep(tmp_path / "f")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert sweep(tmp_path / "f")["resid"].equal(first["resid"])


# What a kill leaves -----------------------------------------------------------------------------

#: The module alone: the whole package takes seconds to be imported.
ALONE = f"""
import sys, time, types
from pathlib import Path
package = sys.modules["nnpatch_core"] = types.ModuleType("nnpatch_core")
package.__path__ = {nnpatch_core.__path__!r}
from nnpatch_core._parts import clean_up, part_of
"""
KILLED = f"""
{ALONE}
with part_of(Path(sys.argv[1])) as part:
    part.write_bytes(b"half")
    print("half", flush=True)
    time.sleep(600)
"""


def unfinished(folder: Path) -> Any:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder / "f")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "half\n"
    return process


def test_the_next_call_clears_what_a_kill_has_left(tmp_path: Path, out: Outcome) -> None:
    # Not ours, however much it looks so.
    (tmp_path / ".nnpatch").mkdir()
    (tmp_path / "unfinished").touch()
    live, dead = unfinished(tmp_path), unfinished(tmp_path)
    try:
        dead.send_signal(signal.SIGKILL)
        dead.communicate()
        assert len(list(tmp_path.glob(".nnpatch-unfinished-*"))) == 2
        out.save(tmp_path / "f")
        # The live one's stays.
        (left,) = tmp_path.glob(".nnpatch-unfinished-*")
        assert (left / "part").read_bytes() == b"half"
        assert {".nnpatch", "unfinished", "f"} < {each.name for each in tmp_path.iterdir()}
    finally:
        live.kill()
        live.communicate()
    sweep(tmp_path / "g")
    assert not list(tmp_path.glob(".nnpatch-unfinished-*"))


def test_many_writers_and_cleaners_do_not_get_into_each_others_way(tmp_path: Path) -> None:
    code = f"""
{ALONE}
target = Path(sys.argv[1])
for number in range(300):
    clean_up(target.parent)
    with part_of(target) as part:
        part.write_bytes(b"whole")
        part.replace(target)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "f")]
    writers = [subprocess.Popen(command) for _ in range(3)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    assert [each.name for each in tmp_path.iterdir()] == ["f"]


# Cost -------------------------------------------------------------------------------------------


def test_a_digest_is_cheap(tmp_path: Path) -> None:
    """10,000 cells of 40 prompts, as a long sweep keeps them, beside a sweep of minutes."""
    tensors = {"values/0": torch.rand(10_000, 40), "done": torch.ones(10_000, 40).byte()}
    begun = time.process_time()
    _safetensors.write_file(tmp_path / "f", {"format": "x"}, tensors, CheckpointError)
    assert time.process_time() - begun < 1
