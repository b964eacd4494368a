"""The command line: what it prints, for people and as JSON, and its exit code, whatever is wrong.

Most tests call `main` in this process; a few run the program, for real exit codes and pipes.
"""

import json
import logging
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
import time
import tomllib
from importlib import metadata
from pathlib import Path

import attrs
import psutil
import pytest
import torch

from nnpatch_core.adapters import heads_of, table_of
from nnpatch_core.cli import main
from nnpatch_core.cli.models import weightless
from nnpatch_core.infer import read_model
from nnpatch_core.scaffold import adapter_source
from nnpatch_core.testing import CHECKS, causal_model_types, tiny_model

ROOT = Path(__file__).resolve().parents[2]
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
    def json(self):
        return json.loads(self.out)

    @property
    def lines(self):
        return self.out.splitlines()


@pytest.fixture(autouse=True)
def quiet_transformers():
    """The program lowers the level of a logger, which is not to outlast a test."""
    logger = logging.getLogger("transformers")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def nnpatch(capsys):
    """Runs a command in this process."""

    def nnpatch(*arguments):
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            code = end.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Done(code, out, err)

    return nnpatch


@pytest.fixture
def refused(nnpatch):
    """Runs a command that cannot be carried out; it says why in one line that has all the parts."""

    def refused(*arguments, parts=()):
        done = nnpatch(*arguments)
        assert done.code == 2
        assert done.out == ""
        (line,) = done.err.splitlines()
        assert line.startswith("nnpatch: error: ")
        for part in parts:
            assert part in line
        return line

    return refused


@pytest.fixture
def misused(nnpatch):
    """Runs a command that is spelled wrongly: usage, and what is wrong with it."""

    def misused(*arguments, parts=()):
        done = nnpatch(*arguments)
        assert done.code == 2
        assert done.out == ""
        assert done.err.startswith("usage: nnpatch")
        last = done.err.splitlines()[-1]
        assert "error: " in last
        for part in parts:
            assert part in last

    return misused


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Puts a module on the path, for `module:attribute`."""
    folder = tmp_path / "modules"
    folder.mkdir()
    made = []

    def module(code, name="martians"):
        (folder / f"{name}.py").write_text(textwrap.dedent(code), encoding="utf-8")
        monkeypatch.syspath_prepend(str(folder))
        made.append(name)
        return name

    yield module
    for name in made:
        sys.modules.pop(name, None)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts throw-away distributions on the path, as an installer would."""
    modules = []

    def install(distribution, code, *, version="1.2.3", value=None):
        module = distribution.replace("-", "_")
        site_packages = tmp_path / f"site-{len(modules)}"
        info = site_packages / f"{module}-{version}.dist-info"
        info.mkdir(parents=True)
        (site_packages / f"{module}.py").write_text(textwrap.dedent(code), encoding="utf-8")
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n", encoding="utf-8"
        )
        (info / "entry_points.txt").write_text(
            f"[nnpatch]\n{module} = {value or module}\n", encoding="utf-8"
        )
        monkeypatch.syspath_prepend(str(site_packages))
        modules.append(module)
        return info

    yield install
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def model_folder(tmp_path):
    """Writes a config.json, of settings or of any text, into a folder of its own."""

    def model_folder(config, name="model"):
        folder = tmp_path / name
        folder.mkdir()
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "config.json").write_text(text, encoding="utf-8")
        return folder

    return model_folder


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# Help, version, usage ---------------------------------------------------------------------------

OPTIONS = {
    (): ["plugins", "components", "check", "new-adapter", "--version", "Exit code"],
    ("plugins",): ["--json", "NNPATCH_PLUGINS", "Exit code 1"],
    ("components",): ["MODEL_OR_CONFIG", "--adapter", "--json", "module:attribute"],
    ("check",): [
        *("ADAPTER", "MODEL", "--only", "--known-failure", "--layers", "--json"),
        *("module:attribute", "Exit code 1"),
    ],
    ("new-adapter",): [
        *("NAME", "--model-type", "--output", "--config", "KEY=VALUE", "--json", "Exit code 1"),
    ],
}


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", OPTIONS, ids=lambda command: "".join(command) or "nnpatch")
def test_help(nnpatch, command, flag):
    done = nnpatch(*command, flag)
    assert done.code == 0
    assert done.err == ""
    assert done.out.startswith(f"usage: {' '.join(('nnpatch', *command))} ")
    for option in OPTIONS[command]:
        assert option in done.out


def test_help_has_every_option(nnpatch):
    """A new option comes with a line in the tests above."""
    for command, expected in OPTIONS.items():
        options = set(re.findall(r"--[a-z-]+", nnpatch(*command, "--help").out))
        assert options - {"--help"} == {part for part in expected if part.startswith("--")}


def test_version(nnpatch):
    done = nnpatch("--version")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"nnpatch-core {metadata.version('nnpatch-core')}\n"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "COMMAND"),
        (["sweep"], "'sweep'"),
        (["--json"], "COMMAND"),
        (["plugins", "llama"], "llama"),
        (["plugins", "--yaml"], "--yaml"),
        (["--yaml", "plugins"], "--yaml"),
        (["components"], "MODEL_OR_CONFIG"),
        (["check"], "ADAPTER"),
        (["new-adapter", "gpt2"], "--model-type"),
        (["new-adapter", "--model-type", "gpt2"], "NAME"),
    ],
)
def test_misspelled_command(misused, arguments, part):
    misused(*arguments, parts=[part])


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["componets", "llama"], "did you mean components?"),
        (["new-adaptor"], "did you mean new-adapter?"),
        (["components", "llama", "--jsno"], "did you mean --json?"),
        (["check", "Llama3", "--layer5=0"], "did you mean --layers?"),
    ],
)
def test_misspelled_command_that_is_like_another(misused, arguments, hint):
    misused(*arguments, parts=[hint])


