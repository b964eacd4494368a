"""Where a subspace's files are: a folder, or a repository on the hub of Hugging Face."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import attrs
import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from nnpatch_core._files import reason
from nnpatch_core._printable import named, shown
from nnpatch_core.errors import SubspaceError
from nnpatch_core.spaces.files.content import Content
from nnpatch_core.spaces.files.own import CARD, CONFIG, TENSORS, check_ours, save
from nnpatch_core.spaces.files.repositories import is_repo_id

_Result = TypeVar("_Result")


class Place(Protocol):
    """Somewhere with files."""

    def fetch(self, name: str) -> Path | None:
        """A file as a path on this machine; None if there is no such file."""
        ...

    def label(self, name: str) -> str:
        """How errors call a file."""
        ...


@attrs.frozen
class Folder:
    """A folder on this machine."""

    path: Path

    def fetch(self, name: str) -> Path | None:
        """A file of the folder; None if it has none of that name."""
        file = self.path / name
        return file if file.is_file() else None

    def label(self, name: str) -> str:
        """Its path."""
        return named(self.path / name)


@attrs.frozen
class Repository:
    """A repository on the hub.

    Args:
        repo_id: its name, `owner/name`.
        revision: a branch, tag or commit; None is the main branch.
        token: see huggingface_hub.
        cache_dir: where downloads are kept; None is its usual place.
        local_files_only: nothing is downloaded.
    """

    repo_id: str
    revision: str | None = None
    token: str | bool | None = attrs.field(default=None, repr=False)
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False

    def fetch(self, name: str) -> Path | None:
        """A file of the repository, downloaded; None if it has none of that name.

        Raises:
            SubspaceError: it cannot be had.
        """

        def download() -> Path | None:
            try:
                found = huggingface_hub.hf_hub_download(
                    self.repo_id,
                    name,
                    revision=self.revision,
                    token=self.token,
                    cache_dir=None if self.cache_dir is None else str(self.cache_dir),
                    local_files_only=self.local_files_only,
                )
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                return None
            return Path(str(found))

        return _asked(f"{self.label(name)} cannot be had from the hub", self.token, download)

    def label(self, name: str) -> str:
        """The file and its repository."""
        at = "" if self.revision is None else f" at {named(self.revision)}"
        return f"{named(name)} of {self.repo_id}{at}"


def push(
    repo_id: str,
    content: Content,
    *,
    private: bool | None,
    token: str | bool | None,
    commit_message: str | None,
) -> str:
    """Put a subspace into a repository on the hub, which is made if there is none.

    Returns:
        The address of the commit.

    Raises:
        SubspaceError: it cannot be written, would replace files that are no subspace's, or the hub
            refuses.
    """
    if not is_repo_id(repo_id):
        raise SubspaceError(f"a repository is named owner/name, got {shown(repo_id)}")
    if commit_message is not None and not isinstance(commit_message, str):
        raise SubspaceError(f"commit_message must be text, got {shown(commit_message)}")
    with tempfile.TemporaryDirectory() as folder:
        # Whatever is wrong with it is told before a repository is made.
        save(folder, content, name=repo_id)

        def upload() -> str:
            api = huggingface_hub.HfApi(token=token)
            made = api.create_repo(repo_id, private=private, exist_ok=True)
            # The hub puts the owner before a name that has none.
            full = str(getattr(made, "repo_id", repo_id))
            _check_repository(api, full, token)
            if full != repo_id:
                save(folder, content, name=full)
            commit = api.upload_folder(
                repo_id=full,
                folder_path=folder,
                commit_message=commit_message or "Upload a subspace of nnpatch",
                allow_patterns=[TENSORS, CONFIG, CARD],
            )
            return str(commit.commit_url)

        return _asked(f"the subspace cannot be pushed to {repo_id}", token, upload)


def _check_repository(api: Any, repo_id: str, token: str | bool | None) -> None:
    """Raise `SubspaceError` where a file there would be replaced that is no subspace's."""
    there = set(api.list_repo_files(repo_id))
    if TENSORS in there and CONFIG not in there:
        raise SubspaceError(
            f"{repo_id} already has a {TENSORS} that is no subspace's: choose another repository"
        )
    place = Repository(repo_id, token=token)
    files = {name: place.fetch(name) for name in (CONFIG, CARD) if name in there}
    check_ours({name: file for name, file in files.items() if file is not None}, repo_id)


def _asked(what: str, token: str | bool | None, ask: Callable[[], _Result]) -> _Result:
    """Ask something of the hub; whatever goes wrong is a `SubspaceError` without the token."""
    try:
        return ask()
    except SubspaceError:
        raise
    except RepositoryNotFoundError:
        told = "there is no such repository, or it is private and needs token="
        raise SubspaceError(f"{what}: {told}") from None
    except LocalEntryNotFoundError as cause:
        told = "it is not among the files kept here, and was not downloaded"
        raise SubspaceError(f"{what}: {told}") from cause
    # Anything may go wrong on the way: names, networks, disks, rights.
    except Exception as cause:
        told = reason(cause)
        if isinstance(token, str) and token.strip():
            hidden = token.strip() in str(cause)
            told = "the token is refused" if hidden else told
            # The cause would show it, too.
            raise SubspaceError(f"{what}: {told}") from (None if hidden else cause)
        raise SubspaceError(f"{what}: {told}") from cause
