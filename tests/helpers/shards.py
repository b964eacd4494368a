"""Sweeps of each kind, whole and as shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nnpatch_core import (
    EdgeOutcome,
    MultiSite,
    Outcome,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    edge_patching,
    path_patching,
)
from nnpatch_core.scale import measure_shard
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.checkpoints import BUDGET, SITES, SOURCE, TARGET
from tests.helpers.samples import THREE

ANSWERS = THREE.answers
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])


def spread(logits: torch.Tensor, context: Any) -> torch.Tensor:
    """A metric of all prompts together."""
    right = logits.gather(-1, context.source_answer_index[:, None])[:, 0]
    return right - right.mean()


def leaning(logits: torch.Tensor, context: Any) -> torch.Tensor:
    """Another one, whose sum has a gradient, which other prompts are in too."""
    right = logits.gather(-1, context.source_answer_index[:, None])[:, 0]
    return right * (2 + right.mean())


SWEEPS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "activation": (activation_patching, (SITES, SOURCE, TARGET, *ANSWERS), {}),
    "padded": (activation_patching, (SITES, SOURCE, TARGET, *ANSWERS), {"attention_mask": MASK}),
    "full": (
        activation_patching,
        (Sites(["attn", "o"], seq_pos_type="last"), SOURCE, TARGET, *ANSWERS),
        {"engine": "full"},
    ),
    "chunks": (activation_patching, (SITES, SOURCE, TARGET, *ANSWERS), {"batch_size": 1}),
    "all prompts": (activation_patching, (SITES, SOURCE, TARGET, *ANSWERS), {"metric": spread}),
    "all prompts, chunks": (
        activation_patching,
        (SITES, SOURCE, TARGET, *ANSWERS),
        {"metric": {"spread": spread, "kl": "kl_divergence"}, "batch_size": 2},
    ),
    "screened": (
        activation_patching,
        (SITES, SOURCE, TARGET, *ANSWERS),
        {"screen": "attribution", "top_k": 9},
    ),
    "ablation": (ablation_patching, (SITES, TARGET, *ANSWERS), {"method": "mean"}),
    "resample": (ablation_patching, (SITES, TARGET, *ANSWERS), {"method": "resample", "seed": 3}),
    "paths": (
        path_patching,
        (Sites("o", [0, 1]), Sites(["q", "mlp"], [2]), SOURCE, TARGET, *ANSWERS),
        {},
    ),
    "edges": (edge_patching, (SOURCE, TARGET, *ANSWERS), {"senders": ["a0.h1", "m0", "a1.h2"]}),
}
#: Sites that act on one another, so that each pair of them is a cell that is estimated by itself.
PAIRED = [
    Site.get_site(tiny_api(), name, layer, head, seq_pos=[-1])
    for name, layer, head in [("resid", 0, None), ("o", 1, 2), ("mlp", 2, None)]
]
JOINT = Sites.from_sites(
    [PAIRED[0], MultiSite(PAIRED[:2]), MultiSite(PAIRED[1:]), MultiSite(PAIRED[::2]), PAIRED[2]]
)
#: Of the estimates the options of `attribution_patching`, and of `edge_patching`.
ATTRIBUTED: dict[str, dict[str, Any]] = {
    "attributed": {},
    "attributed, padded": {"attention_mask": MASK, "batch_size": 2},
    "attributed, chunks": {"batch_size": 1},
    "attributed, joint": {"sites": JOINT},
    "attributed, all prompts": {
        "metric": {"leaning": leaning, "kl": "kl_divergence"},
        "batch_size": 1,
        "steps": 2,
    },
    "integrated": {"steps": 3, "attention_mask": MASK},
    "integrated, chunks": {"steps": 2, "batch_size": 1},
    "QK fix": {"qk_fix": True},
    "GradDrop": {"grad_drop": True, "metric": ["logit_difference", "answer_log_probability"]},
    "GradDrop, chunks": {"grad_drop": True, "batch_size": 2},
    "AtP*": {"qk_fix": True, "grad_drop": True, "attention_mask": MASK},
    "AtP*, chunks": {"qk_fix": True, "grad_drop": True, "batch_size": 2},
    "attributed, means": {"ablation": "mean", "keep": "means"},
}
EDGES: dict[str, dict[str, Any]] = {
    "eap": {"batch_size": 1, "attention_mask": MASK},
    "eap, all prompts": {"metric": leaning, "batch_size": 2},
    "eap-ig-inputs": {"steps": 2, "batch_size": 1},
    "eap-ig-activations": {"steps": 2, "attention_mask": MASK},
    "eap-ig-activations, chunks": {"steps": 2, "batch_size": 2, "senders": ["a0.h1", "m1"]},
    "clean-corrupted": {"batch_size": 2},
}
ESTIMATES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    **{
        kind: (
            attribution_patching,
            (
                options.get("sites", SITES),
                None if "ablation" in options else SOURCE,
                TARGET,
                *ANSWERS,
            ),
            {name: value for name, value in options.items() if name != "sites"},
        )
        for kind, options in ATTRIBUTED.items()
    },
    **{
        kind: (
            edge_patching,
            (SOURCE, TARGET, *ANSWERS),
            {"method": kind.partition(",")[0], **options},
        )
        for kind, options in EDGES.items()
    },
}
EVERY = SWEEPS | ESTIMATES
BUDGETS = {
    "edges": "1 GiB",
    "paths": "1 GiB",
    "screened": 400_000,
    **dict.fromkeys(ESTIMATES, "1 GiB"),
    # Of all paths a few wait together.
    "attributed, all prompts": 700_000,
}


def swept(kind: str, model: Any = None, **options: Any) -> Outcome:
    """The sweep of a kind, by one process or by workers in place of the model."""
    function, arguments, own = EVERY[kind]
    budget = {"memory_budget": BUDGETS.get(kind, BUDGET)}
    given = {**budget, "progress": False, **own, **options}
    out = function(tiny_model("llama") if model is None else model, tiny_api(), *arguments, **given)
    return out.outcome if isinstance(out, EdgeOutcome) else out


def measured(kind: str, shard: str, path: Path | str, **options: Any) -> Any:
    """A shard of the sweep of a kind."""
    function, arguments, own = EVERY[kind]
    given = {"memory_budget": BUDGETS.get(kind, BUDGET), "progress": False, **own, **options}
    call = (tiny_model("llama"), tiny_api(), *arguments)
    return measure_shard(function, *call, shard=shard, checkpoint=path, **given)