def test_entry_point_of_the_distribution():
    """What makes the program `nnpatch` leads to what is tested here."""
    text = (ROOT / "nnpatch_core/pyproject.toml").read_text(encoding="utf-8")
    value = tomllib.loads(text)["project"]["scripts"]["nnpatch"]
    assert metadata.EntryPoint("nnpatch", value, "console_scripts").load() is main


# plugins ----------------------------------------------------------------------------------------

MARTIAN = """
    from nnpatch_core import DecoderAPI, decoder_components, hookimpl

    def largest(logits):
        return logits.max(-1).values

    @hookimpl
    def register_model_apis(register):
        register(DecoderAPI("Martian", ("martian", "phobian"), decoder_components()))
        register(DecoderAPI("Deimian", ("deimian",), decoder_components()))

    @hookimpl
    def register_seq_pos(register):
        register("windows", list)

    @hookimpl
    def register_metrics(register):
        register("largest", largest)
        register("smallest", largest)
"""
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


def typed(found):
    return {key: type(value) for key, value in found.items()}


def plugins_json(nnpatch, code=0):
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


def adapters(found):
    return {plugin["distribution"]: plugin["adapters"] for plugin in found["plugins"]}


def test_own_plugins_as_json(nnpatch):
    found = plugins_json(nnpatch)
    assert (found["limited_to"], found["unknown"], found["failures"]) == (None, [], [])
    assert OWN.items() <= adapters(found).items()
    (llama,) = [each for each in found["plugins"] if each["distribution"] == "nnpatch-llama"]
    assert llama == {
        "name": "llama",
        "distribution": "nnpatch-llama",
        "version": metadata.version("nnpatch-llama"),
        "module": "nnpatch_llama",
        "hooks": ["register_model_apis"],
        "adapters": {"Llama3": ["llama"]},
        "seq_pos": [],
        "metrics": [],
    }


def cells(line):
    return re.split(r"\s{2,}", line)


def test_own_plugins_as_a_table(nnpatch):
    done = nnpatch("plugins")
    assert (done.code, done.err) == (0, "")
    header, *rows = done.lines
    assert cells(header) == [
        *("plugin", "version", "adapters (model types)", "strategies, metrics", "hooks")
    ]
    shown = {cells(row)[0]: cells(row)[1:] for row in rows}
    for distribution, own in OWN.items():
        told = ", ".join(f"{name} ({', '.join(types)})" for name, types in own.items())
        version = metadata.version(distribution)
        assert shown[distribution] == [version, told, "-", "register_model_apis"]
    # Columns begin where their heads do.
    for place in ("version", "adapters", "strategies", "hooks"):
        assert all(row[header.index(place) - 2 : header.index(place)] == "  " for row in rows)


def test_plugin_with_strategies_and_metrics(install, nnpatch):
    install("martian-models", MARTIAN)
    (found,) = [
        each
        for each in plugins_json(nnpatch)["plugins"]
        if each["distribution"] == "martian-models"
    ]
    hooks = ["register_metrics", "register_model_apis", "register_seq_pos"]
    assert found == {
        "name": "martian_models",
        "distribution": "martian-models",
        "version": "1.2.3",
        "module": "martian_models",
        "hooks": hooks,
        "adapters": {"Martian": ["martian", "phobian"], "Deimian": ["deimian"]},
        "seq_pos": ["windows"],
        "metrics": ["largest", "smallest"],
    }
    (row,) = [line for line in nnpatch("plugins").lines if line.startswith("martian-models")]
    assert cells(row) == [
        "martian-models",
        "1.2.3",
        "Martian (martian, phobian), Deimian (deimian)",
        "windows, largest, smallest",
        ", ".join(hooks),
    ]


def test_plugin_that_registers_nothing(install, nnpatch):
    install("martian-models", "")
    (row,) = [line for line in nnpatch("plugins").lines if line.startswith("martian-models")]
    assert cells(row) == ["martian-models", "1.2.3", "-", "-", "-"]


@pytest.mark.parametrize(
    ("variable", "expected", "unknown"),
    [
        ("", [], []),
        ("llama", ["nnpatch-llama"], []),
        ("nnpatch-gemma,LLAMA", ["nnpatch-gemma", "nnpatch-llama"], []),
        ("llama,pluto, neptune", ["nnpatch-llama"], ["neptune", "pluto"]),
        ("pluto", [], ["pluto"]),
    ],
)
def test_plugins_that_are_limited(nnpatch, monkeypatch, variable, expected, unknown):
    monkeypatch.setenv("NNPATCH_PLUGINS", variable)
    found = plugins_json(nnpatch)
    assert found["limited_to"] == variable
    assert found["unknown"] == unknown
    assert sorted(adapters(found)) == expected
    done = nnpatch("plugins")
    assert (done.code, done.err) == (0, "")
    assert done.lines[0].startswith(f"Limited by NNPATCH_PLUGINS={variable!r}")
    if unknown:
        assert done.lines[0].endswith(f"; not installed: {', '.join(unknown)}.")
    else:
        assert done.lines[0].endswith(f"={variable!r}.")
    for distribution in OWN:
        assert (f"\n{distribution} " in done.out) == (distribution in expected)
    assert ("No plugin is loaded" in done.out) == (not expected)


