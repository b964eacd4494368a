"""Checks that a patch changes its site alone, and nothing where it puts back its own value."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from nnpatch_core._models import vocab_size
from nnpatch_core.adapters import head_columns
from nnpatch_core.conformance.needs import Needs, component, declared
from nnpatch_core.conformance.subject import POSITION, CheckError, Edit, Subject, put
from nnpatch_core.errors import EngineError, PromptWarning
from nnpatch_core.patching import activation_patching
from nnpatch_core.site import Site
from nnpatch_core.sites import SiteList, Sites

#: How many tokens of the last prompt are padding, where there may be some.
_PADDING = 2


def check_identity_patch(subject: Subject) -> None:
    """Putting a component's own activation back changes nothing, bitwise, head by head too."""
    plain = subject.run(subject.target).logits
    for name, layer in subject.places:
        sites = [subject.site(name, layer)]
        for head in _heads(subject, name, layer):
            sites.append(subject.site(name, layer, head))
        for chosen in (sites[:1], sites[1:]):
            edits: dict[Site, Edit] = dict.fromkeys(chosen, torch.clone)
            if edits and not subject.run(subject.target, edits=edits).logits.equal(plain):
                raise CheckError(f"an identity patch of {name} in layer {layer} changes the logits")


def check_patch_reaches_logits(subject: Subject) -> None:
    """Each component of each layer, and each head of it, matters for the logits."""
    plain = subject.run(subject.target).logits
    for name, layer in subject.places:
        for head in _each(subject, name, layer):
            site = subject.site(name, layer, head)
            if subject.run(subject.target, edits={site: torch.neg}).logits.equal(plain):
                raise CheckError(f"{site.label} can be turned round without any effect")


def check_residual_is_everything(subject: Subject) -> None:
    """The source's whole residual stream at a layer makes the source's logits, and not before."""
    source = subject.run(subject.source, subject.places)
    target = subject.run(subject.target).logits
    if not subject.differs(source.logits, target).any(-1).all():
        raise CheckError("the prompts of the check give the same logits: nothing can be seen")
    for name, layer in subject.places:
        if name not in ("resid_pre", "resid"):
            continue
        value = source.activations[name, layer]
        edits: dict[Site, Edit] = {subject.site(name, layer): put(value)}
        patched = subject.run(subject.target, edits=edits).logits
        what = f"{name} of layer {layer}, patched at every position, does not make the source run"
        subject.expect_same(patched, source.logits, what)


def check_edits_stay(subject: Subject) -> None:
    """An edit of one head or position reaches no other head or position of that component."""
    plain = subject.run(subject.target, subject.places).activations
    for name, layer in subject.places:
        before = plain[name, layer]
        for head in _each(subject, name, layer):
            site = subject.site(name, layer, head, [POSITION])
            after = subject.run(subject.target, [(name, layer)], {site: _other}).activations[
                name, layer
            ]
            allowed = torch.zeros_like(before, dtype=torch.bool)
            allowed[:, POSITION] = _columns(subject, name, layer, head, before)
            changed = after != before
            if not changed[allowed].all() or changed[~allowed].any():
                raise CheckError(f"an edit of {site.label} changes more, or less, than that")


def check_sweep(subject: Subject) -> None:
    """A sweep of every component runs; the last layer's residual stream restores the source."""
    names = list(dict.fromkeys(name for name, _ in subject.places))
    prompts = torch.arange(len(subject.source), device="cpu")
    source, target = (subject.run(batch).logits for batch in (subject.source, subject.target))
    out = activation_patching(
        subject.nnmodel,
        subject.api,
        Sites(names, seq_pos_type="last") if subject.only is None else _listed(subject),
        subject.source.tokens,
        subject.target.tokens,
        # The two tokens between which the runs differ most, so that there is something to move.
        (source - target).argmax(-1),
        (source - target).argmin(-1),
        # Random tokens may end in the padding token; here it is a token.
        attention_mask=subject.target.mask,
        progress=False,
    )
    for name in names:
        swept = out.swept(name)
        if not swept.any() or not torch.isfinite(out.patched(name)[swept][:, prompts]).all():
            raise CheckError(f"a sweep of {name} gives no numbers, or some that are not finite")
    if ("resid", subject.n_layers - 1) in subject.places:
        value = out["resid"].flatten()[-1:]
        subject.expect_same(value, torch.ones_like(value), "resid of the last layer restores not 1")


