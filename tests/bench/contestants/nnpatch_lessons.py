"""Subspaces by `train_subspace`, as its users call it."""

from __future__ import annotations

from typing import Any

import torch
from lessons import Job, Laps, Lesson, Texts, texts
from nnsight import NNsight
from subject import Subject
from torch import Tensor

from nnpatch_core import PromptPairs, Site
from nnpatch_core.plugins import find_adapter
from nnpatch_core.subspace import Subspace, evaluate_subspace, lesson, train_subspace
from nnpatch_core.subspace.basis import Learned
from nnpatch_core.subspace.learning import Learner, State


def make(subject: Subject, engine: str) -> Engine:
    """That engine on that model."""
    return Engine(subject, engine)


class Engine:
    """Learns by the engine of that name; it also prepares the lessons for all."""

    def __init__(self, subject: Subject, engine: str) -> None:
        from transformers import AutoTokenizer

        self.model, self.traced, self.engine = subject.model, NNsight(subject.model), engine
        self.adapter = find_adapter(None, subject.model)
        self.answered: dict[str, list[Texts]] = {}
        self.tokenizer = AutoTokenizer.from_pretrained(subject.name, local_files_only=True)

    def prepare(self, job: Job, seed: int, sizes: tuple[int, int, int]) -> dict[str, Any]:
        """The pairs of a job and the first basis, as JSON: so many pairs for each part.

        Pairs are taken in order of which the model answers both prompts rightly.
        """
        count = sum(sizes)
        if len(self.answered.get(job.task, ())) < count:
            self.answered[job.task] = self._answered(job, count)
        rows = self.answered[job.task][:count]
        pairs = self._pairs(rows)
        parts = torch.arange(len(pairs)).split(list(sizes))
        given: dict[str, Any] = {**pairs.arguments()}
        first = Subspace.random(self.model.config.hidden_size, job.rank, seed)
        return {
            "rows": rows,
            "tokens": {run: given[f"{run}_tokens"].tolist() for run in RUNS},
            "masks": {run: given[f"{run}_attention_mask"].tolist() for run in RUNS},
            "answers": {run: given[f"{run}_answer_index"].tolist() for run in RUNS},
            **{name: part.tolist() for name, part in zip(PARTS, parts, strict=True)},
            "initial": first.basis.tolist(),
        }

    def learn(self, asked: Lesson, rows: list[Texts]) -> dict[str, Any]:
        """Learn one subspace, and measure it on the test pairs."""
        pairs = self._pairs(rows)
        seen = torch.cat([asked.train, asked.held_out]).sort().values
        learned, test = pairs[seen.tolist()], pairs[asked.test.tolist()]
        where = list(range(-asked.last, 0)) if asked.last else None
        site = Site.get_site(self.adapter, "resid", asked.layer, seq_pos=where)
        stamps = Stamps(Laps())
        lesson.Learner = stamps.learner()
        try:
            trained = train_subspace(
                self.traced,
                self.adapter,
                site,
                learned,
                rank=asked.rank,
                held_out=[int((seen == number).nonzero()) for number in asked.held_out],
                epochs=asked.epochs,
                batch_size=asked.batch_size,
                lr=asked.lr,
                warmup=asked.warmup,
                patience=None,
                seed=asked.seed,
                random_labels=False,
                engine=self.engine,
                progress=False,
            )
        finally:
            lesson.Learner = Learner
        stamps.laps.stop()
        found = evaluate_subspace(self.traced, self.adapter, trained, test, draws=5)
        return {
            "seconds": stamps.laps.parts,
            "engine": found.engine,
            "losses": stamps.losses,
            "batches": [seen[some].tolist() for some in stamps.batches],
            "slope": stamps.slope.tolist(),
            "basis": trained.subspace.basis.tolist(),
            "held_out_losses": [epoch.held_out_loss for epoch in trained.history],
            "accuracy": found.accuracy.value,
            "controls": {name: row.accuracy.value for name, row in found.items()},
        }

    def _pairs(self, rows: list[Texts]) -> PromptPairs:
        return PromptPairs.from_texts(*map(list, zip(*rows, strict=True)), self.tokenizer)

    @torch.no_grad()
    def _answered(self, job: Job, count: int) -> list[Texts]:
        """The first pairs of a task with answers of one token, both of which the model gives."""
        found: list[Texts] = []
        single = [
            row
            for row in texts(job.task)
            if all(len(self.tokenizer(each).input_ids) == 1 for each in row[2:])
        ]
        for begin in range(0, len(single), 32):
            rows = single[begin : begin + 32]
            given: dict[str, Any] = {**self._pairs(rows).arguments()}
            right = torch.ones(len(rows), dtype=torch.bool)
            for run in RUNS:
                mask = given[f"{run}_attention_mask"]
                logits = self.model(
                    given[f"{run}_tokens"],
                    attention_mask=mask,
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                    logits_to_keep=1,
                ).logits[:, -1]
                right &= logits.argmax(-1) == given[f"{run}_answer_index"]
            found += [row for row, is_right in zip(rows, right.tolist(), strict=True) if is_right]
            if len(found) >= count:
                return found[:count]
        raise RuntimeError(f"{job.task} has {len(found)} pairs that are answered, not {count}")


RUNS = ("source", "target")
PARTS = ("train", "held_out", "test")


class Stamps:
    """What is kept of a learning while it goes on."""

    def __init__(self, laps: Laps) -> None:
        self.laps = laps
        self.losses: list[float] = []
        self.batches: list[Tensor] = []
        self.slope = torch.empty(0)

    def learner(self) -> type[Learner]:
        """The library's own, with a clock."""
        stamps = self

        class Timed(Learner):
            def step(self, state: State, pairs: Tensor) -> tuple[float, int]:
                if not stamps.losses:
                    with stamps.laps.lap("aside"):
                        stamps.slope = self.slope(state, pairs)
                with stamps.laps.lap("step"):
                    found = super().step(state, pairs)
                stamps.losses.append(found[0])
                stamps.batches.append(pairs)
                return found

            @torch.enable_grad()
            def slope(self, state: State, pairs: Tensor) -> Tensor:
                """The gradient of the mean loss by the basis `[width, rank]` itself."""
                basis = state.basis.now().basis.detach().requires_grad_()
                logits = self.interchange.logits(pairs, Learned(basis), gradients=True)
                return torch.autograd.grad(self.losses(logits, pairs).mean(), [basis])[0]

            def _note(self, *told: Any) -> None:
                with stamps.laps.lap("held_out"):
                    super()._note(*told)

        return Timed
