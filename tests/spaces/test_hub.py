"""The hub, without a network: what is asked of it, and what becomes of its answers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import attrs
import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from nnpatch_core.errors import SubspaceError
from nnpatch_core.subspace import SiteRecord, Subspace
from tests.helpers.paths import ROOT
from tests.helpers.refusals import raises

REPOSITORY = "someone/knob"
TOKEN = "hf_secret"
FILES = ["README.md", "config.json", "model.safetensors"]
OWN = Subspace(torch.eye(4)[:, :1], site=SiteRecord("resid", 2), info={"method": "given"})


def answer(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.example"))


class Hub:
    """Repositories as folders, under the names that huggingface_hub has for what we ask."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None

    def HfApi(self, **options: Any) -> Any:  # noqa: N802 - its name there
        self.asked.append(("HfApi", options))
        return self

    def _note(self, name: str, options: dict[str, Any]) -> None:
        self.asked.append((name, options))
        if self.error is not None:
            raise self.error

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self._note("create_repo", {"repo_id": repo_id, **options})
        full = repo_id if "/" in repo_id else f"me/{repo_id}"
        (self.folder / full).mkdir(parents=True, exist_ok=True)
        return attrs.make_class("Url", ["repo_id"])(full)

    def list_repo_files(self, repo_id: str) -> list[str]:
        return sorted(path.name for path in (self.folder / repo_id).iterdir())

    def upload_folder(self, **options: Any) -> Any:
        self._note("upload_folder", options)
        to = self.folder / options["repo_id"]
        shutil.copytree(options["folder_path"], to, dirs_exist_ok=True)
        return attrs.make_class("Commit", ["commit_url"])(f"https://hub.example/{to.name}/1")

    def hf_hub_download(self, repo_id: str, name: str, **options: Any) -> str:
        self._note("hf_hub_download", {"repo_id": repo_id, "name": name, **options})
        if not (self.folder / repo_id).is_dir():
            raise RepositoryNotFoundError("404", response=answer(404))
        file = self.folder / repo_id / name
        if not file.is_file():
            raise RemoteEntryNotFoundError("404", response=answer(404))
        return str(file)

    def of(self, name: str) -> list[dict[str, Any]]:
        return [options for each, options in self.asked if each == name]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    own = Hub(tmp_path / "hub")
    for name in ("HfApi", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(own, name))
    return own


def test_what_is_pushed_can_be_read(hub: Hub) -> None:
    found = OWN.push_to_hub(REPOSITORY, private=True, token=TOKEN, commit_message="Mine")
    assert found == "https://hub.example/knob/1"
    assert hub.asked[0] == ("HfApi", {"token": TOKEN})
    assert hub.of("create_repo") == [{"repo_id": REPOSITORY, "private": True, "exist_ok": True}]
    [upload] = hub.of("upload_folder")
    assert upload["commit_message"] == "Mine"
    assert sorted(upload["allow_patterns"]) == FILES
    assert not Path(upload["folder_path"]).exists()
    assert hub.list_repo_files(REPOSITORY) == FILES
    again = Subspace.from_pretrained(REPOSITORY)
    assert torch.equal(again.basis, OWN.basis)
    assert (again.site, again.info) == (OWN.site, OWN.info)
    card = (hub.folder / REPOSITORY / "README.md").read_text()
    assert f'Subspace.from_pretrained("{REPOSITORY}")' in card


def test_it_is_replaced_when_it_is_pushed_again(hub: Hub) -> None:
    OWN.push_to_hub(REPOSITORY)
    Subspace.random(5, 2).push_to_hub(REPOSITORY)
    assert Subspace.from_pretrained(REPOSITORY).rank == 2


def test_a_name_without_its_owner(hub: Hub) -> None:
    OWN.push_to_hub("knob")
    assert hub.list_repo_files("me/knob") == FILES
    assert 'from_pretrained("me/knob")' in (hub.folder / "me/knob/README.md").read_text()


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("README.md", "# My own page\n"),
        ("config.json", '{"model_type": "llama"}'),
        ("model.safetensors", "weights of a model"),
    ],
)
def test_a_repository_that_holds_something_else(hub: Hub, name: str, written: str) -> None:
    folder = hub.folder / REPOSITORY
    folder.mkdir(parents=True)
    (folder / name).write_text(written)
    with raises(SubspaceError, f"{REPOSITORY} already has a {name} that is no subspace's"):
        OWN.push_to_hub(REPOSITORY)
    assert hub.of("upload_folder") == []
    assert (folder / name).read_text() == written


