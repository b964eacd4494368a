"""Outcomes made by hand: of numbers that a test chooses, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from nnpatch_core import Outcome
from nnpatch_core.results import Baseline, Cells, Prompts, Scale
from nnpatch_core.sites import Axis


def made(
    changes: Any,
    whole: Any,
    *,
    scale: Scale = "restored",
    target: Any = 0.0,
    elided: Mapping[str, Sequence[int]] | None = None,
    missing: Sequence[int] = (),
    tokens: Sequence[int] | None = None,
    columns: Mapping[str, tuple[Any, ...]] | None = None,
) -> Outcome:
    """An outcome whose cells change the target run by so much, and the source run by `whole`.

    Args:
        changes: `[layers, prompts]`, patched - target, of the site name `mlp`; or of each name.
        whole: `[prompts]`, source - target.
        scale: of the outcome.
        target: `[prompts]`, the target run's metric, or one number for all.
        elided: site name to the layers that put nothing else there; their changes must be 0.
        missing: layers that were not swept, so that their changes are left out.
        tokens: the source prompts, each of one token; by default those numbered from 1.
        columns: further columns of the prompts.
    """
    by_name = changes if isinstance(changes, Mapping) else {"mlp": changes}
    sizes = np.asarray(whole, np.float64)
    unpatched = np.broadcast_to(np.asarray(target, np.float64), sizes.shape)
    cells, raw = {}, {}
    for name, given in by_name.items():
        moved = np.asarray(given, np.float64)
        kept = [layer for layer in range(len(moved)) if layer not in missing]
        shape = (len(kept), len(sizes))
        same = torch.zeros(shape, dtype=torch.bool)
        for layer in (elided or {}).get(name, ()):
            assert not moved[layer].any(), layer
            same[kept.index(layer)] = True
        cells[name] = Cells(
            axes=(Axis("layer", tuple(range(len(moved)))),),
            index=torch.tensor(kept, dtype=torch.int64)[:, None],
            present=torch.ones(shape, dtype=torch.bool),
            elided=same,
            unread=torch.zeros(shape, dtype=torch.bool),
            exact=torch.ones(len(kept), dtype=torch.bool),
        )
        raw[name] = torch.from_numpy(unpatched + moved[kept])
    ids = torch.tensor(tokens or range(1, 1 + len(sizes)), dtype=torch.int64)[:, None]
    mask = torch.ones_like(ids)
    prompts = Prompts(ids, mask, ids + 10_000, mask, columns=columns or {})
    baseline = Baseline(torch.from_numpy(unpatched + sizes), torch.from_numpy(unpatched.copy()))
    return Outcome(
        "activation", scale, cells, {"given": raw}, {"given": baseline}, prompts, "given", {}
    )
