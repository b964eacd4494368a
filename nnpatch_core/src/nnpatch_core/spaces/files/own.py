"""Our own format: a folder of tensors, what they are, and a model card.

`model.safetensors` has everything, and is written last: whoever reads it alone finds a whole
subspace, the new one or the one before. `config.json` repeats its header, for people and for hubs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnpatch_core._files import reason, write_whole
from nnpatch_core._parts import clean_up
from nnpatch_core._printable import named, shown
from nnpatch_core._safetensors import read_file, write_file
from nnpatch_core._version import __version__
from nnpatch_core.errors import SubspaceError
from nnpatch_core.spaces.files.card import MARK, model_card
from nnpatch_core.spaces.files.content import Content, as_json, check_site
from nnpatch_core.spaces.files.tensors import json_of, tensors_in

FORMAT = "nnpatch subspace 1"
TENSORS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_WRITER = "nnpatch-core"


def save(folder: str | os.PathLike[str], content: Content, name: str = ".") -> None:
    """Write a subspace into a folder, which is made if there is none.

    Args:
        folder: it may hold other files. A subspace that was saved there is replaced.
        content: of the subspace.
        name: the card's example loads it from there; by default from where it is run.

    Raises:
        SubspaceError: it cannot be written, or would replace a file that is no subspace's.
    """
    header = header_of(content)
    tensors = {"basis": content.basis}
    if content.mean is not None:
        tensors["mean"] = content.mean
    target = _made(folder)
    check_ours({each: target / each for each in (TENSORS, CONFIG, CARD)}, named(folder))
    config = json.dumps({**header, _WRITER: __version__}, indent=2) + "\n"
    card = model_card(content, name)
    clean_up(target)
    _write_text(target / CARD, card)
    _write_text(target / CONFIG, config)
    write_file(target / TENSORS, header, tensors, SubspaceError)


def load(file: Path, config: Path | None) -> Content:
    """Read a file that `save` wrote.

    Args:
        file: of the tensors.
        config: of the same folder, if there is one: it must say the same.

    Raises:
        SubspaceError: one of them is damaged, or of another version.
    """
    header, tensors = read_file(file, FORMAT, "a subspace", SubspaceError)
    own = f"{named(file)} is no whole subspace"
    known = {"format", "width", "rank", "dtype", "mean", "site", "info"}
    if set(header) != known or set(tensors) != {"basis", *(["mean"] * (header["mean"] is True))}:
        raise SubspaceError(
            f"{own}: its header has {shown(sorted(header))}, and its tensors are "
            f"{shown(sorted(tensors))}"
        )
    if config is not None:
        _check_config(config, header, file)
    try:
        content = Content(
            tensors["basis"], tensors.get("mean"), check_site(header["site"]), header["info"]
        )
        if not isinstance(header["info"], dict):
            raise SubspaceError(f"its info is {shown(header['info'])}")
        if header_of(content) != header:
            raise SubspaceError(
                f"its header says {_size(header)}, and its basis is {_size(header_of(content))}"
            )
    except SubspaceError as error:
        raise SubspaceError(f"{own}: {error}") from error
    return content


def header_of(content: Content) -> dict[str, Any]:
    """The header of a subspace: all but its tensors.

    Raises:
        SubspaceError: `info` cannot be written.
    """
    basis = content.basis
    if basis.ndim != 2:
        raise SubspaceError(f"its basis has the shape {list(basis.shape)}")
    site = content.site
    return {
        "format": FORMAT,
        "width": basis.shape[0],
        "rank": basis.shape[1],
        "dtype": str(basis.dtype).removeprefix("torch."),
        "mean": content.mean is not None,
        "site": None if site is None else as_json(site, "site"),
        "info": as_json(content.info),
    }


def is_ours(config: Any) -> bool:
    """Whether what a `config.json` holds is of a subspace of ours, of any version."""
    kind = FORMAT.rpartition(" ")[0]
    written = config.get("format") if isinstance(config, Mapping) else None
    return isinstance(written, str) and written.rpartition(" ")[0] == kind


def check_ours(files: Mapping[str, Path], place: str) -> None:
    """Raise `SubspaceError` where one of the files that would be replaced is not ours.

    Args:
        files: by name; those that do not exist are no matter.
        place: where they are, for the message.
    """
    for name, file in files.items():
        if os.path.lexists(file) and not _written_by_us(name, file):
            raise SubspaceError(
                f"{place} already has a {name} that is no subspace's: save into another folder or "
                "repository, or move it away first"
            )


def _written_by_us(name: str, file: Path) -> bool:
    try:
        if name == CARD:
            return MARK in file.read_text("utf-8")
        if name == CONFIG:
            return is_ours(json_of(file))
        return is_ours(tensors_in(file).header)
    except (OSError, ValueError):  # a SubspaceError is a ValueError
        return False


def _check_config(config: Path, header: Mapping[str, Any], file: Path) -> None:
    found = json_of(config)
    if isinstance(found, dict):
        found = {key: value for key, value in found.items() if key != _WRITER}
    if found != header:
        raise SubspaceError(
            f"{named(config)} does not say what {named(file)} does: one of them was changed, or "
            "saving was cut short; the second is whole, and can be read by its own path"
        )


def _size(header: Mapping[str, Any]) -> str:
    return f"rank {shown(header['rank'])} of width {shown(header['width'])}, {header['dtype']}"


def _made(folder: str | os.PathLike[str]) -> Path:
    """The folder, made if there is none."""
    if not isinstance(folder, str | os.PathLike) or not isinstance(os.fspath(folder), str):
        raise SubspaceError(f"a folder is named by a string or a path, got {shown(folder)}")
    name = os.fspath(folder)
    if not name or "\0" in str(name):
        raise SubspaceError(f"a folder is named by a string or a path, got {shown(name)}")
    path = Path(os.path.expanduser(str(name)))  # noqa: PTH111 - which raises nothing
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as cause:
        raise SubspaceError(f"{named(name)} is not a folder: {reason(cause)}") from cause
    return path


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda part: part.write_text(text, "utf-8", newline="\n"), SubspaceError)
