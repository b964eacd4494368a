"""What others have written harms neither terminal nor machine: names, texts, configs, prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnpatch_core._printable import printable
from nnpatch_core._sizes import bounded, check_config
from nnpatch_core.cli import main
from nnpatch_core.errors import AdapterError, PatchingError, PluginWarning
from nnpatch_core.plugins import find_adapter, load_plugins
from nnpatch_core.testing import tiny_model
from tests.helpers.distributions import Install

#: Colours, a title, a bell, a way back to the start of the line, text from right to left.
ESCAPES = "\x1b[31m\x1b]0;title\x07\rred\u202e\x9b2J"
ESCAPED = r"\x1b[31m\x1b]0;title\x07\rred\u202e\x9b2J"


def is_safe(text: str) -> bool:
    """No control or format character but the end of a line."""
    return not any(unicodedata.category(each) in ("Cc", "Cf") for each in text.replace("\n", ""))


# Text --------------------------------------------------------------------------------------------


@given(st.text(st.characters()))
def test_printable_text_is_safe_and_says_the_same(text: str) -> None:
    shown = printable(text)
    assert is_safe(shown)
    assert "\n" not in shown
    assert printable(shown) == shown
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text


@given(st.text())
def test_errors_are_safe(text: str) -> None:
    for error in (PatchingError(text), AdapterError(text)):
        assert is_safe(str(error).replace("\t", ""))
    assert PatchingError(3).args == (3,)
    assert str(AdapterError("one\n\ttwo")) == "one\n\ttwo"


ADAPTER = """
    from nnpatch_core import Component, DecoderAPI, decoder_components, hookimpl

    E = "\\x1b[31m\\x1b]0;title\\x07\\rred\\u202e\\x9b2J"

    @hookimpl
    def register_model_apis(register):
        table = decoder_components()
        register(DecoderAPI("A" + E, ("martian" + E,), table))

    @hookimpl
    def register_metrics(register):
        register("m" + E, len)
"""
BROKEN = """
    raise RuntimeError("\\x1b[31m\\x1b]0;title\\x07\\rred\\u202e\\x9b2J")
"""


@pytest.mark.parametrize("code", [ADAPTER, BROKEN], ids=["adapter", "broken"])
def test_names_of_plugins_on_the_terminal(
    install: Install, capsys: pytest.CaptureFixture[str], code: str
) -> None:
    esc = "\x1b[31mred"
    install(f"martian{esc}", code, module="hostile", name=f"martian{esc}", version=f"1{esc}")
    for words in (
        ["plugins"],
        ["components", "llama", "--adapter", "nothing"],
        ["components", "gpt2"],
        ["check", "nothing"],
    ):
        main(words)
        out, err = capsys.readouterr()
        assert is_safe(out), words
        assert is_safe(err), words
        if words == ["plugins"]:
            assert r"\x1b[31mred" in out
            assert ESCAPED in out
    # JSON has its own way, and loses nothing.
    main(["plugins", "--json"])
    out, _ = capsys.readouterr()
    assert is_safe(out)
    assert any(ESCAPES in text for text in strings(json.loads(out)))


def strings(value: Any) -> Iterator[str]:
    """All of them in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in [*value, *(value.values() if isinstance(value, dict) else ())]:
            yield from strings(each)


def test_names_of_plugins_in_warnings_and_errors(install: Install) -> None:
    install("martian-models", ADAPTER, name="martian")
    install("broken\x1b[31m", BROKEN, module="broken", name="broken\x1b[31m")
    with pytest.warns(PluginWarning) as caught:
        load_plugins()
    assert all(is_safe(str(each.message)) for each in caught)
    assert any(ESCAPED in str(each.message) for each in caught)
    with pytest.warns(PluginWarning), pytest.raises(PatchingError) as error:
        find_adapter("nobody")
    assert is_safe(str(error.value))
    assert ESCAPED in str(error.value)


def test_type_of_a_model_in_warnings_and_errors() -> None:
    model = tiny_model("gpt2")
    model.config.model_type = f"gpt2{ESCAPES}"
    with pytest.warns(UserWarning, match="inferred") as caught:
        find_adapter(None, model)
    assert all(is_safe(str(each.message)) for each in caught)


# Prints -------------------------------------------------------------------------------------------

