"""What a new release of nnsight, transformers or torch would break, family by family."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnpatch_core import Sites, _selfcheck, _upstream, _versions, activation_patching
from nnpatch_core.errors import ReleaseWarning
from nnpatch_core.testing import parametrize_with_checks, tiny_model
from nnpatch_gemma import Gemma, Gemma2, Gemma3
from nnpatch_llama import Llama3
from nnpatch_mistral import Mistral
from tests.helpers.paths import ROOT

pytestmark = [
    # Padding is a part of what is tested.
    pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning"),
    pytest.mark.newest,
]

ADAPTERS = {each.model_types[0]: each for each in (Llama3, Mistral, Gemma, Gemma2, Gemma3)}
EVERYTHING = Sites(["resid_pre", "q", "k", "v", "o", "attn", "mlp", "resid"], seq_pos_type="each")
SOURCE = torch.tensor([[0, 5, 6, 7, 8, 9], [3, 9, 11, 3, 4, 2]])
TARGET = torch.tensor([[0, 5, 16, 7, 8, 9], [3, 19, 11, 3, 4, 2]])
MASK = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
ANSWERS = torch.tensor([20, 21]), torch.tensor([30, 31])


def sweep(model: Any, api: Any = None, **options: Any) -> Any:
    return activation_patching(
        *(model, api, EVERYTHING, SOURCE, TARGET, *ANSWERS),
        attention_mask=MASK,
        progress=False,
        **options,
    )


@pytest.mark.parametrize("family", ADAPTERS)
def test_auto_is_the_cone_engine(family: str) -> None:
    model = tiny_model(family)
    # Warnings are errors here, those of a fallback among them.
    out = sweep(model)
    assert (out.info["engine"], out.info["adapter"]) == ("cone", ADAPTERS[family].name)
    full = sweep(model, engine="full")
    assert max(float((out[name] - full[name]).abs().max()) for name in full) < 1e-4


@parametrize_with_checks([*ADAPTERS.values()])
def test_the_kit(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("keyword", ["cache", "past_key_values", "memory"])
def test_keys_and_values_are_taken_under_whichever_name(keyword: str) -> None:
    """A forward with another name for them, and a decoy beside it, is run from the middle."""
    model = tiny_model("llama")
    [own] = _upstream.cache_keywords(model)
    source = f"""
def forward(self, input_ids=None, attention_mask=None, position_ids=None,
            past_key_values_decoy: "Cache" = None, {keyword}: "Cache" = None,
            use_cache=None, logits_to_keep=0):
    return self.plain(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
        use_cache=use_cache, logits_to_keep=logits_to_keep, **{{{own!r}: {keyword}}},
    )
"""
    names: dict[str, Any] = {}
    exec(source, names)
    kind = type(model)
    model.__class__ = type("Renamed", (kind,), {"forward": names["forward"], "plain": kind.forward})
    out = sweep(model, Llama3)
    assert out.info["engine"] == "cone"
    plain = sweep(tiny_model("llama"), Llama3)
    assert all(torch.equal(out[name], plain[name]) for name in plain)


# A release that is newer than those of the tests.


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The installed transformers counts as newer than tested; gives the folder of the cache."""
    monkeypatch.setitem(_versions.TESTED, "transformers", "5.0.0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "nnpatch" / "self-check"


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each self-check has found."""
    found: list[str] = []
    real = _selfcheck._try

    def spied() -> str:
        found.append(real())
        return found[-1]

    monkeypatch.setattr(_selfcheck, "_try", spied)
    return found


def test_a_newer_release_is_tried_once(newer: Path, tries: list[str]) -> None:
    _selfcheck.check_release()
    _selfcheck.check_release()
    assert tries == ["holds"]
    assert [path.read_text("utf-8") for path in newer.iterdir()] == ["holds\n"]


def test_a_newer_release_that_fails_is_told_each_time(
    newer: Path, tries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnpatch_core.engine.cone import prefix

    monkeypatch.setattr(prefix._Prefix, "get_seq_length", lambda self: 0)
    told = r"not tested with .*transformers 5\..* fails its self-check there: "
    for _ in range(2):
        with pytest.warns(ReleaseWarning, match=told):
            _selfcheck.check_release()
    # It may have been mended in between.
    assert len(tries) == 2
    assert not newer.exists()


def test_numbers_that_differ_are_a_failure(
    newer: Path, tries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _selfcheck.activation_patching

    def held(*arguments: Any, **options: Any) -> Any:
        out = real(*arguments, **options)
        values = {name: out[name].clone() for name in out}
        if options["engine"] == "cone":
            values["q"][0, 0, 0] += 0.5
        return values

    monkeypatch.setattr(_selfcheck, "activation_patching", held)
    with pytest.warns(ReleaseWarning, match="the cone engine is off by 0.5"):
        _selfcheck.check_release()


def test_nothing_is_kept_where_the_cache_cannot_be_written(
    newer: Path, tries: list[str], tmp_path: Path
) -> None:
    (tmp_path / "nnpatch").write_text("not a folder", "utf-8")
    _selfcheck.check_release()
    _selfcheck.check_release()
    assert tries == ["holds", "holds"]


def test_the_import_tries_it(tmp_path: Path) -> None:
    script = (
        "import importlib.metadata as m; real = m.version;"
        "m.version = lambda name: '5.999' if name == 'transformers' else real(name);"
        "import nnpatch_core"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    [kept] = (tmp_path / "nnpatch" / "self-check").iterdir()
    assert kept.read_text("utf-8") == "holds\n"


def test_tested_releases_are_those_of_the_lock() -> None:
    lock = dict(
        re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    )
    assert {name: lock[name] for name in _versions.TESTED} == _versions.TESTED
