"""All edges of a model's shape on a device, in float32 and bfloat16, beside whole forwards.

    python tests/bench/edges_on_device.py --device cuda --shape SmolLM2-135M

Wall time, as a device computes while Python waits. The weights are random: the time does not depend
on them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from run import say
from transformers import AutoConfig, AutoModelForCausalLM

from nnpatch_core import Circuit, edge_patching, evaluate_circuit
from nnpatch_core.plugins import find_adapter
from nnpatch_core.testing import tiny_api

SHAPES = Path(__file__).with_name("shapes")
TOKENS, MOVED = 14, 9


def main() -> None:
    """Measure, and print a JSON of what was found."""
    arguments = parse()
    device = torch.device(arguments.device)
    for dtype in arguments.dtypes:
        say(json.dumps(measured(arguments, device, getattr(torch, dtype))))


def measured(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    """Seconds of one type."""
    config = AutoConfig.from_pretrained(SHAPES / arguments.shape)
    torch.manual_seed(0)
    made: Any = AutoModelForCausalLM
    with torch.device(device):
        model: Any = made.from_config(config, dtype=dtype).eval()
    api = find_adapter(tiny_api(), model)
    source = torch.randint(10, 1000, (arguments.pairs, TOKENS))
    target = source.clone()
    target[:, MOVED] = torch.randint(1000, 2000, (arguments.pairs,))
    answers = torch.full((arguments.pairs,), 5), torch.full((arguments.pairs,), 6)
    given = (source, target, *answers)

    def forward(rows: int) -> None:
        with torch.no_grad():
            model(target[:1].expand(rows, -1).to(device), logits_to_keep=1)

    found: dict[str, Any] = {"shape": arguments.shape, "dtype": str(dtype), "tokens": TOKENS}
    found["pairs"] = arguments.pairs
    found["forward"] = clocked(lambda: forward(1), device)
    found["forward, batched by 16"] = clocked(lambda: forward(16), device) / 16
    found["forward, batched by 256"] = clocked(lambda: forward(256), device) / 256
    options: dict[str, Any] = {"progress": False}
    found["eap"] = clocked(
        lambda: edge_patching(model, api, *given, method="eap", **options), device, 2
    )
    began = time.perf_counter()
    names = found_names(api, model, device)[:: arguments.every]
    edges = edge_patching(model, api, *given, senders=names, **options)
    synchronize(device)
    seconds = time.perf_counter() - began
    found |= {"engine": edges.info["engine"], "edges": len(edges), "seconds": seconds}
    found["all edges"] = seconds * len(edges.nodes) / len(edges)
    each = seconds / len(edges) / arguments.pairs
    found |= {"one edge": each, "whole forward / edge": found["forward"] / each}
    for rows in (16, 256):
        found[f"batched by {rows} / edge"] = found[f"forward, batched by {rows}"] / each
    circuit = Circuit.from_edges(edges, n=min(1000, len(edges)), pruned=False)
    found["a circuit of 1,000 edges"] = clocked(
        lambda: evaluate_circuit(model, api, circuit, *given, **options), device, 2
    )
    return found


def found_names(api: Any, model: Any, device: torch.device) -> tuple[str, ...]:
    """The names of the senders of a model."""
    tokens = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]])
    answers = torch.tensor([1]), torch.tensor([2])
    few = edge_patching(model, api, *tokens, *answers, senders="input", progress=False)
    synchronize(device)
    return few.nodes.sender_names


def clocked(function: Callable[[], Any], device: torch.device, times: int = 4) -> float:
    """The least seconds of some calls, after one that does not count."""
    found = []
    for number in range(times + 1):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        if number:
            found.append(time.perf_counter() - began)
    return min(found)


def synchronize(device: torch.device) -> None:
    """Wait until the device has computed all."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="SmolLM2-135M")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="measure each Nth sender")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
