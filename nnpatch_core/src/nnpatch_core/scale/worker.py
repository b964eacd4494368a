"""A worker: a process that has the model, and measures shards of sweeps with it."""

from __future__ import annotations

import pickle
import platform
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import torch

from nnpatch_core._models import as_nnsight, module_of, with_weights
from nnpatch_core.errors import PatchingError
from nnpatch_core.memory import memory_budget
from nnpatch_core.scale.shards import measure_shard
from nnpatch_core.sweep import checksum, versions

#: The name of a checkpoint in a worker's own folder, which no message may show.
_FILE = "shard"


@attrs.frozen
class About:
    """A worker, as far as workers must not differ.

    Args:
        parts: what decides on numbers, by a name that people know.
        host: the machine.
        budget: bytes that sweeps may use there, if it were alone.
    """

    parts: Mapping[str, str]
    host: str
    budget: int


@attrs.frozen
class Sent:
    """A result on its way: the value, or the error in its place, and what was warned of.

    Args:
        value: the result.
        error: why there is none.
        warned: category and words of each warning.
    """

    value: Any
    error: Exception | None
    warned: tuple[tuple[type[Warning], str], ...] = ()


class Worker:
    """The model in a process of its own.

    Args:
        load: a pickled function that gives the model; it runs once.
        threads: of torch.
    """

    def __init__(self, load: bytes, threads: int) -> None:
        self._threads = threads
        self._known = 0.0
        self._begun: float | None = None
        torch.set_num_threads(threads)
        self._loaded = _sent(lambda: as_nnsight(_with_weights(pickle.loads(load)())))
        self._model = self._loaded.value

    def about(self) -> Sent:
        """`About`, or the error with which loading ended."""
        if self._loaded.error is not None:
            return self._loaded
        return _sent(self._told)

    def measure(
        self, sweep: Any, given: Mapping[str, Any], share: str, before: bytes | None
    ) -> Sent:
        """The checkpoint of a shard, as bytes.

        Args:
            sweep: the function.
            given: its arguments by name, but for the model.
            share: which shard.
            before: a checkpoint of what was measured before; None if nothing was.
        """
        self._begun, self._known = None, 0.0

        def run() -> bytes:
            with self._file(before) as path:
                measure_shard(
                    sweep, self._model, shard=share, checkpoint=path, told=self._tell, **given
                )
                return path.read_bytes()

        return _sent(run)

    def finish(self, sweep: Any, given: Mapping[str, Any], measured: bytes) -> Sent:
        """The result of a sweep of which all is measured.

        Args:
            sweep: the function.
            given: its arguments by name, but for the model.
            measured: the checkpoint.
        """

        def run() -> Any:
            with self._file(measured) as path:
                return sweep(self._model, checkpoint=path, **given)

        return _sent(run)

    def progress(self) -> float:
        """How much of the shard at hand is measured, from 0 to 1."""
        return self._known

    def _tell(self, known: float) -> None:
        # What other shards have counts from the first moment on.
        self._begun = known if self._begun is None else self._begun
        self._known = (known - self._begun) / (1 - self._begun) if self._begun < 1 else 1.0

    @contextmanager
    def _file(self, content: bytes | None) -> Iterator[Path]:
        # Torch keeps the number of threads of each thread, and Ray calls from several.
        torch.set_num_threads(self._threads)
        with TemporaryDirectory() as folder:
            path = Path(folder, _FILE)
            if content is not None:
                path.write_bytes(content)
            yield path

    def _told(self) -> About:
        model = module_of(self._model)
        dtypes = dict.fromkeys(str(weight.dtype) for weight in model.parameters())
        parts = {
            "model": type(model).__name__,
            "weights": checksum(model),
            "dtype": ", ".join(dtypes),
            "device": ", ".join(dict.fromkeys(each.device.type for each in model.parameters())),
            "threads": str(self._threads),
            **releases(),
        }
        return About(parts, socket.gethostname(), memory_budget(None, model))


def releases() -> dict[str, str]:
    """The releases that numbers depend on, that of Python among them."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"Python": python, "machine": platform.machine(), **versions()}


def _with_weights(model: Any) -> Any:
    with_weights(model)
    return model


def _sent(make: Callable[[], Any]) -> Sent:
    """What a function gives, raises and warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        value, error = None, None
        try:
            value = make()
        except Exception as cause:
            error = _plain(cause)
    warned = tuple(dict.fromkeys((each.category, str(each.message)) for each in caught))
    return Sent(value, error, warned)


def _plain(error: Exception) -> Exception:
    """An error that travels: our own as it is, without the frames that hold the model."""
    if isinstance(error, PatchingError):
        return error.with_traceback(None)
    return RuntimeError(f"{type(error).__name__}: {error}")
