"""The folder of a run: its settings, what is under way, and what came out."""

from __future__ import annotations

import shutil
from pathlib import Path

import attrs

from nnpatch_core._files import reason
from nnpatch_core._printable import shown
from nnpatch_core.errors import SettingsError
from nnpatch_core.run.settings import Settings, read_settings
from nnpatch_core.run.toml import changed, read_toml, write_toml

SETTINGS, CHECKPOINT, OUTCOME, REPORT = (
    "run.toml",
    "checkpoint",
    "outcome.safetensors",
    "report.html",
)
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
        return cls(settings.out or Path(f"nnpatch-{settings.table.stem}"))

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
            if self.path.exists() and any(self.path.iterdir()):
                raise SettingsError(
                    f"out: {self.path} has other files, and no {SETTINGS} of a run: name an empty "
                    "folder, or say --overwrite to write beside them"
                )
            return
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
                for name in (OUTCOME, REPORT):
                    (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise SettingsError(f"out: {self.path} cannot be used: {reason(error)}") from error
        write_toml(self.path / SETTINGS, attrs.evolve(settings, out=self.path))

    def forget(self) -> None:
        """Remove what was kept of a sweep under way."""
        if self.checkpoint.is_dir():
            shutil.rmtree(self.checkpoint)
        else:
            self.checkpoint.unlink(missing_ok=True)
