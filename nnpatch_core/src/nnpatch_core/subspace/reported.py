"""Subspaces as studies for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from nnpatch_core.prompts import PromptPairs
from nnpatch_core.report import WIDTH, Drawing, Facts, Study, Table, Width
from nnpatch_core.results import in_digits, model_name
from nnpatch_core.subspace.doubts import does_more_than_whole, rivals_of

if TYPE_CHECKING:
    from nnpatch_core.subspace.evaluation import Evaluation
    from nnpatch_core.subspace.sweeping import SubspaceSweep
    from nnpatch_core.subspace.trained import Trained

#: So many pairs a report has, at most, and so many are seen at once.
_MOST, _SHOWN = 200, 8
#: What `info` says that tables say better.
_IN_TABLES = ("metrics", "controls")
_ACCURACY = (
    "Interchange accuracy is the share of pairs whose most likely next token, over the whole "
    "vocabulary, is the source answer when the target prompt runs with the source prompt's "
    "coordinates in the subspace."
)


def study_of_evaluation(evaluation: Evaluation) -> Study:
    """The measurement of a subspace."""
    rows = tuple(
        (
            name,
            *(in_digits(end) for end in (each.accuracy.value, each.accuracy.low)),
            in_digits(each.accuracy.high),
            *(in_digits(end) for end in (each.target.value, each.target.low)),
            in_digits(each.target.high),
        )
        for name, each in evaluation.items()
    )
    head = ("patched", "source answer", "low", "high", "target answer", "low ", "high ")
    own, whole = evaluation.accuracy, evaluation["whole component"].accuracy
    return Study(
        title=f"A subspace at {evaluation.site}",
        question=(
            f"Does the subspace at {evaluation.site} carry what tells the source from the target "
            f"prompt, in {_pairs_in_words(evaluation.pairs)}?"
        ),
        answer=[
            f"Its interchange accuracy is {own}, that of the whole component {whole} "
            "(95 % intervals).",
            _ACCURACY,
        ],
        tables=[
            Table(
                f"What came of patching at {evaluation.site}: shares of "
                f"{_pairs_in_words(evaluation.pairs)}",
                head,
                rows,
                frozenset(head[1:]),
                notes=(
                    "low to high: 95 % intervals (Wilson).",
                    f"Source prompts after which the model gives their answer: "
                    f"{evaluation.source}.",
                    *evaluation.notes,
                ),
            )
        ],
        info={"site": evaluation.site, "engine": evaluation.engine},
        call=(
            "evaluate_subspace(\n    model,\n    None,\n"
            f"    site,  # {evaluation.site}\n    pairs,  # {evaluation.pairs} of them\n"
            "    subspace,\n)"
        ),
        facts=facts_of_evaluation(evaluation, WIDTH),
    )


def facts_of_evaluation(evaluation: Evaluation, width: float) -> Facts:
    """The facts about a measurement of a subspace."""
    return Facts(
        prompts=evaluation.pairs,
        width=Width("the accuracy", width, evaluation.accuracy.needed(width), evaluation.pairs),
        chosen_here=bool(evaluation.seen),
        more_than_whole=does_more_than_whole(evaluation.rows),
        rivals=rivals_of(evaluation.rows),
    )


def study_of_trained(trained: Trained) -> Study:
    """A subspace that was learned."""
    study = study_of_evaluation(trained.evaluation)
    space, pairs = trained.subspace, trained.held_out_pairs
    info = {name: _told(value) for name, value in space.info.items() if name not in _IN_TABLES}
    model = model_name(info.get("model", "")) or "the model"
    epochs = tuple(
        tuple(_number(value) for value in attrs.astuple(each)) for each in trained.history
    )
    head = tuple(field.name.replace("_", " ") for field in attrs.fields(type(trained.best)))
    last = trained.history[-1].epoch
    return attrs.evolve(
        study,
        title=f"{model}: a subspace of rank {space.rank} at {trained.evaluation.site}",
        question=(
            f"Does a subspace of rank {space.rank} at {trained.evaluation.site} of {model} carry "
            "what tells the source from the target prompt, as learned from "
            f"{_pairs_in_words(len(trained.seen))} and measured on "
            f"{_pairs_in_words(trained.evaluation.pairs)} held out?"
        ),
        drawings=[
            Drawing(
                "Loss and accuracy over the epochs; the dotted line is the one that was kept.",
                f"Lines of loss and accuracy over {last} epochs; epoch {trained.best.epoch} was "
                f"kept, with an accuracy of {trained.accuracy} on pairs held out.",
                trained.plot,
            )
        ],
        tables=[
            *study.tables,
            Table("The epochs; 0 is before anything was learned", head, epochs, frozenset(head)),
        ],
        prompts=[_pairs(pairs)],
        prompts_in_words=[
            f"These are the pairs held out; {len(trained.seen)} others were learned from."
        ],
        info={**info, **study.info},
        call=(
            f"train_subspace(\n    model,  # {model}\n    None,\n"
            f"    site,  # {trained.evaluation.site}\n    pairs,\n    rank={space.rank},\n"
            f"    # {info.get('training', 'as by default')}\n)"
        ),
    )


def study_of_sweep(sweep: SubspaceSweep) -> Study:
    """Subspaces that were learned at several sites, and the best of them."""
    best = sweep[sweep.best]
    study = study_of_trained(best)
    model = model_name(best.subspace.info.get("model", "")) or "the model"
    head = ("site", "source answer", "low", "high", "target answer", "epoch")
    rows = tuple(
        (
            label,
            *(in_digits(end) for end in (each.accuracy.value, each.accuracy.low)),
            in_digits(each.accuracy.high),
            in_digits(each.target_accuracy.value),
            str(each.best.epoch),
        )
        for label, each in sweep.items()
    )
    table = Table(
        f"Subspaces of rank {best.subspace.rank}, each learned by itself: shares of "
        f"{_pairs_in_words(best.evaluation.pairs)} held out",
        head,
        rows,
        frozenset(head[1:]),
        notes=(
            "low to high: 95 % intervals (Wilson).",
            "The best site was chosen by these pairs: on others expect less of it.",
        ),
    )
    drawing = Drawing(
        "Accuracy on pairs held out, beside the controls.",
        f"Lines of accuracy over layers; {sweep.best} is the best, with {best.accuracy}.",
        sweep.plot,
    )
    return attrs.evolve(
        study,
        title=f"{model}: subspaces of rank {best.subspace.rank} at {len(sweep)} sites",
        question=(
            f"At which of {len(sweep)} sites of {model} does a subspace of rank "
            f"{best.subspace.rank} carry what tells the source from the target prompt?"
        ),
        answer=[f"The best of {len(sweep)} sites is {sweep.best}.", *study.answer],
        drawings=[drawing, *study.drawings],
        tables=[table, *study.tables],
        call=study.call.replace("train_subspace(", "sweep_subspaces(").replace(
            f"    site,  # {best.evaluation.site}", f"    sites,  # {len(sweep)} of them"
        ),
        facts=attrs.evolve(study.facts, chosen_here=len(sweep) > 1 or study.facts.chosen_here),
    )


def _pairs(pairs: PromptPairs) -> Table:
    rows = tuple(
        (
            str(number),
            _text(each.source),
            _text(each.source_answer),
            _text(each.target),
            _text(each.target_answer),
        )
        for number, each in enumerate(pairs.pairs[:_MOST])
    )
    left_out = len(pairs.pairs) - len(rows)
    return Table(
        "Pairs held out",
        ("#", "source prompt", "answer", "target prompt", "its answer"),
        rows,
        frozenset(["#"]),
        _SHOWN,
        (f"{left_out:,} more are not shown.",) if left_out else (),
    )


def _pairs_in_words(count: int) -> str:
    return "1 pair" if count == 1 else f"{count:,} pairs"


def _text(given: Any) -> str:
    """A prompt or an answer as it was given: a text, messages, or several answers."""
    if isinstance(given, str):
        return given.replace("\n", "\\n")
    if isinstance(given, list | tuple):
        messages = any(isinstance(each, Mapping) for each in given)
        return (" / " if messages else " or ").join(map(_text, given))
    if isinstance(given, Mapping):
        return f"{given.get('role', '')}: {given.get('content', '')}".replace("\n", "\\n")
    return str(given)


def _told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return "" if value != value else in_digits(value)
