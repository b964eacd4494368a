"""Checks of the heads, by turning one round (x to -x) and looking at what changes in `o`.

Turning round keeps every norm over heads as it is, so families that normalise q and k pass too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnpatch_core.adapters import head_columns
from nnpatch_core.conformance.needs import Needs, any_of, heads
from nnpatch_core.conformance.subject import (
    POSITION,
    CheckError,
    Edit,
    Subject,
    nothing_to_see,
)

_CLEAR = 2


def check_query_heads(subject: Subject) -> None:
    """A head of q at a position reaches that head of o, at that position, and nothing else."""
    for layer, before in _layers(subject, "q"):
        for head in range(subject.heads(layer).query):
            changed = _changed(subject, layer, "q", head, before, [POSITION])
            expected = torch.zeros_like(changed, dtype=torch.bool)
            expected[POSITION, head] = True
            _expect(f"q L{layer} H{head}", changed, expected)
            # A gate, column by column, would reach no more than its own part of the head.
            part = _changed(subject, layer, "q", head, before, [POSITION], _half)
            _expect(f"half of q L{layer} H{head}", part, expected)


def check_key_heads(subject: Subject) -> None:
    """A head of k reaches the heads of o in its group, from its position on."""
    for layer, before in _layers(subject, "k"):
        for head in range(subject.heads(layer).key_value):
            what, own = f"k L{layer} H{head}", _group(subject, layer, head)
            changed = _changed(subject, layer, "k", head, before, [POSITION])
            if (changed[:POSITION] == _CLEAR).any():
                raise CheckError(f"{what} at position {POSITION} reaches o at earlier positions")
            _expect(what, changed[POSITION:].amax(0)[None], own[None])
            later = changed[POSITION + 1 :].amax(0)[None]
            _expect(f"{what}, at later positions,", later, own[None])
            part = _changed(subject, layer, "k", head, before, [POSITION], _half)
            _expect(f"half of {what}", part[POSITION:].amax(0)[None], own[None])
            if _turned(subject, layer, "k", head, before).any():
                raise CheckError(f"{what} turns o round, as only a value does")


def check_value_heads(subject: Subject) -> None:
    """Turning a head of v round turns the heads of o in its group round, and no other."""
    for layer, before in _layers(subject, "v"):
        for head in range(subject.heads(layer).key_value):
            what, own = f"v L{layer} H{head}", _group(subject, layer, head)
            changed = _changed(subject, layer, "v", head, before)
            _expect(what, changed.amax(0)[None], own[None])
            turned = _turned(subject, layer, "v", head, before)
            missing = (own[:, 0] & ~turned).nonzero().flatten().tolist()
            if missing:
                raise CheckError(f"{what}, turned round, does not turn the heads {missing} of o")


def check_output_heads(subject: Subject) -> None:
    """Each head of o reaches all of what attention adds at its position, and nothing elsewhere."""
    name = "attn" if "attn" in {name for name, _ in subject.places} else "resid"
    layers = [layer for layer in subject.with_heads("o") if (name, layer) in subject.places]
    if not layers:
        raise CheckError(nothing_to_see(f"{name}, and o with heads"))
    for layer in layers:
        activations = subject.run(subject.target, [("o", layer), (name, layer)]).activations
        before, width = activations[name, layer], activations["o", layer].shape[-1]
        for head in range(subject.heads(layer).query):
            site = subject.site("o", layer, head, [POSITION])
            after = subject.run(subject.target, [(name, layer)], {site: torch.neg})
            value = after.activations[name, layer]
            changed = subject.differs(value, before).any(-1).any(0)
            if changed.nonzero().flatten().tolist() != [POSITION]:
                raise CheckError(
                    f"{site.label} reaches {name} at the positions "
                    f"{changed.nonzero().flatten().tolist()}, not at {POSITION} alone"
                )
            reached = (value != before)[:, POSITION].any(0)
            if _own_columns_alone(subject, layer, head, reached, width):
                raise CheckError(f"{site.label} reaches of {name} no columns but its own")


def _own_columns_alone(
    subject: Subject, layer: int, head: int, reached: Tensor, width: int
) -> bool:
    """Whether a head reaches what the projection's output, taken for its input, would reach."""
    columns = head_columns(subject.api, subject.model, layer, "o", width)
    if columns is None or len(columns) < 2 or len(reached) != width:
        return False
    others = reached.clone()
    others[columns[head].to(others.device)] = False
    return not others.any()


