"""All that a plugin's tests need: the conformance kit, tiny models, a tokenizer; all offline.

`parametrize_with_checks` needs pytest, and `nnpatch_core.testing.strategies` hypothesis: both come
with `pip install "nnpatch-core[testing]"`.
"""

from typing import TYPE_CHECKING, Any

from nnpatch_core._tiny import causal_model_types, tiny_model, tiny_tokenizer
from nnpatch_core.conformance import CHECKS, CheckError, Result, run_checks
from nnpatch_core.testing.adapter import tiny_api
from nnpatch_core.testing.positions import check_seq_pos
from nnpatch_core.tracing import Trace, traces

if TYPE_CHECKING:
    from nnpatch_core.testing.parametrize import parametrize_with_checks

__all__ = [
    "CHECKS",
    "CheckError",
    "Result",
    "Trace",
    "causal_model_types",
    "check_seq_pos",
    "parametrize_with_checks",
    "run_checks",
    "tiny_api",
    "tiny_model",
    "tiny_tokenizer",
    "traces",
]


def __getattr__(name: str) -> Any:
    # The checks run without pytest, on the command line too; only the decorator wants it.
    if name != "parametrize_with_checks":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from nnpatch_core.testing.parametrize import parametrize_with_checks
    except ImportError as error:
        raise ImportError(
            "parametrize_with_checks needs pytest: pip install 'nnpatch-core[testing]'"
        ) from error
    return parametrize_with_checks
