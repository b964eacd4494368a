"""`nnpatch components`: the table of any model, without its weights, or why there is none."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from nnpatch_core import DecoderAPI
from nnpatch_core.adapters import heads_of, table_of
from nnpatch_core.cli.models import weightless
from nnpatch_core.infer import read_model
from nnpatch_core.scaffold import adapter_source
from nnpatch_core.testing import tiny_model
from tests.helpers.commands import (
    COMPONENTS,
    SMALL,
    Command,
    Done,
    ModelFolder,
    Module,
    Refused,
    components_json,
    hook,
    rows_of,
)
from tests.helpers.distributions import Install

LLAMA = """\
adapter Llama3, model type llama

model.layers.N, layers 0-2
  component  module            side    shape             heads
  resid_pre  (the layer)       input   [batch, seq, 32]  -
  q          self_attn.q_proj  output  [batch, seq, 32]  4 query
  k          self_attn.k_proj  output  [batch, seq, 16]  2 key/value
  v          self_attn.v_proj  output  [batch, seq, 16]  2 key/value
  o          self_attn.o_proj  input   [batch, seq, 32]  4 query
  attn       self_attn         output  [batch, seq, 32]  -
  mlp        mlp               output  [batch, seq, 32]  -
  resid      (the layer)       output  [batch, seq, 32]  -
"""


def test_components_of_a_model_type(nnpatch: Command) -> None:
    done = nnpatch("components", "llama")
    assert done == Done(0, LLAMA, "")


def test_components_as_json(nnpatch: Command) -> None:
    found = components_json(nnpatch, "llama")
    (kind,) = found.pop("kinds")
    assert found == {
        "adapter": "Llama3",
        "model_type": "llama",
        "path": "model.layers",
        "layers": 3,
        "inferred": False,
        "missing": {},
    }
    rows = rows_of(kind)
    assert list(rows) == COMPONENTS
    assert rows["k"] == {
        "component": "k",
        "module": "self_attn.k_proj",
        "side": "output",
        "width": 16,
        "heads": 2,
        "kind": "key_value",
        "columns": None,
    }
    assert rows["resid_pre"] == {
        "component": "resid_pre",
        "module": "",
        "side": "input",
        "width": 32,
        "heads": None,
        "kind": None,
        "columns": None,
    }


def test_components_of_a_folder_and_of_its_config(
    model_folder: ModelFolder, nnpatch: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(SMALL)
    found = components_json(nnpatch, folder)
    (kind,) = found["kinds"]
    assert kind["layers"] == [0, 1, 2, 3, 4]
    rows = rows_of(kind)
    widths = {name: (row["width"], row["heads"]) for name, row in rows.items()}
    assert widths == {
        **dict.fromkeys(("resid_pre", "attn", "mlp", "resid"), (48, None)),
        **dict.fromkeys(("q", "o"), (60, 6)),
        **dict.fromkeys(("k", "v"), (30, 3)),
    }
    assert components_json(nnpatch, folder / "config.json") == found
    monkeypatch.chdir(folder)
    assert components_json(nnpatch, "config.json") == found
    assert components_json(nnpatch, ".") == found
    assert "model.layers.N, layers 0-4\n" in nnpatch("components", folder).out


def test_model_type_is_meant_before_a_folder_of_that_name(
    model_folder: ModelFolder, nnpatch: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder(SMALL, "llama").parent)
    assert components_json(nnpatch, "llama")["layers"] == 3
    assert components_json(nnpatch, "./llama")["layers"] == 5


def test_norms_after_the_blocks(nnpatch: Command) -> None:
    found = components_json(nnpatch, "gemma2")
    assert found["adapter"] == "Gemma2"
    rows = rows_of(found["kinds"][0])
    assert rows["attn"]["module"] == "post_attention_layernorm"
    assert rows["mlp"]["module"] == "post_feedforward_layernorm"
    line = "  mlp        post_feedforward_layernorm  output  [batch, seq, 32]  -"
    assert line in nnpatch("components", "gemma2").lines


FUSED = """
    from nnpatch_core import DecoderAPI, Fused, decoder_components, fused_projections

    GPT2 = DecoderAPI(
        "GPT2",
        ("gpt2",),
        decoder_components(
            attn="attn", heads=fused_projections("attn.c_attn", "attn.c_proj", Fused)
        ),
        "transformer.h",
    )

    class AsClass:
        name = "AsClass"
        model_types = ("gpt2",)
        layers = "transformer.h"
        components = GPT2.components
        n_heads = staticmethod(GPT2.n_heads)