def _layers(subject: Subject, name: str) -> list[tuple[int, Tensor]]:
    """The layers with the component and with o, and o's activation there."""
    layers = subject.with_heads(name, "o")
    if not layers:
        raise CheckError(nothing_to_see(f"{name} and o with heads"))
    activations = subject.run(subject.target, [("o", layer) for layer in layers]).activations
    return [(layer, activations["o", layer]) for layer in layers]


def _after(
    subject: Subject,
    layer: int,
    name: str,
    head: int,
    positions: list[int] | None,
    edit: Edit = torch.neg,
) -> Tensor:
    """The activation of o when a head is edited."""
    site = subject.site(name, layer, head, positions)
    run = subject.run(subject.target, [("o", layer)], {site: edit})
    return run.activations["o", layer]


def _split(subject: Subject, layer: int, value: Tensor) -> Tensor:
    """O's activation as `[batch, seq, heads, dim]`."""
    columns = head_columns(subject.api, subject.model, layer, "o", value.shape[-1])
    return value if columns is None else value[..., columns.to(value.device)]


def _group(subject: Subject, layer: int, head: int) -> Tensor:
    """`[query heads, 1]`, bool: those that share a key/value head."""
    heads = subject.heads(layer)
    return (torch.arange(heads.query, device="cpu") // (heads.query // heads.key_value) == head)[
        :, None
    ]


def _changed(
    subject: Subject,
    layer: int,
    name: str,
    head: int,
    before: Tensor,
    positions: list[int] | None = None,
    edit: Edit = torch.neg,
) -> Tensor:
    """`[seq, query heads, dim]`: how o changes, in some prompt, when a head is edited.

    2 is a clear change, 1 one that may be rounding, 0 none at all.
    """
    after = _after(subject, layer, name, head, positions, edit)
    clear, any_change = subject.differs(after, before), after != before
    level = torch.where(clear, _CLEAR, any_change.long())
    return _split(subject, layer, level).amax(0).cpu()


def _half(value: Tensor) -> Tensor:
    """`[batch, positions, dim]` with the first half of the columns turned round."""
    half = max(1, value.shape[-1] // 2)
    return torch.cat([-value[..., :half], value[..., half:]], -1)


def _turned(subject: Subject, layer: int, name: str, head: int, before: Tensor) -> Tensor:
    """`[query heads]`: which heads of o turn round as a whole when a head does everywhere."""
    after = _after(subject, layer, name, head, None)
    return _split(subject, layer, ~subject.differs(after, -before)).all(-1).all(0).all(0).cpu()


def _expect(what: str, changed: Tensor, expected: Tensor) -> None:
    """Compare how `[any, query heads, dim]` changed with which of them should have."""
    expected = expected.expand_as(changed)
    reached, missed = (changed == _CLEAR) & ~expected, (changed == 0) & expected
    for does, wrong in (("reaches", reached), ("does not reach", missed)):
        if wrong.any():
            heads = sorted({head for _, head, _ in wrong.nonzero().tolist()})
            raise CheckError(f"{what} {does} all or part of the heads {heads} of o")


CHECKS: Needs = {
    check_query_heads: (heads("q"), heads("o")),
    check_key_heads: (heads("k"), heads("o")),
    check_value_heads: (heads("v"), heads("o")),
    check_output_heads: (
        heads("o"),
        any_of(
            "attn",
            "resid",
            otherwise="the adapter has neither attn nor resid, which o would reach",
        ),
    ),
}
