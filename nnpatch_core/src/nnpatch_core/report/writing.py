"""A report is written: whole, or not at all."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

from nnpatch_core._files import check_file, write_whole
from nnpatch_core.errors import OutcomeError
from nnpatch_core.report.asked import Asked
from nnpatch_core.report.page import page_of
from nnpatch_core.report.study import Study


def write_report(path: str | os.PathLike[str], study: Callable[[], Study], asked: Asked) -> None:
    """Write the report of a study.

    Args:
        path: the file; a link is followed.
        study: makes it; the path is looked at first, as this may take a while.
        asked: what the caller adds.

    Raises:
        OutcomeError: it cannot be written; a file that was there is as it was.
    """
    check_file(path, OutcomeError)
    with warnings.catch_warnings():
        # What they would say stands in the report.
        warnings.simplefilter("ignore")
        page = page_of(study(), asked)
    write_whole(path, lambda part: part.write_bytes(page.encode()), OutcomeError)