def test_options_of_downloads(hub: Hub, tmp_path: Path) -> None:
    OWN.push_to_hub(REPOSITORY)
    hub.asked.clear()
    options = {"revision": "v1", "token": TOKEN, "local_files_only": True}
    Subspace.from_pretrained(REPOSITORY, cache_dir=tmp_path, **options)
    downloads = hub.of("hf_hub_download")
    assert [each["name"] for each in downloads] == ["config.json", "model.safetensors"]
    for each in downloads:
        assert each.items() >= {**options, "cache_dir": str(tmp_path)}.items()


def test_files_of_others_are_read_from_the_hub(hub: Hub) -> None:
    files = ROOT / "tests" / "spaces" / "files"
    for name in ("older/rank3", "pyvene/low_rank"):
        shutil.copytree(files / name, hub.folder / name)
        here, there = Subspace.from_pretrained(files / name), Subspace.from_pretrained(name)
        assert torch.equal(here.basis, there.basis)
        assert here.site == there.site


def test_weights_of_a_model_are_not_downloaded(hub: Hub) -> None:
    folder = hub.folder / REPOSITORY
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_text("large")
    with raises(SubspaceError, f"config.json of {REPOSITORY} is of a model of the type 'llama'"):
        Subspace.from_pretrained(REPOSITORY)
    assert [each["name"] for each in hub.of("hf_hub_download")] == ["config.json"]


def test_a_folder_comes_before_a_repository(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    OWN.save_pretrained(REPOSITORY)
    assert Subspace.from_pretrained(REPOSITORY).rank == 1
    assert hub.asked == []


def test_errors_of_reading(hub: Hub) -> None:
    with raises(SubspaceError, "config.json of no/where", "no such repository, or it is private"):
        Subspace.from_pretrained("no/where")
    (hub.folder / REPOSITORY).mkdir(parents=True)
    with raises(SubspaceError, f"there is no model.safetensors of {REPOSITORY} at v2"):
        Subspace.from_pretrained(REPOSITORY, revision="v2")
    hub.error = LocalEntryNotFoundError("offline")
    with raises(SubspaceError, "not among the files kept here"):
        Subspace.from_pretrained(REPOSITORY)
    hub.error = httpx.ConnectError("no route")
    with raises(SubspaceError, "cannot be had from the hub: no route"):
        Subspace.from_pretrained(REPOSITORY)
    with raises(SubspaceError, "revision must be text, got 3"):
        Subspace.from_pretrained(REPOSITORY, revision=3)


def test_errors_of_pushing(hub: Hub) -> None:
    for name in ("a/b/c", "../b", "", 3, None, "a--b", "a b", "x.git"):
        with raises(SubspaceError, "a repository is named owner/name"):
            OWN.push_to_hub(name)
    with raises(SubspaceError, "commit_message must be text"):
        OWN.push_to_hub(REPOSITORY, commit_message=3)
    with raises(SubspaceError, "info['a'] is nan"):
        Subspace(OWN.basis, info={"a": float("nan")}).push_to_hub(REPOSITORY)
    assert hub.asked == []
    hub.error = httpx.ConnectError("no route")
    with raises(SubspaceError, f"cannot be pushed to {REPOSITORY}: no route"):
        OWN.push_to_hub(REPOSITORY)


def test_no_error_shows_the_token(hub: Hub) -> None:
    """As httpx does with one that is malformed."""
    hub.error = ValueError(f"Illegal header value b'Bearer {TOKEN}\\n'")
    for call in (
        lambda: OWN.push_to_hub(REPOSITORY, token=TOKEN),
        lambda: Subspace.from_pretrained(REPOSITORY, token=TOKEN),
    ):
        with pytest.raises(SubspaceError, match="the token is refused") as caught:
            call()
        assert TOKEN not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
