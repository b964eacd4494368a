"""What a file says is held to what it can be: its format, its digest, and the sizes it claims."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nnpatch_core import Outcome, Sites, _safetensors, activation_patching
from nnpatch_core.errors import CheckpointError, OutcomeError
from nnpatch_core.results import Baseline, Cells, Prompts, Screening, formats
from nnpatch_core.sites import Axis
from nnpatch_core.testing import tiny_api, tiny_model, traces
from tests.helpers.engines import of_rows
from tests.helpers.samples import ONE

SOURCE, TARGET, ANSWERS = ONE
#: A file's path, what reads it, and the error of its kind.
Written = tuple[Path, Callable[[Path], Any], type[Exception]]


def sweep(path: Path | None = None, model: Any = None, **options: Any) -> Outcome:
    return activation_patching(
        model or tiny_model("llama"), tiny_api(), Sites("q", seq_pos_type="each"),
        SOURCE, TARGET, *ANSWERS, checkpoint=path, progress=False, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def out() -> Outcome:
    return sweep()


def unfold(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["nnpatch"])
        return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def fold(path: Path, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write a file whose digest is right, whatever it holds."""
    header.pop("digest", None)
    header["digest"] = _safetensors._digest(header, tensors)
    save_file(tensors, path, metadata={"nnpatch": json.dumps(header)})


@pytest.fixture(params=["outcome", "checkpoint"])
def written(request: pytest.FixtureRequest, tmp_path: Path, out: Outcome) -> Written:
    """A file of each kind."""
    path = tmp_path / "f"
    if request.param == "outcome":
        out.save(path)
        return path, Outcome.load, OutcomeError
    sweep(path)
    return path, sweep, CheckpointError


# Digests ----------------------------------------------------------------------------------------


def test_another_number_is_damage(written: Written) -> None:
    path, read, error = written
    header, tensors = unfold(path)
    name = next(name for name in tensors if tensors[name].is_floating_point())
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, path, metadata={"nnpatch": json.dumps(header)})
    with pytest.raises(error, match=f"{path} is damaged"):
        read(path)


def test_another_word_is_damage(written: Written) -> None:
    path, read, error = written
    header, tensors = unfold(path)
    header["writer"] = "0.0.1"
    save_file(tensors, path, metadata={"nnpatch": json.dumps(header)})
    with pytest.raises(error, match=f"{path} is damaged"):
        read(path)


def test_a_file_without_a_digest_is_damage(written: Written) -> None:
    path, read, error = written
    header, tensors = unfold(path)
    del header["digest"]
    save_file(tensors, path, metadata={"nnpatch": json.dumps(header)})
    with pytest.raises(error, match=f"{path} is damaged"):
        read(path)


def test_names_types_and_shapes_are_in_the_digest() -> None:
    header, value = {"a": 1}, torch.arange(6, dtype=torch.int32)
    given = [
        {"x": value},
        {"y": value},
        {"x": value.view(2, 3)},
        {"x": value.view(torch.float32)},
        {"x": value[:3], "y": value[3:]},
    ]
    assert len({_safetensors._digest(header, tensors) for tensors in given}) == len(given)
    assert _safetensors._digest({"a": 2}, given[0]) != _safetensors._digest(header, given[0])


# Headers ----------------------------------------------------------------------------------------


def raw_header(path: Path, text: str) -> None:
    _, tensors = unfold(path)
    save_file(tensors, path, metadata={"nnpatch": text})


HEADERS = {
    "nested": "[" * 100_000 + "]" * 100_000,
    "nested in a mapping": '{"a":' * 5000 + "1" + "}" * 5000,
    "long number": "9" * 10_000,
    "half a surrogate": '{"format": "\\ud800"}',
    "list": "[]",
    "text": '"x"',
    "null": "null",
    "empty": "",
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers(written: Written, name: str) -> None:
    path, read, error = written
    raw_header(path, HEADERS[name])
    with pytest.raises(error, match=f"{path} is not an? (outcome|checkpoint)") as caught:
        read(path)
    assert str(caught.value).isprintable()


def test_a_file_of_an_earlier_format_tells_what_reads_it(written: Written) -> None:
    path, read, error = written
    header, tensors = unfold(path)
    current = header["format"]
    kind = current.rpartition(" ")[0]
    old = {**header, "format": f"{kind} 1", "identity": {"nnpatch-core": "0.0.7"}}
    for name in ("digest", "writer"):
        del old[name]
    save_file(tensors, path, metadata={"nnpatch": json.dumps(old)})
    told = f"its format is '{kind} 1', this version reads '{current}'; .*nnpatch-core"
    with pytest.raises(error, match=told):
        read(path)


def test_a_header_that_lacks_or_has_too_much(written: Written) -> None:
    path, read, error = written
    header, tensors = unfold(path)
    for name in set(header) - {"format", "digest", "writer"}:
        fold(path, {key: value for key, value in header.items() if key != name}, tensors)
        with pytest.raises(error, match=f"{path} is no whole"):
            read(path)
    fold(path, {**header, "more": 1}, tensors)
    with pytest.raises(error, match=f"{path} is no whole"):
        read(path)


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, out: Outcome) -> None:
    changes: tuple[dict[str, Any], ...] = (
        {"info": {}},
        {"metric": "no such"},
        {"kind": 5},
        {
            "baselines": {
                name: attrs.evolve(each, source=each.target) for name, each in out.baselines.items()
            }
        },
    )
    for changed in changes:
        with pytest.raises(OutcomeError, match="the outcome cannot be saved: "):
            attrs.evolve(out, **changed).save(tmp_path / "f")
        assert not (tmp_path / "f").exists()


