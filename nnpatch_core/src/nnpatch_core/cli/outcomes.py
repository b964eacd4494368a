"""The outcomes that commands name."""

from __future__ import annotations

from pathlib import Path

from nnpatch_core.cli.output import UsageError
from nnpatch_core.results import Outcome
from nnpatch_core.run import OUTCOME


def read_outcome(path: Path, metric: str | None = None) -> Outcome:
    """The outcome of a run's folder, or of a file, seen through a metric.

    Raises:
        UsageError: there is none.
        OutcomeError: the file is damaged, or has no such metric.
    """
    if not path.exists():
        raise UsageError(f"there is no {path}")
    file = path / OUTCOME if path.is_dir() else path
    if not file.exists():
        raise UsageError(f"{path} has no {OUTCOME}: the run has not ended, or writes none")
    outcome = Outcome.load(file)
    return outcome if metric is None else outcome.for_metric(metric)
