"""Subspaces in files: what is written is read, bit by bit, and nothing else."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import nnpatch_core
from nnpatch_core._bytes import bytes_of
from nnpatch_core.errors import SubspaceError
from nnpatch_core.subspace import SiteRecord, Subspace
from tests.helpers.refusals import raises

FILES = ["README.md", "config.json", "model.safetensors"]
text = st.text(max_size=6)
#: All that JSON can hold of it, and comes out as it went in.
info = st.dictionaries(
    text,
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63) | text
        | st.floats(allow_nan=False, allow_infinity=False),
        lambda each: st.lists(each, max_size=2) | st.dictionaries(text, each, max_size=2),
        max_leaves=4,
    ),
    max_size=3,
)  # fmt: skip
records = st.none() | st.builds(
    SiteRecord,
    st.sampled_from(["resid", "q", "mlp"]),
    st.integers(0, 99),
    st.none() | st.integers(0, 31),
    st.none() | st.lists(st.integers(-9, 9), min_size=1, max_size=3).map(tuple),
    st.none() | text,
)


@st.composite
def subspaces(draw: st.DrawFn) -> Subspace:
    width = draw(st.integers(1, 9))
    rank = draw(st.integers(1, width))
    kind = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    drawn = torch.randn(width, rank + 1, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(drawn[:, :rank]).Q.to(kind)
    mean = drawn[:, rank].to(kind) if draw(st.booleans()) else None
    return Subspace(basis, mean=mean, site=draw(records), info=draw(info))


def saved(folder: Path, **more: Any) -> Subspace:
    own = Subspace(torch.eye(4)[:, :2], **more)
    own.save_pretrained(folder)
    return own


def names(folder: Any) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rewritten(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    """Change header and tensors, and give the file the digest that belongs to them."""
    from nnpatch_core._safetensors import write_file

    file = folder / "model.safetensors"
    with safe_open(str(file), framework="pt") as opened:
        header = json.loads(opened.metadata()["nnpatch"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    del header["writer"], header["digest"]
    change(header, tensors)
    write_file(file, header, tensors, SubspaceError)


# Round trips.


@settings(deadline=None)
@given(subspaces())
def test_a_round_trip_is_bitwise(own: Subspace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        own.save_pretrained(folder)
        assert names(folder) == FILES
        found = Subspace.from_pretrained(folder)
        alone = Subspace.from_pretrained(Path(folder) / "model.safetensors")
        by_name = Subspace.from_pretrained(folder, filename="model.safetensors")
    for each in (found, alone, by_name):
        assert each.basis.dtype == own.basis.dtype
        assert torch.equal(bytes_of(each.basis), bytes_of(own.basis))
        assert (each.mean is None) == (own.mean is None)
        if own.mean is not None:
            assert torch.equal(bytes_of(each.mean), bytes_of(own.mean))
        assert each.site == own.site
        assert each.info == own.info


@pytest.mark.parametrize("make", ["random", "pca", "mean_difference"])
def test_how_it_was_made_is_kept(tmp_path: Path, make: str) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 9, 5, generator=generator)
    made = {
        "random": lambda: Subspace.random(5, 2),
        "pca": lambda: Subspace.pca(one, 2),
        "mean_difference": lambda: Subspace.mean_difference(one, other),
    }[make]()
    made.save_pretrained(tmp_path)
    assert Subspace.from_pretrained(tmp_path).info == made.info
    assert f"| how it was made | {made.info['method']} |" in (tmp_path / "README.md").read_text()


def test_info_is_kept_as_json_has_it(tmp_path: Path) -> None:
    given_ = {"a": (1, 2), "b": np.float32(0.5), "c": torch.tensor(3), "d": np.bool_(True)}
    saved(tmp_path, info=given_)
    assert Subspace.from_pretrained(tmp_path).info == {"a": [1, 2], "b": 0.5, "c": 3, "d": True}


def test_the_config_says_what_there_is(tmp_path: Path) -> None:
    saved(tmp_path, site=SiteRecord("z", 3, 1, (-1,)), info={"method": "given"})
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "format": "nnpatch subspace 1",
        "width": 4,
        "rank": 2,
        "dtype": "float32",
        "mean": False,
        "site": {"component": "o", "layer": 3, "head": 1, "seq_pos": [-1], "where": None},
        "info": {"method": "given"},
        "nnpatch-core": nnpatch_core.__version__,
    }


def test_folders_are_made_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    saved(folder, info={"a": 1})
    (folder / "notes.txt").write_text("mine")
    Subspace.random(7, 3).save_pretrained(folder)
    assert Subspace.from_pretrained(folder).rank == 3
    assert names(folder) == sorted([*FILES, "notes.txt"])


# What is in the way.


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("README.md", "# My work\n"),
        ("README.md", b"\xff\xfe"),
        ("config.json", '{"model_type": "llama"}'),
        ("config.json", "[]"),
        ("config.json", "no JSON"),
        ("model.safetensors", "nothing"),
    ],
)
def test_a_folder_that_holds_something_else(tmp_path: Path, name: str, written: Any) -> None:
    raw = written if isinstance(written, bytes) else written.encode()
    (tmp_path / name).write_bytes(raw)
    before = content(tmp_path)
    with raises(SubspaceError, f"already has a {name} that is no subspace's"):
        saved(tmp_path)
    assert content(tmp_path) == before


def test_weights_of_a_model_are_not_replaced(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    before = content(tmp_path)
    with raises(SubspaceError, "already has a model.safetensors that is no subspace's"):
        saved(tmp_path)
    assert content(tmp_path) == before


def test_a_folder_named_as_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with raises(SubspaceError, "is not a folder"):
            saved(folder)
    for name in (3, None, b"x", "", "a\0b"):
        with raises(SubspaceError, "a folder is named by a string or a path"):
            saved(name)
        with raises(SubspaceError, "a folder is named by a string or a path"):
            Subspace.from_pretrained(name)


@pytest.mark.parametrize("step", range(3))
def test_a_disk_that_fills_up_leaves_a_whole_subspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Whichever file cannot be written: the tensors that are there are those of one subspace."""
    import nnpatch_core._files as files

    before = saved(tmp_path)
    calls = []

    def full(path: Path) -> None:
        calls.append(path)
        if len(calls) == step + 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_flush", full)
    with raises(SubspaceError, "could not be written: No space left on device"):
        Subspace.random(9, 3).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert names(tmp_path) == FILES
    whole = Subspace.from_pretrained(tmp_path / "model.safetensors")
    assert torch.equal(whole.basis, before.basis)
    if step == 2:
        with raises(SubspaceError, "saving was cut short; the second is whole"):
            Subspace.from_pretrained(tmp_path)
    # And saving it again mends it.
    before.save_pretrained(tmp_path)
    assert Subspace.from_pretrained(tmp_path).rank == 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"a": {"b": [1, float("nan")]}}, "info['a']['b'][1] is nan, which is not finite"),
        ({"a": float("inf")}, "info['a'] is inf"),
        ({"a": {1: 2}}, "the keys of info['a'] must be text, got 1"),
        ({"a": object()}, "must be text, numbers, and mappings and lists"),
        ({"a": torch.zeros(2)}, "must be text, numbers, and mappings and lists"),
        ({"a": 2**70}, "of more than 64 bits"),
        ({"a": b"x"}, "got b'x'"),
        ({"a": 1j}, "got 1j"),
    ],
)
def test_info_that_no_file_can_hold(tmp_path: Path, wrong: Any, words: str) -> None:
    with raises(SubspaceError, words):
        saved(tmp_path / "new", info=wrong)
    assert not (tmp_path / "new").exists()


