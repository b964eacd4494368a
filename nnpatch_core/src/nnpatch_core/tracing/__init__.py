"""One forward of a model, and what is put into it: the floor under engines and gradients."""

from nnpatch_core.tracing.activations import (
    LAYER_INPUT,
    LAYER_OUTPUT,
    read,
    read_component,
    skip,
    write,
    write_component,
)
from nnpatch_core.tracing.attention import any_shape
from nnpatch_core.tracing.begun import LEAST_HELD, Begun, begin, pieces_differ, with_cache
from nnpatch_core.tracing.call_arguments import kept_arguments, of_rows
from nnpatch_core.tracing.cells import BoundSite, Cell, Cells, Numbers, columns_of, ends_of, within
from nnpatch_core.tracing.elsewhere import (
    Origin,
    Sendable,
    aligned,
    model_for,
    patched_there,
    summed,
    tokens_there,
    total,
    totals_there,
    why_not_sent,
)
from nnpatch_core.tracing.hooks import (
    backward_functions,
    backward_hooks,
    check_forwards,
    forward_functions,
    forward_hooks,
    in_words,
)
from nnpatch_core.tracing.observer import Trace, traces
from nnpatch_core.tracing.own_runs import appended_to
from nnpatch_core.tracing.patches import Patches
from nnpatch_core.tracing.put import (
    Intervention,
    PatchedTokens,
    Prepared,
    as_patched,
    differs,
    put,
    put_site,
    tokens_of,
)
from nnpatch_core.tracing.record import record
from nnpatch_core.tracing.sites_read import (
    Caught,
    ReadSite,
    sites_of,
    taken,
    watching,
    widths_of,
)
from nnpatch_core.tracing.trace import Kept, call, forward, picked
from nnpatch_core.tracing.widths import check_space, width_of

__all__ = [
    "LAYER_INPUT",
    "LAYER_OUTPUT",
    "LEAST_HELD",
    "Begun",
    "BoundSite",
    "Caught",
    "Cell",
    "Cells",
    "Intervention",
    "Kept",
    "Numbers",
    "Origin",
    "PatchedTokens",
    "Patches",
    "Prepared",
    "ReadSite",
    "Sendable",
    "Trace",
    "aligned",
    "any_shape",
    "appended_to",
    "as_patched",
    "backward_functions",
    "backward_hooks",
    "begin",
    "call",
    "check_forwards",
    "check_space",
    "columns_of",
    "differs",
    "ends_of",
    "forward",
    "forward_functions",
    "forward_hooks",
    "in_words",
    "kept_arguments",
    "model_for",
    "of_rows",
    "patched_there",
    "picked",
    "pieces_differ",
    "put",
    "put_site",
    "read",
    "read_component",
    "record",
    "sites_of",
    "skip",
    "summed",
    "taken",
    "tokens_of",
    "tokens_there",
    "total",
    "totals_there",
    "traces",
    "watching",
    "why_not_sent",
    "width_of",
    "widths_of",
    "with_cache",
    "within",
    "write",
    "write_component",
]
