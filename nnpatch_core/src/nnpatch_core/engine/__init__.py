"""How a sweep is executed: a cell's replacement goes in, the patched run's logits come out."""

from nnpatch_core.engine.full import run_full
from nnpatch_core.engine.replacements import Recorded, Replacement, Zeros
from nnpatch_core.engine.trace import forward, record

__all__ = ["Recorded", "Replacement", "Zeros", "forward", "record", "run_full"]