# Sizes ------------------------------------------------------------------------------------------


def test_a_file_makes_no_tensor_that_is_far_larger_than_itself(
    tmp_path: Path, out: Outcome
) -> None:
    """A layer, a position and a head of 10,000 each would be 10^12 cells, of which 48 are swept."""
    path = tmp_path / "f"
    out.save(path)
    header, tensors = unfold(path)
    names = ["layer", "position", "head"]
    header["cells/0/axes"] = [[name, list(range(10_000))] for name in names]
    for kind in ("tokens", "mask"):
        for run in ("source", "target"):
            tensors[f"prompts/{run}_{kind}"] = torch.ones(1, 10_000, dtype=torch.int64)
    header["prompts/strings"] = {}
    fold(path, header, tensors)
    with pytest.raises(OutcomeError, match=r"f is no whole outcome: .*10000, 10000.* too large"):
        Outcome.load(path)


def test_no_tensor_is_made_that_is_far_larger_than_what_was_swept() -> None:
    axes = tuple(Axis(name, tuple(range(2000))) for name in ("layer", "position", "head"))
    index = torch.zeros(1, 3, dtype=torch.int64)
    flags = torch.zeros(1, 1, dtype=torch.bool)
    cells = Cells(axes, index, flags, flags, flags, flags[0])
    with pytest.raises(OutcomeError, match=r"\[2000, 2000, 2000\] for 1 numbers is too large"):
        cells.place(torch.zeros(1), 0.0)


def test_a_large_tensor_that_is_filled_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnpatch_core.results import parts

    monkeypatch.setattr(parts, "_NUMBERS", 8)
    axes = (Axis("layer", tuple(range(640))),)
    full = torch.arange(640)[:, None]
    flags = torch.zeros(640, 1, dtype=torch.bool)
    cells = Cells(axes, full, flags, flags, flags, flags[:, 0])
    assert cells.place(torch.ones(640), 0.0).sum() == 640

    def first(count: Any) -> Any:
        some = flags[:count]
        return Cells(axes, full[:count], some, some, some, some[:, 0])

    assert first(10).place(torch.ones(10), 0.0).sum() == 10
    with pytest.raises(OutcomeError, match="too large"):
        first(9).place(torch.ones(9), 0.0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cells/0/index", lambda index: index + 10),
        ("cells/0/index", lambda index: index - 10),
        ("cells/0/index", lambda index: index * 0),
        ("cells/0/index", lambda index: index.float()),
        ("cells/0/index", lambda index: index[:, :2]),
        ("raw/0/0", lambda raw: raw[:-1]),
        ("raw/0/0", lambda raw: raw.half()),
        ("cells/0/present", lambda flags: flags.byte()),
        ("cells/0/exact", lambda flags: torch.full_like(flags.byte(), 2).view(torch.bool)),
        ("baselines/0/source", lambda value: value * torch.nan),
        ("baselines/0/target", lambda value: value + torch.inf),
        ("baselines/0/target", lambda value: value[:0]),
        ("prompts/source_mask", lambda mask: mask.flip(1) * torch.tensor([[1, 1, 1, 0]])),
        ("prompts/target_mask", lambda mask: mask * 2),
        ("prompts/source_tokens", lambda tokens: -tokens),
        ("prompts/target_tokens", lambda tokens: tokens[:, :-1]),
    ],
)
def test_parts_that_do_not_fit(
    tmp_path: Path, out: Outcome, name: str, change: Callable[..., Any]
) -> None:
    path = tmp_path / "f"
    out.save(path)
    header, tensors = unfold(path)
    tensors[name] = change(tensors[name]).contiguous()
    fold(path, header, tensors)
    with pytest.raises(OutcomeError, match=f"{path} is no whole outcome"):
        Outcome.load(path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("done", lambda done: done + 1),
        ("done", lambda done: done.bool()),
        ("done", lambda done: done[:-1]),
        ("values/0", lambda values: values[:-1]),
        ("values/0", lambda values: values.double()),
        ("values/1", lambda values: values),
        ("x", lambda values: values),
    ],
)
def test_parts_of_a_checkpoint_that_do_not_fit(
    tmp_path: Path, name: str, change: Callable[..., Any]
) -> None:
    path = tmp_path / "f"
    sweep(path)
    header, tensors = unfold(path)
    tensors[name] = change(tensors.get(name, tensors["values/0"]).clone()).contiguous()
    fold(path, header, tensors)
    model = tiny_model("llama")
    told = f"{path} is no whole checkpoint"
    with traces(model) as seen, pytest.raises(CheckpointError, match=told):
        sweep(path, model)
    assert of_rows(seen) == []


