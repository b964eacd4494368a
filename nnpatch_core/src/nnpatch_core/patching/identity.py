"""What makes a sweep the same sweep again, in a few short words for each part of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nnpatch_core._models import module_of
from nnpatch_core.batch import Batch
from nnpatch_core.metrics import MetricContext
from nnpatch_core.patching.labels import versions
from nnpatch_core.patching.sweep import Sweep
from nnpatch_core.results import Baseline

#: Numbers that are summed up together.
_PIECE = 2**22


def identity(
    sweep: Sweep,
    kind: str,
    runs: Mapping[str, Batch],
    context: MetricContext,
    baseline: Mapping[str, Baseline],
    given: Mapping[str, Tensor],
) -> dict[str, str]:
    """The parts of a sweep: two sweeps with the same give the same numbers, to the last bit.

    Args:
        sweep: what is patched.
        kind: what is put there.
        runs: the prompts of each run.
        context: the answers.
        baseline: the metrics of the unpatched runs, which tell two callables of one name apart.
        given: what else is put at the sites.
    """
    model = module_of(sweep.nnmodel)
    answers = [context.source_answer_index]
    if context.target_answer_index is not None:
        answers.append(context.target_answer_index)
    measured = [value for runs in baseline.values() for value in (runs.source, runs.target)]
    labels = [f"{name}: {cell.label}" for name, grid in sweep.grids.items() for cell in grid.sites]
    adapters = sorted({site.api.name for site in sweep.sites})
    return {
        "kind": kind,
        "model": f"{type(model).__name__} {checksum(model)}",
        **{f"{name} prompts": _digest(batch.tokens, batch.mask) for name, batch in runs.items()},
        "answers": _digest(*answers),
        "sites": f"{len(labels)} {_hash('; '.join(labels).encode())}",
        "adapter": ", ".join(adapters),
        "metric": f"{', '.join(sweep.metrics)} {_digest(*measured)}",
        "engine": sweep.engine,
        "prompts at once": str(sweep.limits.prompts),
        "memory_budget": str(sweep.limits.budget),
        **{name: _digest(value) for name, value in given.items()},
        **versions(),
    }


def checksum(model: nn.Module) -> str:
    """A short word for a model's weights: another one if a bit of them is another.

    Sums of integers, so that it is the same on every device; an offloaded weight counts by its
    shape only.
    """
    words = []
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        total = 0 if weight.is_meta else _sum(weight.detach())
        words.append(f"{name} {weight.dtype} {list(weight.shape)} {total}")
    return _hash("\n".join(words).encode())


def _sum(weight: Tensor) -> int:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = weight.contiguous().flatten()
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten()
    bits = flat.view(kinds[flat.element_size()])
    total = 0
    for first in range(0, len(bits), _PIECE):
        piece = bits[first : first + _PIECE].to(torch.int64)
        # Odd factors, so that numbers that change places change the sum.
        place = torch.arange(first, first + len(piece), device=piece.device) * 2 + 1
        total += int((piece * place * 0x9E3779B1).sum())
    return total % 2**64


def _digest(*tensors: Tensor) -> str:
    parts = [value.detach().cpu().contiguous() for value in tensors]
    shapes = str([(str(part.dtype), list(part.shape)) for part in parts])
    return _hash(shapes.encode() + b"".join(part.numpy().tobytes() for part in parts))


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=6).hexdigest()