def test_no_plugin_installed(nnpatch, monkeypatch):
    monkeypatch.setattr("nnpatch_core.plugins.manager.metadata.distributions", lambda: [])
    assert plugins_json(nnpatch)["plugins"] == []
    done = nnpatch("plugins")
    assert done.code == 0
    assert "No plugin is installed" in done.out
    assert "pip install nnpatch-llama" in done.out


HOOK = """
    from nnpatch_core import DecoderAPI, decoder_components, hookimpl

    @hookimpl
    def {hook}(register):
        {body}
"""


def hook(body, name="register_model_apis"):
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


def garbage(name='"Garbage"', model_types='("llama",)'):
    return GARBAGE.format(name=name, model_types=model_types)


#: What is wrong: the plugin's code, the stage at which it fails, and words of the error.
BROKEN = {
    "import error": ("import no_such_module", "import", "ModuleNotFoundError: No module named"),
    "syntax error": ("def oops(:", "import", "SyntaxError: "),
    "exits": ("raise SystemExit('bye')", "import", "SystemExit: bye"),
    "exits in silence": ("import sys; sys.exit()", "import", "SystemExit"),
    "raises": ("raise RuntimeError('at import')", "import", "RuntimeError: at import"),
    "hook raises": (hook("1 / 0"), "hook register_model_apis", "ZeroDivisionError: "),
    "hook exits": (hook("raise SystemExit(3)"), "hook register_model_apis", "SystemExit: 3"),
    "unknown hook": (hook("pass", "register_models"), "registration", "register_models"),
    "not an adapter": (hook("register(5)"), "hook register_model_apis", "TypeError: an adapter"),
    "not a metric": (
        hook("register('five', 5)", "register_metrics"),
        "hook register_metrics",
        "TypeError: 'five'",
    ),
    "name that is taken": (
        hook("register('last', list)", "register_seq_pos"),
        "hook register_seq_pos",
        "ValueError: 'last'",
    ),
    "adapter without model types": (
        hook("register(DecoderAPI('A', (), {}))"),
        "hook register_model_apis",
        "AdapterError: model_types",
    ),
    "adapter whose model types are None": (
        garbage(model_types="None"),
        "hook register_model_apis",
        "model_types",
    ),
    "adapter whose model types are numbers": (
        garbage(model_types="(1, 2)"),
        "hook register_model_apis",
        "(1, 2)",
    ),
    "adapter whose model types are a string": (
        garbage(model_types='"llama"'),
        "hook register_model_apis",
        "model_types",
    ),
    "adapter without a name": (garbage(name="None"), "hook register_model_apis", "name"),
    "not an Exception": ("raise BaseException('odd')", "import", "BaseException: odd"),
}


@pytest.mark.parametrize(
    ("code", "stage", "error"),
    BROKEN.values(),
    ids=BROKEN,
)
def test_broken_plugin(install, nnpatch, code, stage, error):
    install("broken-models", code, version="0.9")
    install("martian-models", MARTIAN)
    found = plugins_json(nnpatch, code=1)
    (failure,) = found["failures"]
    assert failure["name"] == failure["module"] == "broken_models"
    assert (failure["distribution"], failure["version"]) == ("broken-models", "0.9")
    assert failure["stage"] == stage
    assert error in failure["error"]
    assert {*OWN, "martian-models"} <= set(adapters(found))
    assert "broken-models" not in adapters(found)
    done = nnpatch("plugins")
    assert (done.code, done.err) == (1, "")
    (line,) = [line for line in done.lines if line.startswith("Failed: ")]
    for part in ("broken-models 0.9", stage, error):
        assert part in line
    for distribution in (*OWN, "martian-models"):
        assert f"\n{distribution} " in done.out


@pytest.mark.parametrize(
    ("value", "error"),
    [("no_such_module", "ModuleNotFoundError"), ("broken_models:nothing", "AttributeError")],
)
def test_entry_point_that_leads_nowhere(install, nnpatch, value, error):
    install("broken-models", "", value=value)
    found = plugins_json(nnpatch, code=1)
    (failure,) = found["failures"]
    assert failure["module"] == value
    assert error in failure["error"]
    assert set(OWN) <= set(adapters(found))


@pytest.mark.parametrize(
    ("file", "content", "listed"),
    [
        ("entry_points.txt", b"[nnpatch]\nno equals sign\n", True),
        ("entry_points.txt", b"[nnpatch]\n\xff\xfe = x\n", True),
        ("METADATA", b"Name: broken-models\nVersion: 1\nA: \xff\n", False),
    ],
)
def test_distribution_with_an_unreadable_file(install, nnpatch, file, content, listed):
    info = install("broken-models", MARTIAN)
    (info / file).write_bytes(content)
    done = nnpatch("plugins", "--json")
    assert done.code == int(listed)
    assert set(OWN) <= set(adapters(done.json))
    if listed:
        (failure,) = done.json["failures"]
        assert failure["distribution"] == "broken-models"
        assert "entry points" in failure["stage"]


@pytest.mark.parametrize("file", ["METADATA", "entry_points.txt"])
def test_distribution_without_a_file(install, nnpatch, file):
    """What an interrupted uninstall leaves behind is none."""
    info = install("broken-models", "raise RuntimeError('imported')")
    (info / file).unlink()
    found = plugins_json(nnpatch)
    assert set(OWN) <= set(adapters(found))
    assert "broken-models" not in adapters(found)


