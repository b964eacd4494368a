"""nnpatch: activation patching on Hugging Face language models, on top of nnsight."""

from nnpatch_core import _versions  # noqa: F401 - first: refuses unsupported nnsight, transformers
from nnpatch_core._selfcheck import check_release
from nnpatch_core._version import __version__ as __version__
from nnpatch_core.adapters import (
    Component,
    DecoderAPI,
    Fused,
    Heads,
    Interleaved,
    ModelAPI,
    PartOfHead,
    decoder_components,
    fused_projections,
    separate_projections,
)
from nnpatch_core.circuits import Circuit, circuit_curve, evaluate_circuit, find_circuit
from nnpatch_core.edges import EdgeOutcome
from nnpatch_core.errors import PatchingError
from nnpatch_core.infer import infer_adapter, infer_model_api  # noqa: F401 - the second: a hook
from nnpatch_core.metrics import (
    MetricContext,
    compares_answers,
    per_prompt,
    reads_activations,
    reads_positions,
    reads_tokens,
)
from nnpatch_core.patching import (
    ablation_patching,
    activation_patching,
    attribution_patching,
    cache_average,
    edge_patching,
    path_patching,
    plan_sweep,
)
from nnpatch_core.plugins import hookimpl
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.results import Outcome
from nnpatch_core.seq_pos import (
    AllPositions,
    Custom,
    CustomConstant,
    Each,
    Last,
    LastK,
    PlacedCell,
    PlacedSeqPos,
    PromptBatch,
    SeqPos,
    Span,
    Spans,
)
from nnpatch_core.site import MultiSite, Site, execution_order
from nnpatch_core.sites import Sites
from nnpatch_core.steering import Add, Scale, Set, steer

__all__ = [
    "Add",
    "AllPositions",
    "Circuit",
    "Component",
    "Custom",
    "CustomConstant",
    "DecoderAPI",
    "Each",
    "EdgeOutcome",
    "Fused",
    "Heads",
    "Interleaved",
    "Last",
    "LastK",
    "MetricContext",
    "ModelAPI",
    "MultiSite",
    "Outcome",
    "PartOfHead",
    "PatchingError",
    "PlacedCell",
    "PlacedSeqPos",
    "PromptBatch",
    "PromptPairs",
    "Scale",
    "SeqPos",
    "Set",
    "Site",
    "Sites",
    "Span",
    "Spans",
    "ablation_patching",
    "activation_patching",
    "attribution_patching",
    "cache_average",
    "circuit_curve",
    "compares_answers",
    "decoder_components",
    "edge_patching",
    "evaluate_circuit",
    "execution_order",
    "find_circuit",
    "fused_projections",
    "hookimpl",
    "infer_adapter",
    "path_patching",
    "per_prompt",
    "plan_sweep",
    "reads_activations",
    "reads_positions",
    "reads_tokens",
    "separate_projections",
    "steer",
]

check_release()
