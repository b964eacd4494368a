"""`nnpatch run`: the files of each kind of analysis hold what the call itself gives."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import markupsafe
import pandas
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nnpatch_core import (
    Circuit,
    EdgeOutcome,
    Outcome,
    PromptPairs,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    edge_patching,
    path_patching,
)
from nnpatch_core.subspace import Subspace
from tests.helpers.commands import Command
from tests.helpers.runs import Files, lines, row

pytestmark = pytest.mark.filterwarnings("ignore::nnpatch_core.errors.StatisticsWarning")

SWEEP = ["outcome.safetensors", "cells.parquet", "heatmap.png", "heatmap.html", "report.html"]


def model_of(files: Files) -> Any:
    return AutoModelForCausalLM.from_pretrained(files.model, dtype=torch.float32).eval()


def pairs_of(files: Files) -> PromptPairs:
    return PromptPairs.from_csv(files.table, AutoTokenizer.from_pretrained(files.model))


def check(folder: Path, expected: Outcome) -> Outcome:
    """The outcome in a folder, which is that of the call."""
    found = Outcome.load(folder / "outcome.safetensors")
    assert list(found) == list(expected)
    for name in expected:
        assert found.swept(name).equal(expected.swept(name))
        assert found.elided(name).equal(expected.elided(name))
        # A run keeps a checkpoint, for which other cells run together.
        near = {"rtol": 0, "atol": 2e-6, "equal_nan": True}
        torch.testing.assert_close(found[name], expected[name], **near)
        torch.testing.assert_close(found.patched(name), expected.patched(name), **near)
    return found


def listing(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir() if each.name != ".written.json"}


def test_defaults(files: Files, nnpatch: Command) -> None:
    done = nnpatch("run", *files.arguments)
    assert (done.code, done.err) == (0, "")
    folder = Path("nnpatch-pairs")
    assert listing(folder) == {*SWEEP, "run.toml"}
    model, pairs = model_of(files), pairs_of(files)
    blocks = Sites(["resid", "attn", "mlp"], seq_pos_type="each")
    heads = Sites("o", seq_pos_type="last")
    found = Outcome.load(folder / "outcome.safetensors")
    assert list(found) == ["resid", "attn", "mlp", "o"]
    for sites in (blocks, heads):
        expected = activation_patching(model, None, sites, pairs, progress=False)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)
    frame = pandas.read_parquet(folder / "cells.parquet")
    assert len(frame) == sum(len(cells.index) for cells in found.cells.values())
    assert "The strongest of" in done.out
    assert all(name in done.out for name in SWEEP)


def test_runs_twice_with_the_same_bytes(files: Files, nnpatch: Command) -> None:
    for out in ("one", "two"):
        assert nnpatch("run", *files.arguments, "--out", out).code == 0
    for name in ("outcome.safetensors", "heatmap.png"):
        one, two = (Path(out, name).read_bytes() for out in ("one", "two"))
        assert one == two


def test_the_command_of_a_report_makes_the_run_again(files: Files, nnpatch: Command) -> None:
    options = ["--sites", "mlp,o", "--layers", "0-1", "--positions", "last", "--swap"]
    assert nnpatch("run", *files.arguments, *options, "--out", "one").code == 0
    page = Path("one/report.html").read_text("utf-8")
    (command,) = set(re.findall(r"nnpatch run [^<\n]*--model[^<\n]*", page))
    words = command.split()[1:]
    assert words[words.index("--sites") + 1] == "mlp,o"
    words[words.index("--out") + 1] = "two"
    assert nnpatch(*words).code == 0
    one, two = (Path(out, "outcome.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("by", ["--config", "options"])
def test_sites_of_choice(files: Files, nnpatch: Command, by: str) -> None:
    settings = {
        "sites": ["o", "q"],
        "layers": ["0-1"],
        "heads": ["1"],
        "positions": "lastk",
        "at": [2],
        "metrics": ["logit_difference", "kl_divergence"],
        "batch_size": 3,
    }
    arguments: list[object] = ["--out", "o"]
    if by == "--config":
        text = [f"{name} = {value!r}" for name, value in settings.items()]
        text += [f"table = '{files.table}'", f"model = '{files.model}'"]
        Path("run.toml").write_text("\n".join(text), "utf-8")
        arguments += ["--config", "run.toml"]
    else:
        arguments += files.arguments
        for name, value in settings.items():
            each = value if isinstance(value, list) else [value]
            arguments += [f"--{name.replace('_', '-')}", ",".join(map(str, each))]
    assert nnpatch("run", *arguments).code == 0
    expected = activation_patching(
        model_of(files),
        None,
        Sites(["o", "q"], [0, 1], "lastk", 2, [1]),
        pairs_of(files),
        metric=["logit_difference", "kl_divergence"],
        batch_size=3,
        progress=False,
    )
    found = check(Path("o"), expected)
    assert found.metrics == ("logit_difference", "kl_divergence")
    others = {"heatmap-kl_divergence.png", "heatmap-kl_divergence.html"}
    assert listing(Path("o")) == {*SWEEP, *others, "run.toml"}


def test_ablation(files: Files, nnpatch: Command) -> None:
    options = ["--method", "ablation", "--ablation", "mean", "--per-position", "--sites", "mlp"]
    assert nnpatch("run", *files.arguments, *options, "--out", "o").code == 0
    expected = ablation_patching(
        model_of(files),
        None,
        Sites("mlp", seq_pos_type="each"),
        pairs_of(files),
        method="mean",
        per_position=True,
        progress=False,
    )
    check(Path("o"), expected)


def test_attribution(files: Files, nnpatch: Command) -> None:
    options = ["--method", "attribution", "--steps", "2", "--sites", "mlp", "--positions", "last"]
    assert nnpatch("run", *files.arguments, *options, "--out", "o").code == 0
    expected = attribution_patching(
        model_of(files), None, Sites("mlp", None, "last"), pairs_of(files), steps=2, progress=False
    )
    check(Path("o"), expected)


@pytest.mark.filterwarnings("ignore::nnpatch_core.errors.EstimateWarning")
def test_screen(files: Files, nnpatch: Command) -> None:
    options = ["--screen", "attribution", "--top-k", "3", "--seed", "7", "--sites", "mlp"]
    assert nnpatch("run", *files.arguments, *options, "--out", "o").code == 0
    expected = activation_patching(
        model_of(files),
        None,
        Sites("mlp", seq_pos_type="each"),
        pairs_of(files),
        screen="attribution",
        top_k=3,
        seed=7,
        progress=False,
    )
    assert check(Path("o"), expected).exact("mlp").equal(expected.exact("mlp"))


def test_path(files: Files, nnpatch: Command) -> None:
    options = ["--method", "path", "--senders", "a0.h1,m0", "--receivers", "m1,logits"]
    done = nnpatch("run", *files.arguments, *options, "--through", "mlps", "--out", "o")
    assert done.code == 0, done.err
    expected = path_patching(
        model_of(files),
        None,
        ["a0.h1", "m0"],
        ["m1", "logits"],
        pairs_of(files),
        through="mlps",
        progress=False,
    )
    check(Path("o"), expected)


@pytest.mark.parametrize("estimated", [False, True])
def test_edges(files: Files, nnpatch: Command, estimated: bool) -> None:
    options: list[object] = ["--method", "edges", "--senders", "a0.h1,m0"]
    options += ["--estimate", "eap", "--top-k", 5] if estimated else []
    done = nnpatch("run", *files.arguments, *options, "--out", "o")
    assert done.code == 0, done.err
    given: Any = {"method": "eap", "top_k": 5} if estimated else {}
    expected = edge_patching(
        model_of(files), None, pairs_of(files), senders=["a0.h1", "m0"], progress=False, **given
    )
    found = EdgeOutcome.load("o/outcome.safetensors")
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=0, atol=2e-6, equal_nan=True)
    assert listing(Path("o")) == {
        *("run.toml", "outcome.safetensors", "cells.parquet", "report.html"),
        *("edges.png", "edges.html"),
    }


def test_edges_at_positions_have_no_graph(files: Files, nnpatch: Command) -> None:
    options = ["--method", "edges", "--senders", "m0", "--positions", "each"]
    done = nnpatch("run", *files.arguments, *options, "--out", "o")
    assert done.code == 0, done.err
    found = EdgeOutcome.load("o/outcome.safetensors")
    assert found.matrix.ndim == 3
    assert not Path("o/edges.png").exists()


def test_circuit(files: Files, nnpatch: Command) -> None:
    options = ["--method", "circuit", "--evaluations", "12", "--faithfulness", "0.5"]
    done = nnpatch("run", *files.arguments, *options, "--out", "o")
    assert done.code == 0, done.err
    edges = EdgeOutcome.load("o/outcome.safetensors")
    circuit = Circuit.from_json("o/circuit.json", edges.nodes)
    assert f"{len(circuit):,} of {len(edges.nodes):,} edges" in done.out
    assert {"circuit.png", "circuit.html", "report.html"} <= listing(Path("o"))


def test_subspace(files: Files, nnpatch: Command) -> None:
    files.table.write_text("\n".join(lines(8)) + "\n", "utf-8")
    options = ["--method", "subspace", "--layers", "1,2", "--epochs", "1", "--rank", "2"]
    done = nnpatch("run", *files.arguments, *options, "--out", "o")
    assert done.code == 0, done.err
    assert Subspace.from_pretrained("o/subspace-0").rank == 2
    frame = pandas.read_parquet("o/cells.parquet")
    assert set(frame["layer"]) == {1, 2}
    assert {"accuracy.png", "report.html"} <= listing(Path("o"))


def test_swap_and_limit(files: Files, nnpatch: Command) -> None:
    options = ["--swap", "--limit", "2", "--sites", "mlp", "--out", "o"]
    assert nnpatch("run", *files.arguments, *options).code == 0
    expected = activation_patching(
        model_of(files),
        None,
        Sites("mlp", seq_pos_type="each"),
        pairs_of(files)[:2].swapped(),
        progress=False,
    )
    check(Path("o"), expected)


def test_columns_of_other_names(files: Files, nnpatch: Command) -> None:
    text = files.table.read_text("utf-8").replace("wrong_answer", "foil").replace("clean", "x")
    files.table.write_text(text, "utf-8")
    options = ["--columns", "source=x", "--columns", "target_answer=foil", "--sites", "mlp"]
    done = nnpatch("run", *files.arguments, *options, "--out", "o")
    assert done.code == 0, done.err


def test_spans(files: Files, nnpatch: Command) -> None:
    rows = [
        f"{line},{name}" for line, name in zip(lines(3), ["verb", "is", "is", "is"], strict=True)
    ]
    files.table.write_text("\n".join(rows) + "\n", "utf-8")
    options = ["--spans", "verb=verb:0,same=verb/verb", "--sites", "mlp", "--positions", "spans"]
    done = nnpatch("run", *files.arguments, *options, "--out", "o")
    assert done.code == 0, done.err
    found = Outcome.load("o/outcome.safetensors")
    assert found.axes("mlp")[1].labels == ("verb", "same")
    pairs = PromptPairs.from_csv(
        files.table,
        AutoTokenizer.from_pretrained(files.model),
        spans={"verb": ("verb", 0), "same": ("verb", "verb")},
    )
    sites = Sites("mlp", None, "spans", ["verb", "same"])
    check(Path("o"), activation_patching(model_of(files), None, sites, pairs, progress=False))
    assert "'nix'" in nnpatch("run", *files.arguments, "--spans", "a=nix", "--out", "p").err


def test_a_plan_writes_nothing_and_loads_no_weights(files: Files, nnpatch: Command) -> None:
    before = listing(Path())
    for weights in files.model.glob("*.safetensors"):
        weights.unlink()
    done = nnpatch("plan", *files.arguments)
    assert (done.code, done.err) == (0, "")
    assert "token-layers" in done.out
    assert listing(Path()) == before


def test_write_config(files: Files, nnpatch: Command) -> None:
    assert nnpatch("run", "--write-config", "all.toml").code == 0
    text = Path("all.toml").read_text("utf-8")
    text = text.replace('table = ""', f"table = '{files.table}'")
    text = text.replace('model = ""', f"model = '{files.model}'")
    Path("all.toml").write_text(text, "utf-8")
    assert nnpatch("run", "--config", "all.toml", "--sites", "mlp").code == 0
    # The settings that are given stand in the file, and no file is overwritten.
    again = ["run", "--config", "all.toml", "--sites", "mlp,o", "--limit", 2, "--write-config"]
    refused = nnpatch(*again, "all.toml")
    assert (refused.code, Path("all.toml").read_text("utf-8")) == (2, text)
    assert "exists already" in refused.err
    assert nnpatch(*again, "other.toml").code == 0
    values = tomllib.loads(Path("other.toml").read_text("utf-8"))
    assert values["sites"] == ["mlp", "o"]
    assert values["limit"] == 2
    assert values["table"] == str(files.table)
    assert "there is no 'x'" in nnpatch("run", "--dtype", "x", "--write-config", "p.toml").err
    assert not Path("p.toml").exists()


def test_prompts_that_do_not_line_up_are_told_before_anything_runs(
    files: Files, nnpatch: Command
) -> None:
    """With the default sites, and as `plan` is asked."""
    rows = [*lines(3), row("Cuba", "Spain").replace("Now ", "Of all ")]
    files.table.write_text("\n".join(rows) + "\n", "utf-8")
    for command in ("plan", "run"):
        done = nnpatch(command, *files.arguments)
        assert done.code == 0
        (line,) = done.err.splitlines()
        assert "tokens" in line
        assert "(4 pairs of 3 to 4 tokens)" in done.out
        assert " in 4 prompts of 3 to 4 tokens\n" in done.out


def test_show_and_compare(files: Files, nnpatch: Command) -> None:
    arguments = [*files.arguments, "--sites", "mlp", "--out"]
    assert nnpatch("run", *arguments, "one").code == 0
    assert nnpatch("run", *arguments, "two", "--swap").code == 0
    shown = nnpatch("show", "one", "--top", 2)
    assert (shown.code, shown.err) == (0, "")
    found = Outcome.load("one/outcome.safetensors")
    assert str(found.top(2)) in shown.out
    # Tokens of different prompts, and not answers that count as one.
    told = "A bar in a token, as in ' "
    assert told in shown.out
    assert told in Path("one/report.html").read_text("utf-8").replace("&#39;", "'")
    assert found.info["weights"] in shown.out
    compared = nnpatch("compare", "one", "two", "--top", 2)
    assert compared.code == 0
    difference = found - Outcome.load("two/outcome.safetensors")
    _, *lines = str(difference.top(2)).splitlines()
    assert "\n".join(lines) in compared.out
    assert nnpatch("compare", "one", "one").out.endswith("No value differs.\n")
    some = nnpatch("compare", "one", "two", "--sites", "mlp", "--top", 2)
    assert some.out == compared.out


def test_compare_speaks_the_language_of_commands(files: Files, nnpatch: Command) -> None:
    """It names both runs, tells what differs, and advises options."""
    given = [*files.arguments, "--out"]
    for options in (
        ["a", "--sites", "mlp,o", "--positions", "last"],
        ["b", "--sites", "mlp,o", "--positions", "last", "--swap"],
        ["c", "--sites", "mlp,attn", "--positions", "last", "--method", "attribution"],
        ["d", "--sites", "mlp", "--positions", "last", "--layers", "0", "--limit", "3"],
        ["e", "--sites", "attn", "--positions", "each", "--metrics", "kl_divergence"],
        ["f", "--sites", "mlp,o", "--method", "ablation", "--positions", "last"],
        ["g", "--sites", "mlp", "--method", "ablation", "--metrics", "kl_divergence"],
    ):
        assert nnpatch("run", *given, *options).code == 0
    for one, other, options, parts in (
        ("a", "b", [], ["different prompts, 4 and 4", "There are no p-values: the sides have"]),
        ("a", "c", ["--sites", "mlp"], ["the same 4 prompts", "attribution  logit_difference"]),
        ("a", "c", [], ["a has the sites mlp, o, and c mlp, attn: --sites mlp compares what"]),
        ("a", "e", [], ["a has the sites mlp, o, and e attn: they have none in common"]),
        ("a", "d", ["--sites", "mlp"], ["'mlp'", "in a and", "in d"]),
        ("a", "f", [], ["scale 'restored' and f 'change'"]),
        ("f", "g", ["--sites", "mlp"], ["--metric NAME takes one that both have"]),
        ("a", "e", ["--metric", "kl"], ["no metric 'kl' was measured"]),
    ):
        done = nnpatch("compare", one, other, "--top", 2, *options)
        told = done.out + done.err
        assert not re.search(r"\w\(|one outcome|activation - ", told), told
        for part in parts:
            assert part in told, (part, told)
        if done.code == 0 and one == "a":
            head = f"{one} - {other}: each value of the first run minus that of the second\n"
            assert done.out.startswith(head)
            assert "of the share that is restored (0 target, 1 source)" in done.out


@pytest.mark.parametrize("command", [["show", "nix"], ["compare", "nix", "nix"]])
def test_no_run_to_show(files: Files, nnpatch: Command, command: list[str]) -> None:
    done = nnpatch(*command)
    assert (done.code, done.out) == (2, "")
    assert done.err == "nnpatch: error: there is no nix\n"


def test_warnings_are_told_and_stand_in_the_report(files: Files, nnpatch: Command) -> None:
    rows = [*lines(3), row("Cuba", "Spain").replace("Now Spain", "Of all Spain")]
    files.table.write_text("\n".join(rows) + "\n", "utf-8")
    done = nnpatch("run", *files.arguments, "--sites", "mlp", "--positions", "each", "--out", "o")
    assert done.code == 0
    (line, *_) = done.err.splitlines()
    assert line.startswith("nnpatch: warning: ")
    told = line.removeprefix("nnpatch: warning: ")
    assert str(markupsafe.escape(told))[:60] in Path("o/report.html").read_text("utf-8")


def test_warnings_of_the_table_are_told_and_stand_in_the_report(
    files: Files, nnpatch: Command
) -> None:
    rows = [f"{line},{part}" for line, part in zip(lines(3), ["part", "i", "i", "i"], strict=True)]
    files.table.write_text("\n".join(rows) + "\n", "utf-8")
    options = ["--spans", "cut=part:-1", "--sites", "mlp", "--positions", "spans", "--out", "o"]
    told = "span 'cut' cuts the token ' is' in two"
    for command in ("plan", "run"):
        done = nnpatch(command, *files.arguments, *options)
        assert done.code == 0, done.err
        (line,) = done.err.splitlines()
        assert line.startswith(f"nnpatch: warning: {told}")
    assert str(markupsafe.escape(told)) in Path("o/report.html").read_text("utf-8")


def test_rows_that_were_dropped_are_told(files: Files, nnpatch: Command) -> None:
    rows = [*lines(3), ",Now Cuba is, Oslo, Cairo", "a,b"]
    files.table.write_text("\n".join(rows) + "\n", "utf-8")
    done = nnpatch("plan", *files.arguments, "--faulty", "drop")
    assert done.code == 0
    told = "nnpatch: warning: 2 of 5 lines were dropped: line 5, column clean: must be"
    (line,) = done.err.splitlines()
    assert line.startswith(told)
    assert "; line 6, column answer" in line


def test_paths_are_written_for_a_shell(files: Files, nnpatch: Command) -> None:
    os.rename(files.table, "my pairs.csv")  # noqa: PTH104 - shorter
    done = nnpatch("run", "my pairs.csv", "--model", files.model, "--sites", "mlp")
    assert done.code == 0
    assert "nnpatch run &#39;my pairs.csv&#39;" in Path("nnpatch-my pairs/report.html").read_text()


COSTS = {
    "path": (
        ["--senders", "m0,a0.h1", "--receivers", "logits,m2", "--through", "mlps"],
        ["paths         at most 4, each from its first receiver on", "through       MLPs"],
    ),
    "edges": (
        ["--senders", "a0.h1"],
        # Its own MLP, two layers of 4 + 2 + 2 heads and an MLP, and the logits, above all layers.
        ["edges         20", "measured      20 edges in each pair, on average 50% of the layers"],
    ),
    "edges, estimated": (
        ["--estimate", "eap-ig-inputs", "--top-k", "7"],
        ["estimate      eap-ig-inputs: 5 runs of all pairs with a graph", "measured      7 edges"],
    ),
    "circuit": (
        ["--evaluations", "9"],
        ["estimate      eap-ig-inputs: 5 runs", "circuits      at most 9 runs of all pairs"],
    ),
    "subspace": (
        ["--epochs", "3", "--layers", "0,2"],
        ["sites         2, a subspace each", "steps         at most 3 for each, of up to 32 pairs"],
    ),
}


@pytest.mark.parametrize("case", COSTS)
def test_a_plan_tells_the_cost_of_every_method(files: Files, nnpatch: Command, case: str) -> None:
    options, told = COSTS[case]
    done = nnpatch("plan", *files.arguments, "--method", case.partition(",")[0], *options)
    assert (done.code, done.err) == (0, "")
    for line in told:
        assert line in done.out


def test_planned_edges_are_those_that_run(files: Files, nnpatch: Command) -> None:
    options = ["--method", "edges", "--receivers", "m2,logits"]
    (planned,) = re.findall(r"edges +(\d+)\n", nnpatch("plan", *files.arguments, *options).out)
    assert nnpatch("run", *files.arguments, *options).code == 0
    assert len(EdgeOutcome.load("nnpatch-pairs/outcome.safetensors")) == int(planned)
