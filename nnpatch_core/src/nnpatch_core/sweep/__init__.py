"""A sweep as it runs: what is patched, measured or estimated, and what is kept of it."""

from nnpatch_core.sweep.checkpoint import Checkpoint, budget_of
from nnpatch_core.sweep.checksum import checksum, digest
from nnpatch_core.sweep.cost import plan_of
from nnpatch_core.sweep.estimated import estimate_sweep
from nnpatch_core.sweep.estimation import Repairs, check_repairs
from nnpatch_core.sweep.fingerprint import telling
from nnpatch_core.sweep.held import Held, Logits, UnpatchedRun
from nnpatch_core.sweep.identity import UNTOLD, around, differences, identity
from nnpatch_core.sweep.labels import label_prompts, outcome, versions
from nnpatch_core.sweep.layout import Layout, lay_out
from nnpatch_core.sweep.ledger import Ledger
from nnpatch_core.sweep.lined_up import warn_of_columns
from nnpatch_core.sweep.measured import measure_sweep
from nnpatch_core.sweep.parts import Parts
from nnpatch_core.sweep.prepared import prepare
from nnpatch_core.sweep.progress import make_bar
from nnpatch_core.sweep.provenance import resumed
from nnpatch_core.sweep.runs import Runs, Values
from nnpatch_core.sweep.share import Share, ShareMeasured
from nnpatch_core.sweep.share_file import ShareFile
from nnpatch_core.sweep.spaces_told import space_parts
from nnpatch_core.sweep.stored import Stored
from nnpatch_core.sweep.sweep import (
    Options,
    Sweep,
    baselines,
    check_finite,
    check_padding,
    run_unpatched,
    warn_of_chunks,
)
from nnpatch_core.sweep.tally import Tally
from nnpatch_core.sweep.trials import try_out
from nnpatch_core.sweep.versions import Versions

__all__ = [
    "UNTOLD",
    "Checkpoint",
    "Held",
    "Layout",
    "Ledger",
    "Logits",
    "Options",
    "Parts",
    "Repairs",
    "Runs",
    "Share",
    "ShareFile",
    "ShareMeasured",
    "Stored",
    "Sweep",
    "Tally",
    "UnpatchedRun",
    "Values",
    "Versions",
    "around",
    "baselines",
    "budget_of",
    "check_finite",
    "check_padding",
    "check_repairs",
    "checksum",
    "differences",
    "digest",
    "estimate_sweep",
    "identity",
    "label_prompts",
    "lay_out",
    "make_bar",
    "measure_sweep",
    "outcome",
    "plan_of",
    "prepare",
    "resumed",
    "run_unpatched",
    "space_parts",
    "telling",
    "try_out",
    "versions",
    "warn_of_chunks",
    "warn_of_columns",
]