def check_cone_equals_full(subject: Subject) -> None:
    """A sweep in the cone engine gives the numbers of one whole forward for every cell."""
    target = subject.target
    # Prompts that differ from the first, the second, ... token on: a part of the cells is elided.
    later = (
        torch.arange(target.seq_len, device="cpu")[None]
        >= torch.arange(len(target), device="cpu")[:, None]
    )
    tokens = torch.where(later, subject.source.tokens, target.tokens)
    mask = torch.ones_like(target.mask)
    if getattr(subject.api, "padding", True):
        mask[-1, :_PADDING] = 0
    positions = ([POSITION], [target.seq_len - 1], [3, 5])
    sites = [
        subject.site(name, layer, head, seq_pos)
        for name, layer in subject.places
        for seq_pos in positions
        for head in (_each(subject, name, layer) if seq_pos == positions[0] else [None])
    ]
    logits = subject.run(target).logits
    # Answers must be ids that a prompt could hold, which some models have fewer of than logits.
    best = logits[:, : vocab_size(subject.model)].topk(2).indices
    patched = {}
    for engine in ("full", "cone"):
        try:
            # Padding is what is tested, so that nothing is to be said of it.
            with warnings.catch_warnings(action="ignore", category=PromptWarning):
                out = activation_patching(
                    subject.nnmodel,
                    subject.api,
                    Sites.from_sites(sites),
                    tokens,
                    target.tokens,
                    best[:, 0],
                    best[:, 1],
                    attention_mask=mask,
                    engine=engine,
                    progress=False,
                )
        except EngineError as error:
            raise CheckError(f"{error}; the adapter must declare cone=False") from error
        patched[engine] = torch.cat([out.patched(name) for name in out])
    gap = (patched["full"] - patched["cone"]).abs().max().item()
    if not gap <= subject.rounding * logits.abs().max().item():
        raise CheckError(
            f"the cone engine is off by up to {gap:.3g} from whole forwards; if the model keeps "
            "something of earlier tokens besides keys and values, the adapter must declare "
            "cone=False"
        )


def _listed(subject: Subject) -> SiteList:
    """The sites of the sweep in the layers that are looked at, with their heads."""
    sites = [
        subject.site(name, layer, head, [-1])
        for name, layer in subject.places
        for head in _each(subject, name, layer)
    ]
    return Sites.from_sites(sites)


def _heads(subject: Subject, name: str, layer: int) -> list[int]:
    kind = subject.component(name, layer).heads
    return [] if kind is None else list(range(subject.heads(layer).count(kind)))


def _each(subject: Subject, name: str, layer: int) -> Sequence[int | None]:
    """Each head, or one None for a component without heads."""
    return _heads(subject, name, layer) or [None]


def _other(old: Tensor) -> Tensor:
    """Other numbers, however large the old ones are."""
    return torch.where(old == 0, torch.ones_like(old), -old)


def _columns(subject: Subject, name: str, layer: int, head: int | None, value: Tensor) -> Tensor:
    """`[width]`, bool: the columns of a head, or all."""
    width = value.shape[-1]
    mask = torch.ones(width, dtype=torch.bool, device=value.device)
    columns = head_columns(subject.api, subject.model, layer, name, width)
    if head is not None and columns is not None:
        mask[:] = False
        mask[columns[head].to(mask.device)] = True
    return mask


CHECKS: Needs = {
    check_identity_patch: (),
    check_patch_reaches_logits: (),
    check_residual_is_everything: (component("resid"),),
    check_edits_stay: (),
    check_sweep: (),
    check_cone_equals_full: (declared("cone"),),
}
