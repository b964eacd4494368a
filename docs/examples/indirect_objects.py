"""Which heads of SmolLM2-135M say who is given the drink? A study by one command, both ways.

"When Mary and John went to the store, John gave a drink to" goes on with " Mary" (Wang et al.,
"Interpretability in the Wild", 2022). The table has 24 pairs that differ in the name that is said
again. `nnpatch run` patches each head, each block and the stream at each word that may matter, with
two metrics: from the source into the target run (denoising), and back (noising, `--swap`).
`nnpatch compare` says where the two differ.
"""

from __future__ import annotations

import csv
import random
from pathlib import Path

import smollm2
import telling
from circuit_of_names import NAMES, TEMPLATE

from nnpatch_core import Outcome
from nnpatch_core.cli import main as nnpatch

COUNT = 24
SEED = 0
HEADER = (
    *("source", "target", "source_answer", "target_answer"),
    *("first", "second", "source_again", "target_again", "end"),
)
CONFIG = """
table = "{table}"
model = "{model}"
out = "{out}"
swap = {swap}
question = "{question}"
sites = ["resid", "attn", "mlp", "o"]
positions = "spans"
spans = [
    "first=first:0", "second=second:0", "again=source_again:1/target_again:1", "end=end:-1",
]
metrics = ["logit_difference", "answer_log_probability"]
"""
QUESTIONS = {
    "restored": "Which heads of SmolLM2-135M, at which words, restore who is given the drink?",
    "broken": "Which heads of SmolLM2-135M, at which words, does it break to take away?",
}


def rows() -> list[dict[str, str]]:
    """The pairs, with the words where each name stands."""
    draw = random.Random(SEED)
    found = []
    for a, b in draw.sample([(a, b) for a in NAMES for b in NAMES if a != b], COUNT):
        prompts = [TEMPLATE.format(A=a, B=b, S2=again) for again in (b, a)]
        values = (*prompts, f" {a}", f" {b}", a, b, b, a, "to")
        found.append(dict(zip(HEADER, values, strict=True)))
    return found


def write_table(path: Path) -> None:
    """Write the table as a student would have it."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, HEADER)
        writer.writeheader()
        writer.writerows(rows())


def run(folder: Path, name: str, *, swap: bool) -> Path:
    """One direction: its folder, with outcome, tables, pictures and a report."""
    out = folder / name
    config = folder / f"{name}.toml"
    text = CONFIG.format(
        table=folder / "indirect_objects.csv",
        model=smollm2.default_cache(),
        out=out,
        swap=str(swap).lower(),
        question=QUESTIONS[name],
    )
    config.write_text(text, encoding="utf-8")
    if nnpatch(["run", "--config", str(config), "--overwrite"]):
        raise SystemExit(1)
    return out


def main() -> None:
    """Write the table, run both directions, and compare them."""
    folder = telling.folder(__doc__)
    smollm2.load()
    write_table(folder / "indirect_objects.csv")
    restored, broken = (
        run(folder, name, swap=swap) for name, swap in (("restored", False), ("broken", True))
    )
    for metric in ("logit_difference", "answer_log_probability"):
        nnpatch(["show", str(restored), "--sites", "o", "--top", "12", "--metric", metric])
        nnpatch(["show", str(broken), "--sites", "o", "--top", "12", "--metric", metric])
    nnpatch(["compare", str(restored), str(broken), "--top", "12"])
    for name in ("again", "end"):
        heads = Outcome.load(restored / "outcome.safetensors").sel(site="o", span=name)
        picture = folder / f"indirect-objects-{name}.png"
        heads.plot(crop=True, title=f"Heads at '{name}'").savefig(picture, dpi=80)
        telling.say(f"Picture: {picture}")


if __name__ == "__main__":
    main()
