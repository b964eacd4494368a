"""Runs beside the model's weights, in a process that has nnsight and torch, but not nnpatch.

The text of this module travels (`travelling.py`), so it imports torch alone, and what its functions
are given is plain: numbers, texts, tensors, lists of them, and nnsight's model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

#: The names that lead from the model to a module, the side of it, and the item of what it gives.
At: TypeAlias = tuple[str, str, int]
#: Rows, positions, and the positions of the source run, one number a token each.
Tokens: TypeAlias = tuple[list[int], list[int], list[int]]
#: Which location, which tokens, which columns (None is all), which basis (None is no subspace).
Put: TypeAlias = tuple[int, int, "list[int] | None", "int | None"]
#: Columns and positions, by which logits are chosen; see `read_logits`.
Where: TypeAlias = "tuple[list[list[int]], list[list[int]], int] | None"


def run_cells(
    model: Any,
    remote: Any,
    target: Mapping[str, Any],
    source: Mapping[str, Any] | None,
    given: Mapping[int, Tensor] | None,
    at: Sequence[At],
    tokens: Sequence[Tokens],
    taken: Mapping[int, Sequence[int]],
    cells: Sequence[Sequence[Put]],
    bases: Sequence[Tensor],
    where: Where,
    ids: list[int] | None,
) -> Any:
    """The logits of patched runs, `[cells, batch, ids]` or `[cells, batch, places, ids]`.

    Args:
        model: nnsight's model.
        remote: where it runs, as nnsight takes it.
        target: the arguments of the forward that is patched.
        source: those of the forward whose activations are put; None if none is made.
        given: what is put instead, for each location `[batch or 1, positions, width]`; None,
            without a source, is zeros.
        at: the locations.
        tokens: the tokens.
        taken: for each location, in execution order, at which tokens values are wanted.
        cells: for each cell what is put, in execution order.
        bases: `[width, rank]` of subspaces.
        where: where logits are read; None is the last position.
        ids: which ids of the vocabulary; None is all.
    """
    with model.session(remote=remote):
        zeros = source is None and given is None
        values = {}
        for number, whole in ({} if given is None else given).items():
            for each in taken[number]:
                values[number, each] = _of_tokens(whole, tokens[each])
        found = []
        with torch.no_grad():
            if source is not None:
                with model.trace(**source):
                    for number in taken:
                        whole = _read(model, at[number], source["input_ids"].shape)
                        for each in taken[number]:
                            values[number, each] = _of_tokens(whole, tokens[each])
            for puts in cells:
                with model.trace(**target):
                    for number, each, columns, basis in puts:
                        whole = _read(model, at[number], target["input_ids"].shape).clone()
                        _put(
                            whole,
                            tokens[each],
                            None if zeros else values[number, each],
                            columns,
                            None if basis is None else bases[basis],
                        )
                        _write(model, at[number], whole)
                    found.append(_read_logits(model.output, where, ids))
        logits = torch.stack(found).save()  # type: ignore[attr-defined]
    # A block that travels has no return of its own.
    return logits  # noqa: RET504


def add_up(
    model: Any,
    remote: Any,
    arguments: Mapping[str, Any],
    mask: Tensor,
    at: Sequence[At],
    seq_len: int,
    per_position: bool,
    tokens: Tokens | None,
) -> Any:
    """For each location what `total` gives of its activation; or `[tokens, width]` of some tokens.

    Args:
        model: nnsight's model.
        remote: where it runs, as nnsight takes it.
        arguments: of the forward.
        mask: `[batch, seq]`, 1 for a token.
        at: the locations, in execution order.
        seq_len: see `total`.
        per_position: see `total`.
        tokens: these alone, and not added up; None is all, added up.
    """
    with model.session(remote=remote):
        sums = []
        with torch.no_grad():  # noqa: SIM117 - a trace is a block of its own
            with model.trace(**arguments):
                for each in at:
                    whole = _read(model, each, arguments["input_ids"].shape)
                    if tokens is None:
                        sums.append(total(whole, mask, seq_len, per_position).cpu())
                    else:
                        sums.append(_of_tokens(whole, tokens).float().cpu())
        sums.save()  # type: ignore[attr-defined]
    return sums


def total(activation: Tensor, mask: Tensor, seq_len: int, per_position: bool) -> Tensor:
    """The real tokens of `[batch, any, width]`, added up in float32.

    Args:
        activation: what is added up.
        mask: `[batch, any]`, 1 for a token.
        seq_len: as how many positions, where each is added up apart.
        per_position: whether each position, counted from the end, is.

    Returns:
        `[1, seq_len or 1, width]`.
    """
    real = mask.to(activation.device)[..., None]
    # Zeroed rather than multiplied: padding may hold anything, nan included.
    return summed(torch.where(real.bool(), activation.float(), 0.0), seq_len, per_position)


def summed(values: Tensor, seq_len: int, per_position: bool) -> Tensor:
    """`[batch, any, width]` added up; see `total`."""
    if per_position:
        return aligned(values, seq_len).sum(0, keepdim=True)
    return values.sum((0, 1), keepdim=True)


def aligned(values: Tensor, seq_len: int) -> Tensor:
    """`[batch, any, width]` as `[batch, seq_len, width]`, cut or filled with 0 on the left."""
    missing = seq_len - values.shape[1]
    if missing > 0:
        return torch.nn.functional.pad(values, (0, 0, missing, 0))
    return values[:, -seq_len:]


def _module(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name) if name else model
    return model


def _read(model: Any, at: At, shape: Sequence[int]) -> Any:
    """The whole activation `[batch, seq, width]` at a location, inside a trace."""
    path, side, item = at
    module = _module(model, path)
    value = module.input if side == "input" else module.output
    whole = value[item] if isinstance(value, (tuple, list)) else value
    if whole.ndim == 2 and len(whole) == shape[0] * shape[1]:
        whole = whole.view(*shape, -1)
    if list(whole.shape[:2]) != list(shape[:2]) or whole.ndim != 3:
        raise ValueError(
            f"the {side} of {path} is {list(whole.shape)} in a run of {list(shape)} tokens, where "
            "[batch, seq, width] is wanted"
        )
    return whole


def _write(model: Any, at: At, whole: Tensor) -> None:
    """Put a whole activation at a location, inside a trace."""
    path, side, item = at
    module = _module(model, path)
    if side == "input":
        module.input = whole.reshape(module.input.shape)
        return
    value = module.output
    if isinstance(value, (tuple, list)):
        items = list(value)
        items[item] = whole.reshape(items[item].shape)
        module.output = type(value)(items)
    else:
        module.output = whole.reshape(value.shape)


def _of_tokens(whole: Tensor, tokens: Tokens) -> Tensor:
    """`[tokens, width]`, what a run, or a mean of runs, has at the sources of some tokens."""
    rows, _, sources = tokens
    # A mean has one row, which is that of each prompt.
    own = rows if len(whole) > 1 else [0] * len(rows)
    return whole[_numbers(own, whole), _numbers(sources, whole)]


def _numbers(numbers: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=like.device)


def _put(
    whole: Tensor,
    tokens: Tokens,
    values: Tensor | None,
    columns: list[int] | None,
    basis: Tensor | None,
) -> None:
    """Put values `[tokens, width]` into an activation, in place; None is zeros."""
    rows, positions = _numbers(tokens[0], whole), _numbers(tokens[1], whole)
    there = whole[rows, positions]
    own = torch.zeros_like(there) if values is None else values.to(there.device, there.dtype)
    if columns is not None:
        chosen = _numbers(columns, whole)
        there, own = there[:, chosen], own[:, chosen]
        rows, positions = rows[:, None], positions[:, None]
    if basis is not None:
        own = _interchanged(basis, own, there)
    if columns is None:
        whole[rows, positions] = own
    else:
        whole[rows, positions, chosen] = own


def _interchanged(basis: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Target + (source - target) B B^T."""
    kind = torch.promote_types(target.dtype, basis.dtype)
    basis = basis.to(target.device, kind)
    with torch.autocast(target.device.type, enabled=False):
        moved = source.to(target.device, kind) - target.to(kind)
        moved = (moved @ basis) @ basis.T
        sum_of = (target.to(kind) + moved).to(target.dtype)
        return torch.where(moved == 0, target, sum_of)


def _read_logits(output: Any, where: Where, ids: list[int] | None) -> Tensor:
    """Logits `[batch, ids]` at the last position, or `[batch, places, ids]`, on the CPU.

    Where some are asked for, a model gives those of the positions that are asked for, or of all.
    """
    if not hasattr(output, "logits") and hasattr(output, "last_hidden_state"):
        raise ValueError("the model gives hidden states, where a language model gives logits")
    logits = output.logits if hasattr(output, "logits") else output[0]
    if where is None:
        chosen = logits[:, -1]
    else:
        columns, positions, few = where
        at = torch.tensor(columns if logits.shape[1] == few else positions, device=logits.device)
        chosen = logits[torch.arange(len(at), device=logits.device)[:, None], at]
    if ids is not None:
        chosen = chosen[..., _numbers(ids, chosen)]
    found: Tensor = chosen.to("cpu", copy=True)
    return found
