"""Functions, results, errors and warnings, as they travel between processes."""

from __future__ import annotations

import io
import pickle
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import cloudpickle
import torch
from torch import nn

from nnpatch_core._printable import shown
from nnpatch_core.errors import CheckpointWarning, PatchingError, WorkerError

#: Bytes of numbers that `load` may have with it: more are weights, which are to be read in place.
_LARGEST = 2**24
#: Lines of another process's traceback that an error shows.
_LINES = 12
#: Stands for a worker's own file, which the user does not know.
FILE = "the checkpoint of these workers"
#: What Python itself does not show, but in a script's own lines.
_UNSHOWN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


@attrs.frozen
class Sent:
    """A result on its way: the value, or the error in its place, and what was warned of.

    Args:
        value: the result.
        error: why there is none.
        exhausted: whether memory ran out.
        warned: category and words of each warning.
        kept: the checkpoint of what was measured, also where an error ended it; None if there is
            none.
    """

    value: Any
    error: Exception | None = None
    exhausted: bool = False
    warned: tuple[tuple[type[Warning], str], ...] = ()
    kept: bytes | None = None


def sent(make: Callable[[], Any]) -> Sent:
    """The value of a function, or its error, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for category in _UNSHOWN:
            warnings.simplefilter("ignore", category)
        value, error, exhausted = None, None, False
        try:
            value = make()
        except Exception as cause:
            exhausted = isinstance(cause, torch.OutOfMemoryError | MemoryError)
            error = _travelling(cause)
    warned = tuple(dict.fromkeys((each.category, str(each.message)) for each in caught))
    return Sent(value, error, exhausted, warned)


def renamed(found: Sent, path: Path, name: str | None) -> Sent:
    """A result as it was sent, with a file's name in place of that which it has in a worker.

    Where the worker has no room for it, that is told of the worker: the user's own file lies
    elsewhere.

    Args:
        found: what was sent.
        path: the file in the worker.
        name: how the user knows it; None if there is none, and then nothing is told of it.
    """
    unwritten = f"{path} could not be written"
    own = f"the file of a worker, in {path.parent.parent} (TMPDIR), could not be written"

    def told(words: str) -> str:
        words = words.replace(f"the checkpoint {unwritten}", own).replace(unwritten, own)
        return words.replace(str(path), name or FILE)

    error = found.error
    if isinstance(error, PatchingError):
        error.args = tuple(told(part) if isinstance(part, str) else part for part in error.args)
    warned = tuple(
        (category, told(words))
        for category, words in found.warned
        if name or not (issubclass(category, CheckpointWarning) and str(path) in words)
    )
    return attrs.evolve(found, error=error, warned=warned)


def _travelling(error: Exception) -> Exception:
    """An error that travels: as it is, if it can, without the frames that hold the model."""
    words = f"{type(error).__name__}: {error}"
    if not isinstance(error, PatchingError):
        lines = "".join(traceback.format_exception(error)).splitlines()[-_LINES:]
        error.add_note("\n".join(["In a worker:", *lines]))
    error = error.with_traceback(None)
    try:
        pickle.loads(cloudpickle.dumps(error))
    except Exception:
        return RuntimeError(words)
    return error


class _Weighing(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles, and refuses weights before it copies them."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._left = _LARGEST

    def persistent_id(self, thing: Any) -> None:
        own: list[torch.Tensor] = []
        if isinstance(thing, nn.Module):
            own = [*thing.parameters(), *thing.buffers()]
        elif isinstance(thing, torch.Tensor):
            own = [thing]
        # A module's tensors count twice, which makes no difference to what is refused.
        self._left -= sum(each.nbytes for each in own)
        if self._left < 0:
            raise _HeavyError(type(thing).__name__)


class _HeavyError(Exception):
    """A function that holds weights is pickled; the text is their type."""


def function_sent(load: Callable[[], Any]) -> bytes:
    """A function as it is sent.

    Raises:
        WorkerError: it cannot be, or it holds weights.
    """
    file = io.BytesIO()
    try:
        _Weighing(file).dump(load)
    except _HeavyError as error:
        raise WorkerError(
            f"load holds weights ({error}), which would be sent to each worker: let it read the "
            "model there, such as by from_pretrained"
        ) from None
    except Exception as error:
        raise WorkerError(f"load cannot be sent to workers: {error}") from error
    return file.getvalue()


def call_sent(sweep: Callable[..., Any], given: Mapping[str, Any]) -> bytes:
    """A call as it is sent.

    Raises:
        WorkerError: an argument cannot be, and which one.
    """
    try:
        content: bytes = cloudpickle.dumps((sweep, dict(given)))
    except Exception as error:
        for name, value in given.items():
            try:
                cloudpickle.dumps(value)
            except Exception as cause:
                raise WorkerError(
                    f"{name}= cannot be sent to workers ({cause}), got {shown(value)}"
                ) from cause
        raise WorkerError(f"the call cannot be sent to workers: {error}") from error
    return content