def test_broken_plugins_all_at_once(install, nnpatch):
    whole = [row[0] for row in BROKEN.values()]
    for number, code in enumerate(whole):
        install(f"broken-{number}", code)
    found = plugins_json(nnpatch, code=1)
    assert len(found["failures"]) == len(whole)
    assert set(OWN) <= set(adapters(found))
    assert nnpatch("plugins").out.count("\nFailed: ") == len(whole)


def test_only_broken_plugins(install, nnpatch, monkeypatch):
    install("broken-models", "raise RuntimeError('at import')")
    monkeypatch.setenv("NNPATCH_PLUGINS", "broken-models")
    done = nnpatch("plugins")
    assert done.code == 1
    assert "Failed: " in done.out
    assert "No plugin" not in done.out


def test_broken_plugin_that_is_left_out(install, nnpatch, monkeypatch):
    install("broken-models", "raise RuntimeError('at import')")
    monkeypatch.setenv("NNPATCH_PLUGINS", "llama")
    assert plugins_json(nnpatch)["failures"] == []


def test_error_of_several_lines(install, nnpatch):
    install("broken-models", "raise RuntimeError('first' + chr(10) + 'second')")
    (failure,) = plugins_json(nnpatch, code=1)["failures"]
    assert failure["error"] == "RuntimeError: first\nsecond"
    assert nnpatch("plugins").code == 1


def test_error_that_cannot_be_printed(install, nnpatch):
    code = """
        class Mute(Exception):
            def __str__(self):
                raise RuntimeError("no text")

        raise Mute
    """
    install("broken-models", code)
    (failure,) = plugins_json(nnpatch, code=1)["failures"]
    assert "Mute" in failure["error"]


def test_broken_plugin_does_not_hinder_the_other_commands(install, nnpatch):
    install("broken-models", "raise RuntimeError('at import')")
    assert nnpatch("components", "llama").code == 0
    assert nnpatch("check", "Llama3", "--only", "check_model_type").code == 0


def test_garbage_adapter_does_not_hinder_the_other_commands(install, nnpatch):
    install("broken-models", garbage(model_types="None"))
    assert nnpatch("components", "llama").code == 0


# components -------------------------------------------------------------------------------------

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
ROW = {
    "component": (str,),
    "module": (str,),
    "side": (str,),
    "width": (int,),
    "heads": (int, type(None)),
    "kind": (str, type(None)),
    "columns": (str, type(None)),
}


def components_json(nnpatch, *arguments):
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


def rows_of(kind):
    return {row["component"]: row for row in kind["components"]}


def test_components_of_a_model_type(nnpatch):
    done = nnpatch("components", "llama")
    assert done == Done(0, LLAMA, "")


def test_components_as_json(nnpatch):
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


def test_components_of_a_folder_and_of_its_config(model_folder, nnpatch, monkeypatch):
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


def test_model_type_is_meant_before_a_folder_of_that_name(model_folder, nnpatch, monkeypatch):
    monkeypatch.chdir(model_folder(SMALL, "llama").parent)
    assert components_json(nnpatch, "llama")["layers"] == 3
    assert components_json(nnpatch, "./llama")["layers"] == 5


def test_norms_after_the_blocks(nnpatch):
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


def test_adapter_of_a_module_with_fused_columns(module, nnpatch):
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


def test_layers_of_different_kinds(module, nnpatch):
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


def test_layers_with_different_numbers_of_heads(module, nnpatch):
    name = module(KINDS)
    most, other = components_json(nnpatch, "llama", "--adapter", f"{name}:Counted")["kinds"]
    assert (most["layers"], rows_of(most)["q"]["heads"]) == ([0, 2], 4)
    assert (other["layers"], rows_of(other)["q"]["heads"]) == ([1], 8)


def test_table_that_is_made_anew_each_time(module, nnpatch):
    name = module(KINDS)
    (kind,) = components_json(nnpatch, "llama", "--adapter", f"{name}:Dynamic")["kinds"]
    assert kind["layers"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("layers", "told"),
    [([0], "0"), ([0, 1], "0-1"), ([0, 2], "0, 2"), ([4], "4"), ([0, 1, 2, 5], "0-2, 5")],
)
def test_how_layers_are_named(layers, told):
    from nnpatch_core._ranges import ranges

    assert ranges(layers) == told


#: Families whose config, without weights, is to show what a real run shows.
SHOWN = (
    *("llama", "gemma2", "gpt2", "gpt_neox", "phi3", "falcon", "opt", "mixtral"),
    *("qwen3_next", "bert", "bart", "deepseek_v3", "bloom", "gptj", "mamba"),
)


def seen(model, adapter, layer):
    """The widths of the components in a run of a model with weights."""
    found = {}
    module = model.get_submodule(f"{adapter.layers}.{layer}")
    hooks = []
    for name, row in table_of(adapter, model, layer).items():
        place = module.get_submodule(row.module)

        def enter(_, args, kwargs, name=name):
            found[name] = (args[0] if args else next(iter(kwargs.values()))).shape[-1]

        def leave(_, args, output, name=name, row=row):
            found[name] = (output[row.item] if isinstance(output, tuple) else output).shape[-1]

        if row.side == "input":
            hooks.append(place.register_forward_pre_hook(enter, with_kwargs=True))
        else:
            hooks.append(place.register_forward_hook(leave))
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", SHOWN)
def test_shapes_are_those_of_a_real_run(module, model_folder, nnpatch, family):
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


def test_no_weights_are_made_for_a_config(model_folder, nnpatch):
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


