"""The shards of a run, found on disk, as one job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from nnpatch_core._printable import shown
from nnpatch_core.errors import SettingsError
from nnpatch_core.run.folder import SETTINGS, Folder, shard_folder
from nnpatch_core.run.settings import Settings, read_settings
from nnpatch_core.run.toml import changed, read_toml

#: Settings in which shards may differ.
_OWN = frozenset({"shard", "out", "question", "level", "width", "device", "threads"})


@attrs.frozen
class Shards:
    """The shards of a run.

    Args:
        settings: of the whole run.
        folders: of the shards.
    """

    settings: Settings
    folders: tuple[Folder, ...]

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints of all of them."""
        return [each.checkpoint for each in self.folders]


def find_shards(paths: Sequence[Path], out: Path | None) -> Shards:
    """The shards in some folders, or of which they are.

    Args:
        paths: folders of shards, or folders that have them.
        out: where the whole run writes; None is the folder that all shards are in.

    Raises:
        SettingsError: there are none, or they are of different runs; of all faults at once.
    """
    found: dict[Path, Folder] = {}
    for path in paths:
        for each in _in(path):
            # One folder may be named in two ways.
            found.setdefault(each.path.resolve(), each)
    folders = list(found.values())
    known = {each: _settings(each) for each in folders}
    first, settings = next(iter(known.items()))
    faults = [
        f"{each.path}: {name} is {_words(there.get(name))}, and {_words(here.get(name))} in "
        f"{first.path}"
        for each, own in known.items()
        for here, there in [(changed(settings), changed(own))]
        for name in sorted({*here, *there} - _OWN)
        if here.get(name) != there.get(name)
    ]
    parents = dict.fromkeys(each.path.resolve().parent for each in folders)
    if out is None and len(parents) > 1:
        faults.append(f"out: name a folder, as the shards are in {len(parents)} of them")
    faults += _cuts(known)
    empty = [each for each in folders if not each.checkpoint.is_file()]
    faults += [f"{each.path}: nothing is measured there yet" for each in empty]
    faults += [
        f"{first.path}: {name} is {file}, and {Path.cwd()} has no such file: merge in the folder "
        "in which the shards were run"
        for name, file in (("table", settings.table), ("reference", settings.reference))
        if file is not None and not file.is_absolute() and not file.exists()
    ]
    if faults:
        raise SettingsError("\n".join(faults))
    into = first.path.parent if out is None else out
    return Shards(attrs.evolve(settings, shard=None, out=into), tuple(folders))


def _cuts(known: Mapping[Folder, Settings]) -> list[str]:
    """Why shards do not make one whole: each is of so many, and all must be of as many."""
    by_count: dict[str, Folder] = {}
    for folder, own in known.items():
        by_count.setdefault(str(own.shard).rpartition("/")[2], folder)
    if len(by_count) == 1:
        return []
    told = ", ".join(f"{folder.path} is one of {count}" for count, folder in by_count.items())
    some = next(iter(by_count.values())).path.parent / shard_folder(f"*/{min(by_count, key=int)}")
    return [f"the shards are of {len(by_count)} cuts ({told}): name those of one, such as {some}"]


def _words(value: Any) -> str:
    return shown(list(value) if isinstance(value, tuple) else value)


def _in(path: Path) -> list[Folder]:
    folder = Folder(path)
    if (path / SETTINGS).exists() and _settings(folder).shard is not None:
        return [folder]
    if not folder.shards:
        raise SettingsError(f"{path}: there is no shard of a run (nnpatch run --shard K/N)")
    return folder.shards


def _settings(folder: Folder) -> Settings:
    told = folder.path / SETTINGS
    if not told.exists():
        raise SettingsError(f"{folder.path}: it has no {SETTINGS} of a run")
    values, places = read_toml(told)
    return read_settings(values, lambda name: places.get(name, str(told)))
