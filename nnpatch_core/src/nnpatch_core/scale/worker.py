"""A worker: a process that has the model, and measures shards of sweeps with it."""

from __future__ import annotations

import os
import pickle
import platform
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import torch

from nnpatch_core._devices import identity, numbered
from nnpatch_core._files import write_whole
from nnpatch_core._models import as_nnsight, input_device, module_of, with_weights
from nnpatch_core.errors import CheckpointError
from nnpatch_core.memory import memory_budgets
from nnpatch_core.plugins import load_plugins
from nnpatch_core.scale.sending import Sent, renamed, sent
from nnpatch_core.sweep import (
    Held,
    Logits,
    Share,
    ShareFile,
    ShareMeasured,
    UnpatchedRun,
    checksum,
    versions,
)

#: The name of a checkpoint in a worker's own folder.
_FILE = "shard"


@attrs.frozen
class Room:
    """The memory of a worker.

    Args:
        where: workers with the same word share it.
        budget: bytes that sweeps may use there, if one worker were alone.
    """

    where: str
    budget: int


class Worker:
    """The model in a process of its own.

    Args:
        threads: of torch.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._known = 0.0
        self._begun: float | None = None
        self._path: Path | None = None
        self._model: Any = None
        #: What is known of the unpatched runs of the sweep at hand, whose call it is.
        self._held: tuple[bytes, Held] = (b"", Held())

    def begun(self) -> int:
        """The process, which is there."""
        return os.getpid()

    def load(self, function: bytes) -> Sent:
        """Load the model, and tell all that decides on numbers, by names that people know.

        Args:
            function: gives the model, pickled.
        """
        torch.set_num_threads(self._threads)

        def make() -> dict[str, str]:
            model = as_nnsight(pickle.loads(function)())
            with_weights(model)
            self._model = model
            return self._parts()

        return sent(make)

    def room(self) -> Sent:
        """The `Room` of this worker."""
        return sent(self._room)

    def unpatched(self, call: bytes, share: str) -> Sent:
        """Run a share of the prompts with nothing patched.

        Args:
            call: the function and its arguments by name, but for the model, pickled.
            share: which share.

        Returns:
            The logits by chunk and run, as arrays; none where all prompts run together.
        """
        self._begun, self._known = None, 0.0
        self.forget()
        held = Held(wanted=Share.of(share), told=self._tell)

        def run(sweep: Any, given: Mapping[str, Any], path: Path) -> Any:
            try:
                sweep(self._model, checkpoint=ShareFile(path, None, held=held), **given)
            except UnpatchedRun as found:
                return {number: _arrays(each) for number, each in found.logits.items()}
            raise AssertionError("the sweep has no unpatched runs")

        return self._with_file(call, None, None, run)

    def measure(
        self, call: bytes, share: str, before: bytes | None, name: str | None, *unpatched: Sent
    ) -> Sent:
        """Measure a shard, whose checkpoint is sent.

        Args:
            call: the function and its arguments by name, but for the model, pickled.
            share: which shard.
            before: a checkpoint of what was measured before; None if nothing was.
            name: of the user's checkpoint.
            *unpatched: what workers have sent as `unpatched`.
        """
        self._begun, self._known = None, 0.0
        held = self._holding(call, unpatched)

        def measured(sweep: Any, given: Mapping[str, Any], path: Path) -> None:
            file = ShareFile(path, Share.of(share), self._tell, held)
            with suppress(ShareMeasured):
                sweep(self._model, checkpoint=file, **given)

        return self._with_file(call, before, name, measured)

    def finish(self, call: bytes, measured: bytes, name: str | None, *unpatched: Sent) -> Sent:
        """The result of a sweep of which all is measured.

        Args:
            call: the function and its arguments by name, but for the model, pickled.
            measured: the checkpoint.
            name: of the user's checkpoint.
            *unpatched: what workers have sent as `unpatched`.
        """
        self._begun, self._known = None, 0.0
        held = self._holding(call, unpatched)
        self.forget()

        def finished(sweep: Any, given: Mapping[str, Any], path: Path) -> Any:
            return sweep(self._model, checkpoint=ShareFile(path, None, held=held), **given)

        return self._with_file(call, measured, name, finished)

    def forget(self) -> None:
        """Keep nothing of a sweep any more: its outcome is made, or another one comes."""
        self._held = b"", Held()

    def look(self, content: bool) -> tuple[float, bytes | None]:
        """How much of the shard at hand is measured, from 0 to 1.

        Args:
            content: whether what was kept of it is asked for too; there may be nothing yet.
        """
        path = self._path
        if not content or path is None:
            return self._known, None
        try:
            return self._known, path.read_bytes()
        except OSError:
            return self._known, None

    def _holding(self, call: bytes, unpatched: Sequence[Sent]) -> Held:
        """The unpatched runs of a call as they are known, kept from one share to the next."""
        if self._held[0] != call:
            known = {
                number: {name: torch.from_numpy(each) for name, each in logits.items()}
                for part in unpatched
                for number, logits in part.value.items()
            }
            self._held = call, Held(keeps=True, unpatched=known)
        return self._held[1]

    def _tell(self, known: float) -> None:
        # What other shards have counts from the first moment on.
        self._begun = known if self._begun is None else self._begun
        self._known = (known - self._begun) / (1 - self._begun) if self._begun < 1 else 1.0

    def _with_file(
        self, call: bytes, content: bytes | None, name: str | None, function: Callable[..., Any]
    ) -> Sent:
        """The result of a function for a call, which has a file of its own."""
        # Torch keeps the number of threads of each thread, and Ray calls from several.
        torch.set_num_threads(self._threads)
        with TemporaryDirectory() as folder:
            path = Path(folder, _FILE).resolve()

            def ran() -> Any:
                if content is not None:
                    write_whole(path, lambda part: part.write_bytes(content), CheckpointError)
                return function(*pickle.loads(call), path)

            self._path = path
            try:
                found = sent(ran)
            finally:
                self._path = None
            kept = path.read_bytes() if path.exists() else None
        return attrs.evolve(renamed(found, path, name), kept=kept)

    def _parts(self) -> dict[str, str]:
        model = module_of(self._model)
        weights = [*model.parameters()]
        return {
            "model": type(model).__name__,
            "weights": checksum(model),
            "dtype": ", ".join(dict.fromkeys(str(each.dtype) for each in weights)),
            "device": ", ".join(dict.fromkeys(each.device.type for each in weights)),
            "threads": str(self._threads),
            **releases(),
        }

    def _room(self) -> Room:
        model = module_of(self._model)
        device, where = input_device(model), socket.gethostname()
        if device is not None and device.type not in ("cpu", "meta"):
            where = f"{where} {identity(device)}"
        # Of a model over several devices, the one with the least.
        devices = {str(each.device) for each in model.parameters() if not each.is_meta}
        devices |= {str(numbered(device))} if device is not None else set()
        return Room(where, min(memory_budgets(None, model, sorted(devices) or ["cpu"]).values()))


def _arrays(logits: Logits) -> dict[str, Any]:
    """Logits as Ray hands them out without a copy."""
    return {name: each.numpy() for name, each in logits.items()}


def releases() -> dict[str, str]:
    """The releases that numbers depend on, those of Python and of plugins among them."""
    python = ".".join(platform.python_version_tuple()[:2])
    plugins = ", ".join(dict.fromkeys(map(str, load_plugins(report=False).plugins)))
    return {
        "Python": python,
        "machine": platform.machine(),
        **versions(),
        "plugins": plugins or "none",
    }
