"""Rules of advice: each reads the facts, and says one sentence or nothing.

A rule says what its source says and no more; what the source does not say is told as our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import attrs

from nnpatch_core._ranges import ranges
from nnpatch_core.report import sources
from nnpatch_core.report.facts import Facts
from nnpatch_core.report.sources import Source

#: Metrics of a probability, between 0 and 1.
_PROBABILITIES = ("answer_probability",)


@attrs.frozen
class Rule:
    """A rule of advice.

    Args:
        name: by which it is known.
        source: where it comes from.
        check: gives the advice in one sentence, or None.
    """

    name: str
    source: Source
    check: Callable[[Facts], str | None]


def _noise(facts: Facts) -> str | None:
    if not facts.noise:
        return None
    return (
        "One of the two runs has noise in its embeddings, which can take the model off the inputs "
        "that it knows: other prompts, with some words exchanged, may point to other sites."
    )


def _zero(facts: Facts) -> str | None:
    if facts.ablation != "zero":
        return None
    return (
        "Zeros are nothing that the model meets: where prompts of another answer can be had, put "
        "their activations there instead."
    )


def _one_answer(facts: Facts) -> str | None:
    if not facts.one_answer:
        return None
    return (
        f"All prompts call for {facts.one_answer!r}: their mean still carries it, and so does "
        "another of them, so that what matters may seem not to. Unless reference= has prompts of "
        "other answers, give some there."
    )


def _probability(facts: Facts) -> str | None:
    if not facts.metrics or not all(name in _PROBABILITIES for name in facts.metrics):
        return None
    return (
        "Probability is the only metric, and it can overlook sites that work against the answer: "
        "measure the logit difference as well."
    )


def _one_way(facts: Facts) -> str | None:
    if not facts.one_way:
        return None
    if facts.circuit:
        return (
            "The circuit was run alone, and the model never without it: the first tells whether it "
            "is enough, and the second (complement=True) whether it is needed."
        )
    return (
        "Values went one way only, from the source to the target prompts: the way back "
        "(pairs.swapped(), or `nnpatch run --swap` and `nnpatch compare`) answers another "
        "question, and the two need not agree (clean into corrupt tells what is enough, corrupt "
        "into clean what is needed)."
    )


def _several(facts: Facts) -> str | None:
    if not facts.together:
        return None
    return (
        f"{facts.together} at once, which brings out joint effects and makes peaks larger: look at "
        "each of the sites alone too, before you point to one of them."
    )


def _few(facts: Facts) -> str | None:
    width = facts.width
    if width is None or not width.needed > width.there or facts.prompts == 1:
        return None
    if math.isinf(width.needed):
        return (
            f"These {width.there} prompts do not tell how many it takes until the interval of "
            f"{width.name} is no wider than {width.width:g}: take more of them."
        )
    return (
        f"The interval of {width.name} is wider than {width.width:g}: by the spread of these "
        f"{width.there} prompts it takes about {width.needed:,.0f} until it is not."
    )


def _race(facts: Facts) -> str | None:
    if facts.race is None:
        return None
    return (
        f"The intervals of the two strongest overlap ({facts.race.first}; {facts.race.second}): "
        "that does not make them equal, but take their order for open until you have compared them "
        "prompt by prompt."
    )


def _mixed(facts: Facts) -> str | None:
    if not facts.mixed:
        return None
    return (
        f"{facts.mixed}: a position does not mean the same in all prompts, and a value is an "
        "average over what it mixes; name parts of the prompts (seq_pos_type='spans'), or look at "
        "one kind of prompt at a time."
    )


def _estimates(facts: Facts) -> str | None:
    if facts.estimates is None or not facts.estimates:
        return None
    return (
        f"All of {facts.estimates:,} values are estimates by gradients, which can miss strong "
        "sites, and nothing was measured beside them: measure the strongest, and some of the "
        "others (of activation patching screen='attribution' with top_k=, of edges top_k=)."
    )


def _one_prompt(facts: Facts) -> str | None:
    if facts.prompts != 1:
        return None
    return (
        "There is one prompt, so that nothing tells what holds for others: different prompts give "
        "different information, try a range of them."
    )


def _denominator(facts: Facts) -> str | None:
    if facts.denominator:
        return (
            f"{facts.denominator}: a ratio to it may be anything, and has no bounded interval; "
            "take prompts whose two runs differ clearly."
        )
    if not facts.weak:
        return None
    return (
        f"{_prompts(facts.weak)} of {facts.prompts} {_have(facts.weak)} a source and a target run "
        "that differ by less than a tenth of the mean, or the wrong way: values are ratios of "
        "means for their sake, and the ratio of such a prompt alone says little."
    )


def _unsure(facts: Facts) -> str | None:
    if not facts.unsure:
        return None
    return (
        f"In {_prompts(facts.unsure, first='prompt')} of {facts.prompts} the model does not prefer "
        "each run's own answer: there is no such behaviour to restore or to break, leave them out "
        "(force_model_confidence=True finds them before anything runs)."
    )


def _one_ablation(facts: Facts) -> str | None:
    if not facts.circuit:
        return None
    method = facts.ablation or "the other prompts' activations"
    return (
        f"Faithfulness goes by what the edges outside carry, here by one choice alone ({method}): "
        "it can change much with another (ablation=), so say which it was."
    )


def _chosen_here(facts: Facts) -> str | None:
    if not facts.chosen_here:
        return None
    return (
        "It was chosen by the prompts on which it is measured: measure it on prompts that were "
        "held out, before you say that it holds for others."
    )


def _no_controls(facts: Facts) -> str | None:
    if not facts.circuit or facts.controls:
        return None
    return (
        "Only faithfulness was looked at: whether the model does without the circuit, and whether "
        "each of its edges is needed, tell if it is complete and small (complement=True, "
        "minimality=True)."
    )


def _illusion(facts: Facts) -> str | None:
    if not facts.more_than_whole:
        return None
    return (
        "The subspace does more than the whole activation of which it is a part: the patch may "
        "work by a dormant pathway that the model does not use by itself."
    )


def _rivals(facts: Facts) -> str | None:
    if not facts.rivals:
        return None
    return (
        f"A control does as well ({', '.join(facts.rivals)}): the accuracy says little about this "
        "subspace until it is clearly better."
    )


#: All rules, in the order in which their advice is given.
RULES = (
    Rule("not-confident", sources.INTERPRETING, _unsure),
    Rule("small-denominator", sources.RATIOS, _denominator),
    Rule("one-prompt", sources.INTERPRETING, _one_prompt),
    Rule("few-prompts", sources.ERROR_BARS, _few),
    Rule("overlap", sources.OVERLAP, _race),
    Rule("estimates-alone", sources.ATP_STAR, _estimates),
    Rule("mixed-positions", sources.BY_POSITION, _mixed),
    Rule("probability-alone", sources.PRACTICES, _probability),
    Rule("noise", sources.PRACTICES, _noise),
    Rule("zero-ablation", sources.INTERPRETING, _zero),
    Rule("one-answer", sources.IN_THE_WILD, _one_answer),
    Rule("several-sites", sources.PRACTICES, _several),
    Rule("one-direction", sources.INTERPRETING, _one_way),
    Rule("one-ablation", sources.NOT_ROBUST, _one_ablation),
    Rule("chosen-here", sources.MIB, _chosen_here),
    Rule("no-controls", sources.IN_THE_WILD, _no_controls),
    Rule("more-than-whole", sources.ILLUSION, _illusion),
    Rule("control-as-good", sources.CONTROL_TASKS, _rivals),
)


def _prompts(numbers: Sequence[int], *, first: str = "Prompt") -> str:
    told = ranges(sorted(numbers))
    few = told if len(told) <= 60 else f"{told[:57].rpartition(',')[0]}, …"
    return f"{first}{'s' * (len(numbers) != 1)} {few}"


def _have(numbers: Sequence[int]) -> str:
    return "has" if len(numbers) == 1 else "have"
