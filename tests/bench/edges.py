"""The bench of `edge_patching`: all edges of a model, beside whole forwards for each.

    python tests/bench/edges.py --model smollm2 --every 15

Needs nnpatch with all extras. CPU seconds of one thread; ratios are of one run. `--every N`
measures each Nth sender alone, and counts the others as dear as these.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from run import say
from torch import Tensor
from torch.nn.functional import linear

from nnpatch_core import PromptPairs, edge_patching
from nnpatch_core.edges import EdgeOutcome

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "examples"))

SOURCE = "When Mary and John went to the store, John gave a drink to"
TARGET = "When Mary and John went to the store, Mary gave a drink to"
ANSWERS = (" Mary", " John")
#: How many edges a screen measures.
TOP = 2000
ESTIMATES = ("eap", "clean-corrupted", "eap-ig-inputs", "eap-ig-activations")


def main() -> None:
    """Measure, and print a JSON of what was found."""
    arguments = parse()
    torch.set_num_threads(1)
    model, tokenizer = loaded(arguments.model)
    pairs = PromptPairs.from_texts(
        [SOURCE] * arguments.pairs,
        [TARGET] * arguments.pairs,
        [ANSWERS[0]] * arguments.pairs,
        [ANSWERS[1]] * arguments.pairs,
        tokenizer,
    )
    results: dict[str, Any] = {"model": arguments.model, "machine": platform.processor()}
    results |= forwards(model, pairs.target_tokens)
    results |= estimates(model, pairs, results)
    results |= exact(model, pairs, arguments.every, results)
    say(json.dumps(results, indent=1))


def loaded(name: str) -> tuple[Any, Any]:
    """A real model and its tokenizer."""
    import gemma3
    import smollm2

    model, tokenizer = {"smollm2": smollm2, "gemma3": gemma3}[name].load()
    for weight in model.parameters():
        weight.requires_grad_(False)
    return model, tokenizer


def clocked(function: Callable[[], Any], times: int = 5) -> float:
    """The least CPU seconds of some calls."""
    found = []
    for _ in range(times):
        began = time.process_time()
        function()
        found.append(time.process_time() - began)
    return min(found)


def forwards(model: Any, tokens: Tensor) -> dict[str, Any]:
    """A plain forward, one in a batch of 16, a forward with its backward."""
    one, many = tokens[:1], tokens[:1].expand(16, -1)

    def run(rows: Tensor) -> None:
        with torch.no_grad():
            model(rows, logits_to_keep=1)

    def both() -> None:
        embedded = model.get_input_embeddings()(tokens).requires_grad_()
        logits = model(inputs_embeds=embedded, logits_to_keep=1).logits
        torch.autograd.grad(logits[:, -1, 0].sum(), embedded)

    return {
        "tokens": tokens.shape[1],
        "pairs": len(tokens),
        "forward": clocked(lambda: run(one)),
        "forward of all pairs": clocked(lambda: run(tokens)),
        "forward, batched by 16": clocked(lambda: run(many)) / 16,
        "forward and backward of all pairs": clocked(both),
    }


def estimates(model: Any, pairs: PromptPairs, known: dict[str, Any]) -> dict[str, Any]:
    """Each estimate of all edges, beside the passes that it takes by definition."""
    one, both = known["forward of all pairs"], known["forward and backward of all pairs"]
    layers = model.config.num_hidden_layers
    passes = {
        "eap": one + both,
        "clean-corrupted": 2 * both,
        "eap-ig-inputs": one + 5 * both,
        "eap-ig-activations": one + 5 * (1 + 2 * layers) * both,
    }
    found: dict[str, Any] = {}
    for method in ESTIMATES:
        times = 1 if method == "eap-ig-activations" else 3
        seconds = clocked(partial(swept, model, pairs, method=method), times)
        found[method] = {"seconds": seconds, "passes": passes[method]}
        found[method]["ratio"] = seconds / passes[method]
    return found


def swept(model: Any, pairs: PromptPairs, **options: Any) -> EdgeOutcome:
    """A sweep over edges, without a bar."""
    return edge_patching(model, None, pairs, progress=False, **options)


def exact(model: Any, pairs: PromptPairs, every: int, known: dict[str, Any]) -> dict[str, Any]:
    """All edges, exactly; the screen that measures the first of an estimate; how they agree."""
    began = time.process_time()
    screened = swept(model, pairs, method="eap", top_k=TOP, spot_checks=0)
    screen = time.process_time() - began
    senders = screened.nodes.sender_names[::every]
    before = peak()
    began = time.process_time()
    edges = swept(model, pairs, senders=senders)
    seconds = time.process_time() - began
    total, count = len(edges.nodes), len(edges)
    each = seconds / count / known["pairs"]
    bound = products(model, edges, known["tokens"], pairs)
    found: dict[str, Any] = {
        "edges": total,
        "measured": count,
        "seconds": seconds,
        "all edges": seconds * total / count,
        "one edge": each,
        "products alone": bound,
        "times the products": seconds / bound,
        "whole forward / edge": known["forward"] / each,
        "two whole forwards / edge": 2 * known["forward"] / each,
        "forward batched by 16 / edge": known["forward, batched by 16"] / each,
        "peak, MiB": (peak() - before) / 2**20,
        f"eap and the first {TOP}": screen,
    }
    if every == 1:
        measured, top = edges.matrix.abs().nan_to_num(-1.0), screened.exact
        order = measured.flatten().argsort(descending=True)[:100]
        found["of the first 100 among them"] = int(top.flatten()[order].sum())
    return found


def peak() -> int:
    """Bytes of memory that the process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def products(model: Any, edges: EdgeOutcome, tokens: int, pairs: PromptPairs) -> float:
    """CPU seconds that the matrix products of the measured edges take alone.

    Of each edge: those of the layers above its receiver, for the tokens from the first on that
    differ; of the last layer the MLP of the last token alone.
    """
    moved = (pairs.source_tokens != pairs.target_tokens).any(0).nonzero()
    run = tokens - int(moved[0])
    decoder = model.model.layers[0]
    attention, mlp = decoder.self_attn, decoder.mlp
    inside = [getattr(attention, f"{name}_proj").weight for name in "qkvo"]
    beside = [getattr(mlp, f"{name}_proj").weight for name in ("gate", "up", "down")]
    rows = 2048

    def cost(weights: list[Tensor]) -> float:
        inputs = [torch.randn(rows, weight.shape[1]) for weight in weights]

        def multiply() -> None:
            for given, weight in zip(inputs, weights, strict=True):
                linear(given, weight)

        return clocked(multiply) / rows

    with torch.no_grad():
        own, other = cost(inside), cost(beside)
    total = 0.0
    nodes = edges.nodes
    for _, receiver in edges.outcome.cells["edge"].index[:, :2].tolist():
        node = nodes.receivers[receiver]
        if node.kind == "logits":
            continue
        above = nodes.n_layers - node.layer - (node.kind == "mlp")
        if above:
            total += run * (above * own + (above - 1) * other) + other
    return total * len(pairs)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("smollm2", "gemma3"), default="smollm2")
    parser.add_argument("--every", type=int, default=1, help="measure each Nth sender")
    parser.add_argument("--pairs", type=int, default=1, help="how many pairs, all the same")
    return parser.parse_args()


if __name__ == "__main__":
    main()
