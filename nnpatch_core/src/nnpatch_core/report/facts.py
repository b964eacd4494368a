"""Facts about how a study was made, that advice goes by."""

from __future__ import annotations

import attrs

#: How wide an interval may be, from end to end, on the scale where the source run is 1.
WIDTH = 0.2
#: Of intervals.
LEVEL = 0.95


@attrs.frozen
class Width:
    """How many prompts an interval needs to be no wider than was asked for.

    Args:
        name: of what has the interval.
        width: from end to end.
        needed: how many prompts; inf if these do not tell.
        there: how many there are.
    """

    name: str
    width: float
    needed: float
    there: int


@attrs.frozen
class Race:
    """The strongest, and the next that is another fact, where intervals do not tell them apart.

    Args:
        first: the name of the strongest, with its interval.
        second: of the next.
    """

    first: str
    second: str


@attrs.frozen(kw_only=True)
class Facts:
    """Facts about a study, as plain values; what is not known, or has no meaning, is left out.

    Args:
        metrics: the names of all metrics.
        prompts: how many prompts, or pairs of them, there are.
        noise: whether the source or the target run is one whose embeddings got noise.
        ablation: the method by which activations were taken away: `"zero"`, `"mean"`, `"resample"`.
        one_answer: the answer that all prompts call for, where other prompts' activations are put.
        one_way: whether values went from the source to the target prompts alone, and never back.
        together: in words, how many cells patch several sites at once.
        width: the interval of the strongest.
        race: the two strongest, if they cannot be told apart.
        mixed: in words, why a position does not mean the same in all prompts.
        estimates: how many values are estimates; None if some are measured.
        denominator: in words, why values are divided by what may be 0.
        weak: the numbers of prompts whose two runs differ by little, or the wrong way.
        unsure: the numbers of prompts whose own runs do not prefer their own answers.
        chosen_here: whether what is measured was chosen by the same prompts.
        controls: what was run beside a circuit: `"complement"`, `"random"`.
        circuit: whether it is a circuit that was measured.
        more_than_whole: whether a subspace did more than the activation that it is a part of.
        rivals: the controls that did as well as a subspace.
    """

    metrics: tuple[str, ...] = ()
    prompts: int = 0
    noise: bool = False
    ablation: str = ""
    one_answer: str = ""
    one_way: bool = False
    together: str = ""
    width: Width | None = None
    race: Race | None = None
    mixed: str = ""
    estimates: int | None = None
    denominator: str = ""
    weak: tuple[int, ...] = ()
    unsure: tuple[int, ...] = ()
    chosen_here: bool = False
    controls: tuple[str, ...] = ()
    circuit: bool = False
    more_than_whole: bool = False
    rivals: tuple[str, ...] = ()