def test_no_weights_are_read_from_a_folder(model_folder, nnpatch):
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
def test_adapter_that_does_not_fit(module, refused, attribute, parts):
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
def test_adapter_that_is_not_there(module, refused, command, name, code, parts):
    module(code)
    arguments = ["llama", "--adapter", name] if command == "components" else [name]
    refused(command, *arguments, parts=parts)


@pytest.mark.parametrize("name", ["no-such-model", "no/such-model", "no/such/folder", ""])
def test_model_that_is_not_there(refused, name):
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
def test_config_that_cannot_be_read(model_folder, refused, config, part):
    folder = model_folder(config)
    for place in (folder, folder / "config.json"):
        line = refused("components", place, parts=["cannot be loaded as a model", part])
        assert len(line) < 600


def test_config_of_no_causal_model(model_folder, refused):
    line = refused("components", model_folder({"model_type": "t5"}), parts=["T5Config"])
    assert len(line) < 600


def test_folder_without_a_config(tmp_path, refused):
    refused("components", tmp_path, parts=[str(tmp_path), "cannot be loaded as a model"])


def test_config_with_code_of_its_own_is_not_run(model_folder, refused, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "n")
    config = {"model_type": "martian", "auto_map": {"AutoConfig": "martian.MartianConfig"}}
    folder = model_folder(config)
    (folder / "martian.py").write_text("raise RuntimeError('run')", encoding="utf-8")
    refused("components", folder, parts=["cannot be loaded as a model"])
    assert asked == []


def test_type_that_no_plugin_claims(nnpatch):
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


def test_type_that_no_plugin_claims_beside_a_broken_one(install, nnpatch):
    install("martian-models", "raise RuntimeError('at import')")
    done = nnpatch("components", "gpt2")
    for part in ("Inferred from", "martian-models 1.2.3", "at import"):
        assert part in done.out


def test_type_whose_plugin_is_left_out(nnpatch, monkeypatch):
    monkeypatch.setenv("NNPATCH_PLUGINS", "")
    done = nnpatch("components", "llama")
    assert done.code == 0
    assert "nnpatch-llama has one, which NNPATCH_PLUGINS='' leaves out" in done.out


def test_folder_of_a_type_that_no_plugin_claims(model_folder, nnpatch):
    """What has no weights cannot be run: a tiny model of its type is, and the config is shown."""
    folder = model_folder({"model_type": "gpt2", "n_embd": 48, "n_head": 6, "n_layer": 5})
    found = components_json(nnpatch, folder)
    assert (found["adapter"], found["inferred"], found["layers"]) == ("Gpt2", True, 5)
    (kind,) = found["kinds"]
    assert (rows_of(kind)["q"]["heads"], rows_of(kind)["q"]["width"]) == (6, 144)


def test_folder_of_a_type_without_a_tiny_model(model_folder, refused, monkeypatch):
    def none(model_type):
        return tiny_model(model_type, hidden_size=4096)

    monkeypatch.setattr("nnpatch_core.cli.components.tiny_model", none)
    parts = ["no plugin claims model_type 'gpt2'", "'gpt2' has 2", "--adapter"]
    refused("components", model_folder({"model_type": "gpt2"}), parts=parts)


def test_two_adapters_for_one_type(install, nnpatch, refused):
    code = hook("register(DecoderAPI('Alpaca', ('llama',), decoder_components()))")
    install("other-llamas", code, version="7.0")
    parts = ["'llama'", "'Alpaca' of other-llamas 7.0", "'Llama3' of nnpatch-llama", "--adapter"]
    refused("components", "llama", parts=parts)
    for name in ("Alpaca", "Llama3"):
        assert components_json(nnpatch, "llama", "--adapter", name)["adapter"] == name
    assert components_json(nnpatch, "gemma2")["adapter"] == "Gemma2"


def test_two_adapters_of_one_name(install, refused):
    code = hook("register(DecoderAPI('Llama3', ('alpaca',), decoder_components()))")
    install("other-llamas", code, version="7.0")
    for arguments in (("components", "llama", "--adapter", "Llama3"), ("check", "Llama3")):
        refused(*arguments, parts=["'Llama3'", "other-llamas 7.0", "nnpatch-llama"])


# check ------------------------------------------------------------------------------------------

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


@pytest.fixture
def wrong(module):
    """A module of adapters that are wrong."""
    return module(SWAPPED)


def check_json(nnpatch, *arguments, code=0):
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


def statuses(results):
    return {result["check"]: result["status"] for result in results}


def only(*names):
    return [part for name in names for part in ("--only", f"check_{name}")]


def test_adapter_that_passes(nnpatch):
    done = nnpatch("check", "Llama3")
    assert (done.code, done.err) == (0, "")
    title, header, *rows, count = done.lines
    assert title == "adapter Llama3 on llama"
    assert header.split() == ["check", "status", "reason"]
    assert [row.split() for row in rows] == [[name, "passed"] for name in CHECKS]
    assert count.strip() == f"{len(CHECKS)} passed"


def test_adapter_that_fails(wrong, nnpatch):
    """Keys are where values are said to be, and values where keys are."""
    found = check_json(nnpatch, f"{wrong}:Swapped", code=1)
    (results,) = found["models"].values()
    told = statuses(results)
    assert list(told) == list(CHECKS)
    assert told["check_value_heads"] == told["check_execution_order"] == "failed"
    assert told["check_model_type"] == told["check_layers"] == "passed"
    reasons = {result["check"]: result["reason"] for result in results}
    assert "v L0 H0, turned round, does not turn" in reasons["check_value_heads"]
    done = nnpatch("check", f"{wrong}:Swapped", *only("value_heads", "layers"))
    assert (done.code, done.err) == (1, "")
    (line,) = [line for line in done.lines if "check_value_heads" in line]
    assert line.split(maxsplit=2)[1:] == ["failed", reasons["check_value_heads"]]
    assert done.lines[-1].strip() == "1 failed, 1 passed"


