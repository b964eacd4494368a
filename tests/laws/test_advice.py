"""Advice can be followed: what a message names is there, and doing as it says helps.

The first half reads every text of the package's source; the second follows the advice of the
messages that people meet most.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import shlex
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pandas
import pytest
import torch
from accelerate import dispatch_model
from nnsight import TransformersModel
from transformers import PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig
from typer.main import get_command

import nnpatch_core
from nnpatch_core import (
    Outcome,
    PromptPairs,
    Site,
    Sites,
    infer,
    plugins,
    results,
    subspace,
    testing,
)
from nnpatch_core.cli import main
from nnpatch_core.cli.main import app
from nnpatch_core.errors import (
    AdapterError,
    AdapterWarning,
    AnswerError,
    MaskError,
    MetricError,
    PaddingWarning,
    PatchingError,
    PositionError,
    TokensError,
)
from nnpatch_core.plugins import find_adapter
from nnpatch_core.plugins.known import DISTRIBUTIONS
from nnpatch_core.report import RULES, Facts
from nnpatch_core.report.advice import advice_on
from nnpatch_core.run import in_options, options
from nnpatch_core.run.command import PHRASES
from nnpatch_core.testing import causal_model_types, tiny_model
from tests.helpers.broken_rules import CASES
from tests.helpers.paths import ROOT

PACKAGE = ROOT / "nnpatch_core" / "src" / "nnpatch_core"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("nnpatch_*/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "how-to").glob("*.md")),
    *sorted((ROOT / ".github").rglob("*.[my]*")),
]
#: What may follow `nnpatch ` besides a command: the words of file formats and of prose.
PROSE = {"cells", "checkpoint", "outcome", "subspace", "training", "plugin", "finds", "was", "and"}
#: Of others, whom a message names: each argument, and whose it is.
OTHERS: dict[str, Any] = {
    "device_map": dispatch_model,
    "dispatch": TransformersModel.__mro__,
    "dtype": pandas.read_csv,
    "skiprows": pandas.read_csv,
    "orient": pandas.DataFrame.to_json,
    "add_generation_prompt": PreTrainedTokenizerBase.apply_chat_template,
    "continue_final_message": PreTrainedTokenizerBase.apply_chat_template,
    "task": TransformersModel,
    "tp_plan": DistributedConfig,
    "tp_size": DistributedConfig,
}


# What is named is there ---------------------------------------------------------------------------


@attrs.frozen
class Text:
    """A string of the source; what is filled in is `{}`."""

    file: Path
    line: int
    value: str
    message: bool

    def __str__(self) -> str:
        return f"{self.file.name}:{self.line}: {self.value[:100]!r}"


def texts(file: Path, source: str) -> Iterator[Text]:
    """Every string but docstrings; `message` where it is raised, warned or printed."""
    tree = ast.parse(source)
    parts, documentation, told = set(), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts |= {id(part) for part in ast.walk(node) if part is not node}
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documentation.add(id(node.value))
        name = getattr(getattr(node, "func", None), "id", getattr(node, "attr", ""))
        if isinstance(node, ast.Raise | ast.Return) or name in ("warn", "say", "add_note"):
            told |= {id(part) for part in ast.walk(node)}
        if isinstance(node, ast.Call) and name.endswith(("Error", "unfit")):
            told |= {id(part) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            value = node.value
        elif isinstance(node, ast.JoinedStr):
            value = "".join(
                str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values
            )
        else:
            continue
        if id(node) not in parts | documentation:
            yield Text(file, node.lineno, value, id(node) in told)


SOURCE = [
    text
    for file in sorted(PACKAGE.rglob("*.py"))
    for text in texts(file, file.read_text(encoding="utf-8"))
]


@functools.cache
def commands() -> dict[str, set[str]]:
    """Each command of the command line to its options."""
    group: Any = get_command(app)
    return {
        name: {"-h", "--help"}
        | {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        for name, command in group.commands.items()
    }


def public() -> Iterator[Any]:
    """What users call."""
    for module in (nnpatch_core, infer, plugins, results, subspace, testing):
        for name in module.__all__:
            found = getattr(module, name)
            yield found
            if isinstance(found, type):
                yield from (getattr(found, each) for each in dir(found) if not each.startswith("_"))


@functools.cache
def arguments() -> set[str]:
    """The names of all arguments of what users call."""
    found = set()
    for each in public():
        if callable(each):
            try:
                found |= set(inspect.signature(each).parameters)
            except (TypeError, ValueError):
                continue
    return found


@functools.cache
def extras() -> set[str]:
    project = tomllib.loads((ROOT / "nnpatch_core" / "pyproject.toml").read_text(encoding="utf-8"))
    return set(project["project"]["optional-dependencies"])


@functools.cache
def sessions() -> set[str]:
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any("session" in ast.unparse(each) for each in node.decorator_list)
    }


def wrong_commands(text: str, own: str | None = None) -> list[str]:
    """Commands and options in a text that there are not; `own` is the command that says it."""
    known = commands()
    wrong = []
    named = re.findall(r"(?<![\w-])nnpatch ((?!-)[a-z][a-z-]*)", text)
    wrong += [f"nnpatch {name}" for name in named if name not in {*known, *PROSE}]
    allowed = set().union(*(known[name] for name in {*named, own} & set(known)))
    # One that goes on with what is filled in is none yet.
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*(?![\w-]*\{)", text))
    if "nox" not in text and "pip " not in text:
        wrong += [option for option in options if option not in allowed | {"--version", "--help"}]
    return wrong


def wrong_installs(text: str) -> list[str]:
    wrong = []
    for name in re.findall(r"pip install ['\"]?((?:nnpatch)[\w-]*)", text):
        if not (ROOT / name.replace("-", "_")).is_dir():
            wrong.append(f"pip install {name}")
    for group in re.findall(r"nnpatch[-_]core\[([^\]]*)\]", text):
        wrong += [f"[{extra}]" for extra in group.split(",") if extra not in {*extras(), "{}"}]
    wrong += [
        f"nox -s {name}"
        for group in re.findall(r"nox -s ([a-z ]+)", text)
        for name in group.split()[:1]
        if name not in sessions()
    ]
    return wrong


def wrong_arguments(text: str) -> list[str]:
    known = arguments() | set(OTHERS)
    named = re.findall(r"(?<![\w.{}-])([a-z_]\w*)=(?!=)", text)
    return [f"{name}=" for name in named if name not in known]


def own_command(file: Path) -> str | None:
    if file.parent.name == "run":
        return "run"
    if file.name == "arguments.py":
        return "plugins"
    name = file.stem.replace("_", "-")
    return name if file.parent.name == "cli" and name in commands() else None


def test_there_is_something_to_read() -> None:
    for part in ("nnpatch new-adapter", "pip install", "api=", "--adapter", "--config"):
        assert any(part in text.value for text in SOURCE)
    assert sum(text.message for text in SOURCE) > 200
    assert {"plugins", "components", "check", "new-adapter"} <= set(commands())
    assert {"tests", "lint"} <= sessions()


def test_commands_and_options_that_the_source_names() -> None:
    found = {str(text): wrong_commands(text.value, own_command(text.file)) for text in SOURCE}
    assert {text: wrong for text, wrong in found.items() if wrong} == {}


def test_what_the_source_tells_to_install() -> None:
    found = {str(text): wrong_installs(text.value) for text in SOURCE}
    assert {text: wrong for text, wrong in found.items() if wrong} == {}
    assert all((ROOT / name.replace("-", "_")).is_dir() for name in DISTRIBUTIONS)


def test_extras_that_are_asked_for() -> None:
    asked = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "extra":
                asked.add(ast.literal_eval(node.args[1]))
    assert asked
    assert asked <= extras()


def test_arguments_that_messages_name() -> None:
    # What a page is made of has attributes, not arguments.
    messages = [
        text
        for text in SOURCE
        if text.message and text.file.parent.name != "scaffold" and not text.value.startswith("<")
    ]
    # On the command line a setting of a model is written in the same way.
    found = {
        str(text): wrong_arguments(text.value)
        for text in messages
        # Nor are attributes of HTML arguments.
        if text.file.parent.name != "cli" and text.file.name != "_html.py"
    }
    assert {text: wrong for text, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_the_pages_name(page: Path) -> None:
    wrong = []
    for line in page.read_text(encoding="utf-8").splitlines():
        found = re.search(r"^\$ (?:\w+=\S* )*(nnpatch [a-z].*)|`(nnpatch [a-z-]+[^`]*)`", line)
        if found:
            command = found[1] or found[2]
            # What a command makes is named like one: nnpatch-qwen2.
            wrong += wrong_commands(command)
        wrong += [each for each in wrong_installs(line) if "qwen2" not in each]
    assert wrong == []


def test_contributors_are_told_of_every_session() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert sessions() - set(re.findall(r"nox -s (\w+)", text)) == set()


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("try nnpatch componets llama", ["nnpatch componets"]),
        ("nnpatch components llama --config a=1", ["--config"]),
        ("nnpatch new-adapter x --config a=1", []),
        ("try nnpatch plugins --jason", ["--jason"]),
    ],
)
def test_wrong_commands_are_found(text: str, wrong: list[str]) -> None:
    assert wrong_commands(text) == wrong


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("pip install nnpatch-mamba", ["pip install nnpatch-mamba"]),
        ("pip install 'nnpatch-core[plots]'", ["[plots]"]),
        ("run nox -s test", ["nox -s test"]),
        ("pip install 'nnpatch-core[plot]'", []),
    ],
)
def test_wrong_installs_are_found(text: str, wrong: list[str]) -> None:
    assert wrong_installs(text) == wrong


def test_wrong_arguments_are_found() -> None:
    text = "pass other_answer_index= or atention_mask=, api={}"
    assert wrong_arguments(text) == ["atention_mask="]
    source = 'def f():\n    """Doc: x=1."""\n    raise ValueError(f"pass {a}, or b=")\n'
    assert [(each.value, each.message) for each in texts(Path("x.py"), source)] == [
        ("pass {}, or b=", True)
    ]


# Doing as it says helps ---------------------------------------------------------------------------

SOURCE_TOKENS, TARGET_TOKENS = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 9, 7, 8]])
ANSWERS = torch.tensor([20]), torch.tensor([30])


def patch(sites: Any = None, model: Any = None, api: Any = None, **options: Any) -> Any:
    given = {"source_tokens": SOURCE_TOKENS, "target_tokens": TARGET_TOKENS, "progress": False}
    given |= {"source_answer_index": ANSWERS[0], "target_answer_index": ANSWERS[1]}
    return nnpatch_core.activation_patching(
        tiny_model() if model is None else model,
        api,
        Sites("resid") if sites is None else sites,
        **{**given, **options},
    )


def ablate(**options: Any) -> Any:
    given = {"tokens": TARGET_TOKENS, "answer_index": ANSWERS[0], "progress": False}
    return nnpatch_core.ablation_patching(
        tiny_model(), None, Sites("resid"), **{**given, **options}
    )


def attribute(**options: Any) -> Any:
    given = {"source_tokens": None, "target_tokens": TARGET_TOKENS, "progress": False}
    given |= {"source_answer_index": ANSWERS[0], "target_answer_index": ANSWERS[1]}
    return nnpatch_core.attribution_patching(
        tiny_model(), None, Sites("resid"), **{**given, "ablation": "zero", **options}
    )


def average(batches: Any) -> Any:
    site = Site.get_site("Llama3", "mlp", layer=1, seq_pos=[-1])
    nnpatch_core.cache_average(tiny_model(), [site], batches)
    return site.value


PADDED = torch.tensor([[0, 0, 5, 6], [5, 9, 7, 8]])
MASK = (PADDED != 0).long()
TWO = {"source_answer_index": torch.tensor([20, 21]), "target_answer_index": torch.tensor([3, 4])}
OTHER = {"other_answer_index": ANSWERS[1]}

#: What is done wrong, what is raised, a part of its advice, and what the advice says.
FOLLOWED: dict[str, tuple[Callable[[], Any], type[Exception], str, Callable[[], Any]]] = {
    "positions": (
        lambda: patch(Sites("resid", seq_pos_type="custom")),
        PositionError,
        "needs seq_pos=",
        lambda: patch(Sites("resid", seq_pos_type="custom", seq_pos=[1])),
    ),
    "how many": (
        lambda: patch(screen="attribution"),
        PatchingError,
        "needs top_k=",
        lambda: patch(screen="attribution", top_k=1),
    ),
    "the other answer": (
        ablate,
        AnswerError,
        "pass other_answer_index=",
        lambda: ablate(**OTHER),
    ),
    "another metric": (
        ablate,
        AnswerError,
        "or another metric",
        lambda: ablate(metric="kl_divergence"),
    ),
    "the other answer, estimated": (
        lambda: attribute(target_answer_index=None),
        AnswerError,
        "pass target_answer_index=",
        attribute,
    ),
    "further away": (
        lambda: attribute(metric="kl_divergence"),
        MetricError,
        "steps= looks further",
        lambda: attribute(metric="kl_divergence", steps=2),
    ),
    "a source run": (
        lambda: attribute(source_tokens=SOURCE_TOKENS),
        PatchingError,
        "pass source_tokens=None",
        lambda: attribute(source_tokens=None),
    ),
    "another prompt": (
        lambda: ablate(method="resample", **OTHER),
        TokensError,
        "pass reference=",
        lambda: ablate(method="resample", reference=SOURCE_TOKENS, **OTHER),
    ),
    "one mask": (
        lambda: patch(attention_mask=MASK[1:], source_attention_mask=MASK[1:]),
        MaskError,
        "give one of them",
        lambda: patch(source_attention_mask=MASK[1:]),
    ),
    "padding": (
        lambda: patch(source_tokens=PADDED, target_tokens=PADDED + MASK, **TWO),
        PaddingWarning,
        "pass attention_mask=",
        lambda: patch(
            source_tokens=PADDED, target_tokens=PADDED + MASK, attention_mask=MASK, **TWO
        ),
    ),
    "padding of a data set": (
        lambda: average([PADDED]),
        PaddingWarning,
        "give a batch as (tokens, mask)",
        lambda: average([(PADDED, MASK)]),
    ),
    "padding of a tokenizer's output": (
        lambda: average({"input_ids": PADDED}),
        PaddingWarning,
        "give its 'attention_mask', too",
        lambda: average({"input_ids": PADDED, "attention_mask": MASK}),
    ),
    "a site without a model": (
        lambda: Site.get_site(None, "resid", layer=0),
        AdapterError,
        "or the name of one",
        lambda: Site.get_site("Llama3", "resid", layer=0),
    ),
    "a family without a plugin": (
        lambda: patch(model=tiny_model("gpt2")),
        AdapterWarning,
        "pass what it gives as api=",
        lambda: patch(model=tiny_model("gpt2"), api=nnpatch_core.infer_adapter(tiny_model("gpt2"))),
    ),
}


@pytest.mark.parametrize(("wrong", "error", "advice", "right"), FOLLOWED.values(), ids=FOLLOWED)
def test_advice_in_python(
    wrong: Callable[[], Any], error: type[Exception], advice: str, right: Callable[[], Any]
) -> None:
    # A warning is an error in this suite.
    with pytest.raises(error, match=re.escape(advice)):
        wrong()
    assert right() is not None


def command(*words: str) -> int:
    with warnings.catch_warnings():
        return main(list(words))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Installs what `new-adapter` wrote, as pip does."""
    made = []

    def install(package: Path) -> None:
        project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        name = project["name"]
        info = package / "src" / f"{name.replace('-', '_')}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        lines = [f"{one} = {other}" for one, other in project["entry-points"]["nnpatch"].items()]
        (info / "entry_points.txt").write_text("\n".join(["[nnpatch]", *lines, ""]))
        monkeypatch.syspath_prepend(str(package / "src"))
        made.append(name.replace("-", "_"))

    yield install
    for name in made:
        sys.modules.pop(name, None)


