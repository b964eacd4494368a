"""A sweep of many small buckets, which a checkpoint can be of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from nnpatch_core import Outcome, Sites, activation_patching
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.samples import THREE

SOURCE, TARGET, ANSWERS = THREE
SITES = Sites(["q", "v", "mlp", "resid"], seq_pos_type="each")
#: Small enough for many buckets.
BUDGET = 120_000


def sweep(path: Path | None = None, model: Any = None, **options: Any) -> Outcome:
    arguments = {"memory_budget": BUDGET, "progress": False, **options}
    arguments.setdefault("sites", SITES)
    return activation_patching(
        model or tiny_model("llama"),
        tiny_api(),
        arguments.pop("sites"),
        arguments.pop("source", SOURCE),
        TARGET,
        *arguments.pop("answers", ANSWERS),
        checkpoint=path,
        **arguments,
    )


def numbers(out: Outcome) -> torch.Tensor:
    """Each number of an outcome, to be compared bitwise."""
    return torch.cat([out.raw[metric][name].flatten() for metric in out.metrics for name in out])


def done(path: Path) -> int:
    with safe_open(str(path), framework="pt") as file:
        return int(file.get_tensor("done").sum())


def header(path: Path) -> dict[str, Any]:
    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()["nnpatch"])
