"""A model that counts its forwards, and errors that are known by what they say."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nnpatch_core import (
    Outcome,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
)
from nnpatch_core.errors import (
    PatchingError,
)
from nnpatch_core.testing import tiny_api
from tests.helpers import counted

SOURCE = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
TARGET = torch.tensor([[5, 16, 7, 8], [9, 20, 11, 12]])
SOURCE_ANSWERS = torch.tensor([21, 22])
TARGET_ANSWERS = torch.tensor([31, 32])
ONES = torch.ones_like(SOURCE)
#: The components of the models here, as an error lists them.
COMPONENTS = "resid_pre, q, k, v, o, attn, mlp, resid"

# What makes the sites is called inside the test: some of these are refused as they are made.
last = functools.partial(Sites, "resid", seq_pos_type="last")
custom = functools.partial(Sites, "resid", None, "custom")
site = functools.partial(Site.get_site, tiny_api())


class Counted(counted.Counted):
    """A small model that counts its forwards, and the sweeps over it."""

    def activation(
        self, sites: Callable[..., Any] = last, api: Any = None, **changed: Any
    ) -> Outcome:
        arguments = {
            "source_tokens": SOURCE,
            "target_tokens": TARGET,
            "source_answer_index": SOURCE_ANSWERS,
            "target_answer_index": TARGET_ANSWERS,
            "progress": False,
        }
        return activation_patching(self.model, api, sites(), **{**arguments, **changed})

    def ablation(
        self, sites: Callable[..., Any] = last, api: Any = None, **changed: Any
    ) -> Outcome:
        arguments = {
            "tokens": SOURCE,
            "answer_index": SOURCE_ANSWERS,
            "other_answer_index": TARGET_ANSWERS,
            "progress": False,
        }
        return ablation_patching(self.model, api, sites(), **{**arguments, **changed})

    @contextlib.contextmanager
    def rejects(self, error: type[Exception], *parts: str, forwards: int = 0) -> Iterator[None]:
        """Exactly that error, whose message has all the parts, after so many forwards at most."""
        before = self.forwards
        with raises(error, *parts):
            yield
        assert self.forwards - before <= forwards


@contextlib.contextmanager
def raises(error: type[Exception], *parts: str) -> Iterator[None]:
    everywhere = "".join(f"(?=.*{re.escape(part)})" for part in parts)
    with pytest.raises(error, match=f"(?s)^{everywhere}") as caught:
        yield
    # The root of the errors stands for any of its kinds.
    assert caught.type is error or error is PatchingError


def shown(value: Any) -> str | None:
    """A test is called by what its error must say."""
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        return " ".join(value)
    return "make" if getattr(value, "__name__", "") == "<lambda>" else None


cases = functools.partial(pytest.mark.parametrize, ids=shown)
