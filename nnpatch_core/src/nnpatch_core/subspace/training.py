"""Learn a subspace from pairs of prompts."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from nnpatch_core._arguments import check_flags
from nnpatch_core._models import (
    as_nnsight,
    evaluating,
    frozen,
    in_one_thread,
    module_of,
    with_weights,
)
from nnpatch_core._printable import shown
from nnpatch_core.errors import SubspaceError
from nnpatch_core.gradients import check_gradients
from nnpatch_core.memory import MemoryBudget
from nnpatch_core.spaces import Subspace, check_rank
from nnpatch_core.subspace.checkpoint import TrainingFile, check_place
from nnpatch_core.subspace.controls import Control, other_answers, untrained
from nnpatch_core.subspace.evaluation import evaluated
from nnpatch_core.subspace.found import find_pairs
from nnpatch_core.subspace.interchange import Interchange, open_interchange, record_pairs
from nnpatch_core.subspace.lesson import Lesson
from nnpatch_core.subspace.options import Training, split_pairs
from nnpatch_core.subspace.told import identity, info_of
from nnpatch_core.subspace.trained import Trained
from nnpatch_core.sweep import make_bar

#: The names of what is learned in one call, in a checkpoint.
_OWN, _LABELS, _MODEL = "subspace", "random labels", "random model"
#: How many random subspaces are averaged.
_DRAWS = 5


@in_one_thread
def train_subspace(
    nnmodel: Any,
    api: Any,
    site: Any,
    pairs: Any,
    rank: int = 1,
    *,
    held_out: Any = 0.2,
    epochs: int = 20,
    batch_size: int = 32,
    lr: float = 0.01,
    weight_decay: float = 0.0,
    warmup: float = 0.1,
    kl: float = 0.0,
    patience: int | None = 5,
    seed: int = 0,
    initial: Any = None,
    random_labels: bool = True,
    random_model: bool = False,
    engine: str = "auto",
    memory_budget: MemoryBudget = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Trained:
    """Learn the subspace that carries what tells the source prompts from the target prompts.

    Each step runs target prompts whose coordinates at the site are those of their source prompts,
    and moves the basis so that the model then gives the source answer: distributed alignment search
    of Geiger et al., "Finding Alignments Between Interpretable Causal Variables and Distributed
    Neural Representations" (2023). The basis is orthonormal at every step, weights do not change,
    and dropout is off. The loss is -log p of the source answer's first token over the whole
    vocabulary, in nats.

    What a step cannot change is run once, before the first: the source runs, and of the target runs
    all that is below the site or left of it. A step runs the layers above, from the site's first
    token on. Where a model cannot be run so, a step is a whole forward, and a warning says so.

    A learned map may put in what it is said to find. So controls are learned and measured beside
    it: see `Trained`.

    Args:
        nnmodel: the model, as for `activation_patching`.
        api: an adapter, its name, or None to find it by the model.
        site: a `Site`, or `Sites` of one cell: of any component, or a head of it, at one position,
            several, or those of each prompt. All positions share the basis.
        pairs: a `PromptPairs`. Padding is masked, and positions are those of each prompt.
        rank: how many directions.
        held_out: the share of the pairs that is held out, drawn at random, where pairs of the same
            prompts stay together; or the numbers of some.
        epochs: how many times each pair is learned from, at most.
        batch_size: the pairs of a step. They run in parts where they do not fit in memory.
        lr: the highest learning rate of AdamW, at most 1; it rises over the warmup, and falls to 0.
        weight_decay: of AdamW, which pulls towards the first basis.
        warmup: over which share of the steps the rate rises.
        kl: the weight of a second loss: how far the rest of the next token's distribution, without
            the two answers, moves from the target run's, as a Kullback-Leibler divergence in nats.
        patience: learning stops after so many epochs without a lower loss held out; None never.
        seed: of the first basis, of the pairs held out, and of their order.
        initial: a `Subspace` to begin with; None is one drawn at random.
        random_labels: learn the control of that name, which takes as long again.
        random_model: learn the control of that name.
        engine: as for `activation_patching`.
        memory_budget: as for `activation_patching`.
        checkpoint: a file that is kept up to date after each epoch. The same call goes on from it,
            with what an unbroken call gives; another call is refused.
        progress: whether a bar shows steps, loss and accuracy.

    Returns:
        The subspace of the epoch with the lowest loss on the pairs held out, with its controls.

    Raises:
        SubspaceError: an argument is out of its range, the pairs are too few for a split, the rank
            is above the activation's width, or the loss is not finite.
        GradientError: no gradient flows through the model.
        CheckpointError: the checkpoint is of another call.
        PatchingError: another kind of it, before anything runs.

    Warns:
        EngineWarning: each step is a whole forward.
        AnswerWarning: answers have several tokens, of which the first is learned.
        PromptWarning: some pairs tell nothing, and are left out; pairs held out have a copy among
            those learned from.

    Examples:
        >>> from nnpatch_core import PromptPairs, Site
        >>> from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer
        >>> words = [" red", " blue", " green", " black"]
        >>> others = words[1:] + words[:1]
        >>> pairs = PromptPairs.from_texts(words, others, words, others, tiny_tokenizer(words))
        >>> model = tiny_model()
        >>> site = Site.get_site(tiny_api(), "resid", layer=1, seq_pos=[-1])
        >>> trained = train_subspace(
        ...     model, None, site, pairs, rank=2, epochs=2, held_out=0.25, progress=False
        ... )
        >>> trained.subspace, sorted(trained.controls)
        (Subspace(rank 2 of width 32 at resid L1 [-1]), ['difference of means', 'random labels'])
    """
    training = Training.read(rank, epochs, batch_size, lr, weight_decay, warmup, kl, patience, seed)
    check_flags(random_labels=random_labels, random_model=random_model, progress=progress)
    start = _initial(initial, training)
    traced = as_nnsight(nnmodel)
    check_gradients(module_of(traced))
    if checkpoint is not None:
        check_place(checkpoint)
    known: dict[str, Any] = {"engine": engine, "memory_budget": memory_budget}
    found = find_pairs(traced, api, site, pairs, **known)
    if found.site.space is not None:
        raise SubspaceError(
            f"the site is limited to {found.site.space} already: name it without subspace=; to "
            "begin with that subspace, pass it as initial="
        )
    _check_width(found.width, training, start)
    keys = found.keys
    split = split_pairs(found.usable, keys, held_out, len(pairs), training.seed)
    # Some models load their weights only when they are to run.
    model = with_weights(traced)
    fresh = untrained(model, training.seed) if random_model else None
    with evaluating(model), frozen(model):
        interchange = record_pairs(found, unpatched=training.kl > 0)
        _check_width(interchange.width, training, start)
        asked, others, notes = _asked(interchange, training, random_labels)
        file = None
        if checkpoint is not None:
            words = identity(interchange, training, split, start, asked, random_model)
            file = TrainingFile(checkpoint, words)
        steps = training.epochs * -(-len(split.train) // training.batch_size)
        total = steps * (len(asked) + random_model)
        with make_bar(total, progress, desc="learning", unit="step") as bar:
            lesson = Lesson(training, split, start, file, bar)
            own = lesson.learn(_OWN, interchange, asked[_OWN])
            controls = _differences(lesson, interchange, notes)
            if _LABELS in asked:
                controls[_LABELS] = lesson.learn(_LABELS, interchange, asked[_LABELS]).control(
                    others
                )
            if fresh is not None:
                controls[_MODEL] = _in_random_model(lesson, fresh, api, site, pairs, known)
            # Learning may have ended early.
            bar.total = bar.n
            bar.refresh()
        space = Subspace(own.basis)
        held = split.held_out
        evaluation = evaluated(interchange, space, _DRAWS, training.seed, controls, notes, held)
    info = info_of(interchange, training, split, evaluation)
    return Trained(
        Subspace(own.basis, site=interchange.named, info=info),
        own.history,
        evaluation,
        controls,
        pairs[held.tolist()],
        frozenset(keys[split.train].tolist()),
    )


def _initial(initial: Any, training: Training) -> Subspace | None:
    """The subspace to begin with; None is one drawn at random.

    Raises:
        SubspaceError: it is none, or of another rank.
    """
    found = getattr(initial, "subspace", initial)
    if found is None:
        return None
    if not isinstance(found, Subspace):
        raise SubspaceError(f"initial must be a Subspace, got {shown(initial)}")
    if found.rank != training.rank:
        raise SubspaceError(
            f"initial is of rank {found.rank}, and rank={training.rank} was asked for"
        )
    return found


def _check_width(width: int | None, training: Training, start: Subspace | None) -> None:
    """Raise `SubspaceError` where the rank, or the first basis, does not fit an activation."""
    if width is None:
        return
    check_rank(training.rank, width)
    if start is not None and start.width != width:
        raise SubspaceError(
            f"initial is {start}, and the site is {width} wide: give one made there"
        )


def _asked(
    interchange: Interchange, training: Training, random_labels: bool
) -> tuple[dict[str, Tensor], dict[int, int] | None, list[str]]:
    """The tokens `[pairs]` that patched runs are to give, by what is learned to give them.

    With them the tokens of random labels, by source answer, and notes.
    """
    runs, usable = interchange.runs, interchange.usable
    source, target = runs.source_answers.cpu(), runs.target_answers.cpu()
    asked, notes = {_OWN: source}, list[str]()
    others = None
    if random_labels:
        words = runs.target.tokens[runs.target.mask.bool()].cpu()
        others = other_answers(source[usable], target[usable], words, training.seed)
    if others is not None:
        # Pairs that are left out have no other answer, and need none.
        given = [others.get(each, each) for each in source.tolist()]
        asked[_LABELS] = torch.tensor(given, dtype=torch.int64, device="cpu")
    elif random_labels:
        notes.append("no control with random labels: there are no other tokens to ask for")
    return asked, others, notes


def _differences(lesson: Lesson, interchange: Interchange, notes: list[str]) -> dict[str, Control]:
    """The difference of means of the pairs that are learned from, as a control."""
    source, target = interchange.activations(lesson.split.train)
    try:
        space = Subspace.mean_difference(source, target, site=interchange.named)
    except SubspaceError as error:
        notes.append(f"no control by a difference of means: {error}")
        return {}
    accuracy, still = lesson.measured(interchange, space, interchange.runs.source_answers.cpu())
    return {"difference of means": Control(space, accuracy, still)}


def _in_random_model(
    lesson: Lesson, fresh: nn.Module, api: Any, site: Any, pairs: Any, known: dict[str, Any]
) -> Control:
    """The control that is learned in a model that knows nothing."""
    traced = as_nnsight(fresh)
    with evaluating(fresh), frozen(fresh):
        kept = lesson.training.kl > 0
        interchange = open_interchange(traced, api, site, pairs, unpatched=kept, **known)
        answers = interchange.runs.source_answers.cpu()
        learned = lesson.learn(_MODEL, interchange, answers)
    accuracy, target = learned.measured
    return Control(None, accuracy, target)