@pytest.mark.parametrize("budget", ["", "x", "-1", "1.5", "0", "9" * 30, "²", None, 5])
def test_a_budget_that_is_none(tmp_path: Path, budget: str) -> None:
    path = tmp_path / "f"
    sweep(path)
    header, tensors = unfold(path)
    header["identity"]["memory_budget"] = budget
    fold(path, header, tensors)
    with pytest.raises(CheckpointError, match=f"{path} is no whole checkpoint"):
        sweep(path)


# A new field is one line ------------------------------------------------------------------------


@attrs.frozen(eq=False, repr=False)
class Wider(Outcome):
    """An outcome with two fields more: no other line is about them."""

    x: torch.Tensor = attrs.field(
        default=torch.zeros(1), metadata=formats.stored(formats.Array(formats.NUMBERS, ("batch",)))
    )
    words: str = attrs.field(default="", metadata=formats.stored(formats.TEXT))


@pytest.fixture
def wider(out: Any) -> Any:
    fields = {field.name: getattr(out, field.name) for field in attrs.fields(Outcome)}
    return Wider(**fields, x=torch.tensor([2.5]), words="mine")


def test_a_new_field_is_written_and_read(tmp_path: Path, wider: Any) -> None:
    wider.save(tmp_path / "f")
    again = Wider.load(tmp_path / "f")
    assert type(again) is Wider
    assert again.x.tolist() == [2.5]
    assert again.words == "mine"
    assert again["q"].equal(wider["q"])


def test_a_new_field_is_held_to_its_format(tmp_path: Path, wider: Any) -> None:
    path = tmp_path / "f"
    wider.save(path)
    header, tensors = unfold(path)
    changes = {
        "x is torch.float32 .2., and must be .1.": ({}, {"x": torch.zeros(2)}),
        "x is torch.int64 .1.": ({}, {"x": torch.zeros(1, dtype=torch.int64)}),
        "its words is 5": ({"words": 5}, {}),
    }
    for told, (words, changed) in changes.items():
        fold(path, {**header, **words}, {**tensors, **changed})
        with pytest.raises(OutcomeError, match=f"{path} is no whole outcome: {told}"):
            Wider.load(path)
    del tensors["x"]
    fold(path, header, tensors)
    with pytest.raises(OutcomeError, match="it lacks 'x'"):
        Wider.load(path)
    wider.save(path)
    with pytest.raises(OutcomeError, match="its header has an unknown 'words'"):
        Outcome.load(path)
    with pytest.raises(OutcomeError, match=r"cannot be saved: x is torch.float32 \[3\]"):
        attrs.evolve(wider, x=torch.zeros(3)).save(path)


def test_a_field_without_a_format_is_a_mistake() -> None:
    @attrs.frozen(eq=False)
    class Forgotten(Outcome):
        x: int = 5

    with pytest.raises(TypeError, match=r"Forgotten\.x has no format"):
        formats.formats(Forgotten)
    for kind in (Outcome, Cells, Prompts, Baseline, Screening):
        assert set(formats.formats(kind)) == {field.name for field in attrs.fields(kind)}


def test_names_are_those_of_all_fields(tmp_path: Path, out: Any) -> None:
    """Metrics may stand in another order in another field, and no field may lack one."""
    wide = {"b": out.raw[out.metric], "a": out.raw[out.metric]}
    runs = {"a": out.baseline, "b": attrs.evolve(out.baseline, target=out.baseline.target + 1)}
    crossed = attrs.evolve(out, raw=wide, baselines=runs, metric="a")
    crossed.save(tmp_path / "f")
    again = Outcome.load(tmp_path / "f")
    assert again.metrics == ("b", "a")
    assert again.baselines["b"].target.equal(runs["b"].target)
    told = r"its baselines has the metrics \['a'\], and others have \['b', 'a'\]"
    with pytest.raises(OutcomeError, match=told):
        attrs.evolve(crossed, baselines={"a": out.baseline}).save(tmp_path / "f")
