"""A sweep that workers share."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import attrs

from nnpatch_core._files import reason
from nnpatch_core._warnings import warn
from nnpatch_core.errors import CheckpointError, CheckpointWarning, WorkerError, WorkerWarning
from nnpatch_core.scale.interrupts import heeding
from nnpatch_core.scale.pool import LOOK, Hand, Pool, taken, words_of
from nnpatch_core.scale.sending import Sent
from nnpatch_core.sweep import Share, Stored, make_bar

#: Shards for each of several workers: they end at about one time, and few are lost with a worker.
_SHARDS = 4
#: How often a shard may lose its worker before it is further than it was.
_TRIES = 5
#: Seconds between two times at which all that is measured is kept, and of all time the share that
#: goes into that.
_KEEP, _SHARE = 5.0, 0.02
#: Seconds in which workers may end by themselves, or tell what they have, before they are ended.
_ENDING = 5
_BAR = "{l_bar}{bar}| {n:.1f}/{total} shards [{elapsed}<{remaining}]"


@attrs.define(eq=False)
class _Task:
    """A worker at work.

    Args:
        share: what it measures, or runs unpatched; None is the outcome of all.
        hand: the worker.
        unpatched: whether it runs that share with nothing patched.
        known: how much of it is measured, from 0 to 1.
        moved: when that was more than before.
        look: how far it is, asked and not answered yet.
    """

    share: Share | None
    hand: Hand
    unpatched: bool = False
    known: float = 0.0
    moved: float = attrs.field(factory=time.monotonic)
    look: Any = None


@attrs.define(eq=False)
class Job:
    """A sweep that workers share.

    Args:
        pool: the workers.
        call: a reference to the function and its arguments.
        path: the user's checkpoint; None if there is none.
        shows: whether there is a bar.
        workers: how many there are.
        measured: what was measured before.
        apart: whether workers run prompts unpatched for one another, before they patch.
    """

    pool: Pool
    call: Any
    path: Path | None
    shows: bool
    workers: int
    measured: Stored | None
    apart: bool = False
    at_work: dict[Any, _Task] = attrs.field(factory=dict)
    left: deque[Share | None] = attrs.field(factory=deque)
    #: How often each share has lost its worker, and how far the sweep was then.
    failed: Counter[Share | None] = attrs.field(factory=Counter)
    furthest: dict[Share | None, int] = attrs.field(factory=dict)
    reloads: int = 0
    warned: set[Any] = attrs.field(factory=set)
    keeps: float = attrs.field(factory=lambda: time.monotonic() + _KEEP)
    unwritten: bool = False
    #: References to the logits of unpatched runs, once all are there.
    unpatched: list[Any] = attrs.field(factory=list)
    running_unpatched: bool = False
    started: float = attrs.field(factory=time.monotonic)
    spent: float = attrs.field(init=False)
    #: Raises `KeyboardInterrupt` if that was lost.
    heed: Callable[[], None] = lambda: None

    def __attrs_post_init__(self) -> None:
        self.spent = 0.0 if self.measured is None else self.measured.call["seconds"]

    def run(self) -> Any:
        """The result of the sweep."""
        with heeding() as self.heed:
            return self._run()

    def _run(self) -> Any:
        if self.apart and self.workers > 1:
            self._run_unpatched()
        count = 1 if self.workers == 1 else self.workers * _SHARDS
        self.left.extend(Share(number, count) for number in range(1, count + 1))
        with self._ending(), make_bar(count, self.shows, desc="shards", bar_format=_BAR) as bar:
            # A bar that is not shown has no interval.
            interval, drawn = getattr(bar, "mininterval", LOOK), time.monotonic()
            while self.left or self.at_work:
                self._hand_out()
                self._collect()
                bar.n = count - len(self.left) - sum(1 - each.known for each in self._tasks)
                if time.monotonic() - drawn >= interval:
                    bar.refresh()
                    drawn = time.monotonic()
        self.left.append(None)
        with self._ending():
            while True:
                self._hand_out()
                for found in self._collect():
                    for hand in self.pool.hands:
                        hand.actor.forget.remote()
                    return found
        raise AssertionError  # pragma: no cover - the loop ends by its result

    def _run_unpatched(self) -> None:
        """Let workers run all prompts unpatched, a share each; where all run together it is none.

        Otherwise each worker would run all of them, and where cells are few that is the most of it.
        """
        self.running_unpatched = True
        self.left.extend(Share(each, self.workers) for each in range(1, self.workers + 1))
        with self._ending():
            while self.left or self.at_work:
                self._hand_out()
                self._collect()
        self.running_unpatched = False

    @property
    def _tasks(self) -> list[_Task]:
        return [*self.at_work.values()]

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Where it breaks off, what was measured is kept, and nobody works on for nobody."""
        try:
            yield
        except BaseException as error:
            try:
                self._break_off(isinstance(error, Exception))
            finally:
                for task in self._tasks:
                    self.pool.replace(task.hand)
                self.at_work.clear()
            raise

    def _break_off(self, fault: bool) -> None:
        """Wait a moment for those at work.

        Args:
            fault: whether the call is at fault, which ends all of them soon.
        """
        ray, calls = self.pool.ray, [*self.at_work]
        if calls and fault:
            ended, _ = ray.wait(calls, num_returns=len(calls), timeout=_ENDING)
            for call in ended:
                del self.at_work[call]
                with suppress(ray.exceptions.RayError):
                    self._keep(ray.get(call).kept)
        elif calls:
            looks = [task.hand.actor.look.remote(content=True) for task in self._tasks]
            ended, _ = ray.wait(looks, num_returns=len(looks), timeout=_ENDING)
            for look in ended:
                self._keep(self._looked(look)[1])

    def _hand_out(self) -> None:
        busy = {id(task.hand) for task in self._tasks}
        for hand in self.pool.hands:
            if self.left and hand.loading is None and id(hand) not in busy:
                share = self.left.popleft()
                self.at_work[self._begin(hand, share)] = _Task(share, hand, self.running_unpatched)

    def _begin(self, hand: Hand, share: Share | None) -> Any:
        """Set a worker to work, and give the reference to what it will send."""
        if self.running_unpatched:
            return hand.actor.unpatched.remote(self.call, str(share))
        content, name = self._content(), None if self.path is None else str(self.path)
        if share is None:
            assert content is not None
            return hand.actor.finish.remote(self.call, content, name, *self.unpatched)
        return hand.actor.measure.remote(self.call, str(share), content, name, *self.unpatched)

    def _collect(self) -> list[Any]:
        """Take what workers have done; gives the outcome, once it is there."""
        ray, results = self.pool.ray, []
        loading = {hand.loading: hand for hand in self.pool.hands if hand.loading is not None}
        ready, _ = ray.wait([*self.at_work, *loading], num_returns=1, timeout=LOOK)
        self.heed()
        for reference in ready:
            if reference in loading:
                self._loaded(loading[reference])
                continue
            task = self.at_work.pop(reference)
            try:
                sent: Sent = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise WorkerError(f"a worker has failed: {error}") from error
            except ray.exceptions.RayError as error:
                self._lost(task, words_of(error))
                continue
            if task.share is not None and not task.unpatched:
                self._keep(sent.kept)
            if sent.exhausted:
                self._lost(task, f"its memory ran out ({sent.error})")
                continue
            value = taken(sent, self.warned)
            if task.unpatched:
                self.unpatched.append(reference)
            elif task.share is None:
                results.append(value)
        # Nobody waits until others have told how far they are.
        self._hand_out()
        self._look()
        return results

    def _loaded(self, hand: Hand) -> None:
        """A worker that was made anew is ready, or fails again."""
        try:
            self.pool.check_loaded(hand)
            self.reloads = 0
        except WorkerError as error:
            self.reloads += 1
            if self.reloads >= _TRIES:
                raise WorkerError(f"no worker can be made anew: {error}{self._kept()}") from error
            warn(f"a worker could not be made anew, and is tried again: {error}", WorkerWarning)
            self.pool.replace(hand)

    def _look(self) -> None:
        """How far the workers are; one that has not moved for too long is lost."""
        ray, begun = self.pool.ray, time.monotonic()
        keep = begun >= self.keeps
        for task in self._tasks:
            if task.look is None:
                task.look = task.hand.actor.look.remote(content=keep)
        looks = [task.look for task in self._tasks]
        answered = ray.wait(looks, num_returns=len(looks), timeout=LOOK)[0] if looks else []
        for call, task in [*self.at_work.items()]:
            if task.look in answered:
                known, content = self._looked(task.look)
                task.look = None
                self._keep(content)
                if known > task.known:
                    task.known, task.moved = known, time.monotonic()
            patience = self.pool.patience
            if patience is not None and time.monotonic() - task.moved > patience:
                del self.at_work[call]
                self._lost(task, f"it made no step for {patience:g} seconds (patience=)")
        if keep:
            took = time.monotonic() - begun
            self.keeps = time.monotonic() + max(_KEEP, took / _SHARE)

    def _looked(self, reference: Any) -> tuple[float, bytes | None]:
        try:
            found: tuple[float, bytes | None] = self.pool.ray.get(reference)
        except self.pool.ray.exceptions.RayError:
            # Its call says so, too.
            return 0.0, None
        return found

    def _lost(self, task: _Task, why: str) -> None:
        share = task.share
        known = 0 if self.measured is None else self.measured.runs[0]
        self.failed[share] = self.failed[share] + 1 if self.furthest.get(share) == known else 1
        self.furthest[share] = known
        what = "the outcome" if share is None else f"shard {share}"
        if task.unpatched:
            what = f"unpatched runs {share}"
        self.pool.replace(task.hand)
        if self.failed[share] >= _TRIES:
            raise WorkerError(
                f"{what} has lost its worker {_TRIES} times, the last time as {why}{self._kept()}"
            )
        self.left.appendleft(share)
        warn(f"a worker was lost with {what}, which another one goes on with: {why}", WorkerWarning)

    def _kept(self) -> str:
        if self.path is None or self.measured is None:
            return ""
        return f"; what was measured is kept in {self.path}, and the same call goes on from it"

    def _keep(self, content: bytes | None) -> None:
        """Join what a worker has measured with what others have."""
        if content is None:
            return
        with TemporaryDirectory() as folder:
            file = Path(folder, "shard")
            with self._room_for():
                file.write_bytes(content)
            own = attrs.evolve(Stored.read(file), path="a worker", count=None, shards={})
        before = self.measured
        if before is not None:
            told = before.differences(own.identity)
            if told:
                raise WorkerError(f"workers do not run the same sweep ({told})")
            if own.runs[0] == 0:
                return
        joined = own if before is None else before.joined(own)
        if joined.runs[0] == joined.runs[1]:
            # Shards that are not begun would find nothing to do; the outcome is still to come.
            self.left = deque(share for share in self.left if share is None)
        # As of one process: the time of this call, and of those before it.
        seconds = self.spent + time.monotonic() - self.started
        self.measured = attrs.evolve(joined, call={**joined.call, "seconds": seconds})
        if self.path is not None and (before is None or self.measured.runs != before.runs):
            try:
                self.measured.write(self.path)
            except CheckpointError as error:
                first, self.unwritten = not self.unwritten, True
                if first:
                    warn(
                        f"the checkpoint {error}; the sweep goes on, and is not kept until it can "
                        "be written again",
                        CheckpointWarning,
                    )

    def _content(self) -> bytes | None:
        """All that is measured, as a checkpoint."""
        if self.measured is None:
            return None
        with TemporaryDirectory() as folder:
            file = Path(folder, "measured")
            with self._room_for():
                self.measured.write(file)
            return file.read_bytes()

    @contextmanager
    def _room_for(self) -> Iterator[None]:
        """For files on their way to a worker or from it, which are nobody's own."""
        try:
            yield
        except (CheckpointError, OSError) as error:
            raise WorkerError(
                f"what workers measure goes through files in {gettempdir()} (TMPDIR), where one "
                f"could not be written: {reason(error.__cause__ or error)}{self._kept()}"
            ) from error
