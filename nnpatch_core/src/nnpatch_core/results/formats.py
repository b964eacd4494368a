"""Formats: how each field of an outcome stands in a file.

A field names its format in its metadata, `attrs.field(metadata=stored(...))`, and nowhere else:
what is written, what is read and what a file is held to are all derived from it. A file is a flat
mapping from the way to a value, such as `prompts/target_mask` or `raw/0/1`, to the value: JSON in
the header or a tensor.

Names of sites and metrics are the user's and may hold anything, a slash too. So the header lists
them, and a way has their numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import attrs
import torch

from nnpatch_core._printable import shown
from nnpatch_core.errors import OutcomeError

#: `"sites"` and `"metrics"`, each to the names of an outcome; `"means"`, to one if it has no more.
Names: TypeAlias = Mapping[str, Sequence[str]]
NUMBERS = (torch.float32, torch.float64)
IDS = (torch.int32, torch.int64)
PLACES = (torch.int64,)
FLAGS = (torch.bool,)
#: Sizes that each site name has of its own.
_OF_A_SITE = ("cells", "axes")


class Format(Protocol):
    """A format takes a value apart into what stands in a file, and puts it together again."""

    def leaves(self, way: str, names: Names) -> Iterator[tuple[str, Json | Array]]:
        """The ways to all that stands in the file, with what stands there."""
        ...

    def apart(self, value: Any, way: str, names: Names) -> Iterator[tuple[str, Any]]:
        """The ways, and what to write there.

        Raises:
            OutcomeError: the value has not the names that it should have.
        """
        ...

    def together(self, content: Mapping[str, Any], way: str, names: Names) -> Any:
        """The value of a file's content, whose leaves are right."""
        ...


@attrs.frozen
class Json:
    """JSON in the header.

    Args:
        is_right: tells whether JSON can be what was written.
        packed: makes JSON of a value.
        unpacked: makes the value of JSON.
    """

    is_right: Callable[[Any], bool]
    packed: Callable[[Any], Any] = lambda value: value
    unpacked: Callable[[Any], Any] = lambda value: value

    def leaves(self, way: str, names: Names) -> Iterator[tuple[str, Json | Array]]:
        """Itself."""
        yield way, self

    def apart(self, value: Any, way: str, names: Names) -> Iterator[tuple[str, Any]]:
        """The value as JSON."""
        yield way, self.packed(value)

    def together(self, content: Mapping[str, Any], way: str, names: Names) -> Any:
        """The value of the JSON there."""
        return self.unpacked(content[way])


@attrs.frozen
class Array:
    """A tensor.

    Args:
        kinds: the dtypes that it may have.
        sizes: the names of its sizes; two tensors agree on the sizes that they both have.
    """

    kinds: tuple[torch.dtype, ...]
    sizes: tuple[str, ...]

    def of_site(self, number: int) -> Array:
        """The same, with the sizes of one site name, by its number."""
        own = [f"{size}/{number}" if size in _OF_A_SITE else size for size in self.sizes]
        return Array(self.kinds, tuple(own))

    def leaves(self, way: str, names: Names) -> Iterator[tuple[str, Json | Array]]:
        """Itself."""
        yield way, self

    def apart(self, value: Any, way: str, names: Names) -> Iterator[tuple[str, Any]]:
        """The tensor."""
        yield way, value

    def together(self, content: Mapping[str, Any], way: str, names: Names) -> Any:
        """The tensor there."""
        return content[way]


@attrs.frozen
class Part:
    """An object of an attrs class, each field as its own format says."""

    kind: type

    def leaves(self, way: str, names: Names) -> Iterator[tuple[str, Json | Array]]:
        """Those of its fields."""
        for name, each in formats(self.kind).items():
            yield from each.leaves(_below(way, name), names)

    def apart(self, value: Any, way: str, names: Names) -> Iterator[tuple[str, Any]]:
        """Its fields, taken apart."""
        for name, each in formats(self.kind).items():
            yield from each.apart(getattr(value, name), _below(way, name), names)

    def together(self, content: Mapping[str, Any], way: str, names: Names) -> Any:
        """An object of its fields."""
        fields = formats(self.kind).items()
        return self.kind(
            **{name: each.together(content, _below(way, name), names) for name, each in fields}
        )


@attrs.frozen
class IfMeans:
    """An object of an attrs class in outcomes of means alone; None in all others."""

    part: Part

    def leaves(self, way: str, names: Names) -> Iterator[tuple[str, Json | Array]]:
        """Whether there is one, and those of its fields."""
        yield _below(way, "given"), FLAG
        if names["means"]:
            yield from self.part.leaves(way, names)

    def apart(self, value: Any, way: str, names: Names) -> Iterator[tuple[str, Any]]:
        """Whether there is one, and its fields."""
        yield _below(way, "given"), value is not None
        if value is not None:
            yield from self.part.apart(value, way, names)

    def together(self, content: Mapping[str, Any], way: str, names: Names) -> Any:
        """The object, or None."""
        return self.part.together(content, way, names) if names["means"] else None


