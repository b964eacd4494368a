"""A circuit is found, tried on other prompts and drawn; estimates of edges stand beside the values.

The two examples of circuits share this.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import telling
import torch
from PIL import Image

from nnpatch_core import (
    Circuit,
    PromptPairs,
    circuit_curve,
    edge_patching,
    evaluate_circuit,
    find_circuit,
)
from nnpatch_core.circuits import CircuitEvaluation
from nnpatch_core.edges import EdgeOutcome, Nodes

GOAL = 0.9
QUICK = ("eap", "clean-corrupted", "eap-ig-inputs")
ESTIMATES = (*QUICK, "eap-ig-activations")
#: The strongest edges that an estimate is to find, and among how many of its own.
STRONGEST, FIRST = 100, 1000
#: Every so many senders' edges are measured in float64 too.
EVERY = 60


def tell(
    model: Any, pairs: PromptPairs, others: Mapping[str, PromptPairs], folder: Path, name: str
) -> None:
    """Find a circuit, evaluate it on other pairs, draw it and keep it; compare the estimates."""
    for weight in model.parameters():
        weight.requires_grad_(False)
    began = time.process_time()
    found = find_circuit(model, None, pairs, faithfulness=GOAL)
    telling.say(f"{found}\nCPU seconds   {time.process_time() - began:.0f}\n\n{found.circuit}\n")
    save(found.circuit, folder / f"{name}.json")
    telling.say(f"{'the pairs it was found on':<26}{rows(found.evaluation)}")
    for words, own in others.items():
        telling.say(f"{words:<26}{rows(evaluated(model, found.circuit, own))}")
    first, held_out = next(iter(others.items()))
    curve = circuit_curve(model, None, found.edges, held_out)
    telling.say(f"\nCurve on {first}\n{curve}\n")
    draw(found.circuit.plot(), folder / f"{name}.png")
    draw(curve.plot(), folder / f"{name}-curve.png")
    rankings(model, pairs, held_out)
    compare(model, pairs[:1])


def evaluated(model: Any, circuit: Circuit, pairs: PromptPairs) -> CircuitEvaluation:
    """How faithful a circuit is on some pairs, and all edges but its own."""
    return evaluate_circuit(model, None, circuit, pairs, complement=True, progress=False)


def rows(found: CircuitEvaluation) -> str:
    """The faithfulness of a circuit and of what is left without it, in a line."""
    low, high = found.interval()
    told = [
        f"{found[name]:6.3f} [{low[number]:.3f}, {high[number]:.3f}]"
        for number, name in enumerate(found.names[:2])
    ]
    means = found.outcome.baseline.source.mean(), found.outcome.baseline.target.mean()
    logits = f"{means[0]:.2f} and {means[1]:.2f} logits in the two runs"
    return f"{told[0]}, without it {told[1]}; {logits}"


def rankings(model: Any, pairs: PromptPairs, held_out: PromptPairs) -> None:
    """How good the circuits are that each cheap estimate chooses by itself, on other pairs."""
    telling.say("Circuits by estimates alone, on other pairs: the share of the edges, faithfulness")
    for method in QUICK:
        edges = edge_patching(model, None, pairs, method=method, progress=False)
        curve = circuit_curve(model, None, edges, held_out, progress=False)
        told = f"CPR {curve.cpr:.3f}, CMD {curve.cmd:.3f}"
        points = zip(curve.fractions[:7], curve.faithfulness.tolist(), strict=False)
        told += "".join(f", {share:g}: {value:.3f}" for share, value in points)
        telling.say(f"{method:>20} {told}")


def compare(model: Any, pair: PromptPairs) -> None:
    """Measure every edge for one pair, and see how each estimate ranks them."""
    began = time.process_time()
    exact = edge_patching(model, None, pair)
    seconds = time.process_time() - began
    telling.say(f"\n{len(exact)} edges measured in {seconds:.0f} CPU seconds\n{exact.top(20)}\n")
    sizes = exact.matrix[~exact.matrix.isnan()].abs()
    for least in (0.1, 0.01, 1e-3, 1e-4, 1e-5):
        telling.say(f"{int((sizes >= least).sum()):>7} edges of at least {least:g}")
    heads = "estimate", "Pearson", "Spearman", f"in first {STRONGEST}", f"in first {FIRST}", "signs"
    telling.say("\n" + "".join(f"{head:>20}" for head in (*heads, "CPU seconds")))
    for method in ESTIMATES:
        began = time.process_time()
        estimate = edge_patching(model, None, pair, method=method, progress=False)
        cost = time.process_time() - began
        values = *figures(estimate, exact), cost
        telling.say(f"{method:>20}" + "".join(f"{value:>20.3f}" for value in values))
    rounding(model, pair, exact)


def figures(estimate: EdgeOutcome, exact: EdgeOutcome) -> tuple[float, ...]:
    """Both correlations, and of the strongest edges: how many are found, and with their sign."""
    swept = ~exact.matrix.isnan()
    one, other = estimate.matrix[swept].double(), exact.matrix[swept].double()
    strongest = set(first(other, STRONGEST))
    found = [
        len(strongest & set(first(one, count))) / len(strongest) for count in (STRONGEST, FIRST)
    ]
    agreement = estimate.agreement(exact, top_k=STRONGEST)
    pearson = float(torch.corrcoef(torch.stack([one, other]))[0, 1])
    return pearson, agreement.rank_correlation, *found, agreement.sign_agreement


def first(values: torch.Tensor, count: int) -> list[int]:
    """The places of the largest ones, by size."""
    found: list[int] = values.abs().argsort(descending=True)[:count].tolist()
    return found


def rounding(model: Any, pair: PromptPairs, exact: EdgeOutcome) -> None:
    """How far float32 is off: some senders' edges are measured in float64 as well."""
    senders = exact.nodes.sender_names[::EVERY]
    finer = edge_patching(copy.deepcopy(model).double(), None, pair, senders=senders)
    swept = ~finer.matrix.isnan()
    one, other = exact.matrix[swept].double(), finer.matrix[swept].double()
    telling.say(f"\nin float64, {len(finer)} edges: largest gap {(one - other).abs().max():.1e}")
    for least, most in ((0, 1e-6), (1e-6, 1e-5), (1e-5, 1e-4), (1e-4, 1e-3), (1e-3, 10)):
        some = (other.abs() >= least) & (other.abs() < most) & (other != 0)
        wrong = (one.sign() != other.sign())[some]
        if len(wrong):
            telling.say(f"{least:g} to {most:g}: {wrong.double().mean():.3f} of {len(wrong)} signs")


def save(circuit: Circuit, path: Path) -> None:
    """Keep the names of a circuit's edges: for each receiver its senders."""
    found: dict[str, list[str]] = {}
    for sender, receiver in circuit.kept.nonzero().tolist():
        names = circuit.nodes.sender_names[sender], circuit.nodes.receiver_names[receiver]
        found.setdefault(names[1], []).append(names[0])
    lines = (f" {json.dumps(to)}: {json.dumps(' '.join(senders))}" for to, senders in found.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    telling.say(f"Edges: {path}")


def read(path: Path, nodes: Nodes) -> Circuit:
    """The circuit that `save` has kept."""
    kept: dict[str, str] = json.loads(path.read_text("utf-8"))
    edges: Iterable[str] = (
        f"{sender}->{receiver}" for receiver, senders in kept.items() for sender in senders.split()
    )
    return Circuit.of(nodes, edges)


def draw(figure: Any, path: Path) -> None:
    """Write a picture in 64 colours, which is a third of the file."""
    figure.savefig(path, dpi=80)
    with Image.open(path) as drawn:
        few = drawn.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    telling.say(f"Picture: {path}")
