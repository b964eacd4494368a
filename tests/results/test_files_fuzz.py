"""A file that is not as it was written, by accident or by hand, is never believed.

Each mutant is refused by our own error or is what the file was, to the last bit; one whose digest
was made anew, so that only what it holds can tell, raises nothing else later either.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nnpatch_core import Outcome, Sites, _safetensors, activation_patching
from nnpatch_core.errors import CheckpointError, OutcomeError, PatchingError
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.samples import TWO

SOURCE, TARGET, ANSWERS = TWO
MODEL = tiny_model("llama")
METRICS = ["logit_difference", "answer_probability"]
#: How many mutants of each kind the tests try; `figures` tries more.
MUTANTS = 60


def sweep(path: Path | None = None, **options: Any) -> Outcome:
    sites = Sites(["q", "resid"], seq_pos_type="each")
    return activation_patching(
        MODEL, tiny_api(), sites, SOURCE, TARGET, *ANSWERS, checkpoint=path, progress=False,
        metric=METRICS, **options,
    )  # fmt: skip


def numbers(out: Outcome) -> torch.Tensor:
    """Each number of an outcome, to be compared bitwise."""
    return torch.cat([out.raw[metric][name].flatten() for metric in out.metrics for name in out])


def content(out: Outcome) -> list[str]:
    """All that an outcome holds, in words that are equal if it is the same."""
    tensors = [*out.raw.values(), {name: out.swept(name) for name in out}]
    return [repr({name: value.tolist() for name, value in each.items()}) for each in tensors] + [
        repr((out.kind, out.scale, out.metric, out.info, out.tokens, out.magnitude))
    ]


def unfold(path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["nnpatch"])
        return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def fold(path: Path, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write a file whose digest is right, whatever it holds."""
    if isinstance(header, dict):
        header.pop("digest", None)
        header = {**header, "digest": _safetensors._digest(header, tensors)}
    tensors = {name: each.contiguous().clone() for name, each in tensors.items()}
    save_file(tensors, path, metadata={"nnpatch": json.dumps(header)})


# Mutations --------------------------------------------------------------------------------------


def flip(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def grow(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data) + 1)
    return data[:place] + draw.randbytes(draw.randrange(1, 9)) + data[place:]


def blank(data: bytes, draw: random.Random) -> bytes:
    place, count = draw.randrange(len(data)), draw.randrange(1, 64)
    return data[:place] + bytes(len(data[place : place + count])) + data[place + count :]


def swap(data: bytes, draw: random.Random) -> bytes:
    one, two = sorted(draw.randrange(len(data)) for _ in range(2))
    return data[two:] + data[one:two] + data[:one]


def of_bytes(path: Path, draw: random.Random) -> None:
    data = draw.choice([flip, flip, flip, cut, grow, blank, swap])(path.read_bytes(), draw)
    path.write_bytes(data)


HOSTILE: list[Any] = [
    None, True, -1, 0, 10**30, 1.5, math.nan, math.inf, "", "x", "\ud800", "\x1b[31m", "0", [], {},
    [[]], [0], ["layer"], [["layer", [0]]], {"x": "y"}, "9" * 5000,
]  # fmt: skip


