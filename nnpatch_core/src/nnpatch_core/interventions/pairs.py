"""The two runs of a sweep: their prompts and answers, and whether they can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import attrs
from torch import Tensor

from nnpatch_core._models import module_of, vocab_size
from nnpatch_core.batch import Batch, check_answers, check_paired
from nnpatch_core.errors import AnswerError, ConfidenceError, MetricError, TokensError
from nnpatch_core.interventions.inputs import one_mask, read_batch
from nnpatch_core.metrics import MetricContext, logit_difference
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.results import Baseline, Prompts
from nnpatch_core.sweep.sweep import check_finite


@attrs.frozen(eq=False)
class PairArguments:
    """What a call says about its two runs, by its keywords, unchecked; None is left out."""

    source_tokens: Any
    target_tokens: Any
    source_answer_index: Any = None
    target_answer_index: Any = None
    attention_mask: Any = None
    source_attention_mask: Any = None
    target_attention_mask: Any = None
    tokenizer: Any = None

    def keywords(self) -> dict[str, Any]:
        """The same, to be passed on."""
        return attrs.asdict(self, recurse=False)


@attrs.frozen(eq=False)
class RunArguments:
    """What a call says about the one run of an ablation, by its keywords, unchecked."""

    tokens: Any
    answer_index: Any
    other_answer_index: Any
    attention_mask: Any
    tokenizer: Any


def pair_arguments(given: PairArguments, *, answers: bool = True) -> PairArguments:
    """The arguments of a call about two runs; a `PromptPairs` stands for all of them.

    Args:
        given: as they were passed; a `PromptPairs` in place of `source_tokens`.
        answers: whether the call needs answers.

    Raises:
        TokensError: arguments beside a `PromptPairs`, or no tokens.
        AnswerError: no answers.
    """
    if isinstance(given.source_tokens, PromptPairs):
        return _instead(given, "source_tokens", given.source_tokens.arguments())
    needed = ["source_answer_index", "target_answer_index"] * answers
    _check_given(given, "source_tokens", ["source_tokens", "target_tokens", *needed])
    return given


def ablated_arguments(given: PairArguments, *, answers: bool = True) -> PairArguments:
    """The same of a call without a source run, whose `source_tokens` are None.

    A `PromptPairs` in place of `source_tokens` or `target_tokens` stands for its source prompts, as
    in `run_arguments`.
    """
    place = "target_tokens" if given.source_tokens is None else "source_tokens"
    pairs = getattr(given, place)
    if isinstance(pairs, PromptPairs):
        values = {
            "target_tokens": pairs.source_tokens,
            "target_attention_mask": pairs.source_attention_mask,
            "source_answer_index": pairs.source_answer_index,
            "target_answer_index": pairs.target_answer_index,
            "tokenizer": pairs.tokenizer,
        }
        return _instead(given, place, values)
    _check_given(given, "source_tokens", ["target_tokens", *["source_answer_index"] * answers])
    return given


def run_arguments(given: RunArguments) -> RunArguments:
    """The arguments of a call about one run; a `PromptPairs` stands for its source prompts.

    Raises:
        TokensError: arguments beside a `PromptPairs`, or no tokens.
        AnswerError: no answers.
    """
    if isinstance(given.tokens, PromptPairs):
        return _instead(given, "tokens", given.tokens.ablation_arguments())
    _check_given(given, "tokens", ["tokens", "answer_index"])
    return given


_Arguments = TypeVar("_Arguments", PairArguments, RunArguments)


def _instead(given: _Arguments, place: str, values: Mapping[str, Any]) -> _Arguments:
    """What the `PromptPairs` at `place` stands for; another tokenizer may name its tokens."""
    beside = [name for name in _passed(given) if name not in (place, "tokenizer")]
    if beside:
        raise TokensError(
            f"{place} is a PromptPairs, which stands for all arguments about the prompts: "
            f"leave out {_joined(beside)}"
        )
    tokenizer = values["tokenizer"] if given.tokenizer is None else given.tokenizer
    empty = dict.fromkeys(field.name for field in attrs.fields(type(given)))
    return type(given)(**{**empty, **values, "tokenizer": tokenizer})


def _check_given(given: PairArguments | RunArguments, first: str, needed: Sequence[str]) -> None:
    """Raise unless all that is needed is there, and no `PromptPairs` where none can be."""
    passed = _passed(given)
    misplaced = [name for name, value in passed.items() if isinstance(value, PromptPairs)]
    if misplaced:
        raise TokensError(
            f"{_joined(misplaced)} cannot be a PromptPairs: pass it as {first}, alone, where it "
            "stands for all arguments about the prompts"
        )
    missing = [name for name in needed if name not in passed]
    if missing:
        kind = TokensError if any("tokens" in name for name in missing) else AnswerError
        one = len(missing) == 1
        words = "a torch tensor, and was" if one else "torch tensors, and were"
        raise kind(
            f"{_joined(missing)} must be given as {words} left out (NoneType); a PromptPairs, "
            f"passed as {first}, stands for all arguments about the prompts"
        )


def _passed(given: PairArguments | RunArguments) -> dict[str, Any]:
    values = attrs.asdict(given, recurse=False)
    return {name: value for name, value in values.items() if value is not None}


def _joined(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


@attrs.frozen(eq=False)
class Pairs:
    """Pairs of a source and a target prompt, packed.

    Args:
        source: where activations are taken.
        target: where they are put.
        source_answers: `[batch]`, token ids.
        target_answers: `[batch]`, token ids.
    """

    source: Batch
    target: Batch
    source_answers: Tensor
    target_answers: Tensor

    def __len__(self) -> int:
        return len(self.target)

    @property
    def mask(self) -> Tensor:
        """`[batch, seq]`: 1 where both prompts have a token, which is where one is patched."""
        return self.source.mask * self.target.mask.to(self.source.mask.device)

    def context(self, source_logits: Tensor, target_logits: Tensor) -> MetricContext:
        """What metrics may look at, given the logits of the two runs."""
        return MetricContext(self.source_answers, self.target_answers, source_logits, target_logits)


def read_pairs(nnmodel: Any, given: PairArguments) -> Pairs:
    """What the user passes as two runs, checked.

    Raises:
        PatchingError: one of its kinds, naming the argument that is wrong.
    """
    source_mask = one_mask("source", given.attention_mask, given.source_attention_mask)
    target_mask = one_mask("target", given.attention_mask, given.target_attention_mask)
    source = read_batch(nnmodel, "source_tokens", given.source_tokens, source_mask)
    target = read_batch(nnmodel, "target_tokens", given.target_tokens, target_mask)
    check_paired(source, target)
    count, vocab = len(source), vocab_size(module_of(nnmodel))
    return Pairs(
        source,
        target,
        check_answers("source_answer_index", given.source_answer_index, count, vocab),
        check_answers("target_answer_index", given.target_answer_index, count, vocab),
    )


def check_confidence(context: MetricContext, prompts: Prompts) -> None:
    """Raise `ConfidenceError`, with the prompts, unless each run prefers its own answer."""
    source = logit_difference(context.source_logits, context)
    target = logit_difference(context.target_logits, context)
    check_finite("logit_difference", source.mean().item(), "in the source run")
    check_finite("logit_difference", target.mean().item(), "in the target run")
    rows = (~((source > 0) & (target < 0))).nonzero().flatten().tolist()
    if rows:
        listed = "; ".join(
            f"prompt {row}: {source[row]:+.2f} (must be above 0) in the source run "
            f"{prompts.text(row)[0]}, {target[row]:+.2f} (must be below 0) in the target run "
            f"{prompts.text(row)[1]}"
            for row in rows
        )
        raise ConfidenceError(
            f"the model is not confident on {len(rows)} of {len(source)} prompts, by logit of the "
            f"source answer minus logit of the target answer: {listed}"
        )


def check_denominators(baseline: Mapping[str, Baseline]) -> None:
    """Raise `MetricError` where the two runs are equal in a metric, or it is not finite."""
    for name, runs in baseline.items():
        source, target = runs.source.double().mean().item(), runs.target.double().mean().item()
        check_finite(name, source, "in the source run")
        check_finite(name, target, "in the target run")
        if source == target:
            raise MetricError(
                f"metric {name!r} is {source:g} in the source run and in the target run: "
                "a value relative to their difference would divide by 0"
            )
