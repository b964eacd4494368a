"""`nnpatch new-adapter`: which package it writes, and what it leaves alone."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from nnpatch_core.testing import CHECKS, causal_model_types, tiny_model
from tests.helpers.commands import (
    COMPONENTS,
    Command,
    Misused,
    Refused,
    check_json,
    components_json,
    listing,
    rows_of,
    statuses,
)

#: Of a model with one layer the checks take a third of the time; the first test has a whole one.
ONE_LAYER = ("--config", "num_hidden_layers=1")
FILES = [
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "src/nnpatch_gpt2/__init__.py",
    "src/nnpatch_gpt2/py.typed",
    "tests/test_nnpatch_gpt2.py",
]


def written(folder: Path, name: str) -> str:
    return (folder / f"src/nnpatch_{name}/__init__.py").read_text(encoding="utf-8")


def readme(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_package_in_the_current_folder(
    tmp_path: Path, nnpatch: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = nnpatch("new-adapter", "gpt2", "--model-type", "gpt2")
    assert (done.code, done.err) == (0, "")
    assert [path for path in listing(tmp_path) if Path(path).is_file()] == sorted(
        f"nnpatch-gpt2/{path}" for path in FILES
    )
    title, *lines = done.lines
    assert title == "nnpatch-gpt2, with the adapter Gpt2 for model type gpt2:"
    files, lines = lines[: len(FILES)], lines[len(FILES) :]
    assert files == [f"  nnpatch-gpt2/{path}" for path in FILES]
    assert lines[0] == f"Read off the model: {', '.join(COMPONENTS)}."
    assert lines[1] == f"It passes the {len(CHECKS)} checks of the kit that apply to it."
    assert lines[2] == "Next: pip install -e 'nnpatch-gpt2[test]' && pytest nnpatch-gpt2"
    assert len(lines) == 3


def test_package_elsewhere_as_json(tmp_path: Path, nnpatch: Command) -> None:
    folder = tmp_path / "deep" / "down"
    done = nnpatch(
        "new-adapter", "My_GPT2", "--model-type", "gpt2", "--output", folder, "--json", *ONE_LAYER
    )
    assert (done.code, done.err) == (0, "")
    assert done.json == {
        "distribution": "nnpatch-my-gpt2",
        "adapter": "MyGpt2",
        "files": [str(folder / path.replace("_gpt2", "_my_gpt2")) for path in FILES],
        "components": COMPONENTS,
        "missing": {},
        "failed": {},
    }
    assert all(Path(path).is_file() for path in done.json["files"])
    assert 'name="MyGpt2",\n    model_types=("gpt2",)' in written(folder, "my_gpt2")


def test_written_adapter_passes_the_checks(
    tmp_path: Path, nnpatch: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another way than the command's own: the module is imported and checked."""
    folder = tmp_path / "package"
    code = nnpatch(
        "new-adapter", "neox", "--model-type", "gpt_neox", "--output", folder, *ONE_LAYER
    ).code
    assert code == 0
    monkeypatch.syspath_prepend(str(folder / "src"))
    try:
        found = check_json(nnpatch, "nnpatch_neox:Neox")
        assert set(statuses(found["models"]["gpt_neox"]).values()) == {"passed"}
        shown = components_json(nnpatch, "gpt_neox", "--adapter", "nnpatch_neox:Neox")
        assert list(rows_of(shown["kinds"][0])) == COMPONENTS
    finally:
        sys.modules.pop("nnpatch_neox", None)


