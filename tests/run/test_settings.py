"""Settings are the same by options, in a file, and in the command that a report names."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path
from typing import Any, get_args

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnpatch_core.cli import main
from nnpatch_core.cli import run as cli_run
from nnpatch_core.errors import SettingsError
from nnpatch_core.run import (
    METHODS,
    Settings,
    as_toml,
    command_of,
    options,
    read_settings,
    read_toml,
    template,
)
from nnpatch_core.run.loading import device_of
from nnpatch_core.run.settings import draws

#: Texts of all kinds; a shell's words cannot hold NUL, and an option of several has commas.
TEXTS = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1)
PARTS = TEXTS.map(lambda text: text.replace(",", ";").strip()).filter(bool)
NUMBERS = st.one_of(st.integers(0, 99).map(str), st.integers(0, 9).map(lambda low: f"{low}-99"))
#: Values with which the others may mean something.
NEEDED: dict[str, Any] = {
    "screen": {"top_k": 3},
    "path": {"senders": ("m0",), "receivers": ("logits",)},
    "at": {"positions": "custom"},
    "system": {"chat": True},
    "threshold": {"prune": "acdc"},
    "reference": {"ablation": "mean"},
    "shard": {"memory_budget": "1 GiB"},
    "source_at": {"at": ("1",), "positions": "custom"},
}


def values_of(name: str, kind: Any, option: Any) -> st.SearchStrategy[Any]:
    kinds = (kind, *get_args(kind))
    if option.choices:
        return st.sampled_from(option.choices)
    if kind == tuple[str, ...]:
        parts = NUMBERS if name in ("layers", "heads") else PARTS
        return st.lists(parts, min_size=1, max_size=3).map(tuple)
    if bool in kinds:
        return st.booleans()
    if int in kinds:
        return st.integers(int(option.least or 0), 10**6)
    if name == "shard":
        return st.integers(1, 99).map(lambda count: f"{(count + 1) // 2}/{count}")
    if float in kinds:
        return st.floats(0.01, 0.99)
    if Path in kinds:
        return PARTS.filter(lambda text: not text.startswith("-") and text != ".").map(Path)
    return TEXTS.filter(lambda text: not text.startswith("-"))


@st.composite
def settings(draw: st.DrawFn) -> Settings:
    method = draw(st.sampled_from(METHODS))
    given: dict[str, Any] = {"method": method}
    for name, kind, _, option in options():
        wanted = name in ("table", "model") or draw(st.booleans())
        if wanted and name != "method" and method in option.methods:
            given[name] = draw(values_of(name, kind, option))
    given |= NEEDED.get(method, {})
    if method == "path":
        given.pop("path", None)
    for name, others in NEEDED.items():
        if name in given and name not in METHODS:
            given |= others
    given.setdefault("positions", None)
    if method == "activation" and "screen" not in given:
        given.pop("top_k", None)
    if method == "edges" and "estimate" not in given:
        given.pop("top_k", None)
    if method == "edges" and "estimate" in given and "top_k" not in given:
        given.pop("shard", None)
    if "top_k" not in given:
        given.pop("spot_checks", None)
    if given.get("device_map") or given.get("quantize"):
        given.pop("device", None)
    if not draws(Settings(**given)):
        given.pop("seed", None)
    return Settings(**given)


def parsed(words: list[str]) -> Settings:
    """The settings that a command line stands for."""
    seen: list[Settings] = []

    class SeenError(Exception):
        pass

    def prepared(found: Settings, warn: Any, **_: Any) -> None:
        seen.append(found)
        raise SeenError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli_run.Job, "prepared", prepared)
        main(words[1:])
    (found,) = seen
    return found


@given(settings())
def test_by_file(tmp_path_factory: pytest.TempPathFactory, given: Settings) -> None:
    path = tmp_path_factory.mktemp("toml") / "run.toml"
    path.write_text(as_toml(given), "utf-8", newline="\n")
    values, places = read_toml(path)
    assert read_settings(values) == given
    assert all(name in places for name in values)


@given(settings())
def test_by_command(given: Settings) -> None:
    assert parsed(shlex.split(command_of(given))) == given


def test_the_template_has_all_settings() -> None:
    lines = [line.removeprefix("# ") for line in template().splitlines()]
    told = [line for line in lines if " = " in line and line.split(" = ")[0].isidentifier()]
    values = tomllib.loads("\n".join(told))
    assert list(values) == [name for name, *_ in options()]
    for name, _, default, _ in options():
        if default not in (None, Path()):
            expected = list(default) if isinstance(default, tuple) else default
            assert values[name] == expected


def test_every_setting_has_help() -> None:
    for name, _, _, option in options():
        assert option.words.endswith("."), name
        assert set(option.methods) <= set(METHODS), name
        assert option.methods, name


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"model": 3}, "model: must be a text, got 3"),
        ({"limit": True}, "limit: must be a whole number, got True"),
        ({"limit": 1.5}, "limit: must be a whole number, got 1.5"),
        ({"level": "x"}, "level: must be a number, got 'x'"),
        ({"chat": 1}, "chat: must be true or false, got 1"),
        ({"sites": {"o": 1}}, "sites: must be a text or a list of texts"),
        ({"sites": [True]}, "sites: must be a text or a list of texts"),
        ({"tabel": "x"}, "tabel: there is no such setting (did you mean table?)"),
        ({"dtype": "float8"}, "there is no 'float8'; there are float32, bfloat16"),
        ({"faithfulness": 0.0, "method": "circuit"}, "faithfulness: must lie in (0, 1]"),
        ({"width": 0}, "width: must be above 0"),
        ({"system": "x"}, "system: means nothing without chat"),
        ({"screen": "attribution"}, "screen: needs top_k"),
        ({"seed": 1}, "seed: means nothing here, as nothing is drawn at random"),
        ({"device": "cpu", "device_map": "auto"}, "device: means nothing beside device_map"),
        ({"device": "cpu", "quantize": "4bit"}, "device: means nothing beside quantize"),
        ({"level": 0.9, "method": "subspace"}, "level: means nothing with method 'subspace'"),
    ],
)
def test_faulty(given: dict[str, Any], part: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({"table": "t.csv", "model": "m", **given})
    assert part in str(caught.value)


def test_all_faults_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({"model": 3, "limit": "x", "nix": 1})
    assert len(str(caught.value).splitlines()) == 3


def test_settings_are_frozen() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Settings().model = "m"


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu", None])
def test_a_model_goes_on_the_accelerator_by_default(
    kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: here)
    assert device_of(Settings()) == (kind or "cpu")
    assert device_of(Settings(device="cuda:1")) == "cuda:1"
