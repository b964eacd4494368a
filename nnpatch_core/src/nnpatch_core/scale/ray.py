"""Workers of Ray, which stand for a model: each measures shards of a sweep."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import attrs
from torch import nn

from nnpatch_core._arguments import check_flags
from nnpatch_core._extras import extra
from nnpatch_core._files import check_file
from nnpatch_core._integers import strict_int
from nnpatch_core._parts import check_folder
from nnpatch_core._printable import shown
from nnpatch_core._upstream import Envoy
from nnpatch_core.errors import CheckpointError, WorkerError
from nnpatch_core.memory import read_budget
from nnpatch_core.results import Outcome
from nnpatch_core.scale.interrupts import heeding
from nnpatch_core.scale.job import Job
from nnpatch_core.scale.joining import join
from nnpatch_core.scale.pool import Pool
from nnpatch_core.scale.sending import call_sent, function_sent
from nnpatch_core.sweep import Stored, resumed

#: Sweeps that run all prompts unpatched before anything else.
_APART = ("ablation_patching", "activation_patching", "path_patching")


class RayWorkers:
    """Processes of Ray that each load the model; they stand for it in the sweeps.

    `activation_patching`, `ablation_patching`, `attribution_patching`, `path_patching` and
    `edge_patching` take them as `nnmodel`. The plan is that of one process, and its parts are
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
            from nnpatch_core.testing import tiny_model

            def load():  # such as AutoModelForCausalLM.from_pretrained(...)
                return tiny_model("llama")

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
        if not callable(load) or isinstance(load, nn.Module | Envoy):
            raise WorkerError(f"load must be a function that gives the model, got {shown(load)}")
        for name, count in (("workers", workers), ("num_cpus", num_cpus)):
            if strict_int(count, name, WorkerError) < 1:
                raise WorkerError(f"{name} must be at least 1, got {count}")
        if not _is_number(num_gpus) or num_gpus < 0:
            raise WorkerError(f"num_gpus must be 0 or more, got {shown(num_gpus)}")
        if patience is not None and not (_is_number(patience) and patience > 0):
            raise WorkerError(f"patience must be seconds, or None, got {shown(patience)}")
        ray = extra("ray", "ray", WorkerError)
        content = function_sent(load)
        self._pool: Pool | None = None
        self._count = workers
        with heeding() as heed:
            started = join(ray, address, workers * num_cpus, workers * num_gpus)
            pool = Pool(ray, content, started, num_cpus, num_gpus, patience)
            try:
                heed()
                pool.open(workers, heed)
            except BaseException:
                pool.close()
                raise
        self._pool = pool
        self._busy = threading.Lock()

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
        state = "closed" if self._pool is None else self._pool.like["model"]
        return f"RayWorkers({self._count} workers, {state})"

    def close(self) -> None:
        """End the workers, and the Ray that was started for them."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

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
        pool = self._pool
        if pool is None or not pool.ray.is_initialized():
            raise WorkerError("these workers are closed: make new ones")
        own = dict(given)
        file, shows = own.pop("checkpoint", None), own.pop("progress", True)
        check_flags(progress=shows)
        path, before = None, None
        if file is not None:
            path = check_file(file, CheckpointError)
            check_folder(path.parent, CheckpointError)
            before = Stored.read(path) if path.exists() else None
        if own.get("memory_budget") is None:
            # What runs together decides on last digits: a sweep goes on as it was begun.
            begun = None if before is None else before.identity["memory_budget"]
            own["memory_budget"] = pool.budget if begun is None else read_budget(begun)
        own["progress"] = False
        if not self._busy.acquire(blocking=False):
            raise WorkerError("these workers are at work for another call: wait for its outcome")
        try:
            call = pool.ray.put(call_sent(sweep, own))
            apart = sweep.__name__ in _APART and given.get("screen") is None
            result = Job(pool, call, path, shows, self._count, before, apart).run()
        finally:
            self._busy.release()
        return _told(result, self._count, before)


def _told(result: Any, count: int, before: Stored | None) -> Any:
    """A result whose outcome says that workers have made it."""
    if isinstance(result, Outcome):
        info = {name: words for name, words in result.info.items() if name != "resumed"}
        if before is not None and before.runs[0]:
            info["resumed"] = resumed(*before.runs, estimated=before.estimated)
        return attrs.evolve(result, info={**info, "workers": f"{count} of Ray"})
    return attrs.evolve(result, outcome=_told(result.outcome, count, before))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
