"""The method `report`, which outcomes of all kinds have."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from nnpatch_core.report.asked import Asked, read_asked, read_level, read_width
from nnpatch_core.report.facts import LEVEL, WIDTH, Facts
from nnpatch_core.report.study import Study
from nnpatch_core.report.writing import write_report


class Reports:
    """An outcome of any kind that can be written as a report."""

    __slots__ = ()

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        command: str | None = None,
        question: str | None = None,
        title: str | None = None,
        pages: Mapping[str, str] | None = None,
        warnings: Sequence[Any] = (),
        width: float = WIDTH,
        level: float = LEVEL,
    ) -> None:
        """Write a report: one page that opens anywhere, with all that there is to say.

        It has the question, what was found, pictures, the numbers with intervals, advice on how the
        study was made (see `nnpatch_core.report.advice`), the prompts with their answers and
        unpatched runs, and how it was run. It is one file without scripts that loads nothing, is
        read on a phone, and can be printed. The same outcome gives the same bytes.

        Args:
            path: the file; a link is followed.
            command: one that makes the outcome again; by default the page says the call.
            question: what was asked, in a sentence; by default one is made.
            title: of the page; by default the model and the kind of the study.
            pages: files beside the report, such as interactive pictures, that it links to: what
                each is, and its name.
            warnings: that were raised on the way, as texts or as `warnings` records them.
            width: how wide the interval of the strongest may be, from end to end, before the advice
                asks for more prompts.
            level: of the intervals; those of a subspace are of 0.95.

        Raises:
            OutcomeError: it cannot be written, or an argument is none. Without matplotlib
                (`pip install nnpatch-core[plot]`) the page says that pictures are missing.

        Examples:
            >>> import tempfile
            >>> from pathlib import Path
            >>> import torch
            >>> from nnpatch_core import Sites, activation_patching
            >>> from nnpatch_core.testing import tiny_model
            >>> source, target = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]])
            >>> out = activation_patching(
            ...     tiny_model(), None, Sites("mlp", seq_pos_type="each"), source, target,
            ...     torch.tensor([1]), torch.tensor([2]), progress=False,
            ... )
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     out.report(f"{folder}/report.html", question="Which MLP sees the middle token?")
            ...     page = Path(f"{folder}/report.html").read_text("utf-8")
            >>> page[:15], "Which MLP sees" in page, "<script" in page
            ('<!DOCTYPE html>', True, False)
        """
        self._write(path, read_asked(command, question, title, pages, warnings), width, level)

    def _write(
        self, path: str | os.PathLike[str], asked: Asked, width: float, level: float
    ) -> None:
        """Write a report with what its caller adds."""
        wide, sure = read_width(width), read_level(level)

        def study() -> Study:
            made = self._study(sure)
            if wide == WIDTH:
                return made
            return attrs.evolve(made, facts=self._report_facts(wide, sure))

        write_report(path, study, asked)

    def _study(self, level: float) -> Study:
        """All that it has to tell."""
        raise NotImplementedError

    def _report_facts(self, width: float, level: float) -> Facts:
        """The facts that advice goes by, where an interval may be so wide."""
        raise NotImplementedError
