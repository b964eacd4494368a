"""Where values come from: the runs that a call names, and the values that they put at sites."""

from nnpatch_core.interventions.ablations import (
    Ablation,
    AblationRuns,
    check_ablation,
    read_ablation,
)
from nnpatch_core.interventions.arguments import (
    AS_TARGET,
    PairArguments,
    RunArguments,
    ablated_arguments,
    pair_arguments,
    run_arguments,
)
from nnpatch_core.interventions.averages import cache_average
from nnpatch_core.interventions.constants import Recorded, Zeros
from nnpatch_core.interventions.inputs import (
    Remembered,
    one_mask,
    read_batch,
    read_batches,
    read_spans,
)
from nnpatch_core.interventions.pairs import (
    PairRuns,
    check_denominators,
    differs_of,
    patchable,
    read_pairs,
    read_two,
)

__all__ = [
    "AS_TARGET",
    "Ablation",
    "AblationRuns",
    "PairArguments",
    "PairRuns",
    "Recorded",
    "Remembered",
    "RunArguments",
    "Zeros",
    "ablated_arguments",
    "cache_average",
    "check_ablation",
    "check_denominators",
    "differs_of",
    "one_mask",
    "pair_arguments",
    "patchable",
    "read_ablation",
    "read_batch",
    "read_batches",
    "read_pairs",
    "read_spans",
    "read_two",
    "run_arguments",
]
