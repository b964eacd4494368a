"""Tables and charts from the results of a run, measuring nothing."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from charts import draw
from summary import Summary
from tables import tables

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, PUBLISHED = DOCS / "benchmarks.md", DOCS / "_static" / "bench"
#: Around what a run writes into the page, by the run's name.
BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"
RESULTS, TABLES = "results.json", "tables.md"
CAPTIONS = {
    "scaling.svg": "Cost of a sweep against tokens, layers and pairs of prompts",
    "memory.svg": "Peak memory and cost of a sweep against its memory budget",
}


def save(results: dict[str, Any], folder: Path, name: str = RESULTS) -> None:
    """Write the raw results, one measurement a line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = {
        key: "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]" if value else "[]"
        for key, value in results.items()
        if key != "about"
    }
    parts = [f'"about": {json.dumps(results["about"])}']
    parts += [f'"{key}": {text}' for key, text in lines.items()]
    (folder / name).write_text("{\n " + ",\n ".join(parts) + "\n}\n", encoding="utf-8")


def render(folder: Path) -> str:
    """Draw the charts beside the results; gives the tables."""
    found = Summary(json.loads((folder / RESULTS).read_text(encoding="utf-8")))
    pictures = draw(found, folder)
    text = tables(found)
    if folder == PUBLISHED:
        # Sphinx wants its pictures relative to the page, and there at all.
        for path in pictures:
            text += f"\n\n![{CAPTIONS[path.name]}]({path.relative_to(DOCS).as_posix()})"
        told = (folder / RESULTS).relative_to(DOCS).as_posix()
        text += f"\n\nEvery measurement is in {{download}}`{RESULTS} <{told}>`."
        publish(text, "bench")
    else:
        (folder / TABLES).write_text(f"{text}\n", encoding="utf-8")
    return text


def publish(text: str, run: str) -> None:
    """Put the tables of a run between its marks in the page."""
    begin, end = BEGIN.format(run), END.format(run)
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(begin)[0], page.split(end)[1]
    PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def main() -> None:
    """Render again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", default=PUBLISHED, help="of the results (default: the docs)"
    )
    sys.stdout.write(f"{render(parser.parse_args().folder.resolve())}\n")


if __name__ == "__main__":
    main()
