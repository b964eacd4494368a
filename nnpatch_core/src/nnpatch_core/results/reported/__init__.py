"""An outcome as a study for the report.

`facts` reads what advice goes by off an outcome, `prompts` makes the tables of prompts and
baselines, `call` says in Python how it was made, and `study` puts it all together.
"""

from nnpatch_core.results.reported.facts import facts_of
from nnpatch_core.results.reported.study import study_of, table_of_top

__all__ = ["facts_of", "study_of", "table_of_top"]
