"""Metrics of a user's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnpatch_core import reads_tokens


@reads_tokens(lambda context: context.source_answer_index[:, None])
def answer_logit(logits: Tensor, context: Any) -> Tensor:
    return logits.gather(1, context.source_answer_index[:, None])[:, 0]
