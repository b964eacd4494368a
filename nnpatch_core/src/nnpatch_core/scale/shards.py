"""A sweep in several processes: each measures a shard of it, and all are merged."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import attrs

from nnpatch_core._arguments import listed
from nnpatch_core._files import check_file
from nnpatch_core._printable import shown
from nnpatch_core.errors import CheckpointError, ShardError
from nnpatch_core.memory import MemoryBudget
from nnpatch_core.results import Outcome
from nnpatch_core.sweep import Share, ShareFile, ShareMeasured, Stored


@attrs.frozen
class Shard:
    """A shard that is measured.

    Args:
        path: its checkpoint.
        share: which shard, `K/N`.
        measured: how many patched runs it has, each a cell in a prompt, or how many estimates.
        told: what it has done, in words.
    """

    path: Path
    share: str
    measured: int
    told: str


def measure_shard(
    sweep: Callable[..., Outcome],
    *arguments: Any,
    shard: str,
    checkpoint: str | os.PathLike[str],
    memory_budget: MemoryBudget,
    told: Callable[[float], object] = float,
    **options: Any,
) -> Shard:
    """Measure one of several shards of a sweep, and keep it in a checkpoint.

    What runs together is decided for the whole sweep, and then shared out by its work, so that the
    merged outcome is, to the last bit, that of one process. A shard that was stopped goes on from
    its own checkpoint.

    Args:
        sweep: `activation_patching`, `ablation_patching`, `attribution_patching`, `path_patching`
            or `edge_patching`.
        *arguments: those of the sweep.
        shard: `K/N`, such as `"3/16"` for the third of sixteen.
        checkpoint: the file of this shard alone.
        memory_budget: as of the sweep; it must be named, for all shards alike, as it decides what
            runs together, and what is free differs from machine to machine.
        told: is told, as the sweep goes on, how much of all is measured or another shard's, from 0
            to 1.
        **options: of the sweep.

    Returns:
        The `Shard`.

    Raises:
        ShardError: `shard` is none, or the file is another shard's.
        PatchingError: one of its kinds, as the sweep raises it.

    Examples:
        >>> import tempfile, torch
        >>> from nnpatch_core import Sites, activation_patching
        >>> from nnpatch_core.testing import tiny_api, tiny_model
        >>> call = (tiny_model("llama"), tiny_api(), Sites("resid", seq_pos_type="each"),
        ...         torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]]),
        ...         torch.tensor([1]), torch.tensor([2]))
        >>> budget = {"memory_budget": "1 GiB"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = [f"{folder}/{number}" for number in (1, 2)]
        ...     for number, file in enumerate(files, 1):
        ...         _ = measure_shard(activation_patching, *call, shard=f"{number}/2",
        ...                           checkpoint=file, progress=False, **budget)
        ...     whole = merge_shards(files, f"{folder}/whole")
        ...     out = activation_patching(*call, checkpoint=whole, progress=False)
        >>> torch.equal(
        ...     out["resid"], activation_patching(*call, progress=False, **budget)["resid"])
        True
    """
    share = Share.of(shard)
    if memory_budget is None:
        raise ShardError(
            "memory_budget= must be named for a shard: left to itself it is half of what is free, "
            "and shards that have other budgets cannot be merged"
        )
    path = check_file(checkpoint, CheckpointError)
    if path.exists() and Stored.read(path).share is None:
        raise ShardError(
            f"{path} is the checkpoint of a whole sweep, not of shard {share}: name another file"
        )
    try:
        sweep(
            *arguments,
            checkpoint=ShareFile(path, share, told),
            memory_budget=memory_budget,
            **options,
        )
    except ShareMeasured as done:
        return Shard(path, str(share), done.measured, done.told)
    raise ShardError(f"{shown(sweep)} measures nothing that could be shared out")


def merge_shards(
    shards: Iterable[str | os.PathLike[str] | Shard], to: str | os.PathLike[str]
) -> Path:
    """Merge the checkpoints of all shards into one, from which the sweep itself gives its outcome.

    Args:
        shards: the checkpoints, in any order.
        to: the file that is written, whole or not at all.

    Returns:
        `to`. The call of the sweep with `checkpoint=to` runs nothing but the unpatched runs.

    Raises:
        ShardError: one is missing, not finished, or of another sweep; the message names it.
        CheckpointError: a file is no checkpoint, or `to` cannot be written.
    """
    given = listed(shards)
    if not given:
        raise ShardError(f"merge_shards takes the checkpoints of all shards, got {shown(shards)}")
    paths = [each.path if isinstance(each, Shard) else each for each in given]
    merged: Stored | None = None
    for path in paths:
        own = Stored.read(path)
        merged = own if merged is None else merged.with_shard(own)
    assert merged is not None
    merged.check_complete()
    merged.write(to)
    return Path(to)
