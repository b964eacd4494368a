"""The process of one contestant that learns subspaces; see `worker.py`."""

from __future__ import annotations

import importlib
import time
from typing import Any

import torch
from contestants import LEARNERS
from lessons import Job, Texts, lesson_from
from subject import Subject
from worker import serve, versions


class Answers:
    """What a worker does when it is asked; each method is a request, its arguments JSON."""

    def __init__(self, name: str, subject: Subject) -> None:
        entry = LEARNERS[name]
        module = importlib.import_module(f"contestants.{entry.module}")
        self.contestant: Any = module.make(subject, **entry.options)
        torch.set_num_threads(1)

    def about(self) -> dict[str, Any]:
        """The libraries, and the CPU seconds that importing them and loading the model took."""
        return {"libraries": versions(), "loading": time.process_time()}

    def prepare(self, job: dict[str, Any], seed: int, sizes: list[int]) -> dict[str, Any]:
        """The pairs of a job, and the first basis."""
        wanted = Job(**{**job, "seeds": tuple(job["seeds"])})
        answer: dict[str, Any] = self.contestant.prepare(wanted, seed, tuple(sizes))
        return answer

    def learn(self, lesson: dict[str, Any], rows: list[list[str]]) -> dict[str, Any]:
        """Learn a subspace."""
        answer: dict[str, Any] = self.contestant.learn(
            lesson_from(lesson), [Texts(*row) for row in rows]
        )
        return answer


if __name__ == "__main__":
    serve(Answers)
