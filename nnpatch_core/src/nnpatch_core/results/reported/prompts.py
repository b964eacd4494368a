"""Tables of the prompts, their answers, and the unpatched runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from nnpatch_core._printable import printable
from nnpatch_core.report import Marked, Table
from nnpatch_core.results.reported.facts import unsure_of
from nnpatch_core.results.words import in_digits

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome
    from nnpatch_core.results.parts import Prompts

#: So many prompts a report has, at most: it is to be read, and the outcome has all.
MOST = 200
#: So many are seen at once.
_SHOWN = 8


def prompt_tables(outcome: Outcome) -> list[Table]:
    """The table of the prompts, and that of their unpatched runs."""
    if outcome.moments is not None:
        return [_means(outcome)]
    return [_prompts(outcome), _baselines(outcome)]


def prompts_in_words(outcome: Outcome) -> list[str]:
    """Sentences on the prompts, above their tables."""
    words = []
    if outcome.moments is not None:
        return [f"Only means over {outcome.count} prompts were kept, and not the prompts."]
    if outcome.count > MOST:
        words.append(f"Of {outcome.count:,} prompts the first {MOST} are shown.")
    if not outcome.prompts.strings:
        words.append("No tokenizer was at hand: prompts and answers are token ids.")
    if not outcome.prompts.answers:
        words.append("The answers are not known, as in all outcomes that earlier versions saved.")
    unsure = unsure_of(outcome)
    if unsure is None:
        words.append(
            "Whether each run prefers its own answer is not known: no difference of the two "
            "answers, such as logit_difference, was measured under its own name."
        )
    elif unsure:
        words.append(
            f"{len(unsure)} of {outcome.count} prompts are not confident: their own runs do not "
            "prefer their own answers."
        )
    else:
        words.append("Each run prefers its own answer, in every prompt.")
    if "swapped" in outcome.info:
        words.append(f"Here {outcome.info['swapped']}.")
    return words


def _prompts(outcome: Outcome) -> Table:
    prompts, alone = outcome.prompts, outcome.scale == "change"
    sides = {} if alone else {"source": "target"}
    head = ["#", *(["prompt"] if alone else ["source prompt"])]
    answers = {run: texts for run, texts in prompts.answers.items() if run == "source"}
    if answers:
        head.append("answer")
    if sides:
        head += ["target prompt", *(["its answer"] if "target" in prompts.answers else [])]
    elif "target" in prompts.answers:
        head.append("other answer")
    head += [name for name in prompts.columns if name not in head]
    rows = []
    for number in range(min(outcome.count, MOST)):
        source, target = _spelled(prompts, number)
        row: list[str | Marked] = [str(number), source]
        row += [_answer(each[number]) for each in answers.values()]
        row += [] if alone else [target]
        if "target" in prompts.answers:
            row.append(_answer(prompts.answers["target"][number]))
        row += [
            "" if values[number] is None else _line(str(values[number]))
            for name, values in prompts.columns.items()
            if name in head[len(row) :]
        ]
        rows.append(tuple(row))
    caption = "The prompts" if alone else "The pairs of prompts; tokens that differ are marked"
    return Table(caption, tuple(head), tuple(rows), frozenset(["#"]), _SHOWN)


def _spelled(prompts: Prompts, number: int) -> tuple[Marked, Marked]:
    """The two prompts of a pair; where they have one length, tokens that differ stand out."""
    runs = (
        (prompts.source_tokens[number], prompts.source_mask[number]),
        (prompts.target_tokens[number], prompts.target_mask[number]),
    )
    (source, first), (target, second) = runs
    aligned = bool((first == second).all())
    made = []
    for tokens, mask in runs:
        differ = (source != target) & mask.bool()
        pieces = [
            (_token(prompts, token), aligned and out)
            for token, own, out in zip(tokens.tolist(), mask.tolist(), differ.tolist(), strict=True)
            if own
        ]
        made.append(Marked(tuple(_joined(pieces))))
    return made[0], made[1]


def _joined(pieces: list[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Pieces, neighbours of a kind drawn together."""
    held: list[str] = []
    kind = False
    for text, out in pieces:
        if held and out != kind:
            yield "".join(held), kind
            held = []
        held, kind = [*held, text], out
    if held:
        yield "".join(held), kind


def _token(prompts: Prompts, token: int) -> str:
    return _line(prompts.strings[token]) if token in prompts.strings else f"{token} "


def _answer(text: object) -> str:
    # A leading space is part of it.
    return "" if text is None else f"'{_line(str(text))}'"


def _line(text: str) -> str:
    """A text in one line: a line that breaks would look like nothing."""
    return printable(text)


def _baselines(outcome: Outcome) -> Table:
    alone = outcome.scale == "change"
    head, columns = ["#"], []
    for name, baseline in outcome.baselines.items():
        runs: dict[str, Tensor] = {name: baseline.source}
        if not alone:
            runs = {f"{name}, source": baseline.source, f"{name}, target": baseline.target}
        head += [*runs]
        columns += [values.tolist() for values in runs.values()]
    unsure = unsure_of(outcome)
    rows = []
    for number in range(min(outcome.count, MOST)):
        row = [str(number), *(in_digits(values[number]) for values in columns)]
        if unsure is not None:
            row.append("NO" if number in unsure else "yes")
        rows.append(tuple(row))
    means = ["mean", *(in_digits(sum(values) / len(values)) for values in columns)]
    rows.insert(0, (*means, *([] if unsure is None else [""])))
    numbers = frozenset(head)
    if unsure is not None:
        head.append("confident")
    return Table("The unpatched runs", tuple(head), tuple(rows), numbers, _SHOWN + 1)


def _means(outcome: Outcome) -> Table:
    head = ["metric", "source", "target"]
    rows = [
        (name, *(in_digits(float(run.double().mean())) for run in (each.source, each.target)))
        for name, each in outcome.baselines.items()
    ]
    return Table("Means of the unpatched runs", tuple(head), tuple(rows), frozenset(head[1:]))
