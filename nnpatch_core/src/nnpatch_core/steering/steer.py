"""The context in which a model is steered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import attrs
import torch
from torch import nn

from nnpatch_core._models import alone, pad_id, with_weights
from nnpatch_core._upstream import under_way
from nnpatch_core.adapters import Place, place_of
from nnpatch_core.errors import AdapterError, SteeringError
from nnpatch_core.seq_pos import are_per_prompt
from nnpatch_core.site import Site
from nnpatch_core.spaces import Subspace
from nnpatch_core.steering.passes import Steered, Watch, inputs_of
from nnpatch_core.steering.put import Put, in_backward, steered_by
from nnpatch_core.steering.sited import site_of
from nnpatch_core.steering.values import Amount, amount_of
from nnpatch_core.tracing import appended_to, columns_of, width_of


@attrs.define(eq=False)
class _Forwards:
    """The forwards of a steered model, as they come.

    Args:
        model: the Hugging Face model.
        watch: says which tokens are steered.
        label: of the site, for errors.
    """

    model: nn.Module
    watch: Watch
    label: str
    _steered: Steered | None = attrs.field(default=None, init=False)
    _running: bool = attrs.field(default=False, init=False)

    def begin(self, _: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Read what the model is called with; a hook."""
        inputs = inputs_of(self.model, args, kwargs)
        self._steered = self.watch.steered(inputs, under_way(), appended_to(self.model))
        self._running = True

    def end(self, *_: Any) -> None:
        """Hold that the forward is over; a hook."""
        self._running = False

    def current(self) -> Steered:
        """The tokens of the forward that is under way."""
        # A checkpointed layer, and one that nnpatch calls alone, belong to the last forward.
        belongs = self._running or in_backward() or appended_to(self.model) is not None
        if self._steered is None or not belongs:
            raise SteeringError(
                f"the module of site {self.label} runs outside of a forward of "
                f"{type(self.model).__name__}, so that it is not known which tokens are steered: "
                "call the model itself, not a part of it or its .forward"
            )
        return self._steered


@contextmanager
def steer(nnmodel: Any, site: Site | Subspace, value: Any, *, api: Any = None) -> Iterator[None]:
    """Steer a model: while this holds, each of its runs has other activations at a site.

    By plain torch hooks, so that `generate`, forwards, traces and sweeps are steered alike; a sweep
    counts them as hooks of yours. They are off again whatever happens inside, and the model is as
    it was. Several may stand inside one another: they act in the order in which they were entered.

    Which tokens: with `seq_pos=None` every one, of the prompt and generated, but no padding. With
    `seq_pos=[-1]` the last one of each prompt, and then each that is generated: always the token
    after which the next one is read. Other positions, `[k]` or `[batch, k]`, are of the prompt
    alone, counted in the left-padded batch. With and without a cache the text is the same. Beams
    and `num_return_sequences=` repeat a prompt, and its values and positions with it.

    Args:
        nnmodel: an `NNsight`, a `TransformersModel` or a plain Hugging Face model; PEFT's and
            `torch.compile`'s wrappers are looked through. What is compiled runs uncompiled here.
        site: a `Site`, perhaps with `subspace=`; or a `Subspace`, at the site where it was made.
        value: `Set`, `Add` or `Scale`; or the coordinate to which a subspace of rank 1 is set: a
            number, or `[batch]`, one for each prompt.
        api: the adapter by which the site of a `Subspace` is found; None finds it by the model.

    Raises:
        SteeringError: a value that does not fit the site; in a run, rows that are not those of the
            values, and where it cannot be known where a prompt ends (assisted decoding, a prompt
            in several parts), unless every token is steered.
        SubspaceError: a subspace of another width, or one that does not know its site.
        PositionError: a position that is not in a prompt, or is padding there.
        PatchingError: one of its kinds, if the model does not have the site.

    Warns:
        PaddingWarning: a run without a mask, whose tokens look padded.

    Examples:
        >>> import torch
        >>> from nnpatch_core import Add, Site
        >>> from nnpatch_core.testing import tiny_api, tiny_model
        >>> model, prompt = tiny_model("llama"), torch.tensor([[5, 6, 7]])
        >>> site = Site.get_site(tiny_api(), "resid", layer=1, seq_pos=[-1])
        >>> with steer(model, site, Add(torch.full([32], 0.5))):
        ...     steered = model(prompt).logits
        >>> (steered != model(prompt).logits).any(-1)
        tensor([[False, False,  True]])
    """
    model = with_weights(nnmodel)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise AdapterError(
            f"{type(model).__name__} is an encoder and a decoder, which run on other tokens each: "
            "only decoders can be steered"
        )
    found = site_of(site, api, model)
    place = place_of(found.api, model, found.layer, found.component)
    amount = amount_of(value, found.subspace, _width(place, found.head), found.label)
    _check_rows(found, amount)
    watch = Watch(found.seq_pos, amount.prompts, pad_id(nnmodel, model))
    forwards = _Forwards(model, watch, found.label)
    put = Put(place, found.head, amount, found.label)
    with ExitStack() as stack:
        stack.enter_context(alone(model))
        # What was compiled before does not see hooks that are new.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        before = model.register_forward_pre_hook(forwards.begin, with_kwargs=True)
        stack.callback(before.remove)
        stack.callback(model.register_forward_hook(forwards.end, always_call=True).remove)
        stack.callback(steered_by(put, forwards.current, found.seq_pos).remove)
        yield


def _width(place: Place, head: int | None) -> int | None:
    """The width of what is steered; None where only a run can tell."""
    whole = width_of(place)
    if whole is None:
        return None
    columns = columns_of(place, head, whole)
    return whole if columns is None else columns.numel()


def _check_rows(site: Site, amount: Amount) -> None:
    """Raise `SteeringError` where values and positions are of other numbers of prompts."""
    if amount.prompts is None or not are_per_prompt(site.seq_pos):
        return
    if amount.prompts != len(site.seq_pos):
        raise SteeringError(
            f"there are values of {amount.prompts} prompts, and site {site.label} has positions of "
            f"{len(site.seq_pos)}"
        )
