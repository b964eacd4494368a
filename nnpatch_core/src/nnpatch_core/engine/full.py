"""The reference engine: a whole forward for every cell. It defines what is correct."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from nnpatch_core.batch import Batch
from nnpatch_core.engine.replacements import Replacement
from nnpatch_core.engine.trace import forward
from nnpatch_core.site import AnySite, execution_order


def run_full(
    nnmodel: Any, target: Batch, cells: Iterable[AnySite], replacement: Replacement
) -> Iterator[Tensor]:
    """For each cell, patch it alone into a run of `target`.

    Yields:
        The patched run's logits at each prompt's last token, `[batch, vocab]` in float32 on
        the CPU.
    """
    for cell in cells:
        values = [(site, replacement.value(site)) for site in execution_order(cell.sites, nnmodel)]

        def visit(traced: Any, values: Any = values) -> None:
            for site, value in values:
                site.write(traced, value, replacement.mask)

        yield forward(nnmodel, target, visit)
