"""The arguments of a call about its prompts, for which a `PromptPairs` may stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from nnpatch_core.errors import AnswerError, PatchingError, TokensError
from nnpatch_core.interventions.inputs import one_mask
from nnpatch_core.prompts import PromptPairs


@attrs.frozen(eq=False)
class PairArguments:
    """The arguments of a call about its two runs, by their names, unchecked; None is left out."""

    source_tokens: Any
    target_tokens: Any
    source_answer_index: Any = None
    target_answer_index: Any = None
    attention_mask: Any = None
    source_attention_mask: Any = None
    target_attention_mask: Any = None
    tokenizer: Any = None
    spans: Any = None
    source_answer_tokens: Any = None
    target_answer_tokens: Any = None
    columns: Any = None
    #: By name, what a `PromptPairs` knows of its answers besides their first tokens, for metrics.
    known_answers: Any = None
    #: Whether they are a batch of several, whose means are compared together.
    part: Any = None


@attrs.frozen(eq=False)
class RunArguments:
    """The arguments of a call about the one run of an ablation, by their names, unchecked."""

    tokens: Any
    answer_index: Any = None
    other_answer_index: Any = None
    attention_mask: Any = None
    tokenizer: Any = None
    spans: Any = None
    answer_tokens: Any = None
    other_answer_tokens: Any = None
    columns: Any = None
    known_answers: Any = None
    #: Whether they are a batch of several, whose means are compared together.
    part: Any = None


#: The names that `attribution_patching` has for the arguments of an ablation's one run: its prompts
#: are the target, and the source answer is what they call for.
AS_TARGET = {
    "tokens": "target_tokens",
    "answer_index": "source_answer_index",
    "other_answer_index": "target_answer_index",
}


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
        _check_alone(given, "source_tokens")
        pairs = given.source_tokens
        values = pairs.arguments()
        return PairArguments(**{**values, **_besides(pairs, given.tokenizer)})
    needed = ["source_answer_index", "target_answer_index"] * answers
    _check_given(given, "source_tokens", ["source_tokens", "target_tokens", *needed])
    return given


def ablated_arguments(
    given: PairArguments, ablation: Any = None, *, answers: bool = True
) -> RunArguments:
    """The one run that is ablated, of a call without a source run, whose `source_tokens` are None.

    A `PromptPairs` in place of `source_tokens` or `target_tokens` stands for its source prompts, as
    in `run_arguments`.

    Args:
        given: as they were passed.
        ablation: the argument of that name, for an error.
        answers: whether the call needs answers.

    Raises:
        PatchingError: there is a source run.
        MaskError: two masks.
    """
    first = "target_tokens" if given.source_tokens is None else "source_tokens"
    pairs = getattr(given, first)
    if isinstance(pairs, PromptPairs):
        _check_alone(given, first)
        return _one_run(pairs, given.tokenizer)
    _check_given(given, "source_tokens", ["target_tokens", *["source_answer_index"] * answers])
    if given.source_tokens is not None or given.source_attention_mask is not None:
        told = "an ablation" if ablation is None else f"ablation={ablation!r}"
        raise PatchingError(
            f"{told} needs no source run: pass source_tokens=None, and no source_attention_mask="
        )
    mask = one_mask("target", given.attention_mask, given.target_attention_mask)
    return RunArguments(
        given.target_tokens,
        given.source_answer_index,
        given.target_answer_index,
        mask,
        given.tokenizer,
        given.spans,
        answer_tokens=given.source_answer_tokens,
        other_answer_tokens=given.target_answer_tokens,
    )


def run_arguments(given: RunArguments) -> RunArguments:
    """The arguments of a call about one run; a `PromptPairs` stands for its source prompts.

    Raises:
        TokensError: arguments beside a `PromptPairs`, or no tokens.
        AnswerError: no answers.
    """
    if isinstance(given.tokens, PromptPairs):
        _check_alone(given, "tokens")
        return _one_run(given.tokens, given.tokenizer)
    _check_given(given, "tokens", ["tokens", "answer_index"])
    return given


def _one_run(pairs: PromptPairs, tokenizer: Any) -> RunArguments:
    return RunArguments(**{**pairs.ablation_arguments(), **_besides(pairs, tokenizer)})


def _besides(pairs: PromptPairs, tokenizer: Any) -> dict[str, Any]:
    """All that pairs bring besides the arguments that people pass, and the tokenizer."""
    return {
        "tokenizer": tokenizer or pairs.tokenizer,
        "columns": pairs.columns,
        "known_answers": pairs.metric_data,
        "part": pairs.is_part,
    }


def _check_alone(given: PairArguments | RunArguments, first: str) -> None:
    """Raise where something is passed beside a `PromptPairs`; a tokenizer may name its tokens."""
    beside = [name for name in _passed(given) if name not in (first, "tokenizer")]
    if beside:
        raise TokensError(
            f"{first} is a PromptPairs, which stands for all arguments about the prompts: "
            f"leave out {_joined(beside)}"
        )


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
