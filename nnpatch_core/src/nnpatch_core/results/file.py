"""An outcome as one safetensors file: tensors, and the rest as JSON in its header.

Nothing here names a field, but for the two whose keys are the names of sites and of metrics: the
fields name their formats; see `formats`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from nnpatch_core._bytes import bytes_of
from nnpatch_core._files import check_file
from nnpatch_core._parts import clean_up
from nnpatch_core._printable import shown
from nnpatch_core._safetensors import read_file, write_file
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.formats import FLAGS, Array, Json, Names, Part, are_names
from nnpatch_core.results.whole import check_whole

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome

_Outcome = TypeVar("_Outcome", bound="Outcome")

FORMAT = "nnpatch outcome 5"
#: An older format, and what files of it lack, as it was then.
_OLDER: Mapping[str, Mapping[str, Any]] = {"nnpatch outcome 4": {"prompts/answers": {}}}


def write(path: str | os.PathLike[str], outcome: Outcome) -> None:
    """Write an outcome, whole or not at all.

    Raises:
        OutcomeError: it cannot be written, or not be read again; a file that was there is as it
            was.
    """
    names = {"sites": list(outcome.cells), "metrics": list(outcome.raw)}
    try:
        means = ["means"] if outcome.moments is not None else []
        content = dict(Part(type(outcome)).apart(outcome, "", {**names, "means": means}))
        tensors = {way: value for way, value in content.items() if isinstance(value, Tensor)}
        rest = {way: value for way, value in content.items() if way not in tensors}
        header = {"format": FORMAT, **names, **rest}
        _check_content(header, tensors, type(outcome))
        check_whole(outcome)
    except OutcomeError as error:
        raise OutcomeError(f"the outcome cannot be saved: {error}") from error
    clean_up(check_file(path, OutcomeError).parent)
    write_file(path, header, tensors, OutcomeError)


def read(path: str | os.PathLike[str], kind: type[_Outcome]) -> _Outcome:
    """Read an outcome of a class that `write` wrote.

    Raises:
        OutcomeError: the file is not an outcome, not of this version, damaged, or its parts do not
            fit together.
    """
    header, tensors = read_file(path, FORMAT, "an outcome", OutcomeError, older=tuple(_OLDER))
    try:
        lacking = _OLDER.get(header["format"], {})
        if lacking.keys() & header.keys():
            raise OutcomeError(f"a file of its format has no {shown(min(lacking))}")
        header = {**header, **lacking}
        names = _check_content(header, tensors, kind)
        outcome: _Outcome = Part(kind).together({**header, **tensors}, "", names)
        check_whole(outcome)
    except OutcomeError as error:
        raise OutcomeError(f"{os.fspath(path)} is no whole outcome: {error}") from error
    return outcome


def _check_content(header: Mapping[str, Any], tensors: Mapping[str, Tensor], kind: type) -> Names:
    """Hold a file's content to the formats of a class's fields, and return its names.

    Raises:
        OutcomeError: something is lacking or unknown, or is not of its format.
    """
    for name in ("sites", "metrics"):
        if name not in header:
            raise OutcomeError(f"its header lacks {name}")
        if not are_names(header[name]):
            raise OutcomeError(f"its {name} is {shown(header[name])}")
    means = ["means"] if header.get("moments/given") is True else []
    names = {"sites": header["sites"], "metrics": header["metrics"], "means": means}
    leaves = dict(Part(kind).leaves("", names))
    texts = {way: leaf for way, leaf in leaves.items() if isinstance(leaf, Json)}
    arrays = {way: leaf for way, leaf in leaves.items() if isinstance(leaf, Array)}
    _check_ways("its header", header, {"format", "sites", "metrics", *texts})
    for way, text in texts.items():
        if not text.is_right(header[way]):
            raise OutcomeError(f"its {way} is {shown(header[way])}")
    _check_ways("it", tensors, set(arrays))
    sizes: dict[str, int] = {}
    for way, array in arrays.items():
        _check_tensor(way, tensors[way], array, sizes)
    return names


def _check_ways(what: str, content: Mapping[str, Any], ways: set[str]) -> None:
    lacking, unknown = sorted(ways - set(content)), sorted(set(content) - ways)
    if lacking:
        raise OutcomeError(f"{what} lacks {shown(', '.join(lacking))}")
    if unknown:
        raise OutcomeError(f"{what} has an unknown {shown(', '.join(unknown))}")


def _check_tensor(way: str, tensor: Tensor, array: Array, sizes: dict[str, int]) -> None:
    """Hold a tensor to its dtypes and sizes; sizes that are met first are put into `sizes`."""
    shape = list(tensor.shape)
    wanted = [sizes.get(size, size.partition("/")[0]) for size in array.sizes]
    fits = len(shape) == len(wanted) and all(
        sizes.setdefault(size, number) == number
        for size, number in zip(array.sizes, shape, strict=True)
    )
    if tensor.dtype not in array.kinds or not fits:
        must = ", ".join(map(str, wanted))
        raise OutcomeError(f"{way} is {tensor.dtype} {shape}, and must be [{must}]")
    # A file's bytes may be others than those of true and false.
    if array.kinds == FLAGS and tensor.numel() and int(bytes_of(tensor).max()) > 1:
        raise OutcomeError(f"{way} holds neither true nor false")
