"""Reads the tokens that an answer is, after its prompt."""

from __future__ import annotations

import attrs

from nnpatch_core.errors import AnswerError
from nnpatch_core.prompts.encoding import Encoded, Encoder
from nnpatch_core.prompts.rows import UnusableError

FIRST = "multi_token='first' takes the first token of an answer that has several"


@attrs.frozen
class Answer:
    """An answer as it is compared.

    Args:
        given: as the user spelled it.
        tokens: its ids, of which the first is compared by one logit.
        spelled: the text that was tokenised after the prompt; None of an id.
        spaced: whether its space was put in, and makes a difference.
        cut: whether further tokens were left out.
    """

    given: str | int
    tokens: tuple[int, ...]
    spelled: str | None = None
    spaced: bool = False
    cut: bool = False

    @property
    def token(self) -> int:
        """The first of its ids."""
        return self.tokens[0]


def read_answer(
    encoder: Encoder, prompt: Encoded, answer: str | int, *, space: bool, several: str
) -> Answer:
    """Read the tokens that an answer is.

    Args:
        encoder: tokenises.
        prompt: what it follows.
        answer: a text or an id.
        space: whether it is joined to the prompt by a space, where neither has one.
        several: what becomes of several tokens: `"first"` takes the first one, `"all"` takes all,
            and anything else takes none.

    Raises:
        UnusableError: it is no token that the tokenizer has, or several that are not taken.
    """
    if isinstance(answer, int):
        if not 0 <= answer < encoder.vocab_size:
            raise UnusableError(
                AnswerError,
                f"the id {answer} is not in the tokenizer's vocabulary, "
                f"0 to {encoder.vocab_size - 1}",
            )
        return Answer(answer, (answer,))
    touching = not (prompt.answered or prompt.text[-1:].isspace() or answer[0].isspace())
    spelled = f" {answer}" if space and touching else answer
    tokens = _after(encoder, prompt, spelled)
    if not tokens:
        raise UnusableError(AnswerError, f"{spelled!r} has no tokens after its prompt")
    compared = tokens if several == "all" else tokens[:1]
    if getattr(encoder.tokenizer, "unk_token_id", None) in compared:
        raise UnusableError(AnswerError, f"{spelled!r} is not in the tokenizer's vocabulary")
    if len(tokens) > 1 and several not in ("first", "all"):
        raise UnusableError(
            AnswerError,
            f"{spelled!r} is {len(tokens)} tokens: {encoder.pieces(tokens)}",
            _other_spelling(encoder, prompt, answer, space) if touching else FIRST,
        )
    spaced = spelled != answer and tokens != encoder.ids(answer)
    return Answer(answer, compared, spelled, spaced, len(compared) < len(tokens))


def _after(encoder: Encoder, prompt: Encoded, spelled: str) -> tuple[int, ...]:
    """Find the tokens that a text adds to its prompt's."""
    whole, count = encoder.ids(prompt.text + spelled), len(prompt.ids)
    if whole[:count] == prompt.ids:
        return whole[count:]
    pairs = enumerate(zip(prompt.ids, whole, strict=False))
    same = next((at for at, (alone, joined) in pairs if alone != joined), min(count, len(whole)))
    advice = "begin the answer with a space"
    if prompt.text[-1:].isspace():
        advice = "take the white space off the end of the prompt"
    raise UnusableError(
        AnswerError,
        f"{spelled!r} changes the tokens of its prompt, which ends in "
        f"{encoder.pieces(prompt.ids[same:])} alone and in {encoder.pieces(whole[same:])} with it",
        advice,
    )


def _other_spelling(encoder: Encoder, prompt: Encoded, answer: str, space: bool) -> str:
    """Advise to spell an answer the other way, where that makes it one token."""
    respelled = answer if space else f" {answer}"
    try:
        single = len(_after(encoder, prompt, respelled)) == 1
    except UnusableError:
        single = False
    if not single:
        return FIRST
    if space:
        return "without the space it would be one token: space=False joins answers as they are"
    return "with a space it would be one token: space=True joins answers by one"