@attrs.frozen
class Each:
    """A mapping from the names of sites, or of metrics, to values of one format.

    Args:
        of: `"sites"` or `"metrics"`.
        value: the format of each value.
    """

    of: str
    value: Format

    def leaves(self, way: str, names: Names) -> Iterator[tuple[str, Json | Array]]:
        """Those of its values, by the numbers of the names."""
        for number in range(len(names[self.of])):
            for below, leaf in self.value.leaves(_below(way, number), names):
                if self.of == "sites" and isinstance(leaf, Array):
                    leaf = leaf.of_site(number)
                yield below, leaf

    def apart(self, value: Any, way: str, names: Names) -> Iterator[tuple[str, Any]]:
        """Its values, taken apart."""
        if set(value) != set(names[self.of]):
            raise OutcomeError(
                f"its {way} has the {self.of} {shown(list(value))}, and others have "
                f"{shown(list(names[self.of]))}"
            )
        for number, name in enumerate(names[self.of]):
            yield from self.value.apart(value[name], _below(way, number), names)

    def together(self, content: Mapping[str, Any], way: str, names: Names) -> Any:
        """A mapping of its values."""
        return {
            name: self.value.together(content, _below(way, number), names)
            for number, name in enumerate(names[self.of])
        }


def stored(value: Format) -> Mapping[str, Format]:
    """The metadata of a field that is written in this format."""
    return {"format": value}


def formats(kind: type) -> dict[str, Format]:
    """Field to format, of an attrs class.

    Raises:
        TypeError: a field has none; so a field that is never written is a mistake.
    """
    fields = attrs.fields(kind)
    for field in fields:
        if "format" not in field.metadata:
            raise TypeError(f"{kind.__name__}.{field.name} has no format: declare it by stored(…)")
    return {field.name: field.metadata["format"] for field in fields}


def record(kind: type) -> Json:
    """The format of None, or of an attrs class as one JSON object: its fields are all `Json`."""
    fields: dict[str, Any] = formats(kind)

    def is_right(value: Any) -> bool:
        if value is None:
            return True
        if not isinstance(value, dict) or set(value) != set(fields):
            return False
        return all(each.is_right(value[name]) for name, each in fields.items())

    def packed(value: Any) -> Any:
        if value is None:
            return None
        return {name: each.packed(getattr(value, name)) for name, each in fields.items()}

    def unpacked(value: Any) -> Any:
        if value is None:
            return None
        return kind(**{name: each.unpacked(value[name]) for name, each in fields.items()})

    return Json(is_right, packed, unpacked)


def choice(*values: str) -> Json:
    """The format of one of some texts."""
    return Json(lambda value: value in values)


def is_text(value: Any) -> bool:
    """Tell whether JSON is a text."""
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    """Tell whether JSON is a number of things."""
    return type(value) is int and value >= 0


def is_size(value: Any) -> bool:
    """Tell whether JSON is a size of a value; it is nan where a patched run gave that."""
    return type(value) in (int, float) and not value < 0


def are_texts(value: Any) -> bool:
    """Tell whether JSON is an object of texts."""
    return isinstance(value, dict) and all(map(is_text, value.values()))


def are_names(value: Any) -> bool:
    """Tell whether JSON is a list of different texts, at least one."""
    whole = isinstance(value, list) and bool(value) and all(map(is_text, value))
    return whole and len(set(value)) == len(value)


def are_strings(value: Any) -> bool:
    """Tell whether JSON is an object of texts by token ids."""
    return are_texts(value) and all(map(_is_id, value))


def are_columns(value: Any) -> bool:
    """Tell whether JSON is an object of lists of equal length, each of single values."""
    if not isinstance(value, dict) or not all(isinstance(its, list) for its in value.values()):
        return False
    lengths = {len(its) for its in value.values()}
    return len(lengths) <= 1 and all(as_json(one) is one for its in value.values() for one in its)


def as_json(value: Any) -> Any:
    """A single value as JSON has it; anything else is a text."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float and math.isfinite(value):
        return value
    return None if type(value) is float else str(value)


TEXT = Json(is_text)
FLAG = Json(lambda value: type(value) is bool)
COUNT = Json(is_count)
SIZE = Json(is_size)
#: Texts by token ids.
STRINGS = Json(
    are_strings,
    packed=lambda strings: {str(token): text for token, text in strings.items()},
    unpacked=lambda strings: {int(token): text for token, text in strings.items()},
)
#: Columns of a table; what JSON has no word for is written as a text.
COLUMNS = Json(
    are_columns,
    packed=lambda columns: {name: list(map(as_json, its)) for name, its in columns.items()},
    unpacked=lambda columns: {name: tuple(its) for name, its in columns.items()},
)
#: Texts by name, the model's among them.
INFO = Json(lambda value: are_texts(value) and "model" in value, packed=dict)


def _is_id(token: str) -> bool:
    return token.isascii() and token.isdigit() and len(token) < 20 and str(int(token)) == token


def _below(way: str, name: str | int) -> str:
    return f"{way}/{name}" if way else str(name)