"""


def test_adapter_of_a_module_with_fused_columns(module: Module, nnpatch: Command) -> None:
    name = module(FUSED)
    found = components_json(nnpatch, "gpt2", "--adapter", f"{name}:GPT2")
    assert (found["adapter"], found["path"]) == ("GPT2", "transformer.h")
    rows = rows_of(found["kinds"][0])
    for part in "qkv":
        assert rows[part]["module"] == "attn.c_attn"
        assert rows[part]["width"] == 96
        assert rows[part]["columns"] == f"Fused(part={part!r})"
    assert rows["o"]["columns"] is None
    lines = nnpatch("components", "gpt2", "--adapter", f"{name}:GPT2").lines
    line = "  k          attn.c_attn  output  [batch, seq, 96]  4 key/value, Fused(part='k')"
    assert line in lines
    as_class = components_json(nnpatch, "gpt2", "--adapter", f"{name}:AsClass")
    assert as_class == {**found, "adapter": "AsClass"}


KINDS = """
    import attrs
    from nnpatch_core import Component, DecoderAPI, PartOfHead, decoder_components
    from nnpatch_core import separate_projections

    gated = separate_projections()
    gated["q"] = attrs.evolve(gated["q"], columns=PartOfHead(0, parts=2))
    Qwen3Next = DecoderAPI(
        "Qwen3Next",
        ("qwen3_next",),
        decoder_components(attn="linear_attn", heads={}),
        kinds={"self_attn": decoder_components(heads=gated)},
    )
    Counted = DecoderAPI(
        "Counted",
        ("llama",),
        decoder_components(),
        query_heads=lambda config, layer: 8 if layer == 1 else 4,
    )
    Dynamic = type(
        "Dynamic",
        (),
        {
            "name": "Dynamic",
            "model_types": ("llama",),
            "layers": "model.layers",
            "components": property(lambda self: decoder_components()),
            "n_heads": lambda self, config, kind, layer: 4 if kind == "query" else 2,
        },
    )
