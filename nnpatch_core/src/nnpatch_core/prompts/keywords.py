"""The arguments about prompts that a `PromptPairs` stands for, by their names and types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from torch import Tensor

from nnpatch_core.seq_pos import Span


class GivenSpans(TypedDict, total=False):
    """Spans, which are left out where there are none."""

    spans: Mapping[str, Span]


class PatchingArguments(GivenSpans):
    """Those of `activation_patching` and `attribution_patching`; tensors as in `PromptPairs`."""

    source_tokens: Tensor
    target_tokens: Tensor
    source_attention_mask: Tensor
    target_attention_mask: Tensor
    source_answer_index: Tensor
    target_answer_index: Tensor
    tokenizer: Any


class AblationArguments(GivenSpans):
    """Those of `ablation_patching`, which runs the source prompts."""

    tokens: Tensor
    attention_mask: Tensor
    answer_index: Tensor
    other_answer_index: Tensor
    tokenizer: Any
