"""`nnpatch merge`: the shards of a run, put together."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nnpatch_core.cli.output import say, say_aside
from nnpatch_core.errors import PatchingError, SettingsError
from nnpatch_core.run import UNLOADED, Job, find_shards, in_options

_FOLDERS = Annotated[
    list[Path],
    typer.Argument(metavar="DIR...", help="Folders of shards, or a folder that has them all."),
]
_OUT = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="The folder for all files. By default that of the shards."),
]
_OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Begin anew in the folder.")]


def merge(folders: _FOLDERS, *, out: _OUT = None, overwrite: _OVERWRITE = False) -> bool:
    """Put the shards of a run together, and write outcome, tables, pictures and a report.

    The model is loaded for its unpatched runs; nothing is measured again. The outcome is, to the
    last bit, that of one process.
    """
    shards = find_shards(folders, out)
    try:
        job = Job.prepared(shards.settings, say_aside, resume=not overwrite, overwrite=overwrite)
        job.run(say, progress=sys.stderr.isatty(), resume=not overwrite, shards=shards.checkpoints)
    except PatchingError as error:
        # The file is this very merge's.
        words = str(error).replace(
            ": name another file, or delete it",
            ": table or model are others than when the shards were measured",
        )
        if isinstance(error, SettingsError) and UNLOADED in words:
            words += "; if it is in the folder in which the shards were run, merge there"
        raise type(error)(in_options(words)) from error
    return True
