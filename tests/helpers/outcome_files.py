"""Write outcomes of today's format to tests/results/files, each with its numbers beside it.

A file there is never written again: later versions must read it, or say why not. Run this when the
format has changed, and commit what is new.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs

import nnpatch_core
from nnpatch_core import Outcome, PromptPairs, Sites, activation_patching, attribution_patching
from nnpatch_core.results.file import FORMAT
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer

FOLDER = Path(__file__).parents[1] / "results" / "files"
SOURCE = ["The capital of France is", "Zoë talks of France is"]
TARGET = ["The capital of Japan is", "Zoë talks of Japan is"]
#: Which one wrote a file is of no interest.
ENVIRONMENT = "Python 3.11, some machine"
SPANS = {"country": [("France", "Japan")] * 2, "verb": [" is"] * 2}
METRICS = {"a/b": "logit_difference", "p": "answer_probability"}


def outcomes() -> dict[str, Outcome]:
    """One of each kind of content."""
    texts = [*SOURCE, *TARGET, " Paris Tokyo"]
    pairs = PromptPairs.from_texts(
        SOURCE,
        TARGET,
        [" Paris"] * 2,
        [" Tokyo"] * 2,
        tiny_tokenizer(texts),
        extra={"kind": ["plain", None]},
        spans=SPANS,
    )
    model, api = tiny_model("llama"), tiny_api()
    each = Sites(["resid", "k"], layers=[0, 2], seq_pos_type="each")
    named = Sites(["mlp", "o"], layers=[1], seq_pos_type="spans", seq_pos=["country", "verb"])
    listed = Sites.from_sites(each.get_sites_dict(model, api, pairs)["resid"][:2])
    rest: dict[str, Any] = {"progress": False}
    made = {
        "activation": activation_patching(model, api, each, pairs, metric=METRICS, **rest),
        "attribution": attribution_patching(model, api, named, pairs, grad_drop=True, **rest),
        "screened": activation_patching(
            model, api, each, pairs, screen="attribution", top_k=3, **rest
        ),
        "means": activation_patching(model, api, named, pairs, keep="means", **rest),
        "listed": activation_patching(model, api, listed, pairs, **rest),
    }
    return {
        name: attrs.evolve(out, info={**out.info, "environment": ENVIRONMENT})
        for name, out in made.items()
    }


def numbers(out: Outcome) -> dict[str, Any]:
    """All that must be read again, as JSON has it."""
    kept = out.moments is None
    return {
        "text": repr(out),
        "tokens": list(out.tokens),
        "info": dict(out.info),
        "screening": None if out.screening is None else out.screening.largest,
        "columns": {name: list(values) for name, values in out.prompts.columns.items()},
        "answers": {run: list(texts) for run, texts in out.prompts.answers.items()},
        "metrics": {
            metric: {
                name: {
                    "values": out.for_metric(metric)[name].tolist(),
                    "swept": out.swept(name).tolist(),
                    "exact": out.exact(name).tolist(),
                    "elided": out.elided(name).tolist(),
                    "axes": [[axis.name, list(axis.labels)] for axis in out.axes(name)],
                    "prompts": out.for_metric(metric).patched(name).tolist() if kept else None,
                    "error": None
                    if out.magnitude
                    else out.for_metric(metric).standard_error(name).tolist(),
                }
                for name in out
            }
            for metric in out.metrics
        },
    }


def main() -> None:
    number = FORMAT.rpartition(" ")[2]
    for name, out in outcomes().items():
        path = FOLDER / f"{name}-{number}-{nnpatch_core.__version__}.safetensors"
        if path.exists():
            print(f"{path.name} is there, and stays")  # noqa: T201
            continue
        out.save(path)
        text = json.dumps(numbers(out), ensure_ascii=False, separators=(",", ":"))
        path.with_suffix(".json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
