"""What EAP-IG's and MIB's own code said of the models of `formula_models.py`, and its names.

The numbers are in tests/edges/files, written by tests/scripts/eap_ig_reference.py, which imports
this file where nnpatch is not installed. docs/edges-and-eap-ig.md says what each of them is.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

FILES = Path(__file__).resolve().parents[1] / "edges" / "files"


def reference(model: str) -> dict[str, Any]:
    """The file of one model, with its edges' names and its circuits as lists of names."""
    found = json.loads((FILES / f"eap_ig_{model}.json").read_text("utf-8"))
    found["edges"] = edge_names(found["layers"], found["heads"], found["parallel"])
    for circuit in found["circuits"]:
        for name in ("edges", "left_by_pruning"):
            circuit[name] = list(unpacked(circuit[name], found["edges"]))
    return found


def edge_names(layers: int, heads: int, parallel: bool) -> list[str]:
    """EAP-IG's edges in its order: layer by layer, by what reads, and then by sender.

    Key and value receivers are there for each query head, under grouped queries too.
    """
    found, senders = [], ["input"]
    for layer in range(layers):
        attention = [f"a{layer}.h{head}" for head in range(heads)]
        readers = [f"{head}<{part}>" for head in attention for part in "qkv"]
        # Where the MLP reads what attention reads, the two are listed together.
        own = [*readers, f"m{layer}"] if parallel else readers
        found += [f"{sender}->{reader}" for sender in senders for reader in own]
        senders = senders + attention
        if not parallel:
            found += [f"{sender}->m{layer}" for sender in senders]
        senders = [*senders, f"m{layer}"]
    return found + [f"{sender}->logits" for sender in senders]


def grouped(edge: str, shared: int) -> str:
    """An edge under the name of the key/value head that `shared` query heads read."""
    sender, receiver = edge.split("->")
    if receiver[-3:] not in ("<k>", "<v>"):
        return edge
    layer, head = receiver[:-3].split(".h")
    return f"{sender}->{layer}.h{int(head) // shared}{receiver[-3:]}"


def groups(edges: Iterable[str], shared: int) -> dict[str, list[str]]:
    """EAP-IG's edges of each edge of ours."""
    found: dict[str, list[str]] = {}
    for edge in edges:
        found.setdefault(grouped(edge, shared), []).append(edge)
    return found


def packed(chosen: Collection[str], edges: Sequence[str]) -> str:
    """Which of the edges are chosen, as hexadecimal digits: the first edge is the lowest bit."""
    return f"{sum(1 << place for place, edge in enumerate(edges) if edge in chosen):x}"


def unpacked(digits: str, edges: Sequence[str]) -> Iterator[str]:
    """The edges that `packed` packed."""
    bits = int(digits, 16)
    return (edge for place, edge in enumerate(edges) if bits >> place & 1)
