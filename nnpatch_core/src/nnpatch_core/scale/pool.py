"""The workers of a pool: made, loaded, replaced and ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from nnpatch_core._warnings import warn
from nnpatch_core.errors import WorkerError, WorkerWarning
from nnpatch_core.scale.alike import budget_of_each, check_alike, check_workers
from nnpatch_core.scale.sending import Sent
from nnpatch_core.scale.worker import Worker

#: Seconds between two looks at the workers.
LOOK = 0.5
#: Seconds after which it is said that Ray has not begun all workers, and after which it is given
#: up at the earliest: each imports much, perhaps from a slow disk.
_SOON, _PATIENCE = 30, 120


@attrs.define(eq=False)
class Hand:
    """A worker, as the pool has it.

    Args:
        actor: of Ray.
        loading: what tells how it is loaded; None once it is.
        since: when it was made.
    """

    actor: Any
    loading: Any
    since: float = attrs.field(factory=time.monotonic)


@attrs.define(eq=False)
class Pool:
    """The workers.

    Args:
        ray: the library.
        load: a pickled function that gives the model.
        started: whether Ray was started for them.
        num_cpus: of each.
        num_gpus: of each.
        patience: as of `RayWorkers`.
        hands: all workers.
        like: what they have in common.
        budget: bytes for each.
    """

    ray: Any
    load: bytes
    started: bool
    num_cpus: int
    num_gpus: float
    patience: float | None
    hands: list[Hand] = attrs.field(factory=list)
    like: Mapping[str, str] = attrs.field(factory=dict)
    budget: int = 0

    def open(self, workers: int, heed: Callable[[], None]) -> None:
        """Make the workers, and wait until each has its model.

        Args:
            workers: how many.
            heed: raises `KeyboardInterrupt` if that was lost; see `heeding`.

        Raises:
            WorkerError: one does not load, or they differ.
        """
        for _ in range(workers):
            self.hire()
        self._await_begun(heed)
        waiting = [each.loading for each in self.hands]
        while waiting:
            ready, waiting = self.ray.wait(waiting, timeout=LOOK)
            heed()
            for each in ready:
                self._parts(each)
        self.like = check_workers([self._parts(each.loading) for each in self.hands])
        rooms = [self.heard(each.actor.room.remote(), "its look at memory") for each in self.hands]
        self.budget = budget_of_each(rooms)
        for each in self.hands:
            each.loading = None

    def close(self) -> None:
        """End the workers, and the Ray that was started for them."""
        if not self.ray.is_initialized():
            return
        for each in self.hands:
            self.ray.kill(each.actor)
        self.hands = []
        if self.started:
            self.ray.shutdown()

    def hire(self) -> None:
        """Make a worker, which loads as others work."""
        actor = (
            self.ray.remote(Worker)
            # One call at work, and one that looks how far it is.
            .options(num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_concurrency=2)
            .remote(self.num_cpus)
        )
        self.hands.append(Hand(actor, actor.load.remote(self.load)))

    def replace(self, hand: Hand) -> None:
        """End a worker, and make another."""
        self.ray.kill(hand.actor)
        self.hands.remove(hand)
        self.hire()

    def check_loaded(self, hand: Hand) -> None:
        """Raise `WorkerError` where a new worker has not loaded, or is not like the others."""
        check_alike(self.like, self._parts(hand.loading))
        hand.loading = None

    def heard(self, reference: Any, what: str, warned: set[Any] | None = None) -> Any:
        """The value that a worker sends, its warnings said here.

        Args:
            reference: to what is sent.
            what: is done there.
            warned: the warnings that were said before.

        Raises:
            WorkerError: it is lost.
            Exception: what it has raised.
        """
        try:
            found: Sent = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            raise WorkerError(f"a worker was lost in {what}: {words_of(error)}") from error
        return taken(found, set() if warned is None else warned)

    def _await_begun(self, heed: Callable[[], None]) -> None:
        """Wait until Ray has begun all workers: it may have no room for them."""
        begun, start = [each.actor.begun.remote() for each in self.hands], time.monotonic()
        told = False
        while True:
            _, left = self.ray.wait(begun, num_returns=len(begun), timeout=LOOK)
            heed()
            if not left:
                return
            waited = time.monotonic() - start
            if waited < _SOON:
                continue
            words = (
                f"Ray has begun {len(begun) - len(left)} of {len(begun)} workers in {waited:.0f} "
                f"seconds: each takes {self.num_cpus} CPU and {self.num_gpus:g} GPU, and Ray has "
                f"{self._resources()} in all"
            )
            if not self.started:
                words += ", of which other RayWorkers keep theirs until they are closed"
            if self.patience is not None and waited >= max(self.patience, _PATIENCE):
                raise WorkerError(words)
            if not told:
                warn(f"{words}; the wait goes on", WorkerWarning)
                told = True

    def _resources(self) -> str:
        found = self.ray.cluster_resources()
        return " and ".join(f"{found.get(name, 0):g} {name}" for name in ("CPU", "GPU"))

    def _parts(self, reference: Any) -> Mapping[str, str]:
        """The words of a worker about its model."""
        try:
            parts: Mapping[str, str] = self.heard(reference, "load")
        except WorkerError:
            raise
        except Exception as error:
            raise WorkerError(
                f"load gave no model in a worker: {type(error).__name__}: {error}"
            ) from error
        return parts


def taken(found: Sent, warned: set[Any]) -> Any:
    """The value that was sent; its error is raised, and its warnings are said.

    Args:
        found: what was sent.
        warned: the warnings that were said before.
    """
    for each in found.warned:
        if each not in warned:
            warned.add(each)
            category, words = each
            warn(words, category)
    if found.error is not None:
        raise found.error
    return found.value


def words_of(error: Exception) -> str:
    """An error of Ray's in one line: of its many the first.

    Args:
        error: of Ray's.
    """
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no words'}"
