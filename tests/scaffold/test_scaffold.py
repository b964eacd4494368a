"""What `nnpatch new-adapter` writes: the source makes the adapter again, and the package works."""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement

import nnpatch_core
from nnpatch_core import (
    Component,
    DecoderAPI,
    Fused,
    Interleaved,
    PartOfHead,
    decoder_components,
    fused_projections,
    separate_projections,
)
from nnpatch_core.components import COMPONENT_NAMES
from nnpatch_core.errors import AdapterError
from nnpatch_core.infer import put_to_test, read_model
from nnpatch_core.scaffold import adapter_source, package_names, write_package
from nnpatch_core.testing import CHECKS, Result, tiny_model


def facts(adapter: DecoderAPI) -> dict[str, Any]:
    """Everything that an adapter says, tables in their order."""
    found = {field.name: getattr(adapter, field.name) for field in attrs.fields(DecoderAPI)}
    found["components"] = list(adapter.components.items())
    found["kinds"] = [(path, list(table.items())) for path, table in adapter.kinds.items()]
    return found


def names_used(source: str) -> set[str]:
    """The names that a piece of source takes from elsewhere."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    made = {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
    return {node.id for node in nodes} - made


def made_again(adapter: DecoderAPI, variable: str = "Again") -> DecoderAPI:
    """The adapter that the source of an adapter makes, with the names that it asks for alone."""
    source, names = adapter_source(adapter, variable)
    assert names_used(source) == names
    assert names <= set(nnpatch_core.__all__)
    scope = {name: getattr(nnpatch_core, name) for name in names}
    exec(source, scope)
    return scope[variable]


# The source of adapters that were read off a model ----------------------------------------------

#: Family to the settings of its tiny model, and what its adapter says that most do not.
FAMILIES = {
    "llama": ({}, {}),
    "gemma2": ({}, {}),
    "gpt2": ({}, {"layers": "transformer.h"}),
    "gpt_neox": ({}, {"layers": "gpt_neox.layers"}),
    "phi3": ({}, {}),
    "falcon": ({}, {"layers": "transformer.h", "key_value_heads": 1}),
    "opt": ({}, {"layers": "model.decoder.layers"}),
    "mixtral": ({}, {}),
    "qwen3": ({}, {}),
    "qwen3_next": ({}, {}),
    "lfm2": ({}, {}),
    "granite": ({"residual_multiplier": 0.5}, {"residual": "scaled"}),
    "bert": ({}, {"layers": "bert.encoder.layer", "residual": None}),
    "bart": ({}, {"layers": "model.decoder.layers", "residual": None, "padding": False}),
    "deepseek_v3": ({}, {}),
    "bloom": ({}, {"layers": "transformer.h"}),
    "gptj": ({}, {"layers": "transformer.h"}),
    "codegen": ({}, {"layers": "transformer.h"}),
    "olmo2": ({}, {}),
    "mamba": ({}, {"layers": "backbone.layers", "residual": None}),
}
LAYOUTS = {"gpt2": Fused, "phi3": Fused, "falcon": Fused, "gpt_neox": Interleaved}
LAYOUTS["bloom"] = Interleaved


@functools.cache
def read(family: str) -> tuple[Any, Mapping[str, str]]:
    """The adapter of a family, and what could not be read off."""
    given_settings, _ = FAMILIES[family]
    model = tiny_model(family, **given_settings)
    found = read_model(model, package_names(family).adapter)
    if family != "bart":
        return found.adapter, found.missing
    # That it does not mask padding is told by the checks, of one layer as of three.
    return put_to_test(found.adapter, tiny_model(family, decoder_layers=1))[0], found.missing


@pytest.mark.parametrize("family", FAMILIES)
def test_source_makes_the_adapter_again(family: str) -> None:
    adapter, _ = read(family)
    assert facts(made_again(adapter)) == facts(adapter)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_source_is_made_from(family: str) -> None:
    """The families are worth a test: they differ as they should."""
    adapter, missing = read(family)
    told = {
        "layers": "model.layers",
        "query_heads": "num_attention_heads",
        "key_value_heads": "num_key_value_heads",
        "residual": "sum",
        "padding": True,
        **FAMILIES[family][1],
    }
    assert {name: getattr(adapter, name) for name in told} == told
    assert adapter.model_types == (family,)
    layout = LAYOUTS.get(family)
    for part in "qkv" if layout else "":
        assert adapter.components[part].columns == layout(part)
    lacking = {"deepseek_v3": {"k", "v"}, "mamba": set(COMPONENT_NAMES) - {"resid_pre", "resid"}}
    if family in lacking:
        assert set(missing) == lacking[family]
        assert not set(missing) & set(adapter.components)
    assert bool(adapter.kinds) == (family == "qwen3_next")


LLAMA = """\
Llama = DecoderAPI(
    name="Llama",
    model_types=("llama",),
    components=decoder_components(),
)"""
GPT2 = """\
Gpt2 = DecoderAPI(
    name="Gpt2",
    model_types=("gpt2",),
    components=decoder_components(
        attn="attn",
        heads=fused_projections("attn.c_attn", "attn.c_proj", Fused),
    ),
    layers="transformer.h",
)"""
OPT = """\
Opt = DecoderAPI(
    name="Opt",
    model_types=("opt",),
    components=decoder_components(mlp="fc2", heads=separate_projections(o="out_proj")),
    layers="model.decoder.layers",
)"""
MAMBA = """\
Mamba = DecoderAPI(
    name="Mamba",
    model_types=("mamba",),
    components={
        "resid_pre": Component("", "input"),
        "resid": Component(""),
    },
    layers="backbone.layers",
    residual=None,
)"""


@pytest.mark.parametrize(
    ("family", "expected"), [("llama", LLAMA), ("gpt2", GPT2), ("opt", OPT), ("mamba", MAMBA)]
)
def test_source_is_as_short_as_an_author_would_have_it(family: str, expected: str) -> None:
    adapter, _ = read(family)
    assert adapter_source(adapter, adapter.name)[0] == expected


# The source of any adapter ----------------------------------------------------------------------

identifiers = st.from_regex(r"[a-z_][a-z0-9_]{0,9}", fullmatch=True)
paths = st.lists(identifiers, min_size=1, max_size=3).map(".".join)
parts = st.sampled_from("qkv")
layouts = st.none() | st.one_of(
    parts.map(Fused),
    parts.map(Interleaved),
    st.integers(0, 3).flatmap(
        lambda index: st.integers(index + 1, 5).map(lambda parts: PartOfHead(index, parts))
    ),
)
counts = st.integers(1, 9) | paths


@st.composite
def rows(draw: st.DrawFn, heads: Any) -> Any:
    side = draw(st.sampled_from(["input", "output"]))
    return Component(
        draw(st.just("") | paths),
        side,
        heads=heads,
        item=draw(st.integers(0, 3)) if side == "output" else 0,
        columns=draw(layouts),
    )


@st.composite
def usual_tables(draw: st.DrawFn) -> Any:
    """Tables made by the functions that the source may name."""
    heads = draw(
        st.sampled_from(
            [
                None,
                {},
                separate_projections(),
                separate_projections("attention", q="query", o="out"),
                separate_projections("attention.self", k="key_proj"),
                fused_projections("attn.qkv", "attn.o_proj", Fused),
                fused_projections("attn.qkv", "out", Interleaved),
            ]
        )
    )
    return decoder_components(attn=draw(paths), mlp=draw(paths), heads=heads)


@st.composite
def tables(draw: st.DrawFn, kinds: Any) -> Any:
    """Tables of some components, in any order, whose kind of heads is given by their names."""
    if draw(st.booleans()):
        table = draw(usual_tables())
        # A row more, a row less, another row, another order: no longer a usual table.
        for name in draw(st.lists(st.sampled_from(COMPONENT_NAMES), max_size=2, unique=True)):
            table.pop(name, None)
            if draw(st.booleans()):
                table[name] = draw(rows(kinds[name]))
        order = draw(st.just(list(table)) | st.permutations(list(table)))
        return {name: attrs.evolve(table[name], heads=kinds[name]) for name in order}
    names = draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=6, unique=True))
    return {name: draw(rows(kinds[name])) for name in names}


@st.composite
def adapters(draw: st.DrawFn) -> Any:
    usual = {
        name: row.heads for name, row in decoder_components(heads=separate_projections()).items()
    }
    any_kind = st.sampled_from([None, "query", "key_value"])
    changes = st.dictionaries(st.sampled_from(COMPONENT_NAMES), any_kind, max_size=2)
    kinds = {**usual, "my_own": draw(any_kind), **draw(changes)}
    return DecoderAPI(
        name=draw(identifiers),
        model_types=tuple(draw(st.lists(identifiers, min_size=1, max_size=3))),
        components=draw(tables(kinds)),
        layers=draw(st.just("model.layers") | paths),
        query_heads=draw(st.just("num_attention_heads") | counts),
        key_value_heads=draw(st.just("num_key_value_heads") | counts),
        kinds=draw(st.dictionaries(paths, tables(kinds), max_size=2)),
        residual=draw(st.sampled_from(["sum", "scaled", None])),
        padding=draw(st.booleans()),
    )


@settings(max_examples=50)
@given(adapters())
def test_source_of_any_adapter_makes_it_again(adapter: Any) -> None:
    assert facts(made_again(adapter)) == facts(adapter)


@given(usual_tables())
def test_usual_tables_are_named_by_what_makes_them(table: Any) -> None:
    adapter = DecoderAPI("A", ("a",), table)
    _, names = adapter_source(adapter, "A")
    assert "decoder_components" in names
    assert "Component" not in names
    assert facts(made_again(adapter)) == facts(adapter)


def test_source_of_an_adapter_without_components() -> None:
    adapter = DecoderAPI("A", ("a",), {})
    assert facts(made_again(adapter)) == facts(adapter)


@pytest.mark.parametrize(
    "text",
    [
        "attn-1",
        "self attn",
        "aufmerksamkeit_ä",
        "注意",
        "it's",
        'say "attn"',
        "back\\slash",
        "tab\\t",
        "new\nline",
        "ends with \\",
        """both ' and " """,
    ],
)
def test_odd_characters(text: str) -> None:
    """Modules can be called almost anything."""
    adapter = DecoderAPI(
        text,
        (text, f"{text}2"),
        {**decoder_components(attn=text), text: Component(text, heads="query")},
        text,
        text,
        text,
        kinds={text: decoder_components(mlp=text, heads=separate_projections(text, q=text))},
    )
    assert facts(made_again(adapter)) == facts(adapter)


