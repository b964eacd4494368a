"""One forward of a model, and what is put in it: the floor under engines and gradients."""

from nnpatch_core.tracing.arguments import of_rows
from nnpatch_core.tracing.hooks import (
    backward_hooks,
    check_forwards,
    forward_functions,
    forward_hooks,
    in_words,
)
from nnpatch_core.tracing.observer import Trace, traces
from nnpatch_core.tracing.replacements import Recorded, Replacement, Zeros
from nnpatch_core.tracing.trace import call, forward, record

__all__ = [
    "Recorded",
    "Replacement",
    "Trace",
    "Zeros",
    "backward_hooks",
    "call",
    "check_forwards",
    "forward",
    "forward_functions",
    "forward_hooks",
    "in_words",
    "of_rows",
    "record",
    "traces",
]
