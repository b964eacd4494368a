"""A metric that declares that it compares two answers is refused before the model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nnpatch_core import (
    MetricContext,
    Sites,
    ablation_patching,
    attribution_patching,
    compares_answers,
    per_prompt,
    reads_tokens,
)
from nnpatch_core.errors import AnswerError, MetricError
from nnpatch_core.testing import tiny_api, tiny_model, traces

TOKENS = torch.tensor([[5, 6, 7], [8, 6, 9]])
ANSWERS, OTHERS = torch.tensor([20, 21]), torch.tensor([30, 31])
SITES = Sites("mlp", seq_pos_type="last")


def difference(logits: Tensor, context: MetricContext) -> Tensor:
    prompts, other = torch.arange(len(logits)), context.other_answer("difference")
    return logits[prompts, context.source_answer_index] - logits[prompts, other]


def ablated(model: Any, metric: Any, others: Tensor | None) -> Any:
    given = {"other_answer_index": others, "metric": metric, "progress": False}
    return ablation_patching(model, tiny_api(), SITES, TOKENS, ANSWERS, **given)


def attributed(model: Any, metric: Any, others: Tensor | None) -> Any:
    given = {"ablation": "zero", "metric": metric, "progress": False}
    return attribution_patching(model, tiny_api(), SITES, None, TOKENS, ANSWERS, others, **given)


def declared() -> Callable[..., Tensor]:
    def own(logits: Tensor, context: MetricContext) -> Tensor:
        return difference(logits, context)

    return compares_answers(own)


def several() -> Callable[..., Tensor]:
    """With the other declarations, one of which is put on a function around it."""

    def own(logits: Tensor, *, context: MetricContext) -> Tensor:
        return difference(logits, context)

    def columns(context: MetricContext) -> Tensor:
        return torch.stack([context.source_answer_index, context.other_answer("own")], -1)

    return per_prompt(compares_answers(reads_tokens(columns)(own)))


@pytest.mark.parametrize("make", [declared, several, lambda: "logit_difference"])
@pytest.mark.parametrize(
    ("call", "argument"), [(ablated, "other_answer_index="), (attributed, "target_answer_index=")]
)
def test_declared(call: Callable[..., Any], argument: str, make: Callable[[], Any]) -> None:
    model, metric = tiny_model("llama"), make()
    name = metric if isinstance(metric, str) else "own"
    with traces(model) as seen:
        with pytest.raises(AnswerError, match=rf"'{name}' compares two answers: pass {argument}"):
            call(model, metric, None)
        assert not seen
        # Under a name of the user's own both are told, if it has one.
        with pytest.raises(AnswerError, match=rf"'gap'( \('{name}'\))? compares two answers"):
            call(model, {"gap": metric}, None)
        assert not seen
    assert call(model, metric, OTHERS)["mlp"].isfinite().all()


def test_not_declared() -> None:
    model = tiny_model("llama")
    with traces(model) as seen:
        with pytest.raises(AnswerError, match="'difference' compares two answers"):
            ablated(model, difference, None)
        assert len(seen) == 1


def test_it_is_put_on_what_can_be_called() -> None:
    with pytest.raises(MetricError, match="must be a metric that can be called"):
        compares_answers("logit_difference")  # type: ignore[type-var]
