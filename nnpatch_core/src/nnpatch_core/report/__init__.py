"""The report: a study as one page that opens anywhere, with advice on how it was made.

`facts` is what the advice goes by, `rules` the advice, `sources` where it comes from, `advice` asks
the rules. A `study` is what any kind of outcome has to tell; `asked` reads what its caller adds;
`page` lays both out, in the `parts` of a page, with pictures from `svg`, and `writing` writes it.
This room knows no outcome: those above it make the studies.
"""

from nnpatch_core.report.advice import Advice, Source, advice
from nnpatch_core.report.asked import Asked, read_asked
from nnpatch_core.report.facts import WIDTH, Facts, Race, Reported, Width
from nnpatch_core.report.parts import Marked, Table
from nnpatch_core.report.rules import RULES, Rule
from nnpatch_core.report.study import Drawing, Study
from nnpatch_core.report.writing import write_report

__all__ = [
    "RULES",
    "WIDTH",
    "Advice",
    "Asked",
    "Drawing",
    "Facts",
    "Marked",
    "Race",
    "Reported",
    "Rule",
    "Source",
    "Study",
    "Table",
    "Width",
    "advice",
    "read_asked",
    "write_report",
]
