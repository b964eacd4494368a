"""`nnpatch plugins`: what it lists, and what it says of plugins that are broken."""

from __future__ import annotations

import re
from importlib import metadata

import pytest

from tests.helpers.commands import OWN, Command, adapters, garbage, hook, plugins_json
from tests.helpers.distributions import Install

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


def test_own_plugins_as_json(nnpatch: Command) -> None:
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


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line)


def test_own_plugins_as_a_table(nnpatch: Command) -> None:
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


def test_plugin_with_strategies_and_metrics(install: Install, nnpatch: Command) -> None:
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


def test_plugin_that_registers_nothing(install: Install, nnpatch: Command) -> None:
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
def test_plugins_that_are_limited(
    nnpatch: Command,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    expected: list[str],
    unknown: list[str],
) -> None:
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


def test_no_plugin_installed(nnpatch: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnpatch_core.plugins.manager.metadata.distributions", lambda: [])
    assert plugins_json(nnpatch)["plugins"] == []
    done = nnpatch("plugins")
    assert done.code == 0
    assert "No plugin is installed" in done.out
    assert "pip install nnpatch-llama" in done.out


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
def test_broken_plugin(
    install: Install, nnpatch: Command, code: str, stage: str, error: str
) -> None:
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
def test_entry_point_that_leads_nowhere(
    install: Install, nnpatch: Command, value: str, error: str
) -> None:
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
def test_distribution_with_an_unreadable_file(
    install: Install, nnpatch: Command, file: str, content: bytes, listed: bool
) -> None:
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
def test_distribution_without_a_file(install: Install, nnpatch: Command, file: str) -> None:
    """What an interrupted uninstall leaves behind is none."""
    info = install("broken-models", "raise RuntimeError('imported')")
    (info / file).unlink()
    found = plugins_json(nnpatch)
    assert set(OWN) <= set(adapters(found))
    assert "broken-models" not in adapters(found)


def test_broken_plugins_all_at_once(install: Install, nnpatch: Command) -> None:
    whole = [row[0] for row in BROKEN.values()]
    for number, code in enumerate(whole):
        install(f"broken-{number}", code)
    found = plugins_json(nnpatch, code=1)
    assert len(found["failures"]) == len(whole)
    assert set(OWN) <= set(adapters(found))
    assert nnpatch("plugins").out.count("\nFailed: ") == len(whole)


def test_only_broken_plugins(
    install: Install, nnpatch: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("broken-models", "raise RuntimeError('at import')")
    monkeypatch.setenv("NNPATCH_PLUGINS", "broken-models")
    done = nnpatch("plugins")
    assert done.code == 1
    assert "Failed: " in done.out
    assert "No plugin" not in done.out


def test_broken_plugin_that_is_left_out(
    install: Install, nnpatch: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("broken-models", "raise RuntimeError('at import')")
    monkeypatch.setenv("NNPATCH_PLUGINS", "llama")
    assert plugins_json(nnpatch)["failures"] == []


def test_error_of_several_lines(install: Install, nnpatch: Command) -> None:
    install("broken-models", "raise RuntimeError('first' + chr(10) + 'second')")
    (failure,) = plugins_json(nnpatch, code=1)["failures"]
    assert failure["error"] == "RuntimeError: first\nsecond"
    assert nnpatch("plugins").code == 1


def test_error_that_cannot_be_printed(install: Install, nnpatch: Command) -> None:
    code = """
        class Mute(Exception):
            def __str__(self):
                raise RuntimeError("no text")

        raise Mute
    """
    install("broken-models", code)
    (failure,) = plugins_json(nnpatch, code=1)["failures"]
    assert "Mute" in failure["error"]


def test_broken_plugin_does_not_hinder_the_other_commands(
    install: Install, nnpatch: Command
) -> None:
    install("broken-models", "raise RuntimeError('at import')")
    assert nnpatch("components", "llama").code == 0
    assert nnpatch("check", "Llama3", "--only", "check_model_type").code == 0


def test_garbage_adapter_does_not_hinder_the_other_commands(
    install: Install, nnpatch: Command
) -> None:
    install("broken-models", garbage(model_types="None"))
    assert nnpatch("components", "llama").code == 0
