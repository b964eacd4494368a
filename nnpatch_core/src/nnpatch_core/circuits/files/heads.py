"""The nodes as files have them: a key and a value for each query head, the same in all layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnpatch_core._arrays import Integers
from nnpatch_core._integers import strict_int
from nnpatch_core._printable import shown
from nnpatch_core.edges import ARROW, Nodes
from nnpatch_core.errors import EdgeError

#: So many pairs of a sender and a receiver are held: far more than a file of them has.
_MOST = 2**28
#: So many edges does an error name.
_NAMED = 3


def spread(nodes: Nodes) -> Nodes:
    """The same nodes with a key and a value for each query head.

    Examples:
        >>> spread(Nodes(query=(4,), key_value=(2,), parallel=(False,))).key_value
        (4,)
    """
    return Nodes(nodes.query, nodes.query, nodes.parallel)


def copies(nodes: Nodes) -> Integers:
    """`[receivers of the file]`: of which of the receivers of the nodes each is a copy.

    Examples:
        >>> nodes = Nodes(query=(2,), key_value=(1,), parallel=(False,))
        >>> copies(nodes).tolist(), spread(nodes).receiver_names[2:4]
        ([0, 1, 2, 2, 3, 3, 4, 5], ('a0.h0<k>', 'a0.h1<k>'))
    """
    found = []
    for each in spread(nodes).receivers:
        name = each.name
        if each.kind in ("k", "v"):
            size = nodes.query[each.layer] // nodes.key_value[each.layer]
            name = f"a{each.layer}.h{(each.head or 0) // size}<{each.kind}>"
        found.append(nodes.receiver(name))
    return np.array(found)


def joined(nodes: Nodes, given: Tensor, what: str) -> Tensor:
    """`[senders, receivers]` of the nodes, from that of a file.

    Raises:
        EdgeError: the copies of a key or a value do not say the same.
    """
    index = torch.from_numpy(copies(nodes))
    firsts = torch.from_numpy(np.unique(index.numpy(), return_index=True)[1])
    found = given[:, firsts]
    again = found[:, index]
    differs = (given != again) & ~((given != given) & (again != again))
    places = differs.nonzero().tolist()
    if places:
        names, own = spread(nodes), firsts[index].tolist()
        pairs = [
            f"{names.sender_names[sender]}{ARROW}{names.receiver_names[own[receiver]]} and "
            f"{ARROW}{names.receiver_names[receiver]}"
            for sender, receiver in places[:_NAMED]
        ]
        more = f", and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
        raise EdgeError(
            f"heads that share a key and a value must have the same edges into it, and the {what} "
            f"of these differ: {'; '.join(pairs)}{more}; without nodes= each head keeps its own"
        )
    return found


def config_of(nodes: Nodes, width: int) -> dict[str, Any]:
    """The entry `cfg` of a file.

    Raises:
        EdgeError: the layers differ, which it cannot say.
    """
    if len(set(nodes.query)) > 1 or len(set(nodes.parallel)) > 1:
        raise EdgeError(
            "the format has one number of heads for all layers, and says of all or none that "
            "attention and MLP read the same stream; these layers differ in that"
        )
    return {
        "n_layers": nodes.n_layers,
        "n_heads": nodes.query[0],
        "parallel_attn_mlp": bool(nodes.parallel[0]),
        "d_model": width,
    }


def nodes_of(config: Any) -> Nodes:
    """The nodes that an entry `cfg` is about, with a key and a value for each query head.

    Raises:
        EdgeError: it is none.
    """
    if not isinstance(config, Mapping):
        raise EdgeError(f"cfg must have the sizes of the model, got {shown(config)}")
    sizes = []
    for name in ("n_layers", "n_heads"):
        if name not in config:
            raise EdgeError(f"cfg lacks {name}: it has {shown(sorted(map(str, config)))}")
        size = strict_int(config[name], f"{name} in cfg", EdgeError)
        if size < 1:
            raise EdgeError(f"{name} in cfg must be at least 1, got {size}")
        sizes.append(size)
    parallel = config.get("parallel_attn_mlp")
    if not isinstance(parallel, bool):
        raise EdgeError(f"parallel_attn_mlp in cfg must be true or false, got {shown(parallel)}")
    layers, heads = sizes
    if layers * layers * heads * heads * 3 > _MOST:
        raise EdgeError(f"cfg has {layers} layers of {heads} heads, more than a file can be about")
    return Nodes((heads,) * layers, (heads,) * layers, (parallel,) * layers)


def width_in(config: Mapping[str, Any]) -> dict[str, str]:
    """The width of the stream, as an entry of `info`, where a `cfg` tells it."""
    width = config.get("d_model")
    is_told = isinstance(width, int) and not isinstance(width, bool) and 0 < width < 10**8
    return {"width": str(width)} if is_told else {}


def check_nodes(found: Nodes, asked: Any) -> Nodes:
    """The nodes that the caller wants, if the file can be about them.

    Raises:
        EdgeError: they are none, or others.
    """
    if not isinstance(asked, Nodes):
        raise EdgeError(f"nodes must be the Nodes of a model, got {shown(asked)}")
    if spread(asked) != found:
        raise EdgeError(f"it is of {_told(found)}, and nodes= are of {_told(asked)}")
    return asked


def _told(nodes: Nodes) -> str:
    heads = sorted(set(nodes.query))
    size = f"{nodes.n_layers} layers of {' or '.join(map(str, heads))} heads"
    parallel = sum(nodes.parallel)
    return size + (f", {parallel} of them parallel" if parallel else "")
