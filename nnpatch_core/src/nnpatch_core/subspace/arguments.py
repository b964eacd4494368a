"""The arguments of learning, as a type, for calls that pass them on."""

from __future__ import annotations

from typing import Any, TypedDict

from nnpatch_core.memory import MemoryBudget


class TrainingArguments(TypedDict, total=False):
    """The arguments of `train_subspace` after `rank`, but for `checkpoint` and `progress`."""

    held_out: Any
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup: float
    kl: float
    patience: int | None
    seed: int
    initial: Any
    random_labels: bool
    random_model: bool
    engine: str
    memory_budget: MemoryBudget