@pytest.mark.parametrize("make", ["empty folder", "full folder", "file"])
def test_what_exists_is_left_as_it_is(tmp_path: Path, refused: Refused, make: str) -> None:
    target = tmp_path / "nnpatch-gpt2"
    if make == "file":
        target.write_text("mine", encoding="utf-8")
    else:
        target.mkdir()
    if make == "full folder":
        (target / "pyproject.toml").write_text("mine", encoding="utf-8")
    before = listing(tmp_path)
    refused(
        *("new-adapter", "gpt2", "--model-type", "gpt2", "--output", target),
        parts=[str(target), "exists already"],
    )
    assert listing(tmp_path) == before
    for path in (target, target / "pyproject.toml"):
        if path.is_file():
            assert path.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    "name", ["", "!!", "3llamas", "none", "é", "a/b", "../a", "a'b", "-", "nnpatch-", "a--b!"]
)
def test_name_that_makes_no_package(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refused("new-adapter", "--model-type", "gpt2", "--", name, parts=[repr(name), "letters"])
    assert listing(tmp_path) == []


@pytest.mark.parametrize("name", ["core", "nnpatch-core"])
def test_name_of_the_core(tmp_path: Path, refused: Refused, name: str) -> None:
    refused("new-adapter", name, "--model-type", "gpt2", "--output", tmp_path / "new")
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("model_type", "like"), [("lama", "llama"), ("gpt-2", "gpt2"), ("zzzzzzzz", "llama")]
)
def test_unknown_model_type(tmp_path: Path, refused: Refused, model_type: str, like: str) -> None:
    arguments = ["new-adapter", "new", "--model-type", model_type]
    line = refused(*arguments, "--output", tmp_path / "new", parts=[repr(model_type), like])
    assert len(line) < 250
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("model_type", "settings", "parts"),
    [
        ("llama", ["hidden_size=4096"], ["'llama'", "parameters", "at most"]),
        ("llama", ["hidden_act=nothing"], ["no tiny model of type 'llama'", "nothing"]),
        (
            "llama",
            ["num_hidden_layers=many"],
            ["no tiny model of type 'llama'", "num_hidden_layers"],
        ),
        ("llama", ["num_hidden_layers=0"], ["no list of modules that run one after the other"]),
        ("xlnet", [], ["no list of modules that run one after the other"]),
        ("xmod", [], ["does not run on plain tokens", "language"]),
    ],
)
def test_model_of_which_there_is_no_tiny_one(
    tmp_path: Path, refused: Refused, model_type: str, settings: list[str], parts: list[str]
) -> None:
    if model_type not in causal_model_types():
        pytest.skip(f"this transformers has no {model_type}")
    given = [part for setting in settings for part in ("--config", setting)]
    arguments = ["new-adapter", "new", "--model-type", model_type, *given]
    refused(*arguments, "--output", tmp_path / "new", parts=parts)
    assert listing(tmp_path) == []