def test_info_that_holds_itself(tmp_path: Path) -> None:
    own: dict[str, Any] = {}
    own["own"] = own
    with raises(SubspaceError, "stands deeper than"):
        saved(tmp_path, info=own)


# What is damaged.


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_flipped_byte_is_found(at: int, bits: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = saved(folder, info={"a": "b"})
        file = folder / "model.safetensors"
        whole = bytearray(file.read_bytes())
        whole[at % len(whole)] ^= bits
        file.write_bytes(whole)
        try:
            found = Subspace.from_pretrained(folder)
        except SubspaceError as error:
            told = str(error)
        else:
            # A byte that means nothing, such as one of padding.
            assert torch.equal(found.basis, own.basis)
            assert found.info == own.info
            return
        assert "model.safetensors" in told


@pytest.mark.parametrize("length", [0, 1, 8, 100, -1])
def test_a_file_that_was_cut(tmp_path: Path, length: int) -> None:
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with raises(SubspaceError, f"{file} cannot be read as a subspace"):
        Subspace.from_pretrained(tmp_path)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "config.json").unlink()
    assert Subspace.from_pretrained(tmp_path).rank == 2
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with raises(SubspaceError, f"there is no {tmp_path / 'model.safetensors'}"):
        Subspace.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with raises(SubspaceError, "model.safetensors", "what can be read is"):
        Subspace.from_pretrained(tmp_path)


