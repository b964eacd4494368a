"""Steers prompts with one value after the other, and reads how likely their answers are."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from nnpatch_core._arguments import listed
from nnpatch_core._models import as_nnsight, evaluating, in_one_thread, vocab_size, with_weights
from nnpatch_core._printable import shown
from nnpatch_core._warnings import warn
from nnpatch_core.batch import Batch, check_answers
from nnpatch_core.errors import (
    AnswerError,
    AnswerWarning,
    PatchingError,
    PositionError,
    SteeringError,
    TokensError,
    UnknownNameError,
)
from nnpatch_core.interventions import read_batch
from nnpatch_core.memory import limits_of
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.seq_pos import PromptBatch, are_per_prompt
from nnpatch_core.site import Site
from nnpatch_core.sites import bind_cells
from nnpatch_core.steering.curve import Answered, SteeringCurve
from nnpatch_core.steering.sited import site_of
from nnpatch_core.steering.steer import steer
from nnpatch_core.steering.values import Add, Scale, Set
from nnpatch_core.sweep import Options, check_padding, make_bar
from nnpatch_core.tracing import forward

_HOW = {"set": Set, "add": Add, "scale": Scale}
_RUNS = ("target", "source")


@in_one_thread
def sweep_steering(
    nnmodel: Any,
    site: Any,
    values: Any,
    prompts: Any,
    source_answer_index: Any = None,
    target_answer_index: Any = None,
    *,
    attention_mask: Any = None,
    run: Literal["target", "source"] = "target",
    how: Literal["set", "add", "scale"] = "set",
    api: Any = None,
    batch_size: int | None = None,
    level: float = 0.95,
    progress: bool = True,
) -> SteeringCurve:
    """Steer prompts with one value after the other, and read how likely their answers become.

    Args:
        nnmodel: an `NNsight`, a `TransformersModel` or a plain Hugging Face model.
        site: where it is steered, as of `steer`: a `Site` with a subspace of rank 1, or a
            `Subspace` that knows its site.
        values: numbers, each put into all prompts.
        prompts: a `PromptPairs`; or tokens `[batch, seq]`, a tokenizer's output too.
        source_answer_index: `[batch]`, token ids, where no pairs are given.
        target_answer_index: the same.
        attention_mask: `[batch, seq]`, likewise.
        run: which prompts of the pairs are steered.
        how: whether the coordinate is set to a value, or that is added to it, or it is multiplied.
        api: the adapter by which the site of a `Subspace` is found; None finds it by the model.
        batch_size: how many prompts run together; None is as many as fit.
        level: of the intervals over prompts.
        progress: whether a bar shows the values done.

    Returns:
        The `SteeringCurve`: for each value and prompt the probability of the source answer and of
        the target answer as the next token, and whether it is the most likely one.

    Raises:
        SteeringError: values that are no finite numbers, or a site without a subspace of rank 1.
        AnswerError: answers that are no token ids, or left out.
        PatchingError: one of its kinds, as for `steer`, and for malformed prompts.

    Warns:
        AnswerWarning: answers of more than a token, of which the first one alone is read.

    Examples:
        >>> import torch
        >>> from nnpatch_core import Site
        >>> from nnpatch_core.spaces import Subspace
        >>> from nnpatch_core.testing import tiny_api, tiny_model
        >>> site = Site.get_site(
        ...     tiny_api(), "resid", layer=1, seq_pos=[-1], subspace=Subspace.random(32)
        ... )
        >>> curve = sweep_steering(
        ...     tiny_model("llama"), site, [-2, 0, 2], torch.tensor([[5, 6, 7], [5, 9, 7]]),
        ...     torch.tensor([1, 2]), torch.tensor([3, 4]), progress=False,
        ... )
        >>> curve.source.probability.shape
        torch.Size([3, 2])
    """
    model = with_weights(nnmodel)
    options = Options(batch_size, None, progress)
    _check_names(run, how)
    level = _level(level)
    found = site_of(site, api, model)
    if found.subspace is None or found.subspace.rank != 1:
        has = "no subspace" if found.subspace is None else f"{found.subspace}"
        raise SteeringError(
            f"site {found.label} has {has}, and values are coordinates of a subspace of rank 1: "
            "name one, by subspace=; a direction v is Subspace((v / v.norm())[:, None])"
        )
    numbers = _numbers(values)
    traced = as_nnsight(nnmodel)
    answers = _Answers.of(
        traced, prompts, (source_answer_index, target_answer_index), attention_mask, run
    )
    batch = answers.batch
    patches = bind_cells([found], traced, batch.seq_len, PromptBatch(batch))
    check_padding(patches, batch)
    if are_per_prompt(found.seq_pos) and len(found.seq_pos) != len(batch):
        raise PositionError(
            f"site {found.label} has positions of {len(found.seq_pos)} prompts, and there are "
            f"{len(batch)}"
        )
    limits = limits_of(
        patches, len(batch), batch.seq_len, given=None, batch_size=options.batch_size, whole=True
    )
    put = _HOW[how]
    read: list[tuple[Answered, ...]] = []
    with (
        evaluating(model),
        make_bar(1 + len(numbers), bool(progress), desc="values") as bar,
    ):
        for number in (None, *numbers):
            parts = []
            for chunk in limits.chunks(len(batch)):
                own = _of(found, chunk)
                steering = nullcontext() if number is None else steer(traced, own, put(number))
                with steering:
                    parts.append(answers.read(forward(traced, batch.rows(chunk)), chunk))
            sides = ([each[side] for each in parts] for side in (0, 1))
            read.append(tuple(map(_joined, sides)))
            bar.update()
    (source, target), *steered = read
    return SteeringCurve(
        numbers,
        _stacked([each[0] for each in steered]),
        _stacked([each[1] for each in steered]),
        source,
        target,
        how,
        found.label,
        level,
    )


def _of(site: Site, chunk: slice) -> Site:
    """The site for some of the prompts."""
    if not are_per_prompt(site.seq_pos):
        return site
    return attrs.evolve(site, seq_pos=site.seq_pos[chunk])


def _check_names(run: Any, how: Any) -> None:
    for name, value, known in (("run", run, _RUNS), ("how", how, tuple(_HOW))):
        if not isinstance(value, str) or value not in known:
            raise UnknownNameError(f"unknown {name} {shown(value)}; there are {', '.join(known)}")


def _level(level: Any) -> float:
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < 1:
        raise PatchingError(f"level must be a number between 0 and 1, got {shown(level)}")
    return float(level)


def _numbers(values: Any) -> tuple[float, ...]:
    given = None if isinstance(values, str | bytes | dict) else listed(values)
    found = []
    for each in given or ():
        try:
            number = None if isinstance(each, bool | str | bytes) else float(each)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            number = None
        if number is None or not abs(number) < float("inf"):
            raise SteeringError(f"each of values must be a finite number, got {shown(each)}")
        found.append(number)
    if not found:
        raise SteeringError(f"values must be a list of numbers, at least one, got {shown(values)}")
    return tuple(found)


@attrs.frozen(eq=False)
class _Answers:
    """Prompts and their answers.

    Args:
        batch: the prompts.
        source: `[batch, any]`, token ids; negative ones fill.
        target: the same.
    """

    batch: Batch
    source: Tensor
    target: Tensor

    @classmethod
    def of(cls, nnmodel: Any, prompts: Any, answers: Any, mask: Any, run: str) -> _Answers:
        """Read them."""
        names = ("source_answer_index", "target_answer_index")
        if isinstance(prompts, PromptPairs):
            beside = [name for name, each in zip(names, answers, strict=True) if each is not None]
            beside += ["attention_mask"] if mask is not None else []
            if beside:
                raise TokensError(
                    f"prompts are a PromptPairs, which has its answers and masks: leave out "
                    f"{', '.join(beside)}"
                )
            return cls._of_pairs(nnmodel, prompts, run)
        if run != "target":
            raise PatchingError("run= is for a PromptPairs, which has two runs: leave it out")
        batch = read_batch(nnmodel, "prompts", prompts, mask)
        size = vocab_size(with_weights(nnmodel))
        ids = []
        for name, each in zip(names, answers, strict=True):
            if each is None:
                raise AnswerError(f"{name} must be given, as [batch]; a PromptPairs has it itself")
            ids.append(check_answers(name, each, len(batch), size)[:, None])
        return cls(batch, *ids)

    @classmethod
    def _of_pairs(cls, nnmodel: Any, pairs: PromptPairs, run: str) -> _Answers:
        tokens, mask = (getattr(pairs, f"{run}_{name}") for name in ("tokens", "attention_mask"))
        longest = 1
        for whole in (pairs.source_answer_tokens, pairs.target_answer_tokens):
            longest = max(longest, 0 if whole is None else whole.shape[1])
        if longest > 1:
            warn(
                f"answers have up to {longest} tokens, and the curve is of the first one of each",
                AnswerWarning,
            )
        sides = [
            (pairs.source_answer_sets, pairs.source_answer_index),
            (pairs.target_answer_sets, pairs.target_answer_index),
        ]
        ids = [index[:, None] if every is None else every for every, index in sides]
        return cls(read_batch(nnmodel, "prompts", tokens, mask), *ids)

    def read(self, logits: Tensor, chunk: slice) -> tuple[Answered, Answered]:
        """Those of some prompts, off their logits `[rows, vocab]`."""
        probabilities = logits.double().softmax(-1)
        likeliest = probabilities.amax(-1)

        def answered(ids: Tensor) -> Answered:
            each = probabilities.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0)
            return Answered(each.sum(1), each.amax(1) == likeliest)

        return answered(self.source[chunk]), answered(self.target[chunk])


def _joined(parts: list[Answered]) -> Answered:
    return Answered(*(torch.cat(each) for each in _fields(parts)))


def _stacked(parts: list[Answered]) -> Answered:
    return Answered(*(torch.stack(each) for each in _fields(parts)))


def _fields(parts: list[Answered]) -> tuple[list[Tensor], list[Tensor]]:
    return [each.probability for each in parts], [each.first for each in parts]