"""


def test_layers_of_different_kinds(module: Module, nnpatch: Command) -> None:
    name = module(KINDS)
    found = components_json(nnpatch, "qwen3_next", "--adapter", f"{name}:Qwen3Next")
    most, other = found["kinds"]
    assert most["layers"] == [0, 2]
    assert list(rows_of(most)) == ["resid_pre", "attn", "mlp", "resid"]
    assert rows_of(most)["attn"]["module"] == "linear_attn"
    assert other["layers"] == [1]
    assert list(rows_of(other)) == COMPONENTS
    assert rows_of(other)["q"]["columns"] == "PartOfHead(index=0, parts=2)"
    lines = nnpatch("components", "qwen3_next", "--adapter", f"{name}:Qwen3Next").lines
    assert "model.layers.N, layers 0, 2" in lines
    assert "model.layers.N, layer 1" in lines


def test_layers_with_different_numbers_of_heads(module: Module, nnpatch: Command) -> None:
    name = module(KINDS)
    most, other = components_json(nnpatch, "llama", "--adapter", f"{name}:Counted")["kinds"]
    assert (most["layers"], rows_of(most)["q"]["heads"]) == ([0, 2], 4)
    assert (other["layers"], rows_of(other)["q"]["heads"]) == ([1], 8)


def test_table_that_is_made_anew_each_time(module: Module, nnpatch: Command) -> None:
    name = module(KINDS)
    (kind,) = components_json(nnpatch, "llama", "--adapter", f"{name}:Dynamic")["kinds"]
    assert kind["layers"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("layers", "told"),
    [([0], "0"), ([0, 1], "0-1"), ([0, 2], "0, 2"), ([4], "4"), ([0, 1, 2, 5], "0-2, 5")],
)
def test_how_layers_are_named(layers: list[int], told: str) -> None:
    from nnpatch_core._ranges import ranges

    assert ranges(layers) == told


#: Families whose config, without weights, is to show what a real run shows.
SHOWN = (
    *("llama", "gemma2", "gpt2", "gpt_neox", "phi3", "falcon", "opt", "mixtral"),
    *("qwen3_next", "bert", "bart", "deepseek_v3", "bloom", "gptj", "mamba"),
)


def seen(model: Any, adapter: DecoderAPI, layer: int) -> dict[str, int]:
    """The widths of the components in a run of a model with weights."""
    found = {}
    module = model.get_submodule(f"{adapter.layers}.{layer}")
    hooks = []
    for name, row in table_of(adapter, model, layer).items():
        place = module.get_submodule(row.module)

        def enter(_: Any, args: Any, kwargs: Any, name: Any = name) -> None:
            found[name] = (args[0] if args else next(iter(kwargs.values()))).shape[-1]

        def leave(_: Any, args: Any, output: Any, name: Any = name, row: Any = row) -> None:
            found[name] = (output[row.item] if isinstance(output, tuple) else output).shape[-1]

        if row.side == "input":
            hooks.append(place.register_forward_pre_hook(enter, with_kwargs=True))
        else:
            hooks.append(place.register_forward_hook(leave))
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    for handle in hooks:
        handle.remove()
    return found


@pytest.mark.parametrize("family", SHOWN)
def test_shapes_are_those_of_a_real_run(
    module: Module, model_folder: ModelFolder, nnpatch: Command, family: str
) -> None:
    model = tiny_model(family)
    adapter = read_model(model, "Read").adapter
    source, names = adapter_source(adapter, "Read")
    name = module(f"from nnpatch_core import {', '.join(sorted(names))}\n{source}\n")
    by_type = components_json(nnpatch, family, "--adapter", f"{name}:Read")
    for kind in by_type["kinds"]:
        for layer in kind["layers"]:
            widths = {row["component"]: row["width"] for row in kind["components"]}
            assert widths == seen(model, adapter, layer)
            for row in kind["components"]:
                if row["kind"] is not None:
                    assert row["heads"] == heads_of(adapter, model, layer).count(row["kind"])
    folder = model_folder(model.config.to_json_string(use_diff=False))
    assert components_json(nnpatch, folder, "--adapter", f"{name}:Read") == by_type


HUGE = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def test_no_weights_are_made_for_a_config(model_folder: ModelFolder, nnpatch: Command) -> None:
    # First a small one: of the other, weights would fill any memory.
    for name, config, parameters in (("small", SMALL, 6e4), ("huge", HUGE, 70e9)):
        folder = model_folder(config, name)
        model = weightless(str(folder))
        assert all(parameter.is_meta for parameter in model.parameters())
        assert sum(parameter.numel() for parameter in model.parameters()) > parameters
    begun, before = time.process_time(), psutil.Process().memory_info().rss
    found = components_json(nnpatch, folder)
    assert psutil.Process().memory_info().rss - before < 2**30
    assert time.process_time() - begun < 30
    (kind,) = found["kinds"]
    assert len(kind["layers"]) == 80
    rows = rows_of(kind)
    assert (rows["resid"]["width"], rows["q"]["heads"], rows["k"]["width"]) == (8192, 64, 1024)


def test_no_weights_are_read_from_a_folder(model_folder: ModelFolder, nnpatch: Command) -> None:
    folder = model_folder(SMALL)
    (folder / "model.safetensors").write_bytes(b"these are no weights")
    assert components_json(nnpatch, folder)["layers"] == 5


MISFITS = """
    import attrs
    from nnpatch_core import DecoderAPI, decoder_components

    Llama = DecoderAPI("Llama", ("llama",), decoder_components())
    Module = attrs.evolve(Llama, components=decoder_components(attn="attention"))
    Layers = attrs.evolve(Llama, layers="transformer.h")
    Heads = attrs.evolve(Llama, query_heads=5)
    Attribute = attrs.evolve(Llama, query_heads="no_such_attribute")
    number = 5

    class Arguments:
        def __init__(self, needed):
            pass
