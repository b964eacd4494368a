"""Run by the `attribution` session: how far estimates can be trusted on a real model, and the cost.

SmolLM2-135M completes "When Mary and John went to the store, John gave a drink to" by the name that
was said once; the task is that of Wang et al., "Interpretability in the Wild" (2022). Every block
and head is estimated in each way and measured, and the figures go into docs/attribution-details.md.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs" / "examples"))

import smollm2  # noqa: E402 - found by the line above

from nnpatch_core import (  # noqa: E402
    Outcome,
    PromptPairs,
    Sites,
    activation_patching,
    attribution_patching,
)
from nnpatch_core.results import Agreement  # noqa: E402

PAGE = ROOT / "docs" / "attribution-details.md"
PICTURES = ROOT / "docs" / "_static" / "attribution"
BEGIN, END = "<!-- report: begin -->", "<!-- report: end -->"

TEMPLATES = (
    "When {a} and {b} went to the store, {s} gave a drink to",
    "Then {a} and {b} had a long day, and {s} sent a letter to",
    "After {a} and {b} came to the park, {s} threw a ball to",
)
NAMES = (
    ("Mary", "John"),
    ("Tom", "Anna"),
    ("Paul", "Sarah"),
    ("Mark", "Lucy"),
)
BLOCKS = ("attn", "mlp")
HEADS = ("q", "k", "v", "o")
TOP = 20
TOPS = (10, 20, 30, 50, 100)
STEPS = 5
#: By name, what is asked of `attribution_patching`, and whether it tells signs.
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    f"integrated, {STEPS} steps": {"steps": STEPS},
    "QK fix": {"qk_fix": True},
    "GradDrop": {"grad_drop": True},
    "AtP*": {"qk_fix": True, "grad_drop": True},
}


def prompts(tokenizer: Any) -> PromptPairs:
    """Twelve pairs: the source names one of two people again, the target the other."""
    rows = [
        (template.format(a=a, b=b, s=b), template.format(a=a, b=b, s=a), f" {a}", f" {b}")
        for template in TEMPLATES
        for a, b in NAMES
    ]
    return PromptPairs.from_texts(*map(list, zip(*rows, strict=True)), tokenizer)


def timed(work: Callable[[], Any], repeat: int = 1) -> tuple[Any, float]:
    """What `work` gives, and the least CPU seconds that it took."""
    found = []
    for _ in range(repeat):
        gc.collect()
        begun = time.process_time()
        result = work()
        found.append(time.process_time() - begun)
    return result, min(found)


def baseline(model: Any, given: dict[str, Any]) -> None:
    """Two plain forwards and one plain backward, down to the embeddings, without nnpatch."""
    mask = given["source_attention_mask"]
    with torch.no_grad():
        model(given["source_tokens"], attention_mask=mask, use_cache=False, logits_to_keep=1)
    embedded = model.get_input_embeddings()(given["target_tokens"]).detach().requires_grad_()
    mask = given["target_attention_mask"]
    output = model(inputs_embeds=embedded, attention_mask=mask, use_cache=False, logits_to_keep=1)
    logits = output.logits[:, -1]
    picked = [
        logits.gather(1, given[f"{run}_answer_index"][:, None]) for run in ("source", "target")
    ]
    torch.autograd.grad((picked[0] - picked[1]).sum(), embedded)


def main() -> None:
    """Measure, print, publish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--publish", action="store_true", help="put the report into the docs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = smollm2.load()
    model.requires_grad_(False)
    pairs = prompts(tokenizer)
    given = pairs.arguments()
    seq_len = given["target_tokens"].shape[1]
    # What comes before the name that differs is the same in both runs.
    changed = int((given["source_tokens"] != given["target_tokens"]).any(0).nonzero()[0])
    sites = Sites([*BLOCKS, *HEADS], seq_pos_type="lastk", seq_pos=seq_len - changed)

    def sweep(how: Callable[..., Outcome], grid: Sites = sites, **asked: Any) -> Outcome:
        return how(model, "Llama3", grid, **given, progress=False, **asked)

    text = [_described(pairs, seq_len, changed, sweep(attribution_patching))]
    exact, exact_cost = timed(lambda: sweep(activation_patching))
    say(f"exact: {exact_cost:.1f} s")
    ranks, recalls, pictures = [], [], []
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, asked in METHODS.items():
        estimate, cost = timed(lambda asked=asked: sweep(attribution_patching, **asked))
        found = estimate.agreement(exact, TOP)
        say(f"{name}: {cost:.1f} s\n{found}")
        ranks.append(_ranks(name, cost, found, estimate.magnitudes().agreement(exact, TOP)))
        recalls.append(_recalls(name, estimate, exact))
        if name in ("plain", "AtP*"):
            path = PICTURES / f"{'plain' if name == 'plain' else 'atp-star'}.png"
            found.plot(label=6).savefig(path, dpi=110)
            told = f"{name}: estimate against measured value, the worst six named"
            pictures.append(f"![{told}]({path.relative_to(ROOT / 'docs').as_posix()})")
    text.append(
        "Rank correlation with the measured values (but for the first, of sizes: the mean over the "
        f"pairs of how far each moves), and signs of the strongest {TOP}:\n\n"
        f"{_table(_RANKS, ranks)}"
    )
    text.append(
        "How many of the strongest cells, by size, are among as many of the estimate's:\n\n"
        f"{_table(_RECALLS, recalls)}"
    )
    text.append("\n\n".join(pictures))
    text.append(_screened(sweep, exact, exact_cost))
    text.append(_costs(model, given, sweep))
    report = "\n\n".join(text)
    sys.stdout.write(f"{report}\n")
    if arguments.publish:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n\n{report}\n\n{END}{after}", encoding="utf-8")


