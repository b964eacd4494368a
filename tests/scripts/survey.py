"""Run by the `survey` session: `nnpatch new-adapter` for every causal language model there is.

Each type of transformers that can be built tiny with generic settings gets a package, whose own
tests are then run as they were written. The table goes into docs/families.md.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch
import transformers

from nnpatch_core.cli import main as nnpatch
from nnpatch_core.testing import causal_model_types

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
HEADS = ("q", "k", "v", "o")
#: Of a folder's name; without it a folder may pass for a library that transformers looks for.
PREFIX = "package-"
#: The figures that the project has set itself.
PASS, WITH_HEADS = 90, 75


def generate(model_type: str, folder: Path) -> dict[str, Any]:
    """Run the command; what it said, or the error."""
    out, errors = io.StringIO(), io.StringIO()
    name = model_type.replace("_", "-")
    arguments = ["new-adapter", name, "--model-type", model_type, "--output", str(folder), "--json"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = nnpatch(arguments)
    if code == 2:
        lines = errors.getvalue().strip().splitlines()
        return {"error": lines[-1].removeprefix("nnpatch: error: ")}
    said: dict[str, Any] = json.loads(out.getvalue())
    said["cone"] = not any("cone=False" in file.read_text() for file in folder.rglob("*.py"))
    return said


def run_tests(folders: list[Path], report: Path) -> dict[str, list[str]]:
    """Model type to the checks that fail when its tests are run; all in one run of pytest."""
    paths = os.pathsep.join(str(folder / "src") for folder in folders)
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *("--import-mode=importlib", "-k", "test_conformance", "--tb=no", "-W", "ignore"),
        *(f"--junit-xml={report}", "-o", "junit_family=xunit1"),
        *(str(folder / "tests") for folder in folders),
    ]
    # Threads of tiny models wait for each other longer than they work.
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=False, env=environment, cwd=report.parent)
    names = {folder: folder.name.removeprefix(PREFIX) for folder in folders}
    found: dict[str, list[str]] = {name: [] for name in names.values()}
    ran = dict.fromkeys(found, 0)
    of_file = {file.name: names[folder] for folder in folders for file in folder.glob("tests/*.py")}
    for case in ElementTree.parse(report).iter("testcase"):
        folder = of_file[Path(str(case.get("file"))).name]
        ran[folder] += 1
        failure = case.find("failure")
        failure = case.find("error") if failure is None else failure
        if failure is not None:
            check = str(case.get("name")).rpartition("-")[2].rstrip("]")
            sys.stdout.write(f"{folder}: {check}: {failure.get('message')}\n")
            found[folder].append(check)
    for folder, count in ran.items():
        if not count:
            found[folder].append("no test ran")
    return found


def page(said: dict[str, dict[str, Any]], failed: dict[str, list[str]]) -> str:
    built = [name for name, result in said.items() if "error" not in result]
    passing = [name for name in built if not failed[name]]
    whole = [name for name in passing if set(HEADS) <= set(said[name]["components"])]
    cone = [name for name in passing if said[name]["cone"]]
    tiny = [name for name, result in said.items() if "no tiny model" not in reason(result)]
    rows = []
    for name in tiny:
        result = said[name]
        if "error" in result:
            rows.append(f"| {name} | | no | | {cell(result['error'])} |")
            continue
        faults = "; ".join(f"fails `{check}`" for check in failed[name])
        lacking = "; ".join(f"{key}: {why}" for key, why in result["missing"].items())
        told = "; ".join(part for part in (faults, lacking) if part)
        components = " ".join(result["components"])
        verdict = "no" if failed[name] else "yes"
        engine = "cone" if result["cone"] else "full"
        rows.append(f"| {name} | {components} | {verdict} | {engine} | {cell(told)} |")
    untold = sorted(set(said) - set(tiny))
    return f"""\
# Families

What `nnpatch new-adapter` makes of each causal language model of transformers
{transformers.__version__}, with nothing added by hand: the components that it reads off a tiny
random model, and whether the package that it writes passes its own tests, which are the
[conformance kit](conformance.md). This page is written by `nox -s survey`.

- {len(said)} types of causal language models, of which {len(tiny)} are built tiny and run with
  generic settings.
- {len(passing)} of the packages pass the kit untouched, {len(whole)} of them with `q`, `k`, `v` and
  `o`.
- {len(cone)} of them run in the [cone engine](engines.md), the others in the full engine: they keep
  something of earlier tokens besides keys and values, or cannot be run from the middle of a prompt.

A model that is `no` here may still be patched: with an adapter written by hand, or with fewer
components. Types with a plugin of ours (`llama`, `mistral`, `gemma`, `gemma2`, `gemma3_text`,
`gemma3`) are in the table too.

| model type | components | passes | engine | not read off, and why |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

Not built tiny, or not run on plain tokens, with generic settings: {", ".join(untold)}. For these,
`--config KEY=VALUE` gives the settings that the family needs.
"""


def reason(result: dict[str, Any]) -> str:
    """Why there is no package, with one name for the ways in which a model is not built."""
    error = str(result.get("error", ""))
    unbuilt = ("with generic settings", "a tiny one at most", "does not run on plain tokens")
    return "no tiny model" if any(part in error for part in unbuilt) else error


def cell(text: str) -> str:
    """Text that stays in its cell, and says a reason for several components once."""
    grouped: dict[str, list[str]] = {}
    for part in text.split("; "):
        name, colon, why = part.partition(": ")
        grouped.setdefault(why if colon else "", []).append(name if colon else part)
    told = [
        "; ".join(dict.fromkeys(names)) if not why else f"{', '.join(names)}: {why}"
        for why, names in grouped.items()
    ]
    return "; ".join(told).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def main() -> int:
    torch.set_num_threads(1)
    types = sys.argv[1:] or causal_model_types()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        said = {}
        for model_type in types:
            said[model_type] = generate(model_type, root / f"{PREFIX}{model_type}")
            sys.stdout.write(f"{model_type}: {said[model_type].get('error', 'written')}\n")
            sys.stdout.flush()
        folders = [root / f"{PREFIX}{name}" for name, each in said.items() if "error" not in each]
        failed = run_tests(folders, root / "report.xml")
    text = page(said, failed)
    sys.stdout.write(text.partition("A model that is")[0])
    if sys.argv[1:]:
        sys.stdout.write(text)
        return 0
    PAGE.write_text(text, encoding="utf-8")
    passing = [name for name in failed if not failed[name]]
    whole = [name for name in passing if set(HEADS) <= set(said[name]["components"])]
    return 0 if len(passing) >= PASS and len(whole) >= WITH_HEADS else 1


if __name__ == "__main__":
    sys.exit(main())