def test_a_config_that_was_changed(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"rank": 2', '"rank": 3'))
    with raises(SubspaceError, f"{file} does not say what"):
        Subspace.from_pretrained(tmp_path)
    file.write_text("{")
    with raises(SubspaceError, f"{file} is not JSON"):
        Subspace.from_pretrained(tmp_path)


def test_another_version_of_the_format(tmp_path: Path) -> None:
    saved(tmp_path)
    rewritten(tmp_path, lambda header, _: header.update(format="nnpatch subspace 2"))
    with raises(SubspaceError, "this version reads 'nnpatch subspace 1'", "pip install --upgrade"):
        Subspace.from_pretrained(tmp_path)


CHANGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "not orthonormal": (
        lambda _, tensors: tensors.update(basis=tensors["basis"] * 2), "not orthonormal",
    ),
    "not finite": (
        lambda _, tensors: tensors["basis"].fill_(torch.nan), "not finite",
    ),
    "a mean of another width": (
        lambda header, tensors: (header.update(mean=True), tensors.update(mean=torch.zeros(3))),
        "mean must have the shape",
    ),
    "another rank": (lambda header, _: header.update(rank=1), "its header says rank 1 of width 4"),
    "integers": (
        lambda header, tensors: (
            header.update(dtype="int64"), tensors.update(basis=tensors["basis"].long())
        ),
        "a basis must be real numbers",
    ),
    "no basis": (
        lambda _, tensors: tensors.update(other=tensors.pop("basis")), "its tensors are ['other']",
    ),
    "a site that is none": (lambda header, _: header.update(site={"layer": 1}), "its site is"),
    "a layer that is none": (
        lambda header, _: header.update(
            site={"component": "q", "layer": -1, "head": None, "seq_pos": None, "where": None}
        ),
        "the layer of its site is -1",
    ),
    "info that is none": (lambda header, _: header.update(info=[1]), "its info is [1]"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_somebody_made_up(tmp_path: Path, name: str) -> None:
    change, words = CHANGES[name]
    saved(tmp_path)
    rewritten(tmp_path, change)
    (tmp_path / "config.json").unlink()
    file = tmp_path / "model.safetensors"
    with raises(SubspaceError, f"{file} cannot be read as a subspace", words):
        Subspace.from_pretrained(tmp_path)


def test_names_of_what_is_not_there(tmp_path: Path) -> None:
    with raises(SubspaceError, "give a folder, or the name owner/name"):
        Subspace.from_pretrained(tmp_path / "nothing")
    saved(tmp_path)
    with raises(SubspaceError, "there is no", "other.safetensors"):
        Subspace.from_pretrained(tmp_path, filename="other.safetensors")
    for name in ("../x", "/x", "", 3):
        with raises(SubspaceError, "filename must name a file inside the folder"):
            Subspace.from_pretrained(tmp_path, filename=name)
    with raises(SubspaceError, "revision= is of repositories"):
        Subspace.from_pretrained(tmp_path, revision="main")
    with raises(SubspaceError, "filename= is of folders"):
        Subspace.from_pretrained(tmp_path / "config.json", filename="config.json")
    with raises(SubspaceError, "part= is of pyvene's"):
        Subspace.from_pretrained(tmp_path, part=0)