"""


@pytest.mark.parametrize(
    ("attribute", "parts"),
    [
        ("Module", ["does not fit", "'attn'", "'attention'", "self_attn, mlp"]),
        ("Layers", ["does not fit", "'transformer.h'"]),
        ("Heads", ["does not fit", "5 heads"]),
        ("Attribute", ["config.no_such_attribute"]),
        ("number", ["api must be an adapter", "5"]),
        ("Arguments", ["takes no arguments", "needed"]),
        ("nothing", ["'martians:nothing' cannot be imported", "AttributeError"]),
        ("", ["'martians:' cannot be imported", "AttributeError"]),
    ],
)
def test_adapter_that_does_not_fit(
    module: Module, refused: Refused, attribute: str, parts: list[str]
) -> None:
    name = module(MISFITS)
    refused("components", "llama", "--adapter", f"{name}:{attribute}", parts=parts)


@pytest.mark.parametrize(
    ("name", "code", "parts"),
    [
        ("no_such_module:Adapter", "", ["cannot be imported", "ModuleNotFoundError"]),
        (":Adapter", "", ["cannot be imported", "ValueError"]),
        ("martians:Adapter", "def oops(:", ["cannot be imported", "SyntaxError"]),
        ("martians:Adapter", "1 / 0", ["cannot be imported", "ZeroDivisionError"]),
        ("martians:Adapter", "raise SystemExit(0)", ["cannot be imported", "SystemExit"]),
        ("martians:Adapter", "raise ValueError('a' + chr(10) + 'b')", ["ValueError: a"]),
        ("Martian", "", ["unknown adapter 'Martian'", "Gemma2", "Llama3"]),
        ("", "", ["unknown adapter ''"]),
    ],
)
@pytest.mark.parametrize("command", ["components", "check"])
def test_adapter_that_is_not_there(
    module: Module, refused: Refused, command: str, name: str, code: str, parts: list[str]
) -> None:
    module(code)
    arguments = ["llama", "--adapter", name] if command == "components" else [name]
    refused(command, *arguments, parts=parts)


@pytest.mark.parametrize("name", ["no-such-model", "no/such-model", "no/such/folder", ""])
def test_model_that_is_not_there(refused: Refused, name: str) -> None:
    refused("components", name, parts=[f"{name!r} is no model type", "cannot be loaded"])
    refused("check", "Llama3", name, parts=[f"{name!r} is no model type", "cannot be loaded"])


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ("{not json", "not a valid JSON file"),
        ("", "not a valid JSON file"),
        ("[1]", "model_type"),
        ("{}", "model_type"),
        ({"model_type": "martian"}, "`martian`"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_config_that_cannot_be_read(
    model_folder: ModelFolder, refused: Refused, config: str | dict[str, str], part: str
) -> None:
    folder = model_folder(config)
    for place in (folder, folder / "config.json"):
        line = refused("components", place, parts=["cannot be loaded as a model", part])
        assert len(line) < 600


def test_config_of_no_causal_model(model_folder: ModelFolder, refused: Refused) -> None:
    line = refused("components", model_folder({"model_type": "t5"}), parts=["T5Config"])
    assert len(line) < 600


def test_folder_without_a_config(tmp_path: Path, refused: Refused) -> None:
    refused("components", tmp_path, parts=[str(tmp_path), "cannot be loaded as a model"])


def test_config_with_code_of_its_own_is_not_run(
    model_folder: ModelFolder, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def answer(*question: object) -> str:
        asked.append(question)
        return "n"

    monkeypatch.setattr("builtins.input", answer)
    config = {"model_type": "martian", "auto_map": {"AutoConfig": "martian.MartianConfig"}}
    folder = model_folder(config)
    (folder / "martian.py").write_text("raise RuntimeError('run')", encoding="utf-8")
    refused("components", folder, parts=["cannot be loaded as a model"])
    assert asked == []


def test_type_that_no_plugin_claims(nnpatch: Command) -> None:
    done = nnpatch("components", "mamba")
    assert done.code == 0
    assert done.lines[0] == "adapter Mamba, model type mamba"
    told = "Inferred from a tiny random model: no plugin claims model_type 'mamba'."
    assert done.lines[-5] == told
    assert done.lines[-4] == "Not read off: q, k, v, o: mixer is not called attention."
    assert done.lines[-1].endswith("nnpatch new-adapter mamba --model-type mamba")
    found = components_json(nnpatch, "mamba")
    assert found["inferred"]
    assert list(found["missing"]) == ["q", "k", "v", "o", "attn", "mlp"]


@pytest.fixture
def one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny models that are inferred have one layer, where the table is not the point."""

    def tiny(model_type: str, **settings: Any) -> Any:
        return tiny_model(model_type, num_hidden_layers=1, **settings)

    for module in ("components", "models"):
        monkeypatch.setattr(f"nnpatch_core.cli.{module}.tiny_model", tiny)