def test_the_command_that_keeps_an_inferred_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model("gpt2")
    with pytest.warns(AdapterWarning) as caught:
        find_adapter(None, model)
    (words,) = re.findall(r"nnpatch (new-adapter .*)$", str(caught[0].message))
    assert command(*shlex.split(words)) == 0
    installed(tmp_path / "nnpatch-gpt2")
    # From now on it is known, and nothing is said.
    assert find_adapter(None, model).name == "Gpt2"
    assert command("check", "Gpt2", "--only", "check_layers") == 0


def test_a_type_that_has_no_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model_type = "roc_bert"
    if model_type not in causal_model_types():
        pytest.skip(f"this transformers has no {model_type}")
    monkeypatch.chdir(tmp_path)
    assert command("new-adapter", "rocks", "--model-type", model_type) == 2
    assert "give settings that fit by --config KEY=VALUE" in capsys.readouterr().err
    small = ["--config", "pronunciation_vocab_size=64", "--config", "shape_vocab_size=64"]
    assert command("new-adapter", "rocks", "--model-type", model_type, *small) in (0, 1)
    capsys.readouterr()

    assert command("components", model_type) == 2
    message = capsys.readouterr().err
    # The command takes no settings.
    assert "settings that" not in message
    assert "name a folder with a config.json of that type" in message
    assert "its adapter with --adapter" in message
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "mine.py").write_text(
        "from nnpatch_core import Component, DecoderAPI\n"
        "Mine = DecoderAPI('Mine', ('roc_bert',), {'resid': Component('')},\n"
        "                  layers='roc_bert.encoder.layer')\n"
    )
    assert command("components", str(tmp_path), "--adapter", "mine:Mine") == 0
    sys.modules.pop("mine", None)