def test_layers_that_are_elsewhere(wrong, nnpatch):
    done = nnpatch("check", f"{wrong}:Nowhere", *only("layers", "sweep"))
    assert done.code == 1
    assert done.out.count("'transformer.h'") == 2


def test_several_model_types(wrong, nnpatch):
    found = check_json(nnpatch, f"{wrong}:Two", *only("model_type", "components"))
    assert list(found["models"]) == ["mistral", "llama"]
    for results in found["models"].values():
        assert statuses(results) == dict.fromkeys(
            ["check_model_type", "check_components"], "passed"
        )
    done = nnpatch("check", f"{wrong}:Two", *only("model_type"))
    assert done.code == 0
    assert [line for line in done.lines if "adapter" in line] == [
        "adapter Two on mistral",
        "adapter Two on llama",
    ]


def test_one_model_type_fails_of_several(wrong, nnpatch):
    found = check_json(nnpatch, f"{wrong}:GPT2", *only("layers"), code=1)
    assert [results[0]["status"] for results in found["models"].values()] == ["passed", "failed"]


def test_model_of_another_type(nnpatch):
    found = check_json(nnpatch, "Llama3", "mistral", *only("model_type"), code=1)
    assert "'mistral'" in found["models"]["mistral"][0]["reason"]


def test_model_folder(tmp_path, nnpatch, monkeypatch):
    folder = tmp_path / "model"
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder)
    checks = [f"check_{name}" for name in ("layers", "components", "sweep")]
    arguments = only("layers", "components", "sweep")
    # transformers may show on the standard error how far it has come.
    done = nnpatch("check", "Llama3", folder, *arguments, "--json")
    assert done.code == 0
    assert statuses(done.json["models"][str(folder)]) == dict.fromkeys(checks, "passed")
    done = nnpatch("check", "Llama3", folder / "config.json", *arguments)
    assert done.code == 0
    assert f"adapter Llama3 on {folder / 'config.json'}" in done.lines
    monkeypatch.chdir(folder)
    assert nnpatch("check", "Llama3", "config.json", *only("layers"), "--layers", "1").code == 0


def test_weights_of_the_folder_are_those_that_are_checked(tmp_path, nnpatch):
    """One whose last layer's MLP gives nothing fails."""
    model = tiny_model("llama")
    torch.nn.init.zeros_(model.model.layers[2].mlp.down_proj.weight)
    model.save_pretrained(tmp_path)
    done = nnpatch("check", "Llama3", tmp_path, *only("patch_reaches_logits"), "--json")
    assert done.code == 1
    ((result,),) = done.json["models"].values()
    assert "mlp L2" in result["reason"]


def test_folder_without_weights(model_folder, refused):
    folder = model_folder(SMALL)
    refused("check", "Llama3", folder, parts=[str(folder), "cannot be loaded as a model"])


def test_checks_run_are_those_named_in_that_order(nnpatch):
    found = check_json(nnpatch, "Llama3", *only("causal", "model_type"))
    assert list(statuses(found["models"]["llama"])) == ["check_causal", "check_model_type"]


def test_skipped_check(nnpatch, module):
    code = """
        from nnpatch_core import Component, DecoderAPI

        Block = DecoderAPI("Block", ("llama",), {"mlp": Component("mlp")})
    """
    name = module(code)
    found = check_json(nnpatch, f"{name}:Block", *only("value_heads", "model_type"))
    assert found["models"]["llama"] == [
        {"check": "check_value_heads", "status": "skipped", "reason": "the adapter has no v"},
        {"check": "check_model_type", "status": "passed", "reason": ""},
    ]
    done = nnpatch("check", f"{name}:Block", *only("value_heads", "model_type"))
    assert done.lines[-1].strip() == "1 skipped, 1 passed"


def test_only_some_layers_are_looked_at(wrong, nnpatch):
    """Layer 1 is said to have as many keys as queries."""
    arguments = [f"{wrong}:Own", *only("components", "key_heads")]
    for layers, code in (("0", 0), ("0,2", 0), ("2,0", 0), ("1", 1), ("0,1", 1)):
        check_json(nnpatch, *arguments, "--layers", layers, code=code)
    check_json(nnpatch, *arguments, code=1)


@pytest.mark.parametrize("layers", ["3", "0,99", "-1"])
def test_layers_out_of_range(refused, layers):
    refused("check", "Llama3", "--layers", layers, parts=["out of range", "layers 0 to 2"])


@pytest.mark.parametrize("layers", ["x", "", "0,", "0-2", "1.0"])
def test_layers_that_are_no_numbers(misused, layers):
    misused("check", "Llama3", "--layers", layers, parts=[f"{layers!r} is not numbers"])


def known(*names):
    return [part for name in names for part in ("--known-failure", f"check_{name}")]


def test_known_failures(wrong, nnpatch):
    arguments = [f"{wrong}:Swapped", *only("value_heads", "key_heads", "layers")]
    check_json(nnpatch, *arguments, *known("value_heads"), code=1)
    found = check_json(nnpatch, *arguments, *known("value_heads", "key_heads"))
    results = found["models"]["llama"]
    assert list(statuses(results).values()) == ["known failure", "known failure", "passed"]
    assert "does not turn" in results[0]["reason"]