@pytest.mark.usefixtures("one_layer")
def test_type_that_no_plugin_claims_beside_a_broken_one(install: Install, nnpatch: Command) -> None:
    install("martian-models", "raise RuntimeError('at import')")
    done = nnpatch("components", "gpt2")
    for part in ("Inferred from", "martian-models 1.2.3", "at import"):
        assert part in done.out


@pytest.mark.usefixtures("one_layer")
def test_type_whose_plugin_is_left_out(nnpatch: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNPATCH_PLUGINS", "")
    done = nnpatch("components", "llama")
    assert done.code == 0
    assert "nnpatch-llama has one, which NNPATCH_PLUGINS='' leaves out" in done.out


@pytest.mark.usefixtures("one_layer")
def test_folder_of_a_type_that_no_plugin_claims(
    model_folder: ModelFolder, nnpatch: Command
) -> None:
    """What has no weights cannot be run: a tiny model of its type is, and the config is shown."""
    folder = model_folder({"model_type": "gpt2", "n_embd": 48, "n_head": 6, "n_layer": 5})
    found = components_json(nnpatch, folder)
    assert (found["adapter"], found["inferred"], found["layers"]) == ("Gpt2", True, 5)
    (kind,) = found["kinds"]
    assert (rows_of(kind)["q"]["heads"], rows_of(kind)["q"]["width"]) == (6, 144)


def test_folder_of_a_type_without_a_tiny_model(
    model_folder: ModelFolder, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(model_type: str) -> Any:
        return tiny_model(model_type, hidden_size=4096)

    monkeypatch.setattr("nnpatch_core.cli.components.tiny_model", none)
    parts = ["no plugin claims model_type 'gpt2'", "'gpt2' has 2", "--adapter"]
    refused("components", model_folder({"model_type": "gpt2"}), parts=parts)


def test_two_adapters_for_one_type(install: Install, nnpatch: Command, refused: Refused) -> None:
    code = hook("register(DecoderAPI('Alpaca', ('llama',), decoder_components()))")
    install("other-llamas", code, version="7.0")
    parts = ["'llama'", "'Alpaca' of other-llamas 7.0", "'Llama3' of nnpatch-llama", "--adapter"]
    refused("components", "llama", parts=parts)
    for name in ("Alpaca", "Llama3"):
        assert components_json(nnpatch, "llama", "--adapter", name)["adapter"] == name
    assert components_json(nnpatch, "gemma2")["adapter"] == "Gemma2"


def test_two_adapters_of_one_name(install: Install, refused: Refused) -> None:
    code = hook("register(DecoderAPI('Llama3', ('alpaca',), decoder_components()))")
    install("other-llamas", code, version="7.0")
    for arguments in (("components", "llama", "--adapter", "Llama3"), ("check", "Llama3")):
        refused(*arguments, parts=["'Llama3'", "other-llamas 7.0", "nnpatch-llama"])
