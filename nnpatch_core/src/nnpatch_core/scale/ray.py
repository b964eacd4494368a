"""Workers of Ray, which stand for a model: each measures shards of a sweep."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import attrs

from nnpatch_core._arguments import check_flags
from nnpatch_core._extras import extra
from nnpatch_core._files import check_file
from nnpatch_core._integers import strict_int
from nnpatch_core._printable import shown
from nnpatch_core._warnings import warn
from nnpatch_core.errors import CheckpointError, PatchingError, WorkerError, WorkerWarning
from nnpatch_core.results import Outcome
from nnpatch_core.scale.worker import About, Sent, Worker, releases
from nnpatch_core.sweep import Share, Stored, make_bar

#: Shards for each of several workers: they end at about one time, and few are lost with a worker.
_SHARDS = 4
#: How often a shard is begun anew after a worker was lost with it.
_TRIES = 3
#: Seconds between two looks at the workers.
_LOOK = 0.5
#: Seconds in which workers may end by themselves, when one has raised an error.
_ENDING = 5
#: Bytes that `load` may have with it: more of them are weights, which are to be read in place.
_LARGEST = 2**24
_BAR = "{l_bar}{bar}| {n:.1f}/{total} shards [{elapsed}<{remaining}]"


class RayWorkers:
    """Processes of Ray that each load the model; they stand for it in the sweeps.

    `activation_patching`, `ablation_patching`, `path_patching` and `edge_patching` with
    `method="exact"` take them as `nnmodel`. The plan is that of one process, and its parts are
    shared out, so that the outcome is that of one process, to the last bit, where the workers'
    threads are as many. A worker that is lost gives back what it had, with a `WorkerWarning`.

    Args:
        load: gives the model, in each worker once: there the weights are read, they are not sent.
        workers: how many processes.
        num_gpus: of each, as Ray counts them; it may be a fraction.
        num_cpus: of each, and threads of torch.
        address: of a Ray that runs, such as `"auto"`; None starts one here, and ends it again.
        patience: seconds that a worker may go without a step before it counts as hanging; None is
            for ever.

    Raises:
        WorkerError: Ray is not installed or not there, a worker does not load, or they differ.

    Examples:
        A file that several workers read; run it as a script::

            from nnpatch_core import Sites, activation_patching
            from nnpatch_core.scale import RayWorkers
            from transformers import AutoModelForCausalLM

            def load():
                return AutoModelForCausalLM.from_pretrained("gpt2")

            with RayWorkers(load, workers=2) as pool:
                out = activation_patching(pool, None, Sites("resid"), pairs)
    """

    def __init__(
        self,
        load: Callable[[], Any],
        workers: int = 2,
        *,
        num_gpus: float = 0,
        num_cpus: int = 1,
        address: str | None = None,
        patience: float | None = 600,
    ) -> None:
        if not callable(load):
            raise WorkerError(f"load must be a function that gives the model, got {shown(load)}")
        for name, count in (("workers", workers), ("num_cpus", num_cpus)):
            if strict_int(count, name, WorkerError) < 1:
                raise WorkerError(f"{name} must be at least 1, got {count}")
        if not _is_number(num_gpus) or num_gpus < 0:
            raise WorkerError(f"num_gpus must be 0 or more, got {shown(num_gpus)}")
        if patience is not None and not (_is_number(patience) and patience > 0):
            raise WorkerError(f"patience must be seconds, or None, got {shown(patience)}")
        self._ray = extra("ray", "ray", WorkerError)
        self._patience, self._started = patience, False
        self._actors: list[Any] = []
        self._join(address, workers * num_cpus, workers * num_gpus)
        try:
            content = self._load_of(load)
            actor = self._ray.remote(Worker).options(
                num_cpus=num_cpus, num_gpus=num_gpus, max_concurrency=2
            )
            self._make: Callable[[], Any] = lambda: actor.remote(content, num_cpus)
            self._actors = [self._make() for _ in range(workers)]
            about = [self._heard(each.about.remote(), "load") for each in self._actors]
            self._like = _check_alike(about)
            self._budget = _budget(about)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RayWorkers({len(self._actors)} workers, {self._like.get('model', 'no model')})"

    def close(self) -> None:
        """End the workers, and the Ray that was started for them."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._started:
            self._ray.shutdown()
            self._started = False

    def swept(self, sweep: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        """The result of a sweep, which is called with these workers as its `nnmodel`.

        Args:
            sweep: the function.
            given: its other arguments by name.

        Raises:
            WorkerError: the workers are closed, or lost again and again.
            PatchingError: one of its kinds, as the sweep raises it.

        Warns:
            WorkerWarning: a worker was lost.
        """
        if not self._actors:
            raise WorkerError("these workers are closed: make new ones")
        own = dict(given)
        file, shows = own.pop("checkpoint", None), own.pop("progress", True)
        check_flags(progress=shows)
        if own.get("memory_budget") is None:
            own["memory_budget"] = self._budget
        own["progress"] = False
        path = None if file is None else check_file(file, CheckpointError)
        job = _Job(self, sweep, self._ray.put(own), path, shows, len(self._actors))
        outcome = job.run()
        return _with_workers(outcome, len(self._actors))

    def _join(self, address: str | None, cpus: int, gpus: float) -> None:
        """Join the Ray that runs, or start one."""
        ray = self._ray
        if ray.is_initialized():
            return
        options: dict[str, Any] = {"address": address}
        if address is None:
            options = {"num_cpus": cpus, "include_dashboard": False}
            options |= {"num_gpus": math.ceil(gpus)} if gpus else {}
        try:
            ray.init(**options, log_to_driver=False, logging_level="ERROR")
        except Exception as error:
            where = "could not be started" if address is None else f"does not answer at {address!r}"
            raise WorkerError(f"Ray {where}: {type(error).__name__}: {error}") from error
        self._started = True

    def _load_of(self, load: Callable[[], Any]) -> bytes:
        """`load` as it is sent."""
        try:
            content: bytes = self._ray.cloudpickle.dumps(load)
        except Exception as error:
            raise WorkerError(f"load cannot be sent to workers: {error}") from error
        if len(content) > _LARGEST:
            raise WorkerError(
                f"load holds {len(content) / 2**20:.0f} MiB, which would be sent to each worker: "
                "let it read the model there, such as by from_pretrained"
            )
        return content

    def _heard(self, reference: Any, what: str) -> Any:
        """What a worker sends, its warnings said here.

        Raises:
            PatchingError: what the worker has raised.
            WorkerError: it is lost, or has raised another error.
        """
        try:
            sent: Sent = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            raise WorkerError(f"a worker was lost: {_first_line(error)}") from error
        for category, words in sent.warned:
            warn(words, category)
        if sent.error is None:
            return sent.value
        if isinstance(sent.error, PatchingError):
            raise sent.error
        raise WorkerError(f"{what} ended in a worker with {sent.error}") from sent.error


@attrs.define(eq=False)
class _Job:
    """A sweep that workers share.

    Args:
        pool: the workers.
        sweep: the function.
        given: a reference to its arguments.
        path: the user's checkpoint; None if there is none.
        shows: whether there is a bar.
        workers: how many there are.
    """

    pool: RayWorkers
    sweep: Callable[..., Any]
    given: Any
    path: Path | None
    shows: bool
    workers: int
    measured: Stored | None = None
    failed: Counter[Share] = attrs.field(factory=Counter)
    #: For each shard at work its worker, how far it was at the last look, and when it moved last.
    at_work: dict[Any, tuple[Share, Any, float, float]] = attrs.field(factory=dict)

    def run(self) -> Any:
        if self.path is not None and self.path.exists():
            self.measured = Stored.read(self.path)
        count = 1 if self.workers == 1 else self.workers * _SHARDS
        left = deque(Share(number, count) for number in range(1, count + 1))
        before = self._content()
        try:
            with make_bar(count, self.shows, desc="shards", bar_format=_BAR) as bar:
                while left or self.at_work:
                    self._hand_out(left, before)
                    self._collect(left)
                    bar.n = count - len(left) - sum(1 - each[2] for each in self.at_work.values())
                    bar.refresh()
        except BaseException as error:
            # What workers still measure is nobody's. A fault of the call ends all of them soon.
            if isinstance(error, Exception) and self.at_work:
                calls = [*self.at_work]
                ended, _ = self.pool._ray.wait(calls, num_returns=len(calls), timeout=_ENDING)
                for call in ended:
                    del self.at_work[call]
            self._restart([actor for _, actor, _, _ in self.at_work.values()])
            raise
        content = self._content()
        assert content is not None
        actor = self.pool._actors[0]
        reference = actor.finish.remote(self.sweep, self.given, content)
        return self.pool._heard(reference, "the sweep")

    def _hand_out(self, left: deque[Share], before: bytes | None) -> None:
        busy = {id(actor) for _, actor, _, _ in self.at_work.values()}
        for actor in self.pool._actors:
            if left and id(actor) not in busy:
                share = left.popleft()
                call = actor.measure.remote(self.sweep, self.given, str(share), before)
                self.at_work[call] = share, actor, 0.0, time.monotonic()

    def _collect(self, left: deque[Share]) -> None:
        ray = self.pool._ray
        ready, _ = ray.wait([*self.at_work], num_returns=1, timeout=_LOOK)
        for reference in ready:
            share, actor, _, _ = self.at_work.pop(reference)
            try:
                sent: Sent = ray.get(reference)
            except ray.exceptions.RayError as error:
                self._lost(share, actor, _first_line(error), left)
                continue
            if sent.error is not None and "OutOfMemoryError" in str(sent.error):
                self._lost(share, actor, str(sent.error), left)
                continue
            self._keep(self.pool._heard(reference, "the sweep"))
        self._look(left)

    def _look(self, left: deque[Share]) -> None:
        """How far the workers are; one that has not moved for too long is lost."""
        ray, now = self.pool._ray, time.monotonic()
        for reference, (share, actor, known, moved) in [*self.at_work.items()]:
            try:
                seen = ray.get(actor.progress.remote(), timeout=_LOOK)
            except ray.exceptions.RayError:
                seen = known
            if seen > known:
                self.at_work[reference] = share, actor, seen, now
            elif self.pool._patience is not None and now - moved > self.pool._patience:
                del self.at_work[reference]
                words = f"it made no step for {self.pool._patience:g} seconds"
                self._lost(share, actor, words, left)

    def _lost(self, share: Share, actor: Any, why: str, left: deque[Share]) -> None:
        self.failed[share] += 1
        if self.failed[share] >= _TRIES:
            raise WorkerError(
                f"shard {share} has lost its worker {_TRIES} times, the last time as {why}"
                f"{self._kept()}"
            )
        warn(f"a worker was lost with shard {share}, which begins anew: {why}", WorkerWarning)
        self._restart([actor])
        left.appendleft(share)

    def _kept(self) -> str:
        if self.path is None or self.measured is None:
            return ""
        return f"; what was measured is kept in {self.path}, and the same call goes on from it"

    def _restart(self, actors: Sequence[Any]) -> None:
        pool = self.pool
        for actor in actors:
            pool._ray.kill(actor)
            pool._actors = [each for each in pool._actors if each is not actor]
            made = pool._make()
            pool._actors.append(made)
            _check_like(pool._like, pool._heard(made.about.remote(), "load").parts)

    def _keep(self, content: bytes) -> None:
        """Join what a shard has measured with what others have."""
        with TemporaryDirectory() as folder:
            file = Path(folder, "shard")
            file.write_bytes(content)
            own = attrs.evolve(Stored.read(file), count=None, shards={})
        self.measured = own if self.measured is None else self.measured.joined(own)
        if self.path is not None:
            try:
                self.measured.write(self.path)
            except CheckpointError as error:
                warn(f"the checkpoint {error}; the sweep goes on", WorkerWarning)

    def _content(self) -> bytes | None:
        if self.measured is None:
            return None
        with TemporaryDirectory() as folder:
            file = Path(folder, "measured")
            self.measured.write(file)
            return file.read_bytes()


def _check_alike(about: Sequence[About]) -> dict[str, str]:
    """What workers have in common, which is all that decides on numbers.

    Raises:
        WorkerError: they differ, or have other releases than this process.
    """
    here = releases()
    like = dict(about[0].parts)
    _check_like({name: here[name] for name in here}, {name: like[name] for name in here}, "here")
    for each in about[1:]:
        _check_like(like, each.parts)
    return like


def _check_like(
    like: Mapping[str, str], parts: Mapping[str, str], where: str = "in another worker"
) -> None:
    told = "; ".join(
        f"{name}: {parts.get(name)} in a worker, {like.get(name)} {where}"
        for name in {**like, **parts}
        if like.get(name) != parts.get(name)
    )
    if told:
        raise WorkerError(f"workers must not differ, or their numbers do ({told})")


def _budget(about: Sequence[About]) -> int:
    """Bytes for each worker, if those of one machine share what is free there."""
    hosts = Counter(each.host for each in about)
    return min(each.budget // hosts[each.host] for each in about)


def _with_workers(result: Any, count: int) -> Any:
    """A result whose outcome says that workers have made it."""
    if isinstance(result, Outcome):
        info = {name: words for name, words in result.info.items() if name != "resumed"}
        return attrs.evolve(result, info={**info, "workers": f"{count} of Ray"})
    return attrs.evolve(result, outcome=_with_workers(result.outcome, count))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no words'}"
