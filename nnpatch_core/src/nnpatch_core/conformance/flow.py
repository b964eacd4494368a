"""Checks of how activations depend on each other in the model, as the adapter has it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from nnpatch_core._rounding import as_typed
from nnpatch_core.adapters import table_of
from nnpatch_core.batch import Batch
from nnpatch_core.conformance.needs import Needs, any_of, component, declared
from nnpatch_core.conformance.subject import (
    POSITION,
    CheckError,
    Edit,
    Subject,
    differentiable,
    nothing_to_see,
    put,
)
from nnpatch_core.site import Site

_PADDING = 3


def check_residual(subject: Subject) -> None:
    """A layer gives `resid_pre + attn + mlp`, or each times a number of its own if "scaled"."""
    activations = subject.run(subject.target, subject.places).activations
    kind = getattr(subject.api, "residual", "sum")
    seen = False
    for layer in subject.layers:
        table = table_of(subject.api, subject.model, layer)
        blocks = [name for name in ("attn", "mlp") if name in table]
        if not blocks or "resid" not in table or "resid_pre" not in table:
            continue
        seen = True
        resid = activations["resid", layer]
        resid = resid if resid.dtype is torch.float64 else resid.float()
        named = (activations[name, layer] for name in ("resid_pre", *blocks))
        parts = torch.stack([part.to(resid.device, resid.dtype) for part in named], -1)
        if kind == "sum":
            total = parts.sum(-1)
        else:
            flat = parts.flatten(0, -2)
            with as_typed(parts):
                total = parts @ torch.linalg.lstsq(flat, resid.flatten()[:, None]).solution[:, 0]
        terms = " + ".join(("resid_pre", *blocks))
        what = f"{terms} is not resid in layer {layer}" + (", scaled" if kind == "scaled" else "")
        subject.expect_same(total, resid, what)
    if not seen:
        raise CheckError(nothing_to_see("the residual stream and what is added to it"))


def check_blocks(subject: Subject) -> None:
    """Attention brings what earlier tokens have to later ones; mlp takes each token alone."""
    tables = {layer: table_of(subject.api, subject.model, layer) for layer in subject.layers}
    layers = [layer for layer, table in tables.items() if {"resid_pre", "attn"} <= set(table)]
    if not layers:
        raise CheckError(nothing_to_see("resid_pre and attn"))
    later = list(range(POSITION + 1, subject.target.seq_len))
    for layer in layers:
        blocks = [(name, layer) for name in ("attn", "mlp") if name in tables[layer]]
        before = subject.run(subject.target, blocks).activations
        edit: dict[Site, Edit] = {subject.site("resid_pre", layer, None, [POSITION]): torch.neg}
        after = subject.run(subject.target, blocks, edit).activations
        attn, mlp = ("attn", layer), ("mlp", layer)
        if not subject.differs(after[attn], before[attn])[:, later].any():
            raise CheckError(f"attn of layer {layer} brings nothing from earlier tokens to later")
        if mlp not in blocks:
            continue
        # With what attention brings held as it was, later tokens see nothing of the edit.
        edit[subject.site("attn", layer, None, later)] = put(before[attn][:, later])
        held = subject.run(subject.target, blocks, edit).activations
        if subject.differs(held[mlp], before[mlp])[:, later].any():
            raise CheckError(f"mlp of layer {layer} brings something from earlier tokens to later")


def check_causal(subject: Subject) -> None:
    """No token sees a later one, and no layer a later one."""
    tokens = subject.target.tokens.clone()
    tokens[:, -1] = subject.source.tokens[:, -1]
    places = [place for place in subject.places if place[0] in ("resid", "resid_pre")]
    before = subject.run(subject.target, places).activations
    after = subject.run(Batch(tokens, subject.target.mask), places).activations
    for place in places:
        differs = subject.differs(before[place], after[place]).any(-1).any(0)
        if differs[:-1].any() or not differs[-1]:
            raise CheckError(
                f"changing the last token changes {place[0]} of layer {place[1]} at the positions "
                f"{differs.nonzero().flatten().tolist()}"
            )


def check_padding(subject: Subject) -> None:
    """Padding on the left changes nothing, whatever token it holds."""
    batch = subject.target
    drawn = subject.source.tokens.flip(-1)[:, :_PADDING]
    padded = Batch(torch.cat([drawn, batch.tokens], 1), pad(batch.mask, (_PADDING, 0)))
    plain, shifted = subject.run(batch, subject.places), subject.run(padded, subject.places)
    for name, layer in subject.places:
        what = f"padding on the left changes {name} of layer {layer}"
        subject.expect_same(
            shifted.activations[name, layer][:, _PADDING:], plain.activations[name, layer], what
        )
    subject.expect_same(shifted.logits, plain.logits, "padding on the left changes the logits")


def check_gradients(subject: Subject) -> None:
    """A gradient flows from the logits to each component of each layer."""
    with differentiable(subject.model):
        batch = subject.target
        # Copies, as what was made in inference mode cannot be kept for a gradient.
        batch = Batch(batch.tokens.clone(), batch.mask.clone())
        run = subject.run(batch, subject.places, gradients=True)
        for place, value in run.activations.items():
            if not value.requires_grad:
                raise CheckError(f"{place[0]} of layer {place[1]} has no gradient")
        # Not the sum: of logits that a softmax or a norm follows it may be constant.
        logits = run.logits
        loss = (
            logits * torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype, device="cpu")
        ).sum()
        gradients: list[Tensor | None] = list(
            torch.autograd.grad(loss, list(run.activations.values()), allow_unused=True)
        )
    for place, gradient in zip(run.activations, gradients, strict=True):
        if gradient is None or not gradient.isfinite().all() or not gradient.any():
            raise CheckError(f"no finite gradient reaches {place[0]} of layer {place[1]}")


_NO_STREAM = "the adapter lacks the residual stream, or what is added to it"
CHECKS: Needs = {
    check_residual: (
        declared("residual"),
        any_of("resid_pre", otherwise=_NO_STREAM),
        any_of("resid", otherwise=_NO_STREAM),
        any_of("attn", "mlp", otherwise=_NO_STREAM),
    ),
    check_blocks: (component("resid_pre"), component("attn")),
    check_causal: (component("resid"),),
    check_padding: (declared("padding"),),
    check_gradients: (),
}
