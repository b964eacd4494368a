"""The report: a study as one page that opens anywhere, with advice on how it was made.

`facts` is what the advice goes by, `rules` the rules of it, `sources` where it comes from, `advice`
what they say, and `linter` the advice on an outcome. A `study` is what any kind of outcome has to
tell; `asked` reads what its caller adds; `page` lays both out, in the `parts` of a page, with
pictures from `svg`; `writing` writes it, and `reports` is the method of the outcomes. This room
knows no outcome: those above it make the studies.
"""

from nnpatch_core.report.advice import Advice
from nnpatch_core.report.asked import read_asked
from nnpatch_core.report.facts import LEVEL, WIDTH, Facts, Race, Width
from nnpatch_core.report.linter import advice
from nnpatch_core.report.parts import Marked, Table
from nnpatch_core.report.reports import Reports
from nnpatch_core.report.rules import RULES, Rule
from nnpatch_core.report.sources import Source
from nnpatch_core.report.study import Drawing, Study

__all__ = [
    "LEVEL",
    "RULES",
    "WIDTH",
    "Advice",
    "Drawing",
    "Facts",
    "Marked",
    "Race",
    "Reports",
    "Rule",
    "Source",
    "Study",
    "Table",
    "Width",
    "advice",
    "read_asked",
]
