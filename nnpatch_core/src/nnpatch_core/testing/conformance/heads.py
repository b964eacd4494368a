"""Checks of the heads, by turning one round (x to -x) and looking at what `o` has of it.

Turning round keeps every norm over heads as it is, so families that normalise q and k pass too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnpatch_core.layers import head_columns
from nnpatch_core.testing.conformance.subject import CheckError, Subject

_POSITION = 2


def check_query_heads(subject: Subject) -> None:
    """A head of q at a position reaches that head of o, at that position, and nothing else."""
    for layer, before in _layers(subject, "q"):
        for head in range(subject.heads(layer).query):
            changed = _changed(subject, layer, "q", head, before, [_POSITION])
            expected = torch.zeros_like(changed)
            expected[_POSITION, head] = True
            _compare(changed, expected, f"q L{layer} H{head}")


def check_key_heads(subject: Subject) -> None:
    """A head of k reaches the heads of o in its group, from its position on."""
    for layer, before in _layers(subject, "k"):
        heads = subject.heads(layer)
        group = heads.query // heads.key_value
        for head in range(heads.key_value):
            changed = _changed(subject, layer, "k", head, before, [_POSITION])
            own = torch.zeros(heads.query, dtype=torch.bool)
            own[head * group : (head + 1) * group] = True
            wrong = changed & ~own
            wrong[:_POSITION] |= changed[:_POSITION]
            if wrong.any():
                _fail(f"k L{layer} H{head}", "reaches", wrong)
            if not (changed[_POSITION + 1 :].any(0) == own).all():
                missing = own & ~changed[_POSITION + 1 :].any(0)
                _fail(f"k L{layer} H{head}", "does not reach later tokens at", missing[None])
            turned = _turned(subject, layer, "k", head, before)
            if turned[own].any():
                raise CheckError(f"k L{layer} H{head} turns o round, as only a value does")


def check_value_heads(subject: Subject) -> None:
    """Turning a head of v round turns the heads of o in its group round, and no other."""
    for layer, before in _layers(subject, "v"):
        heads = subject.heads(layer)
        group = heads.query // heads.key_value
        for head in range(heads.key_value):
            own = torch.zeros(heads.query, dtype=torch.bool)
            own[head * group : (head + 1) * group] = True
            turned = _turned(subject, layer, "v", head, before)
            if not (turned == own).all():
                _fail(
                    f"v L{layer} H{head}", "turned round is seen wrongly by", (turned != own)[None]
                )
            changed = _changed(subject, layer, "v", head, before)
            if (changed.any(0) & ~own).any():
                _fail(f"v L{layer} H{head}", "reaches", (changed.any(0) & ~own)[None])


def check_output_heads(subject: Subject) -> None:
    """Each head of o is handed to the residual stream at its own position, and only there."""
    name = "attn" if "attn" in {name for name, _ in subject.places} else "resid"
    for layer in subject.with_heads("o"):
        if (name, layer) not in subject.places:
            continue
        before = subject.run(subject.target, [(name, layer)]).activations[name, layer]
        for head in range(subject.heads(layer).query):
            site = subject.site("o", layer, head, [_POSITION])
            after = subject.run(subject.target, [(name, layer)], {site: torch.neg})
            changed = subject.differs(after.activations[name, layer], before).any(-1).any(0)
            if changed.nonzero().flatten().tolist() != [_POSITION]:
                raise CheckError(
                    f"{site.label} reaches {name} at the positions "
                    f"{changed.nonzero().flatten().tolist()}, not at {_POSITION} alone"
                )


def _layers(subject: Subject, name: str) -> list[tuple[int, Tensor]]:
    """The layers with the component and with o, and o's activation there."""
    layers = subject.with_heads(name, "o")
    found = subject.run(subject.target, [("o", layer) for layer in layers]).activations
    return [(layer, found["o", layer]) for layer in layers]


def _after(
    subject: Subject, layer: int, name: str, head: int, positions: list[int] | None
) -> Tensor:
    """What o has when a head is turned round."""
    site = subject.site(name, layer, head, positions)
    run = subject.run(subject.target, [("o", layer)], {site: torch.neg})
    return run.activations["o", layer]


def _split(subject: Subject, layer: int, value: Tensor) -> Tensor:
    """O's activation as `[batch, seq, heads, dim]`."""
    columns = head_columns(subject.api, subject.model, layer, "o", value.shape[-1])
    return value if columns is None else value[..., columns.to(value.device)]


def _changed(
    subject: Subject,
    layer: int,
    name: str,
    head: int,
    before: Tensor,
    positions: list[int] | None = None,
) -> Tensor:
    """`[seq, query heads]`: where o changes when a head is turned round."""
    after = _after(subject, layer, name, head, positions)
    differs = subject.differs(after, before)
    return _split(subject, layer, differs).any(-1).any(0).cpu()


def _turned(subject: Subject, layer: int, name: str, head: int, before: Tensor) -> Tensor:
    """`[query heads]`: which heads of o turn round as a whole when a head does everywhere."""
    after = _split(subject, layer, _after(subject, layer, name, head, None))
    old = _split(subject, layer, before)
    same = ~subject.differs(after, -old)
    return same.all(-1).all(0).all(0).cpu()


def _compare(changed: Tensor, expected: Tensor, what: str) -> None:
    if (changed & ~expected).any():
        _fail(what, "reaches", changed & ~expected)
    if (expected & ~changed).any():
        _fail(what, "does not reach", expected & ~changed)


def _fail(what: str, does: str, where: Tensor) -> None:
    heads = sorted({head for _, head in where.nonzero().tolist()})
    raise CheckError(f"{what} {does} the heads {heads} of o")


CHECKS = (check_query_heads, check_key_heads, check_value_heads, check_output_heads)
