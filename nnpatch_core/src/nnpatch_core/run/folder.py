"""The folder of a run: its settings, what is under way, and what came out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

import attrs

from nnpatch_core._files import reason, write_whole
from nnpatch_core._printable import shown
from nnpatch_core.errors import SettingsError
from nnpatch_core.run.settings import Settings, read_settings
from nnpatch_core.run.toml import changed, read_toml, write_toml
from nnpatch_core.sweep import Stored

SETTINGS, CHECKPOINT, OUTCOME, REPORT = (
    "run.toml",
    "checkpoint",
    "outcome.safetensors",
    "report.html",
)
#: The files that runs have written here, so that another one removes these and no others.
WRITTEN = ".written.json"
#: The output folder is no part of what a run finds out; nor is how its report puts it.
_ASIDE = frozenset({"out", "question", "level", "width"})


@attrs.frozen
class Folder:
    """The folder that a run writes into.

    Args:
        path: where it is.
    """

    path: Path

    @classmethod
    def of(cls, settings: Settings) -> Folder:
        """The folder that settings name, or that has the table's name."""
        path = settings.out or Path(f"nnpatch-{settings.table.stem}")
        return cls(path if settings.shard is None else path / shard_folder(settings.shard))

    @property
    def shards(self) -> list[Folder]:
        """The folders of shards in this one."""
        found = (each for each in self.path.glob(shard_folder("*/*")) if each.is_dir())
        return [Folder(each) for each in sorted(found)]

    @property
    def checkpoint(self) -> Path:
        """Where a sweep is kept that is under way: a file, or a folder of them."""
        return self.path / CHECKPOINT

    def check(self, settings: Settings, *, resume: bool, overwrite: bool) -> None:
        """See that a run may write here.

        Raises:
            SettingsError: something else is there, another run, or a finished one.
        """
        if self.path.exists() and not self.path.is_dir():
            raise SettingsError(f"out: {self.path} is not a folder")
        if overwrite:
            return
        told = self.path / SETTINGS
        if not told.exists():
            shards = {each.path for each in self.shards}
            if self.path.exists() and set(self.path.iterdir()) - shards:
                raise SettingsError(
                    f"out: {self.path} has other files, and no {SETTINGS} of a run: name an empty "
                    "folder, or say --overwrite to write beside them"
                )
            return
        if self.measured and not resume:
            raise SettingsError(
                f"out: {self.path} has this shard, and it is measured: nnpatch merge puts all "
                "shards together, --overwrite begins anew"
            )
        if self.finished:
            raise SettingsError(
                f"out: {self.path} has a finished run: --overwrite begins anew, --out names "
                "another folder, and nnpatch show prints what it has found"
            )
        if not resume:
            raise SettingsError(
                f"out: {self.path} has a run that was broken off: --resume goes on with it, "
                "--overwrite begins anew, --out names another folder"
            )
        values, places = read_toml(told)
        there = changed(read_settings(values, lambda name: places.get(name, str(told))))
        now = changed(settings)
        different = [
            f"{name}: {shown(there.get(name))} there, {shown(now.get(name))} now"
            for name in sorted({*there, *now} - _ASIDE)
            if there.get(name) != now.get(name)
        ]
        if different:
            raise SettingsError(
                "\n".join([f"out: {self.path} has a run with other settings", *different])
            )

    @property
    def finished(self) -> bool:
        """Whether a run has ended here."""
        return (self.path / REPORT).exists() and not self.checkpoint.exists()

    @property
    def measured(self) -> bool:
        """Whether a shard is here, all of which is measured."""
        if not self.checkpoint.is_file():
            return False
        shards = Stored.read(self.checkpoint).shards
        return bool(shards) and all(shards.values())

    def begin(self, settings: Settings, *, resume: bool) -> None:
        """Make the folder, with the settings in it.

        Raises:
            SettingsError: it cannot be made, or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not resume:
                # What another run has left must not pass for what this one finds.
                self.forget()
                self._remove_written()
        except OSError as error:
            raise SettingsError(f"out: {self.path} cannot be used: {reason(error)}") from error
        out = self.path if settings.shard is None else self.path.parent
        write_toml(self.path / SETTINGS, attrs.evolve(settings, out=out))

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file, or a folder of files, and keep in mind what it was.

        Raises:
            PatchingError: one of its kinds, as the writer raises it.
        """
        path = self.path / name
        # Noted before: a run may break off amid a file.
        self._note([] if path.is_dir() else [name])
        there = set(_files_in(path))
        write(path)
        self._note(
            each.relative_to(self.path).as_posix() for each in _files_in(path) if each not in there
        )

    def _note(self, names: Iterable[str]) -> None:
        known = self._written()
        every = [*dict.fromkeys([*known, *names])]
        if every != known:
            text = json.dumps(every, indent=0)
            write_whole(
                self.path / WRITTEN, lambda part: part.write_text(text, "utf-8"), SettingsError
            )

    def _written(self) -> list[str]:
        """The files that runs have written here, as far as that is known."""
        try:
            names = json.loads((self.path / WRITTEN).read_text("utf-8"))
        except (OSError, ValueError):
            return []
        return [each for each in names if isinstance(each, str)] if isinstance(names, list) else []

    def _remove_written(self) -> None:
        """Remove what earlier runs have written, and nothing else."""
        for name in [*self._written(), OUTCOME, REPORT]:
            parts = PurePosixPath(name).parts
            # The list is a file, which may say anything.
            if not parts or parts[0] == "/" or ".." in parts or name == SETTINGS:
                continue
            file = self.path.joinpath(*parts)
            if any(each.is_symlink() for each in [*file.parents][: len(parts) - 1]):
                continue
            if file.is_symlink() or file.is_file():
                file.unlink()
            if len(parts) > 1 and file.parent.is_dir() and not any(file.parent.iterdir()):
                file.parent.rmdir()
        (self.path / WRITTEN).unlink(missing_ok=True)

    def forget(self) -> None:
        """Remove what was kept of a sweep under way."""
        if self.checkpoint.is_dir():
            shutil.rmtree(self.checkpoint)
        else:
            self.checkpoint.unlink(missing_ok=True)


def shard_folder(shard: str) -> str:
    """The name of the folder of a shard, `K/N`.

    Examples:
        >>> shard_folder("3/16")
        'shard-3-of-16'
    """
    return f"shard-{shard.replace('/', '-of-')}"


def _files_in(path: Path) -> Iterator[Path]:
    """A file, or those in a folder."""
    if path.is_dir():
        yield from (each for each in path.rglob("*") if each.is_file())
    elif path.exists():
        yield path