def test_known_failure_that_is_none(nnpatch):
    found = check_json(nnpatch, "Llama3", *only("layers", "model_type"), *known("layers"), code=1)
    assert list(statuses(found["models"]["llama"]).values()) == ["fixed", "passed"]
    done = nnpatch("check", "Llama3", *only("layers"), *known("layers"))
    assert done.code == 1
    assert done.lines[-1].strip() == "1 fixed"


@pytest.mark.parametrize("option", ["--only", "--known-failure"])
def test_unknown_check(refused, option):
    parts = ["unknown check 'check_everything'", "check_layers", "check_gradients"]
    refused("check", "Llama3", option, "check_everything", parts=parts)


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        ("Raises", "RuntimeError: cannot count"),
        ("Words", "Error: "),
        ("Zero", "Error: "),
        ("NoTable", "TypeError: "),
        ("Rows", "AttributeError: "),
        ("NoLayers", "Error: "),
    ],
)
def test_adapter_of_garbage_fails(wrong, nnpatch, attribute, reason):
    found = check_json(nnpatch, f"{wrong}:{attribute}", code=1)
    (results,) = found["models"].values()
    assert [each["check"] for each in results] == list(CHECKS)
    failed = [each for each in results if each["status"] == "failed"]
    assert any(reason in each["reason"] for each in failed)


@pytest.mark.parametrize(
    ("attribute", "parts"),
    [
        ("Nameless", ["'Own' names no model type", "name a model"]),
        ("Martian", ["'martian' is no model type of transformers"]),
        ("NoTypes", ["model type"]),
    ],
)
def test_adapter_of_which_nothing_can_be_checked(wrong, refused, attribute, parts):
    refused("check", f"{wrong}:{attribute}", parts=parts)


@pytest.mark.parametrize(
    ("attribute", "part"),
    [
        ("Raises", "RuntimeError: cannot count"),
        ("NoTable", "NoneType"),
        ("Rows", "Error: "),
        ("NoLayers", "no list of layers at None"),
    ],
)
def test_components_of_garbage(wrong, refused, attribute, part):
    refused("components", "llama", "--adapter", f"{wrong}:{attribute}", parts=[part])


# new-adapter ------------------------------------------------------------------------------------

FILES = [
    "pyproject.toml",
    "README.md",
    "src/nnpatch_gpt2/__init__.py",
    "src/nnpatch_gpt2/py.typed",
    "tests/test_nnpatch_gpt2.py",
]


def written(folder, name):
    return (folder / f"src/nnpatch_{name}/__init__.py").read_text(encoding="utf-8")