def nothing(width: int, heads: int) -> Any:
    return []


@pytest.mark.parametrize(
    "change",
    [
        {"query_heads": lambda config, layer: 4},
        {"key_value_heads": lambda config, layer: 4},
        {"components": {"q": Component("q", heads="query", columns=nothing)}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_function_has_no_source(change: dict[str, Any]) -> None:
    """No source is better than one that does not compile."""
    adapter = attrs.evolve(DecoderAPI("A", ("a",), decoder_components()), **change)
    with pytest.raises(AdapterError):
        adapter_source(adapter, "A")


# Names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "short", "module", "adapter"),
    [
        ("gpt2", "gpt2", "nnpatch_gpt2", "Gpt2"),
        ("gpt_neox", "gpt-neox", "nnpatch_gpt_neox", "GptNeox"),
        ("GPT-NeoX", "gpt-neox", "nnpatch_gpt_neox", "GptNeox"),
        ("nnpatch-gpt-neox", "gpt-neox", "nnpatch_gpt_neox", "GptNeox"),
        (" my  own__model ", "my-own-model", "nnpatch_my_own_model", "MyOwnModel"),
        ("qwen2.5", "qwen2-5", "nnpatch_qwen2_5", "Qwen25"),
        ("a-3b", "a-3b", "nnpatch_a_3b", "A3b"),
    ],
)
def test_names(given: str, short: str, module: str, adapter: str) -> None:
    names = package_names(given)
    assert names.distribution == f"nnpatch-{short}"
    assert (names.module, names.adapter) == (module, adapter)


@given(st.text(max_size=12))
def test_names_are_names_or_refused(text: Any) -> None:
    try:
        names = package_names(text)
    except AdapterError:
        return
    assert re.fullmatch(r"nnpatch(-[a-z0-9]+)+", names.distribution)
    assert names.module.isidentifier()
    assert names.adapter.isidentifier()
    assert package_names(names.distribution) == names
    ast.parse(f"{names.adapter} = 1")


# The package ------------------------------------------------------------------------------------


def write(
    root: Path,
    family: str,
    adapter: Any = None,
    results: Any = (),
    settings: dict[str, Any] | None = None,
) -> tuple[Path, Any]:
    """The package of a family, in a folder of its name; the folder and the names."""
    found, missing = read(family)
    names = package_names(family)
    folder = root / names.distribution
    given = FAMILIES[family][0] if settings is None else settings
    write_package(folder, names, adapter or found, missing, results, given)
    return folder, names


@pytest.fixture(scope="module")
def packages(tmp_path_factory: Any) -> dict[str, tuple[Path, Any]]:
    """Family to its package, and its names."""
    root = tmp_path_factory.mktemp("packages")
    return {family: write(root, family) for family in FAMILIES}


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_files_of_a_package(tmp_path: Path) -> None:
    adapter, missing = read("gpt2")
    folder = tmp_path / "not" / "yet" / "there"
    files = write_package(folder, package_names("my-gpt2"), adapter, missing, [], {})
    assert files == [
        folder / "pyproject.toml",
        folder / "README.md",
        folder / "LICENSE",
        folder / "src/nnpatch_my_gpt2/__init__.py",
        folder / "src/nnpatch_my_gpt2/py.typed",
        folder / "tests/test_nnpatch_my_gpt2.py",
    ]
    assert sorted(files) == sorted(path for path in folder.rglob("*") if path.is_file())
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("family", FAMILIES)
def test_pyproject(packages: dict[str, tuple[Path, Any]], family: str) -> None:
    folder, names = packages[family]
    found = tomllib.loads(text_of(folder / "pyproject.toml"))
    assert found["build-system"]["build-backend"] == "hatchling.build"
    project = found["project"]
    assert project["name"] == names.distribution
    assert family in project["description"]
    assert (folder / project["readme"]).is_file()
    (requirement,) = map(Requirement, project["dependencies"])
    assert requirement.name == "nnpatch-core"
    assert requirement.specifier.contains(metadata.version("nnpatch-core"), prereleases=True)
    assert not requirement.specifier.contains("99")
    ((_, value),) = project["entry-points"]["nnpatch"].items()
    assert value == names.module
    (source,) = found["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert (folder / source / "__init__.py").is_file()
    assert "testing" in Requirement(project["optional-dependencies"]["test"][0]).extras


@pytest.mark.parametrize("family", FAMILIES)
def test_module_of_the_package(packages: dict[str, tuple[Path, Any]], family: str) -> None:
    """It has the adapter under its name, and registers that alone."""
    folder, names = packages[family]
    path = folder / "src" / names.module / "__init__.py"
    scope: dict[str, Any] = {}
    exec(compile(text_of(path), path.name, "exec"), scope)
    assert scope["__all__"] == [names.adapter]
    adapter = scope[names.adapter]
    assert facts(adapter) == facts(read(family)[0])
    registered: list[Any] = []
    scope["register_model_apis"](registered.append)
    assert registered == [adapter]
    assert hasattr(scope["register_model_apis"], "nnpatch_impl")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_could_not_be_read_off_is_in_the_package(
    packages: dict[str, tuple[Path, Any]], family: str
) -> None:
    folder, names = packages[family]
    missing = read(family)[1]
    module = text_of(folder / f"src/{names.module}/__init__.py")
    readme = text_of(folder / "README.md")
    comment = " ".join(re.findall(r"^# +(.*)$", module, re.MULTILINE))
    for name, reason in missing.items():
        assert reason
        assert f"{name}: {' '.join(reason.split())}." in comment
        assert f"- `{name}`: {reason}." in readme
    assert ("Not read off the model" in module) == bool(missing)
    assert ("Not read off the model" in readme) == bool(missing)


def test_checks_that_fail_are_in_the_readme(tmp_path: Path) -> None:
    results = [
        Result("check_layers", "passed"),
        Result("check_causal", "failed", "a token sees a later one"),
        Result("check_padding", "skipped", "the adapter declares padding=False"),
    ]
    folder, _ = write(tmp_path, "llama", results=results)
    readme = text_of(folder / "README.md")
    assert "Checks that fail" in readme
    assert "- `check_causal`: a token sees a later one\n" in readme
    assert "check_layers" not in readme
    assert "check_padding" not in readme


def lines_of(folder: Path) -> list[tuple[str, str]]:
    return [
        (path.name, line)
        for path in (*folder.rglob("*.py"), *folder.rglob("*.toml"))
        for line in text_of(path).splitlines()
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_lines_are_not_too_long(packages: dict[str, tuple[Path, Any]], family: str) -> None:
    assert [(name, line) for name, line in lines_of(packages[family][0]) if len(line) > 100] == []


def ruff(*arguments: Any, cwd: Any) -> Any:
    """Ruff with its own settings; a test is skipped where there is none."""
    beside = Path(sys.executable).with_name("ruff")
    program = str(beside) if beside.exists() else shutil.which("ruff")
    if program is None:
        pytest.skip("ruff is not installed")
    return subprocess.run(
        [program, *arguments, "--isolated", "--no-cache", "."],
        check=False,
        capture_output=True,
        text=True,
        cwd=cwd,
    )


def test_ruff_sees_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("import os\nx = [1,2]\n", encoding="utf-8")
    assert ruff("check", cwd=tmp_path).returncode == 1
    assert ruff("format", "--check", cwd=tmp_path).returncode == 1


def test_packages_are_clean(packages: dict[str, tuple[Path, Any]]) -> None:
    """By ruff's own rules, and with imports in order."""
    for folder, _ in packages.values():
        done = ruff("check", "--extend-select=I,W,D1,PT", "--ignore=D103", cwd=folder)
        assert (done.returncode, done.stdout) == (0, "All checks passed!\n")


@pytest.mark.parametrize("family", FAMILIES)
def test_packages_are_formatted(packages: dict[str, tuple[Path, Any]], family: str) -> None:
    done = ruff("format", "--check", "--diff", cwd=packages[family][0])
    assert done.stdout == ""
    assert done.returncode == 0


SETTINGS = {
    "num_hidden_layers": 2,
    "hidden_act": "relu",
    "attention_bias": True,
    "pad_token_id": None,
    "layer_types": ["full_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "name": "with 'quotes' and \"others\"",
}


class MadeError(Exception):
    """In place of a model."""


@pytest.mark.parametrize("settings", [{}, SETTINGS], ids=["none", "some"])
def test_tests_are_of_the_tiny_model_with_these_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[Any, Any]
) -> None:
    # Not by a name that an installed package has.
    folder, names = tmp_path / "new", package_names("made-in-this-test")
    write_package(folder, names, read("llama")[0], {}, [], settings)
    monkeypatch.syspath_prepend(str(folder / "src"))
    made = []

    def tiny(*arguments: Any, **given: Any) -> None:
        made.append((arguments, given))
        raise MadeError

    for module in ("nnpatch_core.testing", "nnpatch_core.testing.parametrize"):
        monkeypatch.setattr(f"{module}.tiny_model", tiny)
    scope: dict[str, Any] = {}
    try:
        exec(text_of(folder / f"tests/test_{names.module}.py"), scope)
    finally:
        sys.modules.pop(names.module, None)
    ((_, checks),) = [mark.args for mark in scope["test_conformance"].pytestmark]
    assert len(checks) == len(CHECKS)
    for test in (checks[0].values[0], scope["test_found_by_the_type_of_a_model"]):
        with pytest.raises(MadeError):
            test()
    assert made == [(("llama",), settings)] * 2


def test_tests_with_settings_are_formatted(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, "llama", settings=SETTINGS)
    assert max(len(line) for _, line in lines_of(folder)) <= 100
    assert ruff("format", "--check", cwd=folder).returncode == 0


def test_package_is_not_written_over_another(tmp_path: Path) -> None:
    folder, names = write(tmp_path, "llama")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(AdapterError, match=r"exists already"):
        write_package(folder, names, read("gpt2")[0], {}, [], {})
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("number", range(1, 6))
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_package_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: KeyboardInterrupt | OSError
) -> None:
    writes = []
    write_text = Path.write_text

    def one_fails(path: Any, *args: Any, **kwargs: Any) -> Any:
        writes.append(path)
        if len(writes) == number:
            raise error
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", one_fails)
    with pytest.raises((AdapterError, KeyboardInterrupt)):
        write(tmp_path, "llama")
    assert len(writes) == number
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_package_that_cannot_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("nnpatch_core.scaffold.package.shutil.move", fails)
    with pytest.raises(AdapterError, match=r"cannot be written.*cross-device"):
        write(tmp_path, "llama")
    assert list(tmp_path.iterdir()) == []


# Its tests --------------------------------------------------------------------------------------


def install(folder: Path) -> None:
    """Beside the module what an installer puts there, as the pyproject has it."""
    project = tomllib.loads(text_of(folder / "pyproject.toml"))["project"]
    info = folder / "src" / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n",
        encoding="utf-8",
    )
    ((name, value),) = project["entry-points"]["nnpatch"].items()
    (info / "entry_points.txt").write_text(f"[nnpatch]\n{name} = {value}\n", encoding="utf-8")


def test_tests_of_packages(tmp_path: Path) -> None:
    """They pass; checks fail where the table is wrong; what is not installed is not found.

    One run of three packages: installed, not installed, and with keys for values. The latter two
    have settings, by which their models have one layer.
    """
    right, _ = write(tmp_path, "gptj")
    one = {"num_hidden_layers": 1}
    uninstalled, _ = write(tmp_path, "granite", settings={**FAMILIES["granite"][0], **one})
    wrong, names = write(tmp_path, "opt", settings=one)
    install(right)
    install(wrong)
    module = wrong / "src" / names.module / "__init__.py"
    table = 'separate_projections(o="out_proj")'
    assert table in text_of(module)
    swapped = 'separate_projections(o="out_proj", k="v_proj", v="k_proj")'
    module.write_text(text_of(module).replace(table, swapped), encoding="utf-8")
    folders = (right, uninstalled, wrong)
    report = tmp_path / "report.xml"
    paths = [*(str(folder / "src") for folder in folders), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"),
            *(f"--rootdir={tmp_path}", f"--junit-xml={report}", "-o", "junit_family=xunit1"),
            *(str(folder / "tests") for folder in folders),
        ],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=500,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        },
    )
    assert done.returncode == 1, done.stdout
    outcomes: dict[Path, dict[str, Any]] = {folder: {} for folder in folders}
    for case in ElementTree.parse(report).iter("testcase"):
        folder = next(folder for folder in folders if folder.name in case.get("file"))
        name = case.get("name").rpartition("-")[2].rstrip("]")
        bad = case.find("failure") is not None or case.find("error") is not None
        skipped = case.find("skipped") is not None
        outcomes[folder][name] = "failed" if bad else "skipped" if skipped else "passed"
    found = "test_found_by_the_type_of_a_model"
    for results in outcomes.values():
        assert len(results) == len(CHECKS) + 1
    assert set(outcomes[right].values()) == {"passed"}
    assert outcomes[uninstalled].pop(found) == "failed"
    assert set(outcomes[uninstalled].values()) == {"passed"}
    assert outcomes[wrong].pop(found) == "passed"
    assert outcomes[wrong]["check_value_heads"] == "failed"
    assert outcomes[wrong]["check_model_type"] == "passed"
