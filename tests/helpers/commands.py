"""The command line's own words, and what each JSON of it must look like."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from nnpatch_core.testing import CHECKS

OWN = {
    "nnpatch-llama": {"Llama3": ["llama"]},
    "nnpatch-mistral": {"Mistral": ["mistral"]},
    "nnpatch-gemma": {
        "Gemma": ["gemma"],
        "Gemma2": ["gemma2"],
        "Gemma3": ["gemma3_text"],
        "Gemma3Vision": ["gemma3"],
    },
}
COMPONENTS = ["resid_pre", "q", "k", "v", "o", "attn", "mlp", "resid"]


@attrs.frozen
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


#: The fixtures of tests/cli: what runs a command, or makes what is given to one.
Command = Callable[..., Done]
Refused = Callable[..., str]
Misused = Callable[..., None]
Module = Callable[..., str]
ModelFolder = Callable[..., Path]


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


PLUGIN = {
    "name": str,
    "distribution": str,
    "version": str,
    "module": str,
    "hooks": list,
    "adapters": dict,
    "seq_pos": list,
    "metrics": list,
}
FAILURE = dict.fromkeys(("name", "distribution", "version", "module", "stage", "error"), str)


def typed(found: dict[str, Any]) -> dict[str, type[Any]]:
    return {key: type(value) for key, value in found.items()}


def plugins_json(nnpatch: Command, code: int = 0) -> dict[str, Any]:
    """What `plugins --json` says, after a look at every key and type of it."""
    done = nnpatch("plugins", "--json")
    assert (done.code, done.err) == (code, "")
    found = done.json
    assert list(found) == ["limited_to", "unknown", "plugins", "failures"]
    assert found["limited_to"] is None or isinstance(found["limited_to"], str)
    for plugin in found["plugins"]:
        assert typed(plugin) == PLUGIN
        for types in plugin["adapters"].values():
            assert isinstance(types, list)
            assert all(isinstance(name, str) for name in types)
        for key in ("hooks", "seq_pos", "metrics"):
            assert all(isinstance(name, str) for name in plugin[key])
    for failure in found["failures"]:
        assert typed(failure) == FAILURE
    return found


def adapters(found: dict[str, Any]) -> dict[str, Any]:
    return {plugin["distribution"]: plugin["adapters"] for plugin in found["plugins"]}


HOOK = """
    from nnpatch_core import DecoderAPI, decoder_components, hookimpl

    @hookimpl
    def {hook}(register):
        {body}
"""


def hook(body: str, name: str = "register_model_apis") -> str:
    return HOOK.format(hook=name, body=body)


GARBAGE = """
    from nnpatch_core import decoder_components, hookimpl

    class Garbage:
        name = {name}
        model_types = {model_types}
        layers = "model.layers"
        components = decoder_components()

        def n_heads(self, config, kind, layer):
            return 4

    @hookimpl
    def register_model_apis(register):
        register(Garbage())
"""


def garbage(name: str = '"Garbage"', model_types: str = '("llama",)') -> str:
    return GARBAGE.format(name=name, model_types=model_types)


ROW = {
    "component": (str,),
    "module": (str,),
    "side": (str,),
    "width": (int,),
    "heads": (int, type(None)),
    "kind": (str, type(None)),
    "columns": (str, type(None)),
}


def components_json(nnpatch: Command, *arguments: Any) -> dict[str, Any]:
    """What `components --json` says, after a look at every key and type of it."""
    done = nnpatch("components", *arguments, "--json")
    assert (done.code, done.err) == (0, "")
    found = done.json
    keys = ["adapter", "model_type", "path", "layers", "kinds", "inferred", "missing"]
    assert list(found) == keys
    assert isinstance(found["inferred"], bool)
    assert found["inferred"] or found["missing"] == {}
    layers = [layer for kind in found["kinds"] for layer in kind["layers"]]
    assert sorted(layers) == list(range(found["layers"]))
    for kind in found["kinds"]:
        assert list(kind) == ["layers", "components"]
        for row in kind["components"]:
            assert list(row) == list(ROW)
            for key, value in row.items():
                assert isinstance(value, ROW[key])
            assert (row["heads"] is None) == (row["kind"] is None)
            assert row["side"] in ("input", "output")
            assert row["kind"] in (None, "query", "key_value")
    return found


def rows_of(kind: dict[str, list[Any]]) -> dict[str, dict[str, str | int | None]]:
    return {row["component"]: row for row in kind["components"]}


#: Five layers, with other widths and heads than the tiny models.
SMALL = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "vocab_size": 64,
}


SWAPPED = """
    import attrs
    from nnpatch_core import Component, DecoderAPI, decoder_components, separate_projections

    Two = DecoderAPI("Two", ("mistral", "llama"), decoder_components())
    Swapped = DecoderAPI(
        "Swapped",
        ("llama",),
        decoder_components(heads=separate_projections(k="v_proj", v="k_proj")),
    )
    Nowhere = attrs.evolve(Swapped, layers="transformer.h")
    Martian = attrs.evolve(Swapped, model_types=("martian",))
    GPT2 = attrs.evolve(Swapped, model_types=("llama", "gpt2"))

    class Own:
        name = "Own"
        model_types = ("llama",)
        layers = "model.layers"
        components = decoder_components()

        def n_heads(self, config, kind, layer):
            return 4 if kind == "query" or layer == 1 else 2

    class Nameless(Own):
        model_types = ()

    class Raises(Own):
        def n_heads(self, config, kind, layer):
            raise RuntimeError("cannot count")

    class Words(Own):
        def n_heads(self, config, kind, layer):
            return "four"

    class Zero(Own):
        def n_heads(self, config, kind, layer):
            return 0

    class NoTable(Own):
        components = None

    class Rows(Own):
        components = {"q": "self_attn.q_proj", 3: None}

    class NoLayers(Own):
        layers = None

    class NoTypes(Own):
        model_types = None
"""


def check_json(
    nnpatch: Command, *arguments: Any, code: int = 0
) -> dict[str, str | bool | dict[str, list[dict[str, str]]]]:
    """What `check --json` says, after a look at every key and type of it."""
    done = nnpatch("check", *arguments, "--json")
    assert (done.code, done.err) == (code, "")
    found = done.json
    assert list(found) == ["adapter", "ok", "models"]
    assert found["ok"] is (code == 0)
    statuses = {"passed", "failed", "skipped", "known failure", "fixed"}
    for results in found["models"].values():
        for result in results:
            assert typed(result) == dict.fromkeys(("check", "status", "reason"), str)
            assert result["check"] in CHECKS
            assert result["status"] in statuses
            assert bool(result["reason"]) == (result["status"] != "passed")
    return found


def statuses(results: list[dict[str, str]]) -> dict[str, str]:
    return {result["check"]: result["status"] for result in results}


def only(*names: str) -> list[str]:
    return [part for name in names for part in ("--only", f"check_{name}")]
