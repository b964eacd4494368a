"""How well a subspace carries what is said to be in it, beside what should not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._extras import extra
from nnpatch_core._html import block, preformatted
from nnpatch_core._integers import strict_int, strict_seed
from nnpatch_core._models import as_nnsight, evaluating, in_one_thread, module_of
from nnpatch_core._warnings import warn
from nnpatch_core.errors import PromptWarning, SubspaceError
from nnpatch_core.memory import MemoryBudget
from nnpatch_core.report import Facts, Reports, Study
from nnpatch_core.spaces import Space, Subspace, as_space, check_width
from nnpatch_core.subspace.controls import Control
from nnpatch_core.subspace.doubts import OWN, does_more_than_whole, rivals_of
from nnpatch_core.subspace.found import find_pairs, site_of
from nnpatch_core.subspace.interchange import Interchange, record_pairs
from nnpatch_core.subspace.learning import tops_of
from nnpatch_core.subspace.proportion import Proportion, check_level
from nnpatch_core.subspace.reported import facts_of_evaluation, study_of_evaluation
from nnpatch_core.tracing import check_space


@attrs.frozen
class Measured:
    """The answers of patched runs.

    Args:
        accuracy: the share of pairs whose most likely next token, over the whole vocabulary, is the
            source answer: interchange intervention accuracy.
        target: the share in which it is the target answer still.
    """

    accuracy: Proportion
    target: Proportion


@attrs.frozen(eq=False, repr=False)
class Evaluation(Reports, Mapping[str, Measured]):
    """A subspace and its controls on some pairs: what is patched to what came of it.

    `"subspace"` is what was evaluated. `"random subspace"`: others of its rank, the mean of several
    draws. `"whole component"`: all of the activation. `"nothing"`: the target run itself. Of what
    was learned here there are `"difference of means"` and `"random labels"` too, see
    `train_subspace`.

    Args:
        rows: by what is patched, with the subspace first.
        site: where, in words.
        pairs: how many pairs tell something.
        source: the share of the source prompts after which the model gives their answer.
        engine: which engine ran.
        notes: what is missing, and why.
        seen: how many of the pairs the subspace was learned from.
    """

    rows: Mapping[str, Measured]
    site: str
    pairs: int
    source: Proportion
    engine: str
    notes: tuple[str, ...] = ()
    seen: int = 0

    def __getitem__(self, name: str) -> Measured:
        return self.rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def accuracy(self) -> Proportion:
        """The interchange accuracy of the subspace."""
        return self.rows[OWN].accuracy

    @property
    def target_accuracy(self) -> Proportion:
        """The share of pairs in which the patched run still gives the target answer."""
        return self.rows[OWN].target

    def to_dataframe(self) -> Any:
        """A frame of pandas: a row for each of `rows`, with the ends of 95 percent intervals.

        Raises:
            OutcomeError: pandas is not installed.
        """
        rows = [
            {
                "patched": name,
                "accuracy": each.accuracy.value,
                "low": each.accuracy.low,
                "high": each.accuracy.high,
                "target_accuracy": each.target.value,
                "target_low": each.target.low,
                "target_high": each.target.high,
                "pairs": each.accuracy.count,
            }
            for name, each in self.rows.items()
        ]
        return extra("pandas", "pandas").DataFrame(rows)

    def __str__(self) -> str:
        width = max(map(len, self.rows))
        lines = [f"{'patched at ' + self.site:<{width}}  source answer         target answer"]
        width = max(width, len(lines[0].partition("  source")[0]))
        lines[0] = f"{'patched at ' + self.site:<{width}}  source answer         target answer"
        lines += [
            f"{name:<{width}}  {each.accuracy!s:<20}  {each.target}"
            for name, each in self.rows.items()
        ]
        told = f"{self.pairs} pairs, 95 percent intervals; source prompts answered: {self.source}"
        return "\n".join([*lines, told, *self.notes])

    def _repr_html_(self) -> str:
        return block(preformatted(str(self)))

    def _study(self, level: float) -> Study:
        check_level(level)
        return study_of_evaluation(self)

    def _report_facts(self, width: float, level: float) -> Facts:
        return facts_of_evaluation(self, width)

    def __repr__(self) -> str:
        return f"Evaluation(accuracy {self.accuracy} of {self.pairs} pairs at {self.site})"


@in_one_thread
def evaluate_subspace(
    nnmodel: Any,
    api: Any,
    site: Any,
    pairs: Any,
    subspace: Any = None,
    *,
    draws: int = 5,
    seed: int = 0,
    engine: str = "auto",
    memory_budget: MemoryBudget = None,
) -> Evaluation:
    """Measure on some pairs how well a subspace carries what tells source from target prompts.

    Each target prompt is run with the coordinates of its source prompt, and its most likely next
    token is looked at (interchange intervention accuracy; Geiger et al., 2023). The controls beside
    it say how much of that any subspace of this rank would do, and how much the whole activation.

    Args:
        nnmodel: the model, as for `activation_patching`.
        api: an adapter, its name, or None to find it by the model.
        site: a `Site`, or `Sites` of one cell, perhaps with `subspace=`; or a `Subspace`, or what
            `train_subspace` gave, for the site where it was made.
        pairs: a `PromptPairs`, best of pairs that the subspace was not made from.
        subspace: what is measured, where `site` does not bring it: a `Subspace`, what
            `train_subspace` gave, or an object with `encode` and `decode`.
        draws: how many random subspaces are averaged; of 0 there is no such control.
        seed: of these.
        engine: as for `activation_patching`.
        memory_budget: as for `activation_patching`.

    Raises:
        SubspaceError: no subspace, one of another width than the site, or no site; no pair tells
            something.
        PatchingError: another kind of it, before anything runs.

    Warns:
        PromptWarning: the subspace was learned from some of these pairs; some pairs tell nothing.

    Examples:
        >>> from nnpatch_core import PromptPairs, Site
        >>> from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer
        >>> words = [" red", " blue", " green", " black"]
        >>> others = words[1:] + words[:1]
        >>> pairs = PromptPairs.from_texts(words, others, words, others, tiny_tokenizer(words))
        >>> model = tiny_model()
        >>> site = Site.get_site(tiny_api(), "resid", layer=1, seq_pos=[-1])
        >>> found = evaluate_subspace(model, None, site, pairs, Subspace.random(32), draws=2)
        >>> list(found)
        ['subspace', 'random subspace', 'whole component', 'nothing']
    """
    many = strict_int(draws, "draws", SubspaceError)
    if many < 0:
        raise SubspaceError(f"draws must be at least 0, got {many}")
    first = strict_seed(seed)
    learned = site if subspace is None else subspace
    where, brought = site_of(nnmodel, api, site)
    if where is site and brought is not None and subspace is not None:
        raise SubspaceError("the site has a subspace already, and subspace= is another: give one")
    space = as_space(brought if subspace is None else subspace)
    if space is None:
        raise SubspaceError(
            "no subspace to evaluate: pass it as the fifth argument, or a site with subspace="
        )
    traced = as_nnsight(nnmodel)
    with evaluating(module_of(traced)):
        found = find_pairs(traced, api, where, pairs, engine=engine, memory_budget=memory_budget)
        check_space(space, found.site.place, found.site.head)
        interchange = record_pairs(found)
        check_width(space, interchange.width, "the site")
        controls: Mapping[str, Control] = {}
        seen = 0
        if hasattr(learned, "controls"):
            seen = _warn_of_seen(learned, interchange)
            controls = learned.controls
        measured = evaluated(interchange, space, many, first, controls)
        return attrs.evolve(measured, seen=seen)


def evaluated(
    interchange: Interchange,
    space: Space,
    draws: int,
    seed: int,
    controls: Mapping[str, Control],
    notes: Sequence[str] = (),
    pairs: Tensor | None = None,
) -> Evaluation:
    """Measure a space and its controls; see `evaluate_subspace`.

    Args:
        interchange: the pairs, at the site.
        space: what is measured.
        draws: how many random subspaces there are.
        seed: of the first.
        controls: further ones, which learning has brought.
        notes: what is missing, and why.
        pairs: `[some]`, the numbers of the pairs that were held out then; None is all that tell
            something, and others than those.
    """
    some = interchange.usable if pairs is None else pairs
    answers = interchange.runs.source_answers.cpu()[some]
    others = interchange.runs.target_answers.cpu()[some]

    def measured(*spaces: Space | None) -> Measured:
        tops = torch.stack([tops_of(interchange, some, each) for each in spaces])
        return Measured(Proportion.of(tops == answers), Proportion.of(tops == others))

    rows, told = {OWN: measured(space)}, [*notes]
    if draws and space.rank is None:
        told.append("no random subspace: the rank of what is patched is not known")
    elif draws and space.rank is not None:
        width, rank = interchange.width, min(space.rank, interchange.width)
        drawn = [Subspace.random(width, rank, (seed + number) % 2**63) for number in range(draws)]
        rows["random subspace"] = measured(*drawn)
    for name, control in controls.items():
        if control.subspace is not None and control.answers is None:
            rows[name] = measured(control.subspace)
            continue
        # It was to give other answers, or in another model.
        rows[name] = Measured(control.accuracy, control.target)
        if pairs is None:
            told.append(f"{name}: measured on the pairs held out when it was learned")
    rows["whole component"] = measured(None)
    source, target = (each.cpu()[some] for each in interchange.tops)
    rows["nothing"] = Measured(Proportion.of(target == answers), Proportion.of(target == others))
    told += _doubts(rows)
    label = attrs.evolve(interchange.named, subspace=None).label
    return Evaluation(
        rows,
        label,
        len(some),
        Proportion.of(source == answers),
        interchange.replay.name,
        tuple(told),
    )


def _doubts(rows: Mapping[str, Measured]) -> list[str]:
    """The ways in which a subspace does more than it could if it carried what is there."""
    doubts = []
    if does_more_than_whole(rows):
        doubts.append(
            "the subspace does more than the whole component, of which it is a part: patching it "
            "may put in what the model does not keep there (Makelov et al. 2023, arXiv 2311.17030)"
        )
    doubts += [
        f"{name} does as well: the accuracy says little of this subspace"
        for name in rivals_of(rows)
    ]
    return doubts


def _warn_of_seen(learned: Any, interchange: Interchange) -> int:
    """How many pairs it was learned from; that is warned of."""
    keys = interchange.keys[interchange.usable].tolist()
    seen = sum(key in learned.seen for key in keys)
    if seen:
        warn(
            f"{seen} of {len(interchange.usable)} pairs are pairs that the subspace was learned "
            "from, of which the accuracy says little: evaluate on pairs held out, as "
            "trained.held_out_pairs",
            PromptWarning,
        )
    return seen
