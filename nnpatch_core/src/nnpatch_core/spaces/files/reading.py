"""Which kind of files a folder or a repository holds, and the subspace that they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import attrs

from nnpatch_core._printable import named, shown
from nnpatch_core.errors import SubspaceError
from nnpatch_core.spaces.files import older, own, pyvene
from nnpatch_core.spaces.files.content import Content
from nnpatch_core.spaces.files.hub import Folder, Place, Repository
from nnpatch_core.spaces.files.repositories import is_repo_id
from nnpatch_core.spaces.files.tensors import json_of, tensors_in

_Result = TypeVar("_Result")

#: The tensors of an older library's projection, whichever there is.
_OLDER = (own.TENSORS, "pytorch_model.bin")
_READS = (
    "a subspace that save_pretrained wrote, a projection of the older nnpatch, or rotations of "
    "pyvene"
)


def read(
    name: str | os.PathLike[str],
    *,
    filename: str | None,
    part: int | None,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Content:
    """Read a subspace from a folder, a file, or a repository on the hub.

    Args:
        name: of the folder or file, or of the repository if there is no such folder.
        filename: the file in it; None if its `config.json` tells.
        part: which group of coordinates, of pyvene's interventions with a partition.
        revision: of the repository.
        token: see huggingface_hub.
        cache_dir: see huggingface_hub.
        local_files_only: nothing is downloaded.

    Raises:
        SubspaceError: there is none, or it cannot be read as a subspace.
    """
    path = _path(name)
    if filename is not None:
        _check_filename(filename)
    place: Place
    if path.exists():
        if revision is not None:
            raise SubspaceError(f"revision= is of repositories, and {named(name)} is a local path")
        if path.is_file():
            if filename is not None:
                raise SubspaceError(f"filename= is of folders, and {named(name)} is a file")
            path, filename = path.parent, path.name
        place = Folder(path)
    elif isinstance(name, str) and is_repo_id(name):
        if revision is not None and not isinstance(revision, str):
            raise SubspaceError(f"revision must be text, got {shown(revision)}")
        place = Repository(name, revision, token, cache_dir, bool(local_files_only))
    else:
        raise SubspaceError(
            f"there is no {named(name)}: give a folder, or the name owner/name of a repository on "
            "the hub"
        )
    if filename is None:
        return _of_folder(place, part)
    return _of_file(place, filename, part)


def _of_folder(place: Place, part: int | None) -> Content:
    """By its config."""
    file = place.fetch(own.CONFIG)
    config = None if file is None else json_of(file)
    if own.is_ours(config):
        return _told(place, own.TENSORS, part, lambda path: own.load(path, file))
    if pyvene.is_pyvene_config(config):
        label = place.label(own.CONFIG)
        names = _named(label, lambda: pyvene.file_names(config))
        if len(names) != 1:
            raise SubspaceError(
                f"{label} speaks of {len(names)} interventions: choose one with filename=, of "
                f"{shown(names)}"
            )
        return _of_file(place, names[0], part)
    if config is not None and not older.is_older_config(config):
        kind = config.get("model_type") if isinstance(config, Mapping) else None
        of = f"of a model of the type {shown(kind)}" if isinstance(kind, str) else "of no subspace"
        raise SubspaceError(f"{place.label(own.CONFIG)} is {of}: what can be read is {_READS}")
    for name in _OLDER:
        if place.fetch(name) is not None:
            return _of_file(place, name, part)
    raise SubspaceError(
        f"there is no {place.label(own.TENSORS)}: what can be read is {_READS}; of other names a "
        "file is named by filename="
    )


def _of_file(place: Place, name: str, part: int | None) -> Content:
    """By the names of its tensors."""

    def content(path: Path) -> Content:
        found = tensors_in(path)
        if own.is_ours(found.header):
            return own.load(path, None)
        tensors = found.by_name
        if older.is_older(tensors):
            return older.content_of(tensors, _config(place, name, older.is_older_config))
        if pyvene.is_pyvene(tensors):
            config = _config(place, name, pyvene.is_pyvene_config)
            own_name = PurePosixPath(name).name
            told = pyvene.representation(config, own_name) if config else pyvene.NOTHING_TOLD
            return pyvene.content_of(tensors, told, part)
        raise SubspaceError(
            f"it holds the tensors {shown(sorted(tensors))}, and what can be read is {_READS}"
        )

    return _told(place, name, part, content)


def _config(place: Place, name: str, fits: Callable[[Any], bool]) -> Mapping[str, Any]:
    """The config beside a file, if it is of its kind; an empty mapping if there is none."""
    file = place.fetch(str(PurePosixPath(name).with_name(own.CONFIG)))
    config = None if file is None else json_of(file)
    return config if isinstance(config, Mapping) and fits(config) else {}


def _told(place: Place, name: str, part: int | None, content: Callable[[Path], Content]) -> Content:
    """The content of a file; errors name it."""
    path = place.fetch(name)
    label = place.label(name)
    if path is None:
        raise SubspaceError(f"there is no {label}")
    found = _named(label, lambda: content(path))
    if part is not None and "pyvene" not in found.info.get("file", ""):
        raise SubspaceError(f"part= is of pyvene's interventions, and {label} is none")
    return attrs.evolve(found, file=label)


def _named(label: str, call: Callable[[], _Result]) -> _Result:
    try:
        return call()
    except SubspaceError as error:
        raise SubspaceError(f"{label} cannot be read as a subspace: {error}") from error


def _path(name: Any) -> Path:
    if not isinstance(name, str | os.PathLike):
        raise SubspaceError(f"a folder is named by a string or a path, got {shown(name)}")
    text = os.fspath(name)
    if not isinstance(text, str) or not text or "\0" in text:
        raise SubspaceError(f"a folder is named by a string or a path, got {shown(text)}")
    try:
        path = Path(os.path.expanduser(text))  # noqa: PTH111 - which raises nothing
        path.exists()
    except (OSError, ValueError) as cause:
        raise SubspaceError(f"{named(text)} is no path that can be read") from cause
    return path


def _check_filename(filename: Any) -> None:
    parts = PurePosixPath(filename).parts if isinstance(filename, str) else ()
    if not parts or ".." in parts or "\0" in filename or filename.startswith(("/", "\\")):
        raise SubspaceError(f"filename must name a file inside the folder, got {shown(filename)}")
