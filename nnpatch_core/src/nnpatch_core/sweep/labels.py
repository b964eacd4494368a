"""The labels of an outcome: what it says about a sweep besides its numbers."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from nnpatch_core._models import Elsewhere
from nnpatch_core._printable import shown
from nnpatch_core._upstream import nnsight, transformers
from nnpatch_core.batch import Batch
from nnpatch_core.errors import TokensError
from nnpatch_core.results import (
    Baseline,
    Cells,
    Outcome,
    Prompts,
    Scale,
    known_in_words,
    runs_known,
)
from nnpatch_core.sweep.provenance import provenance
from nnpatch_core.sweep.spaces_told import spaces_told
from nnpatch_core.sweep.sweep import Sweep
from nnpatch_core.sweep.tally import Tally
from nnpatch_core.tracing import forward_hooks

#: The answers of each prompt, several of which count as one, each as tokens.
AnswerIds: TypeAlias = Sequence[Sequence[Sequence[int]]]


def outcome(
    sweep: Sweep,
    kind: str,
    scale: Scale,
    tally: Tally,
    baseline: Mapping[str, Baseline],
    prompts: Prompts,
    mask: Tensor,
    *,
    exact: Tensor | None = None,
    magnitude: bool = False,
) -> Outcome:
    """Put the labels to what was measured.

    Args:
        sweep: what was patched.
        kind: how.
        scale: of the values.
        tally: what was measured.
        baseline: the metrics of the unpatched runs.
        prompts: the prompts.
        mask: `[batch, seq]`: where prompts could be patched.
        exact: `[cells]`: which are no estimates; None is all.
        magnitude: whether values are sizes, without a sign.
    """
    model, layout = sweep.patches.model, sweep.layout
    config, hooks = getattr(model, "config", None), forward_hooks(model)
    adapters = sorted(sweep.patches.adapters, key=lambda api: api.name)
    parted = f"{len(tally.groups)} groups of cells, each with unpatched runs of its own"
    present, elided = layout.by_name(layout.present(mask)), layout.by_name(tally.elided)
    unread = layout.by_name(tally.unread)
    measured = layout.by_name(
        torch.ones(len(tally.elided), dtype=torch.bool, device="cpu") if exact is None else exact
    )
    cells = {
        name: Cells.of(grid, present[name], elided[name], unread[name], measured[name])
        for name, grid in layout.grids.items()
    }
    return Outcome(
        kind=kind,
        scale=scale,
        magnitude=magnitude,
        cells=cells,
        raw={metric: layout.by_name(values) for metric, values in tally.values.items()},
        baselines=baseline,
        prompts=prompts,
        metric=next(iter(sweep.metrics)),
        info={
            "adapter": ", ".join(dict.fromkeys(api.name for api in adapters)),
            "engine": ", ".join(tally.engines),
            **({"fallback": "; ".join(tally.fallbacks)} if tally.fallbacks else {}),
            **({"groups": parted} if tally.groups else {}),
            **({"hooks": "; ".join(hooks)} if hooks else {}),
            "model": getattr(config, "_name_or_path", "") or type(model).__name__,
            "model_type": str(getattr(config, "model_type", None)),
            **_elsewhere(sweep),
            "dtype": _dtype(sweep),
            **({} if sweep.options.seed is None else {"seed": str(sweep.options.seed)}),
            **_together(sweep),
            **_subspaces(sweep),
            **_pieces(sweep),
            "elided": known_in_words(*runs_known(cells.values())),
            **provenance(sweep.options.call, sweep.nnmodel, adapters),
            **versions(),
        },
        screening=None,
    )


def _elsewhere(sweep: Sweep) -> dict[str, str]:
    """Where the model runs, and as what, if that is elsewhere."""
    there = sweep.nnmodel
    if not isinstance(there, Elsewhere):
        return {}
    return {"remote": f"{there.where}, as {there.key}" if there.away else there.where}


def _dtype(sweep: Sweep) -> str:
    there, own = sweep.nnmodel, str(getattr(sweep.patches.model, "dtype", None))
    if isinstance(there, Elsewhere) and there.away:
        return f"as {there.where} has it ({own} by its config)"
    return own


def _together(sweep: Sweep) -> dict[str, str]:
    """How many cells patch several sites at once, in words, if any do."""
    cells = sweep.patches.cells
    several = int((np.diff(cells.ends) > 1).sum())
    return {"together": f"{several} of {len(cells)} cells patch several sites"} if several else {}


def _pieces(sweep: Sweep) -> dict[str, str]:
    """How recorded runs were made in pieces, if they were."""
    pieces = sweep.limits.pieces
    return {} if pieces is None else {"pieces": f"recorded runs in {pieces}"}


def _subspaces(sweep: Sweep) -> dict[str, str]:
    told = spaces_told(sweep.patches)
    return {} if told is None else {"subspace": "; ".join(dict.fromkeys(told.words))}


def versions() -> dict[str, str]:
    """The releases that numbers depend on."""
    # Asking the library itself is a hundred times faster than reading its whole metadata.
    # torch's is more than a text, which netCDF does not take.
    libraries = {
        library.__name__: str(library.__version__) for library in (nnsight, torch, transformers)
    }
    return {"nnpatch-core": _own_version(), **libraries}


@functools.cache
def _own_version() -> str:
    return metadata.version("nnpatch-core")


def label_prompts(
    nnmodel: Any,
    source: Batch,
    target: Batch,
    tokenizer: Any,
    columns: Mapping[Any, tuple[Any, ...]] | None = None,
    answers: Mapping[str, AnswerIds] | None = None,
) -> Prompts:
    """The prompts as they are run, with the text of their tokens if a tokenizer is at hand.

    Args:
        nnmodel: the model, wrapped by nnsight, which may have a tokenizer.
        source: the prompts of the one run.
        target: those of the other; of an ablation the same.
        tokenizer: the user's; None takes the model's.
        columns: further ones of the user's table.
        answers: of the source and of the target run, as tokens.

    Raises:
        TokensError: the tokenizer is none, or does not decode the tokens.
    """
    tokenizer = getattr(nnmodel, "tokenizer", None) if tokenizer is None else tokenizer
    if tokenizer is not None and not hasattr(tokenizer, "decode"):
        raise TokensError(f"tokenizer must be a Hugging Face tokenizer, got {shown(tokenizer)}")
    source, target = source.to(torch.device("cpu")), target.to(torch.device("cpu"))
    strings = {}
    if tokenizer is not None:
        ids = torch.cat([source.tokens[source.mask.bool()], target.tokens[target.mask.bool()]])
        try:
            strings = {token: str(tokenizer.decode([token])) for token in sorted({*ids.tolist()})}
        except Exception as error:
            raise TokensError(
                f"tokenizer {shown(tokenizer)} does not decode the tokens: {error}"
            ) from error
    named = {str(name): values for name, values in (columns or {}).items()}
    told = {
        run: tuple(" or ".join(_spelled(tokenizer, ids) for ids in each) for each in own)
        for run, own in (answers or {}).items()
    }
    return Prompts(source.tokens, source.mask, target.tokens, target.mask, strings, named, told)


def _spelled(tokenizer: Any, ids: Sequence[int]) -> str:
    """An answer's text; its ids where no tokenizer knows them: answers need not be of its words."""
    try:
        return str(tokenizer.decode(list(ids)))
    except Exception:  # no tokenizer, or any error of its own
        return " ".join(map(str, ids))