def test_two_adapters_for_one_type(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    installed: Callable[[Path], None],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("new-adapter", "alpaca", "--model-type", "llama") == 0
    installed(tmp_path / "nnpatch-alpaca")
    capsys.readouterr()
    with pytest.raises(AdapterError, match="choose one with api="):
        patch()
    assert patch(api="Alpaca").info["adapter"] == "Alpaca"
    assert command("components", "llama") == 2
    message = capsys.readouterr().err
    assert "choose one with --adapter" in message
    assert "api=" not in message
    assert command("components", "llama", "--adapter", "Alpaca") == 0


def test_what_new_adapter_says_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = "my adapters/it's"
    assert command("new-adapter", "gpt2", "--model-type", "gpt2", "--output", folder) == 0
    last = capsys.readouterr().out.splitlines()[-1].removeprefix("Next: ")
    one, other = last.split(" && ")
    assert shlex.split(one) == ["pip", "install", "-e", f"{folder}[test]"]
    assert shlex.split(other) == ["pytest", folder]


# What a run by command advises is an option of it -----------------------------------------------

SETTINGS_OF_A_RUN = {name for name, *_ in options()}
ARGUMENTS_OF_CALLS = {
    name
    for call in (
        *(getattr(nnpatch_core, each) for each in nnpatch_core.__all__ if each.islower()),
        PromptPairs.from_texts,
        Outcome.report,
    )
    if callable(call)
    for name in inspect.signature(call).parameters
}
#: Rules that say nothing of what a command makes: the circuit that it finds has its controls.
NEVER = {"no-controls"}


def advised(name: str) -> str:
    """The advice of a rule, where its facts break it; a circuit's own is of another rule."""
    found = advice_on(Facts(**CASES[name][0]))
    return next(each.text for each in found if each.rule == name)


@pytest.mark.parametrize("name", [rule.name for rule in RULES])
def test_arguments_of_advice_are_there(name: str) -> None:
    text = advised(name)
    for argument in re.findall(r"\b([a-z_]+)=", text):
        assert argument in ARGUMENTS_OF_CALLS, text
    if name in NEVER:
        return
    said = in_options(text)
    assert not re.search(r"\b[a-z_]+=|\w\(|pairs\.", said), said
    for option in re.findall(r"--([a-z-]+)", said):
        assert option.replace("-", "_") in SETTINGS_OF_A_RUN, said


def test_phrases_are_those_of_messages() -> None:
    every = "\n".join(text.value for text in SOURCE)
    joined = re.sub(r"\s+", " ", every)
    assert [phrase for phrase in PHRASES if phrase not in joined] == []
    for instead in PHRASES.values():
        for option in re.findall(r"--([a-z-]+)", instead):
            # One is of the command, not of the run.
            assert option.replace("-", "_") in {*SETTINGS_OF_A_RUN, "overwrite"}


#: Warnings of these rooms may come of any run; their arguments are options, but for some.
ROOMS = ("prompts", "sweep", "engine", "gradients", "memory", "metrics", "seq_pos")
#: Arguments that no command gives, so that nothing is said of them.
PYTHON = {"orient", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"}
PYTHON |= {"extra", "mapping", "remote"}


def test_warnings_of_a_run_name_options() -> None:
    looked = 0
    for text in SOURCE:
        if text.file.relative_to(PACKAGE).parts[0] not in ROOMS or not text.message:
            continue
        for argument in re.findall(
            r"\b([a-z_]+)=(?=[\s,:;.)']|True|False|$)", in_options(text.value)
        ):
            looked += 1
            assert argument in PYTHON or argument not in ARGUMENTS_OF_CALLS, text
    assert looked > 3


def test_in_options() -> None:
    """What is no argument of a call stays."""
    same: list[Any] = ["p=0.05", "a = b", "x='y z'", "<a href='x'>", "model=x"]
    assert [in_options(each) for each in same] == same