def places(value: Any, way: Any = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to everything inside a JSON value."""
    items = list(enumerate(value)) if isinstance(value, list) else []
    for key, inner in value.items() if isinstance(value, dict) else items:
        yield (*way, key)
        yield from places(inner, (*way, key))


def of_header(path: Path, draw: random.Random) -> None:
    header, tensors = unfold(path)
    header.pop("digest")
    way = draw.choice([each for each in places(header) if each != ("writer",)])
    owner = header
    for key in way[:-1]:
        owner = owner[key]
    action = draw.choice(["set", "set", "set", "remove", "again", "deep"])
    if action == "set":
        owner[way[-1]] = copy.deepcopy(draw.choice(HOSTILE))
    elif action == "remove":
        del owner[way[-1]]
    elif action == "again" and isinstance(owner, list):
        owner.insert(draw.randrange(len(owner) + 1), owner[way[-1]])
    elif action == "again":
        owner[draw.choice(["x", "q", "0", "99999", ""])] = owner[way[-1]]
    else:
        for _ in range(draw.choice([3, 400])):
            owner[way[-1]] = [owner[way[-1]]]
    fold(path, header, tensors)


def widened(value: torch.Tensor, draw: random.Random) -> torch.Tensor:
    return torch.cat([value, value[-1:]])


def shortened(value: torch.Tensor, draw: random.Random) -> torch.Tensor:
    return value[: draw.randrange(len(value))]


def flat(value: torch.Tensor, draw: random.Random) -> torch.Tensor:
    return value.flatten()


def folded(value: torch.Tensor, draw: random.Random) -> torch.Tensor:
    return value[None]


def of_another_kind(value: torch.Tensor, draw: random.Random) -> torch.Tensor:
    kinds = [torch.float32, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8]
    return value.to(draw.choice([kind for kind in [*kinds, torch.bool] if kind != value.dtype]))


def out_of_range(value: torch.Tensor, draw: random.Random) -> torch.Tensor:
    number = draw.choice([-1, 2, 100, 2**40])
    if value.dtype == torch.bool:
        return torch.full(value.shape, 2, dtype=torch.uint8).view(torch.bool)
    return torch.full_like(value, number % 256 if value.dtype == torch.uint8 else number)


def not_a_number(value: torch.Tensor, draw: random.Random) -> torch.Tensor:
    return torch.full_like(value, draw.choice([math.nan, math.inf]))


SHAPES = [widened, shortened, flat, folded, of_another_kind]


def of_tensors(path: Path, draw: random.Random, values: bool = True) -> None:
    header, tensors = unfold(path)
    name = draw.choice(sorted(tensors))
    action = draw.choice(["change"] * 5 + ["remove", "rename", "add"])
    if action == "change":
        value = tensors[name]
        changes = [*SHAPES]
        if values:
            changes += [not_a_number] if value.is_floating_point() else [out_of_range] * 3
        tensors[name] = draw.choice(changes)(value, draw)
    else:
        found = tensors[name] if action == "add" else tensors.pop(name)
        if action != "remove":
            tensors[draw.choice(["x", "values/9", "raw/9/0", "cells/9", ""])] = found
    fold(path, header, tensors)


def of_shapes(path: Path, draw: random.Random) -> None:
    of_tensors(path, draw, values=False)


# What becomes of them ---------------------------------------------------------------------------


def used(out: Outcome) -> tuple[str, bool, Any]:
    """Ask a loaded outcome for everything it has."""
    content(out)
    for name in out:
        for read in (out.elided, out.unread, out.exact, out.flat, out.patched, out.per_prompt):
            read(name)
        out.axes(name)
    for metric in out.metrics:
        out.for_metric(metric).strongest(3)
    out.to_dataframe(per_prompt=True)
    out.to_xarray()
    out.magnitudes().plot()
    out.agreement(out, top_k=1)
    [out.prompts.text(row) for row in range(len(out.prompts.target_tokens))]
    if out.screening is not None:
        out.screening.missed_at_most()
    return repr(out), out.estimated, out.baseline


def is_unclear(error: CheckpointError | OutcomeError, path: Path) -> bool:
    return str(path) not in str(error) or not str(error).isprintable() or len(str(error)) > 600


def outcomes(folder: Path, mutate: Callable[..., Any], count: int) -> dict[str, Any]:
    """How many mutants were refused, loaded as what they were, as something else; raw errors."""
    path = folder / "out"
    first = sweep()
    first.save(path)
    whole, expected = path.read_bytes(), content(first)
    found: dict[str, Any] = {
        "refused": 0,
        "the same": 0,
        "something else": 0,
        "unclear": [],
        "raw": [],
    }
    for seed in range(count):
        path.write_bytes(whole)
        mutate(path, random.Random(seed))
        try:
            out = Outcome.load(path)
            found["the same" if content(out) == expected else "something else"] += 1
            used(out)
        except OutcomeError as error:
            found["refused"] += 1
            found["unclear"] += [str(error)] if is_unclear(error, path) else []
        except PatchingError:  # by what was asked of it
            pass
        except Exception as error:
            found["raw"].append((seed, repr(error)))
    return found


def checkpoints(folder: Path, mutate: Callable[..., Any], count: int) -> dict[str, Any]:
    """How many mutants were refused, resumed right, resumed wrong; raw errors."""
    path, half = folder / "checkpoint", folder / "half"
    expected = numbers(sweep(half))
    header, tensors = unfold(half)
    # Something is left to be done, so that a resumed sweep runs.
    tensors["done"][::2] = 0
    fold(half, header, tensors)
    whole = half.read_bytes()
    torch.testing.assert_close(numbers(sweep(half)), expected)
    found: dict[str, Any] = {
        "refused": 0,
        "the same": 0,
        "something else": 0,
        "unclear": [],
        "raw": [],
    }
    for seed in range(count):
        path.write_bytes(whole)
        mutate(path, random.Random(seed))
        try:
            same = torch.allclose(numbers(sweep(path)), expected, rtol=1e-5, atol=1e-6)
            found["the same" if same else "something else"] += 1
        except CheckpointError as error:
            found["refused"] += 1
            found["unclear"] += [str(error)] if is_unclear(error, path) else []
        except Exception as error:
            found["raw"].append((seed, repr(error)))
    return found


@pytest.mark.parametrize("mutate", [of_bytes, of_header, of_tensors])
def test_outcomes(tmp_path: Path, mutate: Callable[..., Any]) -> None:
    found = outcomes(tmp_path, mutate, MUTANTS)
    assert (found["raw"], found["unclear"]) == ([], [])
    # With its digest made anew, another text for a token, say, is another outcome.
    assert found["something else"] == 0 or mutate is not of_bytes
    assert found["refused"] > MUTANTS / 2


@pytest.mark.parametrize("mutate", [of_bytes, of_header, of_shapes])
def test_checkpoints(tmp_path: Path, mutate: Callable[..., Any]) -> None:
    found = checkpoints(tmp_path, mutate, MUTANTS)
    assert (found["raw"], found["unclear"]) == ([], [])
    assert found["something else"] == 0
    assert found["refused"] > MUTANTS / 2
