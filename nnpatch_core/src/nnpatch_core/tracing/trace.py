"""One forward in one nnsight trace: the only place of nnpatch that opens one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from nnpatch_core._models import (
    Elsewhere,
    forward_arguments,
    input_device,
    module_of,
    runs_on_meta,
    with_weights,
)
from nnpatch_core._wrappers import is_dispatched
from nnpatch_core.batch import Batch
from nnpatch_core.errors import AdapterError, RemoteError
from nnpatch_core.tracing.elsewhere import logits_there
from nnpatch_core.tracing.observer import report
from nnpatch_core.tracing.own_runs import running
from nnpatch_core.tracing.sites_read import Caught, joined, sites_of, watching


@attrs.frozen(eq=False)
class Kept:
    """Which part is kept of a forward's logits.

    Args:
        asked: the model's argument `logits_to_keep`: how many positions at the end, 0 for all, or
            `[positions]`, which.
        of: for the logits that the model gives, and the activations that were caught on the way,
            what is kept of them, in float32 on the CPU: a copy, so that the whole is not kept for
            the sake of a few positions.
    """

    asked: int | Tensor
    of: Callable[[Tensor, Caught], Tensor]


def kept_of(batch: Batch, start: int = 0) -> Kept:
    """Which part `batch.read` asks for, of a run from one position on."""
    read = batch.read
    if read is None:
        return Kept(1, lambda logits, _: logits[:, -1].to("cpu", torch.float32, copy=True))
    prompts = torch.arange(len(batch), device="cpu")[:, None].expand_as(read)
    padding = batch.read_padding
    asked, pick = picked(prompts, read - start, batch.seq_len - start)

    def of(logits: Tensor, caught: Caught) -> Tensor:
        read = pick(logits).masked_fill(padding[..., None], torch.nan)
        return joined(read, sites_of(batch.sites), caught, batch.mask)

    return Kept(asked, of)


def picked(
    rows: Tensor, positions: Tensor, seq_len: int
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The logits at some positions of some rows.

    Args:
        rows: `[...]`, which row each is of.
        positions: `[...]`, counted from the first that is run.
        seq_len: how many are run.

    Returns:
        The positions to ask of the model, ascending; and a function from what it gives, for these
        or for all, to `[..., vocab]` in float32 on the CPU.
    """
    asked, columns = torch.unique(positions, return_inverse=True)

    def pick(logits: Tensor) -> Tensor:
        few = logits.shape[1] == len(asked)
        if not few and logits.shape[1] != seq_len:
            raise AdapterError(
                f"a model that was asked for its logits at {len(asked)} of {seq_len} positions "
                f"gives them at {logits.shape[1]}"
            )
        at = (columns if few else positions).to(logits.device)
        return logits[rows.to(logits.device), at].to("cpu", torch.float32)

    return asked, pick


def forward(
    nnmodel: Any,
    batch: Batch,
    visit: Callable[[Any], None] | None = None,
    *,
    gradients: bool = False,
    cache: Mapping[str, Any] | None = None,
    start: int = 0,
    kept: Kept | None = None,
) -> Tensor:
    """Run `batch`, with `visit(nnmodel)` reading and editing activations on the way.

    With `gradients` the logits have their graph, and so has what `visit` reads.

    Args:
        nnmodel: the model, wrapped by nnsight.
        batch: the prompts.
        visit: called inside the trace.
        gradients: whether the logits have their graph.
        cache: what the model takes keys and values from, by the keyword under which it does.
        start: the first position that is run; the cache has those left of it.
        kept: what is kept of the logits; None is what `batch.read` asks for.

    Returns:
        The model's final logits at each prompt's last token, `[batch, vocab]` in float32 on the
        CPU; for as many rows as `visit` has made of the batch. Where `batch.read` asks for others,
        `[batch, places, vocab]`: nan where that is padding.

    Raises:
        AdapterError: the model has no weights, or gives no logits of each token.
        RemoteError: it runs elsewhere, and this fails, or is no run that can be sent.
    """
    if isinstance(nnmodel, Elsewhere):
        if visit is not None or gradients or cache or start or kept is not None:
            raise RemoteError("a run of this kind cannot be sent elsewhere: leave out remote=")
        return logits_there(nnmodel, batch)
    model = with_weights(nnmodel)
    device = input_device(model)
    logits: list[Tensor] = []
    kept = kept_of(batch, start) if kept is None else kept

    def body() -> None:
        if visit is not None:
            visit(nnmodel)

    def last(_: Any, __: Any, output: Any) -> None:
        logits.append(kept.of(_logits(output, model), caught))

    caught: Caught = {}
    batch = batch if device is None else batch.to(device)
    arguments = forward_arguments(model, batch, cache, start)
    if "logits_to_keep" in arguments:
        arguments["logits_to_keep"] = _asked(kept.asked, model)
    if runs_on_meta(model):
        # Weights come in as they are needed; nnsight would send the tokens to where they are not.
        arguments = _by_itself(model, arguments)
    with ExitStack() as stack:
        if batch.sites:
            tokens = batch.tokens.shape[1] - start
            caught = stack.enter_context(watching(model, sites_of(batch.sites), tokens))
        # After all other hooks on the model: what nnsight calls its output stands before them.
        stack.callback(model.register_forward_hook(last).remove)
        stack.enter_context(running(model, batch.appended))
        # Nested, not joined: nnsight re-runs the source of its own block, and this must be outside.
        stack.enter_context(torch.set_grad_enabled(gradients))
        with nnmodel.trace(**arguments):
            body()
    report(model, len(logits[0]), batch.tokens.shape[1] - start, gradients=gradients)
    return logits[0]


def _asked(asked: int | Tensor, model: nn.Module) -> int | Tensor | list[int]:
    """Which logits are asked for.

    accelerate moves a tensor to where the embedding is, and the unembedding may be elsewhere: a
    list of numbers stays in host memory, by which any device can be read.
    """
    return asked.tolist() if isinstance(asked, Tensor) and is_dispatched(model) else asked


def _by_itself(module: Any, kwargs: Mapping[str, Any], *args: Any) -> dict[str, Any]:
    """The arguments of a trace that calls a module with what nnsight does not see."""
    # A trace wants an input, which means nothing here.
    unused = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    return {"input_ids": unused, "fn": lambda **_: module(*args, **kwargs)}


def _logits(output: Any, model: Any) -> Tensor:
    headless = not hasattr(output, "logits") and hasattr(output, "last_hidden_state")
    logits = output.logits if hasattr(output, "logits") else output[0]
    if headless or not isinstance(logits, Tensor) or logits.ndim != 3:
        told = "hidden states" if headless else f"{list(getattr(logits, 'shape', []))}"
        raise AdapterError(
            f"{type(model).__name__} gives {told}, where a language model gives logits "
            "[batch, seq, vocab]: load it by AutoModelForCausalLM"
        )
    return logits


def call(
    nnmodel: Any,
    path: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    visit: Callable[[Any], None],
) -> None:
    """Call one module of the model by itself, without a graph, as far as `visit` reads.

    Args:
        nnmodel: the model, wrapped by nnsight.
        path: where the module is.
        args: what it is called with.
        kwargs: the same, by keyword.
        visit: called inside the trace; what comes after its last access is not run.
    """
    model = module_of(nnmodel)
    arguments = _by_itself(model.get_submodule(path), kwargs, *args)
    with running(model, 0), torch.no_grad():  # noqa: SIM117 - nested for the reason above
        with nnmodel.trace(**arguments) as tracer:
            visit(nnmodel)
            tracer.stop()
