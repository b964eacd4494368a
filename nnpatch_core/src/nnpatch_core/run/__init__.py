"""A run from a table of prompts to a folder with outcome, tables, pictures and a report.

`settings` are all that a run is told, `toml` reads and writes them and `command` is the command
line that they stand for; `loading` has model and tokenizer, `sweeps` the call of each kind of
analysis, `folder` what is on disk and `outputs` the files of each kind of result; a `job` goes from
the first to the last.
"""

from nnpatch_core.run.command import command_of, in_options
from nnpatch_core.run.folder import CHECKPOINT, OUTCOME, REPORT, SETTINGS, Folder
from nnpatch_core.run.job import Job
from nnpatch_core.run.loading import UNLOADED
from nnpatch_core.run.merging import find_shards
from nnpatch_core.run.settings import METHODS, Option, Settings, options, read_settings
from nnpatch_core.run.toml import as_toml, read_toml, template

__all__ = [
    "CHECKPOINT",
    "METHODS",
    "OUTCOME",
    "REPORT",
    "SETTINGS",
    "UNLOADED",
    "Folder",
    "Job",
    "Option",
    "Settings",
    "as_toml",
    "command_of",
    "find_shards",
    "in_options",
    "options",
    "read_settings",
    "read_toml",
    "template",
]