def test_settings_of_the_tiny_model(
    tmp_path: Path, nnpatch: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, written = [], []

    def tiny(model_type: str, **settings: Any) -> Any:
        made.append((model_type, settings))
        return tiny_model(model_type, **settings)

    def write(*arguments: Any) -> Any:
        written.append(arguments[-1])
        return []

    monkeypatch.setattr("nnpatch_core.cli.models.tiny_model", tiny)
    monkeypatch.setattr("nnpatch_core.cli.new_adapter.write_package", write)
    given = ["num_hidden_layers=2", "hidden_act=relu", "attention_bias=true", "pad_token_id=null"]
    done = nnpatch(
        *("new-adapter", "new", "--model-type", "llama", "--output", tmp_path / "new", "--json"),
        *(part for setting in given for part in ("--config", setting)),
    )
    assert done.code == 0
    expected = {
        "num_hidden_layers": 2,
        "hidden_act": "relu",
        "attention_bias": True,
        "pad_token_id": None,
    }
    assert made == [("llama", expected)]
    # The tests of the package are to have the same model.
    assert written == [expected]


def test_settings_change_what_is_read(tmp_path: Path, nnpatch: Command) -> None:
    arguments = ["new-adapter", "new", "--model-type", "granite", "--output", tmp_path / "new"]
    given = [*arguments, *ONE_LAYER, "--config", "residual_multiplier=0.5"]
    assert nnpatch(*given).code == 0
    assert 'residual="scaled"' in written(tmp_path / "new", "new")


@pytest.mark.parametrize("setting", ["hidden_size", "=3", "a-b=1", "a b=1", "3=3", ""])
def test_setting_that_is_none(tmp_path: Path, misused: Misused, setting: str) -> None:
    misused(
        *("new-adapter", "new", "--model-type", "llama", "--output", tmp_path / "new"),
        *("--config", setting),
        parts=[f"{setting!r} is not KEY=VALUE"],
    )
    assert listing(tmp_path) == []


@pytest.mark.parametrize("setting", ["class=3", "rope_scale=NaN", "rope_scale=-Infinity"])
def test_setting_that_python_does_not_spell_so(
    tmp_path: Path, nnpatch: Command, setting: str
) -> None:
    arguments = ["new-adapter", "new", "--model-type", "llama", "--output", tmp_path / "new"]
    assert nnpatch(*arguments, "--config", setting).code == 2
    assert listing(tmp_path) == []


def test_what_could_not_be_read_off_is_said(tmp_path: Path, nnpatch: Command) -> None:
    """Its keys and values are made of one latent vector, by one module."""
    folder = tmp_path / "latent"
    arguments = ["new-adapter", "latent", "--model-type", "deepseek_v3", *ONE_LAYER, "--output"]
    done = nnpatch(*arguments, folder)
    assert done.code == 0
    assert "Read off the model: resid_pre, q, o, attn, mlp, resid." in done.lines
    missing = nnpatch(*arguments, tmp_path / "again", "--json").json["missing"]
    assert list(missing) == ["k", "v"]
    source = written(folder, "latent")
    comment = " ".join(re.findall(r"^# +(.*)$", source, re.MULTILINE))
    assert comment.startswith("Not read off the model:")
    for name, reason in missing.items():
        assert "self_attn.kv_a_proj_with_mqa" in reason
        assert f"Not read off: {name}: {reason}." in done.lines
        assert f"{name}: {reason}." in comment
        assert f"- `{name}`: {reason}." in readme(folder).splitlines()
        assert f'"{name}": Component' not in source
    assert "Checks that fail" not in readme(folder)


def test_nothing_missing_is_not_mentioned(tmp_path: Path, nnpatch: Command) -> None:
    folder = tmp_path / "new"
    done = nnpatch("new-adapter", "new", "--model-type", "llama", "--output", folder, *ONE_LAYER)
    assert done.code == 0
    for text in (done.out, readme(folder), written(folder, "new")):
        assert "Not read off" not in text
        assert "ail" not in text


def without_gradient(model_type: str, **settings: Any) -> Any:
    """A tiny model through whose last MLP no gradient flows."""
    model = tiny_model(model_type, **settings)
    model.model.layers[-1].mlp.register_forward_hook(lambda _, args, output: output.detach())
    return model


def test_family_that_fails_a_check(
    tmp_path: Path, nnpatch: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nnpatch_core.cli.models.tiny_model", without_gradient)
    layers = ("--config", "num_hidden_layers=2")
    arguments = ["new-adapter", "new", "--model-type", "llama", *layers, "--output"]
    done = nnpatch(*arguments, tmp_path / "one", "--json")
    assert (done.code, done.err) == (1, "")
    assert list(done.json["failed"]) == ["check_gradients"]
    assert all(Path(path).is_file() for path in done.json["files"])
    reason = done.json["failed"]["check_gradients"]
    assert "L1" in reason or "layer 1" in reason
    done = nnpatch(*arguments, tmp_path / "two")
    assert done.code == 1
    assert f"Fails: check_gradients: {reason}" in done.lines
    assert "It passes" not in done.out
    assert f"- `check_gradients`: {reason}" in readme(tmp_path / "two").splitlines()


def test_type_that_the_model_does_not_call_itself(tmp_path: Path, nnpatch: Command) -> None:
    if "gpt-sw3" not in causal_model_types():
        pytest.skip("this transformers has no gpt-sw3")
    folder = tmp_path / "new"
    arguments = ["new-adapter", "sw3", "--model-type", "gpt-sw3", *ONE_LAYER, "--output", folder]
    done = nnpatch(*arguments)
    assert done.code != 0 or 'model_types=("gpt2",)' in written(folder, "sw3")


def test_place_that_cannot_be_written(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    refused(
        *("new-adapter", "new", "--model-type", "llama", "--output", tmp_path / "file" / "new"),
        *ONE_LAYER,
        parts=["cannot be written", str(tmp_path / "file" / "new")],
    )
    assert listing(tmp_path) == ["file"]


def test_nothing_is_left_of_a_package_half_written(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = []
    write_text = Path.write_text

    def third_fails(path: Any, *args: Any, **kwargs: Any) -> Any:
        writes.append(path)
        if len(writes) == 3:
            raise OSError(28, "No space left on device")
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", third_fails)
    refused(
        *("new-adapter", "new", "--model-type", "llama", "--output", tmp_path / "new"),
        *ONE_LAYER,
        parts=["cannot be written", "No space left on device"],
    )
    assert len(writes) == 3
    # Two files were there, in this folder, so that they could be moved as a whole.
    assert all(tmp_path in path.parents for path in writes)
    assert listing(tmp_path) == []