_RANKS = ("estimate", "CPU", "all, signed", "all", *BLOCKS, *HEADS, "signs")
_RECALLS = ("estimate", *(f"top {k}" for k in TOPS), "top 20, each pair alone")


def _ranks(name: str, cost: float, found: Agreement, of_sizes: Agreement) -> tuple[str, ...]:
    """Rank correlations, of the values and of their sizes, and signs, which sizes do not have."""
    signed = [found.rank_correlation, found.sign_agreement]
    whole, signs = ("–" if found.magnitude else f"{figure:.2f}" for figure in signed)
    parts = of_sizes.by_site()
    sizes = [of_sizes, *(parts[site] for site in (*BLOCKS, *HEADS))]
    each = [f"{part.rank_correlation:.4f}" for part in sizes]
    return (name, f"{cost:.1f} s", whole, *each, signs)


def _recalls(name: str, estimate: Outcome, exact: Outcome) -> tuple[str, ...]:
    """How many of the strongest cells are found, by size: of the mean, and of each pair alone."""
    found = [estimate.magnitudes().agreement(exact, k).recall * k for k in TOPS]
    one, other = _effects(estimate), _effects(exact)
    pairs = [
        len(set(a.topk(TOP).indices.tolist()) & set(b.topk(TOP).indices.tolist()))
        for a, b in zip(one.T, other.T, strict=True)
    ]
    return (name, *(f"{figure:.0f}" for figure in found), f"{sum(pairs) / len(pairs):.1f}")


def _effects(outcome: Outcome) -> torch.Tensor:
    """`[cells, pairs]`: how far each pair moves in each cell."""
    raw = torch.cat(list(outcome.raw[outcome.metric].values())).double()
    return (raw - outcome.baseline.target).abs()


def _described(pairs: PromptPairs, seq_len: int, changed: int, estimate: Outcome) -> str:
    cells = sum(int(estimate.swept(name).sum()) for name in estimate)
    first = pairs.pairs[0]
    return (
        f"{len(pairs)} pairs such as {first.source!r} (source) and {first.target!r} (target), "
        f"{seq_len} tokens, of which the last {seq_len - changed} differ in what they carry; "
        f"{cells} cells: every `attn`, `mlp` and head of `q`, `k`, `v` and `o` there. CPU seconds "
        "on one thread."
    )


def _screened(sweep: Callable[..., Outcome], exact: Outcome, whole: float) -> str:
    rows = []
    top = {
        (row["site"], row["layer"], row["position"], row.get("head"))
        for row in exact.strongest(TOP)
    }
    for by in ("attribution", "atp*"):
        for top_k in (50, 100, 200):
            out, cost = timed(
                lambda by=by, top_k=top_k: sweep(
                    activation_patching, screen=by, top_k=top_k, spot_checks=50
                )
            )
            rows_found = [row for row in out.strongest(TOP) if row["exact"]]
            found = {(r["site"], r["layer"], r["position"], r.get("head")) for r in rows_found}
            rows.append(
                (
                    by,
                    str(top_k),
                    f"{len(top & found)} of {TOP}",
                    f"{out.screening.largest:.3f}",
                    str(out.screening.missed_at_most()),
                    f"{cost:.1f} s",
                )
            )
            say(" ".join(rows[-1]))
    heads = ("screen", "top_k", f"exact top {TOP} found", "largest of 50 checked")
    table = _table((*heads, "at most so many larger (95 %)", "CPU"), rows)
    return f"Screened sweeps, where measuring all cells took {whole:.1f} s:\n\n{table}"


def _costs(model: Any, given: dict[str, Any], sweep: Callable[..., Outcome]) -> str:
    wholes = {
        "`attn`, `mlp`, `resid`, each position": (["attn", "mlp", "resid"], {}),
        "`attn`, `mlp`, `q`, `k`, `v`, `o`, each position": ([*BLOCKS, *HEADS], {}),
        "the same, QK fix": ([*BLOCKS, *HEADS], {"qk_fix": True}),
        "the same, GradDrop": ([*BLOCKS, *HEADS], {"grad_drop": True}),
        "the same, AtP*": ([*BLOCKS, *HEADS], {"qk_fix": True, "grad_drop": True}),
    }
    baseline(model, given)
    rows = []
    for name, (components, asked) in wholes.items():
        grid = Sites(components, seq_pos_type="each")
        # One after the other, for other work on the machine hits both.
        found = [
            (
                timed(lambda: baseline(model, given))[1],
                timed(lambda grid=grid, asked=asked: sweep(attribution_patching, grid, **asked))[1],
            )
            for _ in range(5)
        ]
        plain, own = (min(each) for each in zip(*found, strict=True))
        rows.append((name, f"{plain:.2f} s", f"{own:.2f} s", f"{own / plain:.2f}"))
        say(" ".join(rows[-1]))
    heads = ("estimate", "two forwards, one backward", "nnpatch", "ratio")
    return f"Cost, the least of five runs each:\n\n{_table(heads, rows)}"


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def say(text: str) -> None:
    """Tell how far it is."""
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()
