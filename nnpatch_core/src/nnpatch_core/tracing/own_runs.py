"""A mark on a model while nnpatch itself runs it, for who steers it meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

#: Where the mark is, with the model's id, as a copy of the model has it too.
_RUN = "_nnpatch_run"


@contextmanager
def running(model: nn.Module, appended: int) -> Iterator[None]:
    """Mark a model as run by nnpatch.

    Args:
        model: the Hugging Face model itself.
        appended: how many tokens at the right end of its prompts are an answer's.
    """
    before = model.__dict__.get(_RUN)
    model.__dict__[_RUN] = (appended, id(model))
    try:
        yield
    finally:
        if before is None:
            del model.__dict__[_RUN]
        else:
            model.__dict__[_RUN] = before


def appended_to(model: nn.Module) -> int | None:
    """How many tokens at the right end of a run are an answer's; None where it is not nnpatch's."""
    appended, owner = model.__dict__.get(_RUN, (None, 0))
    return appended if owner == id(model) else None
