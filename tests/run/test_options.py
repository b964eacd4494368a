"""Every option of the sweeps is a setting of a run, and does what the option does."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pandas
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nnpatch_core import (
    Outcome,
    PromptPairs,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    edge_patching,
    find_circuit,
    path_patching,
)
from nnpatch_core.run import METHODS, Settings, command_of, options
from nnpatch_core.run.command import OTHERWISE
from nnpatch_core.subspace import Subspace, sweep_subspaces, train_subspace
from tests.helpers.commands import Command
from tests.helpers.runs import Files, lines, row

pytestmark = pytest.mark.filterwarnings("ignore::nnpatch_core.errors.StatisticsWarning")

CALLS: dict[str, list[Callable[..., Any]]] = {
    "activation": [activation_patching],
    "ablation": [ablation_patching],
    "attribution": [attribution_patching],
    "path": [path_patching],
    "edges": [edge_patching],
    "circuit": [find_circuit],
    "subspace": [sweep_subspaces, train_subspace],
}
#: Arguments that are no settings, and why.
NONE = {
    "nnmodel": "--model loads it",
    "sites": "--sites, --layers, --heads, --positions and --at make them",
    "site": "one of --sites",
    "pairs": "of the table",
    **dict.fromkeys(
        (
            *("tokens", "source_tokens", "target_tokens", "answer_index", "other_answer_index"),
            *("source_answer_index", "target_answer_index", "attention_mask", "answer_tokens"),
            *("source_attention_mask", "target_attention_mask", "other_answer_tokens"),
            *("source_answer_tokens", "target_answer_tokens"),
        ),
        "the table's",
    ),
    "metric_data": "tensors, for metrics of one's own, which a command does not have",
    "remote": "of nnsight's TransformersModel, and a command loads weights",
    "checkpoint": "always kept, in the folder of the run",
    "progress": "a bar where there is a terminal",
    "initial": "learning begins at random, as its numbers are told",
    "training": "those of train_subspace",
    "extra": "columns of the table come along",
    "chat_template_kwargs": "a mapping of anything; a template has its own defaults",
    "options": "those of from_texts",
    "source": "a column",
    "target": "a column",
    "source_answers": "a column",
    "target_answers": "a column",
}
#: Names of settings by those of arguments, where they are other ones for one method.
METHOD = {"ablation": "ablation", "edges": "estimate", "circuit": "estimate"}


@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_a_sweep_is_a_setting(method: str) -> None:
    known = {name: option for name, _, _, option in options()}
    for call in CALLS[method]:
        for name in inspect.signature(call).parameters:
            if name in NONE:
                continue
            setting = METHOD[method] if name == "method" else OTHERWISE.get(name, name)
            assert setting in known, f"{call.__name__}({name}=)"
            assert method in known[setting].methods, f"{call.__name__}({name}=)"


@pytest.mark.parametrize("call", [PromptPairs.from_texts, PromptPairs.from_table, Sites])
def test_so_is_every_option_of_prompts_and_sites(call: Callable[..., Any]) -> None:
    known = {name for name, *_ in options()}
    for name in inspect.signature(call).parameters:
        assert name in NONE or OTHERWISE.get(name, name) in known, name


def model_of(files: Files) -> Any:
    return AutoModelForCausalLM.from_pretrained(files.model, dtype=torch.float32).eval()


def pairs_of(files: Files, **given: Any) -> PromptPairs:
    return PromptPairs.from_csv(files.table, AutoTokenizer.from_pretrained(files.model), **given)


def check(expected: Outcome) -> None:
    found = Outcome.load("o/outcome.safetensors")
    assert list(found) == list(expected)
    for name in expected:
        near = {"rtol": 0, "atol": 2e-6, "equal_nan": True}
        torch.testing.assert_close(found[name], expected[name], **near)


def run(nnpatch: Command, files: Files, *given: object) -> None:
    done = nnpatch("run", *files.arguments, "--out", "o", *given)
    assert done.code == 0, done.err


LAST = ("--sites", "mlp", "--positions", "last")
SITES = Sites("mlp", None, "last")


@pytest.mark.parametrize("ablation", ["mean", "resample"])
def test_reference(files: Files, nnpatch: Command, ablation: str) -> None:
    """A table of prompts alone."""
    words = [line.partition(",")[0] for line in lines(7)]
    Path("others.csv").write_text("\n".join(words) + "\n", "utf-8")
    given = ("--method", "ablation", "--ablation", ablation, "--reference", "others.csv")
    run(nnpatch, files, *given, *LAST)
    tokenizer = AutoTokenizer.from_pretrained(files.model)
    read = tokenizer(words[1:], padding=True, padding_side="left", return_tensors="pt")
    expected = ablation_patching(
        model_of(files),
        None,
        SITES,
        pairs_of(files),
        method=ablation,
        reference=(read["input_ids"], read["attention_mask"]),
        progress=False,
    )
    check(expected)
    # It differs from that of the table's own prompts.
    own = ablation_patching(
        model_of(files), None, SITES, pairs_of(files), method=ablation, progress=False
    )
    assert not own["mlp"].allclose(expected["mlp"], atol=1e-4)


def test_a_faulty_reference(files: Files, nnpatch: Command) -> None:
    given = ("--method", "ablation", "--ablation", "mean", "--reference", "others.csv")
    for text, parts in (
        ("clean,b\nNow,x\n,y\nNow\n", ["reference: line 3, column clean: must be a non-empty"]),
        ("a,b\nNow,x\n", ["reference: others.csv, line 1: no column 'source'"]),
        ("clean\n", ["reference: others.csv has no prompts"]),
    ):
        Path("others.csv").write_text(text, "utf-8")
        done = nnpatch("run", *files.arguments, *given)
        assert done.code == 2
        assert all(part in done.err for part in parts), done.err
    done = nnpatch("run", *files.arguments, "--method", "ablation", "--reference", "others.csv")
    assert "--reference: means nothing without ablation mean or resample" in done.err


def test_subspaces_of_a_run(files: Files, nnpatch: Command) -> None:
    files.table.write_text("\n".join(lines(8)) + "\n", "utf-8")
    learning = ("--epochs", 1, "--rank", 2, "--lr", "0.02", "--batch-size", 4, "--patience", 1)
    controls = ("--no-random-labels", "--held-out", "0.25")
    found = nnpatch(
        *("run", *files.arguments, "--method", "subspace", "--layers", "1,2", "--out", "s"),
        *(*learning, *controls),
    )
    assert found.code == 0, found.err
    one, two = (Subspace.from_pretrained(f"s/subspace-{number}") for number in range(2))
    sweep = sweep_subspaces(
        model_of(files),
        None,
        Sites("resid", [1, 2], "last"),
        pairs_of(files),
        2,
        **{"epochs": 1, "lr": 0.02, "batch_size": 4, "patience": 1, "held_out": 0.25},
        random_labels=False,
        seed=0,
        progress=False,
    )
    for own, other in zip((one, two), sweep.values(), strict=True):
        torch.testing.assert_close(own.basis, other.subspace.basis, rtol=0, atol=1e-5)
        assert "random labels" not in other.controls
    spaces: Any = {1: one, 2: two}
    run(nnpatch, files, "--sites", "resid", "--positions", "last", "--subspace", "s")
    sites = Sites("resid", None, "last", subspace=spaces)
    check(activation_patching(model_of(files), None, sites, pairs_of(files), progress=False))
    given = ("run", *files.arguments, "--sites", "resid", "--out", "p", "--subspace")
    done = nnpatch(*given, "s/subspace-1", "--positions", "last")
    assert done.code == 0
    assert set(Outcome.load("p/outcome.safetensors").cells["resid"].index[:, 0].tolist()) == {2}
    assert "there is no ./nix" in nnpatch(*given, "./nix", "--overwrite").err
    refused = nnpatch(*given, "s", "--layers", "0", "--overwrite")
    assert "has none for layers [0]" in refused.err


def test_means_alone(files: Files, nnpatch: Command) -> None:
    run(nnpatch, files, *LAST, "--keep", "means")
    assert Outcome.load("o/outcome.safetensors").moments is not None
    assert Path("o/report.html").exists()


def test_a_path_of_several_nodes(files: Files, nnpatch: Command) -> None:
    nodes = ["a0.h1", "m1", "logits"]
    run(nnpatch, files, "--method", "path", "--path", ",".join(nodes))
    model, pairs = model_of(files), pairs_of(files)
    check(path_patching(model, None, None, None, pairs, path=nodes, progress=False))


@pytest.mark.filterwarnings("ignore::nnpatch_core.errors.EstimateWarning")
def test_spot_checks_and_repairs_of_estimates(files: Files, nnpatch: Command) -> None:
    run(nnpatch, files, *LAST, "--screen", "attribution", "--top-k", 1, "--spot-checks", 0)
    screening = Outcome.load("o/outcome.safetensors").screening
    assert screening is not None
    assert (screening.chosen, screening.checked) == (1, 0)
    given = ("--method", "attribution", "--sites", "q", "--positions", "last", "--overwrite")
    run(nnpatch, files, *given, "--qk-fix", "--grad-drop")
    expected = attribution_patching(
        model_of(files),
        None,
        Sites("q", None, "last"),
        pairs_of(files),
        qk_fix=True,
        grad_drop=True,
        progress=False,
    )
    check(expected)


def test_positions_of_the_source_prompts(files: Files, nnpatch: Command) -> None:
    run(nnpatch, files, "--sites", "mlp", "--positions", "custom", "--at", "2", "--source-at", "1")
    sites = Sites("mlp", None, "custom", [2], source_seq_pos=[1])
    check(activation_patching(model_of(files), None, sites, pairs_of(files), progress=False))


@pytest.mark.filterwarnings("ignore::nnpatch_core.errors.AnswerWarning")
def test_answers_as_they_are(files: Files, nnpatch: Command) -> None:
    text = files.table.read_text("utf-8").replace(", ", ",")
    files.table.write_text(text, "utf-8")
    assert "begin the answer with a space" in nnpatch("plan", *files.arguments, "--no-space").err
    spaced = nnpatch("plan", *files.arguments)
    assert spaced.code == 0
    assert "pass --no-space to join them as they are" in spaced.err
    assert "space=" not in spaced.err


def test_settings_that_are_off_are_kept() -> None:
    """`--no-space` is one of the words that a report gives."""
    off = attrs.evolve(Settings(table=Path("t.csv"), model="m"), space=False)
    assert command_of(off) == "nnpatch run t.csv --model m --no-space"


@pytest.mark.filterwarnings("ignore::nnpatch_core.errors.StatisticsWarning")
def test_a_report_of_a_run_names_options(files: Files, nnpatch: Command) -> None:
    """Of prompts that do not line up, whose answers have no space."""
    rows = [*lines(3), row("Cuba", "Spain").replace("Now ", "Of all ")]
    files.table.write_text("\n".join(rows).replace(", ", ",") + "\n", "utf-8")
    done = nnpatch("run", *files.arguments, "--sites", "mlp", "--positions", "each", "--out", "o")
    assert done.code == 0, done.err
    page = Path("o/report.html").read_text("utf-8")
    for told in (done.err, page):
        for option in ("--no-space", "--positions spans"):
            assert option in told
        assert not re.search(r"\bspace=|seq_pos_type=|pairs\.(?!csv)|PromptPairs", told)


def files_of(folder: str) -> set[str]:
    return {each.relative_to(folder).as_posix() for each in Path(folder).rglob("*")}


def test_overwrite_leaves_nothing_of_an_earlier_run(files: Files, nnpatch: Command) -> None:
    """Of another method, which draws other pictures; whatever it did not write stays."""
    files.table.write_text("\n".join(lines(8)) + "\n", "utf-8")
    given = ("run", *files.arguments, "--overwrite", "--out")
    edges = ("--method", "edges", "--senders", "a0.h1,m0")
    learning = ("--method", "subspace", "--layers", "1", "--epochs", "1", "--no-random-labels")
    assert nnpatch(*given, "fresh", *edges).code == 0
    assert nnpatch(*given, "o", *LAST, "--metrics", "logit_difference,kl_divergence").code == 0
    assert Path("o/heatmap-kl_divergence.png").exists()
    Path("o/thesis.tex").write_text("dear", "utf-8")
    assert nnpatch(*given, "o", *learning).code == 0
    assert "o/subspace-0" in map(str, Path("o").iterdir())
    assert not Path("o/heatmap.png").exists()
    Path("o/subspace-0/notes.md").write_text("dear", "utf-8")
    assert nnpatch(*given, "o", *edges).code == 0
    mine = {"thesis.tex", "subspace-0", "subspace-0/notes.md"}
    assert files_of("o") == files_of("fresh") | mine
    assert Path("o/thesis.tex").read_text("utf-8") == "dear"


def test_a_list_of_files_that_is_none_removes_nothing(files: Files, nnpatch: Command) -> None:
    Path("o").mkdir()
    Path("mine.txt").write_text("dear", "utf-8")
    Path("there").mkdir()
    Path("there/mine.txt").write_text("dear", "utf-8")
    Path("o/link").symlink_to(Path("there").resolve())
    for text in ("[", "5", '["../mine.txt", "link/mine.txt", "", "/", 5, "nix", "run.toml"]'):
        Path("o/.written.json").write_text(text, "utf-8")
        run(nnpatch, files, *LAST, "--overwrite")
    assert Path("mine.txt").read_text("utf-8") == "dear"
    assert Path("there/mine.txt").read_text("utf-8") == "dear"


def test_the_level_is_that_of_all_intervals(files: Files, nnpatch: Command) -> None:
    """Of the table that is printed, of files, of pictures and of the report."""
    given = ("run", *files.arguments, "--metrics", "kl_divergence", *LAST, "--out")
    texts, frames = {}, {}
    for level in ("0.95", "0.5"):
        done = nnpatch(*given, level, "--level", level)
        assert done.code == 0, done.err
        texts[level] = (done.out, Path(level, "report.html").read_text("utf-8"))
        frames[level] = pandas.read_parquet(Path(level, "cells.parquet"))
    # Half of the width changes which cells are muted.
    one, two = (Path(level, "heatmap.png").read_bytes() for level in texts)
    assert one != two
    for out, page in (texts["0.5"],):
        assert "low to high: 50 % interval" in out
        assert "low to high: 50 % interval" in page
        assert "95 %" not in out + page
    low, high = (f"kl_divergence_{end}" for end in ("low", "high"))
    narrow, wide = (frames[level][high] - frames[level][low] for level in ("0.5", "0.95"))
    assert (narrow < wide).all()
    outcome = Outcome.load("0.5/outcome.safetensors")
    told = str(outcome.top(10, level=0.5))
    assert told in texts["0.5"][0]
    assert told in nnpatch("show", "0.5", "--level", "0.5").out


def test_the_level_of_edges_and_circuits(files: Files, nnpatch: Command) -> None:
    for method, given in (
        ("edges", ["--senders", "a0.h1,m0"]),
        ("circuit", ["--evaluations", 8, "--faithfulness", "0.5"]),
    ):
        run(nnpatch, files, "--method", method, *given, "--level", "0.5", "--overwrite")
        page = Path("o/report.html").read_text("utf-8")
        assert "50 % interval" in page
        assert "95 % interval" not in page