LOUD = """
    print("hello from a plugin")
    from nnpatch_core import DecoderAPI, decoder_components, hookimpl

    class Loud:
        name, model_types, layers = "Loud", ("llama2",), "model.layers"
        components = decoder_components()

        def n_heads(self, config, kind, layer):
            print("counting")
            return 4 if kind == "query" else 2

    @hookimpl
    def register_model_apis(register):
        print("registering")
        register(Loud)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["plugins"],
        ["components", "llama", "--adapter", "Loud"],
        ["check", "Loud", "llama", "--only", "check_components"],
    ],
    ids=lambda words: words[0],
)
def test_what_plugins_print_does_not_spoil_json(
    install: Install, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    install("martian-models", LOUD, name="martian")
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)
    assert "registering" in err
    # The output is the terminal's again afterwards.
    print("mine")  # noqa: T201
    assert capsys.readouterr().out == "mine\n"


# Configs ------------------------------------------------------------------------------------------

BASE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
HOSTILE: dict[str, dict[str, Any]] = {
    "width 10^9": {"hidden_size": 10**9, "intermediate_size": 10**9},
    "head dim 10^9": {"head_dim": 10**9},
    "vocabulary 10^12": {"vocab_size": 10**12},
    "10^6 layers": {"num_hidden_layers": 10**6},
    "10^13 layers": {"num_hidden_layers": 10**13},
    "10^30 layers": {"num_hidden_layers": 10**30},
    "infinitely many layers": {"num_hidden_layers": float("inf")},
    "10^9 heads": {"num_attention_heads": 10**9},
    "10^12 experts": {"model_type": "mixtral", "num_local_experts": 10**12},
    "10^7 layers of GPT-2": {"model_type": "gpt2", "n_layer": 10**7},
    "no layer": {"num_hidden_layers": 0},
    "-1 layers": {"num_hidden_layers": -1},
    "negative width": {"hidden_size": -64},
    "negative vocabulary": {"vocab_size": -5},
    "no head": {"num_attention_heads": 0},
    "3 heads of 64": {"num_attention_heads": 3},
    "4 heads, 3 keys": {"num_key_value_heads": 3},
    "a number as text": {"num_key_value_heads": "2"},
    "a list of heads": {"num_attention_heads": [4, 4]},
    "2.5 layers": {"num_hidden_layers": 2.5},
    "null": {"num_hidden_layers": None},
    "true": {"hidden_size": True},
    "kinds of layers": {"layer_types": ["x"] * 3},
    "escape sequences": {"model_type": "llama\x1b[31m"},
    "a type that is none": {"model_type": 3},
}
#: Reads a JSON list of argument lists, and tells what came of each, in at most 6 GiB.
PROGRAM = """
import contextlib, io, json, sys, time
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
except ImportError:
    pass
from nnpatch_core.cli import main
for words in json.load(sys.stdin):
    out, err, begun = io.StringIO(), io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    print(json.dumps([code, out.getvalue(), err.getvalue(), time.process_time() - begun]))
"""


def test_hostile_configs_are_one_line_of_error_in_no_time(tmp_path: Path) -> None:
    calls = []
    for number, (name, settings) in enumerate(HOSTILE.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**BASE, **settings}), encoding="utf-8")
        calls.append(["components", str(folder)])
        if name in ("width 10^9", "10^6 layers"):
            calls.append(["check", "Llama3", str(folder)])
    for setting in ("hidden_size=1000000000", "num_hidden_layers=1000000"):
        calls.append(["new-adapter", "x", "--model-type", "llama", "--config", setting])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    told = list(map(json.loads, done.stdout.splitlines()))
    assert len(told) == len(calls)
    for words, (code, out, err, seconds) in zip(calls, told, strict=True):
        assert (code, out) == (2, ""), words
        (line,) = err.splitlines()
        assert line.startswith("nnpatch: error: ")
        assert is_safe(line)
        assert len(line) < 1000
        assert seconds < 10, words


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_hidden_layers": 126, "hidden_size": 16384, "vocab_size": 262144},
        {"rope_theta": 10**10, "max_position_embeddings": 10**7, "n_routed_experts": 384},
        {"text_config": {"num_experts": 2048}, "num_experts_per_tok": True},
        {"layers_block_type": ["attention"] * 3000, "moe_layers": "3,4,5"},
    ],
)
def test_configs_as_there_are(config: dict[str, Any]) -> None:
    check_config(config)


@pytest.mark.parametrize(
    "name",
    [
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "decoder_layers",
        "num_blocks",
        "num_attention_heads",
        "n_head",
        "num_kv_heads",
        "num_experts",
        "depth",
    ],
)
def test_absurd_counts_are_named(name: str) -> None:
    with pytest.raises(AdapterError, match=rf"vision\.{name}=3000,"):
        check_config({"vision": {name: 3000}})


def test_the_bound_ends_with_its_block() -> None:
    import torch
    from torch import nn

    with torch.device("meta"):
        with bounded(), pytest.raises(AdapterError, match="Linear with a weight of"):
            nn.Linear(2, 2**25)
        assert nn.Linear(2, 2**25).out_features == 2**25
