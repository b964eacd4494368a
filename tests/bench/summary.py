"""From the raw results to the numbers that tables and charts show."""

from __future__ import annotations

from statistics import median
from typing import Any

from contestants import CONTESTANTS
from jobs import Job, Shape, job_from


class Summary:
    """The results of one run of the bench.

    Args:
        results: what `run.py` has written.
    """

    def __init__(self, results: dict[str, Any]) -> None:
        self.about = results["about"]
        self.memory = results["memory"]
        self._sweeps, self._bounds = results["sweeps"], results["bounds"]

    @property
    def shape(self) -> Shape:
        """The model's layers and heads."""
        return Shape(*self.about["shape"])

    @property
    def clock(self) -> str:
        """What counts: CPU time, which neighbours on the machine spoil least, or on a GPU wall."""
        return "cpu" if self.about["device"] == "cpu" else "wall"

    @property
    def threads(self) -> list[int]:
        """The numbers of threads that were measured, ascending."""
        return sorted({found["threads"] for found in self._sweeps})

    @property
    def contestants(self) -> list[str]:
        """Who was measured, in the tables' order."""
        found = {each["contestant"] for each in self._sweeps}
        return [name for name in CONTESTANTS if name in found]

    def jobs(self, threads: int) -> list[Job]:
        """The jobs measured with that many threads, in the order in which they were run."""
        found = [each["job"] for each in self._sweeps if each["threads"] == threads]
        return list(dict.fromkeys(job_from(fields) for fields in found))

    def runs(self, job: Job, threads: int, contestant: str) -> list[dict[str, Any]]:
        """Each measurement of a contestant."""
        return [
            each
            for each in self._sweeps
            if job_from(each["job"]) == job
            and (each["threads"], each["contestant"]) == (threads, contestant)
        ]

    def seconds(self, job: Job, threads: int, contestant: str, clock: str) -> float | None:
        """What the whole job takes: the median of the runs."""
        found = [each["total"][clock] for each in self.runs(job, threads, contestant)]
        return median(found) if found else None

    def fastest(self, job: Job, threads: int, contestant: str, clock: str) -> float | None:
        """The same, of the run that took least."""
        found = [each["total"][clock] for each in self.runs(job, threads, contestant)]
        return min(found, default=None)

    @property
    def has_peaks(self) -> bool:
        """Whether sweeps tell of their memory, as they do on a GPU."""
        return any("peak" in found for found in self._sweeps)

    def peak(self, job: Job, threads: int, contestant: str) -> int | None:
        """The most memory that a run of the job has taken on the GPU, in bytes."""
        found = [each["peak"] for each in self.runs(job, threads, contestant) if "peak" in each]
        return max(found, default=None)

    def sampled(self, job: Job, threads: int) -> int:
        """How many cells those ran who were not asked for all of them."""
        found = [self.runs(job, threads, name) for name in self.contestants]
        return max((run.get("ran", 0) for runs in found for run in runs), default=0)

    def token_layer(self, job: Job, threads: int, clock: str, by: str = "seconds") -> float:
        """Seconds per token-layer: the best that was seen beside the job's runs.

        `by` is `"seconds"` for matrix products alone, and `"own"` for the model's own layers.
        """
        return min(
            each[by][clock]
            for each in self._bounds
            if job_from(each["job"]) == job and each["threads"] == threads
        )

    def difference(self, job: Job, threads: int, one: str, other: str) -> float | None:
        """The largest difference between two contestants' values, in logits."""
        values = [self.values(job, threads, name) for name in (one, other)]
        if None in values:
            return None
        return max(abs(left - right) for left, right in zip(*values, strict=True))

    def values(self, job: Job, threads: int, contestant: str) -> list[float] | None:
        """The logit difference of each sampled cell, prompt by prompt."""
        for run in self.runs(job, threads, contestant):
            if "values" in run:
                return [value for cell in run["values"] for value in cell]
        return None
