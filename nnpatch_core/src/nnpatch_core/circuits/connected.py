"""Which edges of a circuit are on a way from the input to the logits."""

from __future__ import annotations

import numpy as np

from nnpatch_core._arrays import Booleans
from nnpatch_core.edges import Nodes


def feeds(nodes: Nodes) -> Booleans:
    """`[receivers, senders]`, bool: which senders compute what they write from what each reads.

    A head does from its query and from the key and value that it shares with its group; the input
    reads nothing, and the logits write nothing.

    Examples:
        >>> nodes = Nodes(query=(2,), key_value=(1,), parallel=(False,))
        >>> found = feeds(nodes)
        >>> [nodes.sender_names[each] for each in found[nodes.receiver("a0.h0<k>")].nonzero()[0]]
        ['a0.h0', 'a0.h1']
    """
    found = np.zeros((len(nodes.receivers), len(nodes.senders)), bool)
    for row, receiver in enumerate(nodes.receivers):
        if receiver.kind == "logits":
            continue
        if receiver.kind == "mlp":
            found[row, nodes.sender(f"m{receiver.layer}")] = True
            continue
        layer, head = receiver.layer, receiver.head or 0
        size = nodes.query[layer] // nodes.key_value[layer]
        heads = [head] if receiver.kind == "q" else range(head * size, (head + 1) * size)
        for each in heads:
            found[row, nodes.sender(f"a{layer}.h{each}")] = True
    return found


def connected(nodes: Nodes, kept: Booleans) -> Booleans:
    """`[senders, receivers]`, bool: the edges of `kept` that are on a way from input to logits.

    Args:
        nodes: of the model.
        kept: `[senders, receivers]`, bool.
    """
    found, made = kept.copy(), feeds(nodes)
    while True:
        fed = found.any(0) @ made
        fed[0] = True
        leads = made @ found.any(1)
        leads[-1] = True
        left = found & fed[:, None] & leads[None]
        if (left == found).all():
            return found
        found = left
