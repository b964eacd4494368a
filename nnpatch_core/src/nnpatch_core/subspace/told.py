"""Learning in words: those that make a call what it is, and those of a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from nnpatch_core.spaces import Subspace
from nnpatch_core.subspace.doubts import OWN
from nnpatch_core.subspace.evaluation import Evaluation
from nnpatch_core.subspace.interchange import Interchange
from nnpatch_core.subspace.options import Split, Training
from nnpatch_core.subspace.proportion import Proportion
from nnpatch_core.sweep import UNTOLD, around, digest, versions


def identity(
    interchange: Interchange,
    training: Training,
    split: Split,
    start: Subspace | None,
    asked: Mapping[str, Tensor],
    random_model: bool,
) -> dict[str, str]:
    """The parts of a call: two calls with the same learn the same, to the last bit."""
    sweep, runs = interchange.sweep, interchange.runs
    model = sweep.patches.model
    positions = interchange.site.positions
    taken = positions.at if positions.source is None else positions.source
    untold: set[str] = set()
    return {
        "model": f"{type(model).__name__} {sweep.options.call.weights(model)}",
        "dtype": str(next(model.parameters()).dtype),
        **around(model, untold, gradients=True),
        "adapter": interchange.named.api.name,
        "site": f"{interchange.named.label} {digest(positions.at, taken)}",
        "pairs": digest(runs.source.tokens, runs.source.mask, runs.target.tokens, runs.target.mask),
        "answers": digest(runs.source_answers, runs.target_answers, *asked.values()),
        "held out": digest(split.train, split.held_out),
        "options": json.dumps(attrs.asdict(training), sort_keys=True),
        "initial": "random" if start is None else digest(start.basis),
        "learned": ", ".join([*asked, *["random model"] * random_model]),
        "engine": interchange.replay.name,
        # What runs together decides on last digits.
        "pairs at once": str(interchange.at_once(True, training.batch_size)),
        **versions(),
        **({UNTOLD: ", ".join(sorted(untold))} if untold else {}),
    }


def info_of(
    interchange: Interchange,
    training: Training,
    split: Split,
    evaluation: Evaluation,
) -> dict[str, Any]:
    """The words of a model card on a subspace that was learned."""
    model = interchange.sweep.patches.model
    config: Any = getattr(model, "config", None)
    return {
        "model": _named(getattr(config, "_name_or_path", "")) or type(model).__name__,
        "model_type": str(getattr(config, "model_type", None)),
        "method": "distributed alignment search",
        "data": {"pairs": len(split.train), "pairs held out": len(split.held_out)},
        "training": attrs.asdict(training),
        "metrics": {
            "interchange accuracy": _ends(evaluation.accuracy),
            "target accuracy": _ends(evaluation.target_accuracy),
        },
        "controls": {
            name: _ends(each.accuracy) for name, each in evaluation.items() if name != OWN
        },
        **versions(),
    }


def _named(path: Any) -> str:
    """The name that a model was loaded by; of a folder, as a card is for others, the last part."""
    name = str(path or "")
    return Path(name).name if Path(name).is_absolute() else name


def _ends(share: Proportion) -> dict[str, float]:
    return {"value": share.value, "low": share.low, "high": share.high}