def readme(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def test_package_in_the_current_folder(tmp_path, nnpatch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = nnpatch("new-adapter", "gpt2", "--model-type", "gpt2")
    assert (done.code, done.err) == (0, "")
    assert [path for path in listing(tmp_path) if Path(path).is_file()] == sorted(
        f"nnpatch-gpt2/{path}" for path in FILES
    )
    title, *lines = done.lines
    assert title == "nnpatch-gpt2, with the adapter Gpt2 for model type gpt2:"
    assert lines[:5] == [f"  nnpatch-gpt2/{path}" for path in FILES]
    assert lines[5] == f"Read off the model: {', '.join(COMPONENTS)}."
    assert lines[6] == f"It passes the {len(CHECKS)} checks of the kit that apply to it."
    assert lines[7] == "Next: pip install -e 'nnpatch-gpt2[test]' && pytest nnpatch-gpt2"
    assert len(lines) == 8


def test_package_elsewhere_as_json(tmp_path, nnpatch):
    folder = tmp_path / "deep" / "down"
    done = nnpatch("new-adapter", "My_GPT2", "--model-type", "gpt2", "--output", folder, "--json")
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


def test_written_adapter_passes_the_checks(tmp_path, nnpatch, monkeypatch):
    """By another way than the command's own: the module is imported and checked."""
    folder = tmp_path / "package"
    code = nnpatch("new-adapter", "neox", "--model-type", "gpt_neox", "--output", folder).code
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
def test_what_exists_is_left_as_it_is(tmp_path, refused, make):
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
def test_name_that_makes_no_package(tmp_path, refused, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    refused("new-adapter", "--model-type", "gpt2", "--", name, parts=[repr(name), "letters"])
    assert listing(tmp_path) == []


@pytest.mark.parametrize("name", ["core", "nnpatch-core"])
def test_name_of_the_core(tmp_path, refused, name):
    refused("new-adapter", name, "--model-type", "gpt2", "--output", tmp_path / "new")
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("model_type", "like"), [("lama", "llama"), ("gpt-2", "gpt2"), ("zzzzzzzz", "llama")]
)
def test_unknown_model_type(tmp_path, refused, model_type, like):
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
def test_model_of_which_there_is_no_tiny_one(tmp_path, refused, model_type, settings, parts):
    if model_type not in causal_model_types():
        pytest.skip(f"this transformers has no {model_type}")
    given = [part for setting in settings for part in ("--config", setting)]
    arguments = ["new-adapter", "new", "--model-type", model_type, *given]
    refused(*arguments, "--output", tmp_path / "new", parts=parts)
    assert listing(tmp_path) == []


def test_settings_of_the_tiny_model(tmp_path, nnpatch, monkeypatch):
    made, written = [], []

    def tiny(model_type, **settings):
        made.append((model_type, settings))
        return tiny_model(model_type, **settings)

    def write(*arguments):
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


def test_settings_change_what_is_read(tmp_path, nnpatch):
    arguments = ["new-adapter", "new", "--model-type", "granite", "--output", tmp_path / "new"]
    assert nnpatch(*arguments, "--config", "residual_multiplier=0.5").code == 0
    assert 'residual="scaled"' in written(tmp_path / "new", "new")


@pytest.mark.parametrize("setting", ["hidden_size", "=3", "a-b=1", "a b=1", "3=3", ""])
def test_setting_that_is_none(tmp_path, misused, setting):
    misused(
        *("new-adapter", "new", "--model-type", "llama", "--output", tmp_path / "new"),
        *("--config", setting),
        parts=[f"{setting!r} is not KEY=VALUE"],
    )
    assert listing(tmp_path) == []


@pytest.mark.parametrize("setting", ["class=3", "rope_scale=NaN", "rope_scale=-Infinity"])
def test_setting_that_python_does_not_spell_so(tmp_path, nnpatch, setting):
    arguments = ["new-adapter", "new", "--model-type", "llama", "--output", tmp_path / "new"]
    assert nnpatch(*arguments, "--config", setting).code == 2
    assert listing(tmp_path) == []


def test_what_could_not_be_read_off_is_said(tmp_path, nnpatch):
    """Its keys and values are made of one latent vector, by one module."""
    folder = tmp_path / "latent"
    arguments = ["new-adapter", "latent", "--model-type", "deepseek_v3", "--output"]
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


def test_nothing_missing_is_not_mentioned(tmp_path, nnpatch):
    folder = tmp_path / "new"
    done = nnpatch("new-adapter", "new", "--model-type", "llama", "--output", folder)
    assert done.code == 0
    for text in (done.out, readme(folder), written(folder, "new")):
        assert "Not read off" not in text
        assert "ail" not in text


def without_gradient(model_type, **settings):
    """A tiny model through whose last MLP no gradient flows."""
    model = tiny_model(model_type, **settings)
    model.model.layers[-1].mlp.register_forward_hook(lambda _, args, output: output.detach())
    return model


def test_family_that_fails_a_check(tmp_path, nnpatch, monkeypatch):
    monkeypatch.setattr("nnpatch_core.cli.models.tiny_model", without_gradient)
    arguments = ["new-adapter", "new", "--model-type", "llama", "--output"]
    done = nnpatch(*arguments, tmp_path / "one", "--json")
    assert (done.code, done.err) == (1, "")
    assert list(done.json["failed"]) == ["check_gradients"]
    assert all(Path(path).is_file() for path in done.json["files"])
    reason = done.json["failed"]["check_gradients"]
    assert "L2" in reason or "layer 2" in reason
    done = nnpatch(*arguments, tmp_path / "two")
    assert done.code == 1
    assert f"Fails: check_gradients: {reason}" in done.lines
    assert "It passes" not in done.out
    assert f"- `check_gradients`: {reason}" in readme(tmp_path / "two").splitlines()


def test_type_that_the_model_does_not_call_itself(tmp_path, nnpatch):
    if "gpt-sw3" not in causal_model_types():
        pytest.skip("this transformers has no gpt-sw3")
    folder = tmp_path / "new"
    arguments = ["new-adapter", "sw3", "--model-type", "gpt-sw3", "--output", folder]
    done = nnpatch(*arguments)
    assert done.code != 0 or 'model_types=("gpt2",)' in written(folder, "sw3")


def test_place_that_cannot_be_written(tmp_path, refused):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    refused(
        *("new-adapter", "new", "--model-type", "llama", "--output", tmp_path / "file" / "new"),
        parts=["cannot be written", str(tmp_path / "file" / "new")],
    )
    assert listing(tmp_path) == ["file"]


def test_nothing_is_left_of_a_package_half_written(tmp_path, refused, monkeypatch):
    writes = []
    write_text = Path.write_text

    def third_fails(path, *args, **kwargs):
        writes.append(path)
        if len(writes) == 3:
            raise OSError(28, "No space left on device")
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", third_fails)
    refused(
        *("new-adapter", "new", "--model-type", "llama", "--output", tmp_path / "new"),
        parts=["cannot be written", "No space left on device"],
    )
    assert len(writes) == 3
    # Two files were there, in this folder, so that they could be moved as a whole.
    assert all(tmp_path in path.parents for path in writes)
    assert listing(tmp_path) == []


# The program ------------------------------------------------------------------------------------


def program(*arguments, **options):
    """The installed program; where it is not installed, what it would run."""
    script = Path(sysconfig.get_path("scripts")) / "nnpatch"
    call = "import sys; from nnpatch_core.cli import main; sys.exit(main())"
    command = [script] if script.exists() else [sys.executable, "-c", call]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments],
        check=False,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        env={**environment, **options.pop("env", {})},
        **options,
    )


def test_program_with_a_broken_plugin(install):
    site_packages = install("broken-models", "raise SystemExit(0)").parent
    path = os.pathsep.join([str(site_packages), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    done = program("plugins", "--json", stdout=subprocess.PIPE, env={"PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    assert [failure["distribution"] for failure in found["failures"]] == ["broken-models"]
    assert set(OWN) <= set(adapters(found))


def test_program_without_the_model():
    done = program("components", "no/such-model", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("nnpatch: error: 'no/such-model' is no model type")


def test_program_whose_reader_has_gone():
    """What `| head -1` does to it, when head is the quicker one."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = program("components", "llama", stdout=write)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
