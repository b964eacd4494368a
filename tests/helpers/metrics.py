"""Metrics of a user's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnpatch_core import reads_tokens

#: The built-in metrics that need nothing but the logits at the last token, and the answers.
OF_LAST_TOKEN = (
    "answer_log_probability",
    "answer_probability",
    "kl_divergence",
    "logit_difference",
)


@reads_tokens(lambda context: context.source_answer_index[:, None])
def answer_logit(logits: Tensor, context: Any) -> Tensor:
    return logits.gather(1, context.source_answer_index[:, None])[:, 0]
