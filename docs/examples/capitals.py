"""Where does SmolLM2-135M keep the capital of a country? Activation patching in one command.

Patches the residual stream, the attention blocks and the MLPs of every layer at every token from
"The capital of France is" into "The capital of Japan is", and a few pairs more, prints the
strongest sites and draws the heatmap as an HTML page and a PNG.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import smollm2

from nnpatch_core import Outcome, PromptPairs, Sites, activation_patching

PAIRS = [
    (("France", " Paris"), ("Japan", " Tokyo")),
    (("Germany", " Berlin"), ("Greece", " Athens")),
    (("Italy", " Rome"), ("Russia", " Moscow")),
    (("Egypt", " Cairo"), ("Spain", " Madrid")),
]
SITES = ["resid", "attn", "mlp"]


def main() -> None:
    """Load, sweep, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("nnpatch-demo"),
        help="folder for the pictures (default: %(default)s)",
    )
    arguments = parser.parse_args()

    say(f"Loading SmolLM2-135M (kept in {smollm2.default_cache()}) ...")
    model, tokenizer = smollm2.load()
    pairs = PromptPairs.from_texts(
        [f"The capital of {source} is" for (source, _), _ in PAIRS],
        [f"The capital of {target} is" for _, (target, _) in PAIRS],
        [answer for (_, answer), _ in PAIRS],
        [answer for _, (_, answer) in PAIRS],
        tokenizer,
    )
    say(f"Patching {', '.join(SITES)} in {len(pairs)} prompt pairs, such as")
    say(f"  source {pairs.pairs[0].source!r} -> {pairs.pairs[0].source_answer!r}")
    say(f"  target {pairs.pairs[0].target!r} -> {pairs.pairs[0].target_answer!r}")
    start = time.monotonic()
    out = activation_patching(
        model,
        None,  # the adapter is found by the model's type, through the plugins
        Sites(SITES, seq_pos_type="each"),
        pairs,
        force_model_confidence=True,
    )
    if out.info["engine"] != "cone":
        raise SystemExit(f"the sweep was not run in the cone engine: {out.info['fallback']}")
    cells = sum(out[name].numel() for name in out)
    say(f"{cells} cells in {time.monotonic() - start:.0f} s with {out.info['adapter']}\n")
    report(out)
    draw(out, arguments.out)


def report(out: Outcome) -> None:
    """Print the strongest sites, and where the answer is in each part of the model."""
    say("Share of the source answer that one patch restores (0: none, 1: all of it)\n")
    say(f"{'layer':>5}  strongest token of resid")
    resid = out["resid"]
    n_layers = len(resid)
    for layer in sorted({*range(0, n_layers, 5), n_layers - 1}):
        position = int(resid[layer].argmax())
        token, value = out.prompts.label(position, strip=True), resid[layer, position].item()
        say(f"{layer:>5}  {value:6.3f}  {token}")
    say(f"\nresid, last layer, last token: {resid[-1, -1]:.3f}\n")
    say(f"{'site':<6}{'layer':>5}  {'value':>6}  token")
    for name in ("attn", "mlp"):
        strongest = [row for row in out.strongest(10**6) if row["site"] == name]
        for row in strongest[:5]:
            token = out.prompts.label(row["position"], strip=True)
            say(f"{name:<6}{row['layer']:>5}  {row['value']:6.3f}  {token}")


def draw(out: Outcome, folder: Path) -> None:
    """Write the heatmap as a page and as a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    out.plot().savefig(folder / "capitals.png", dpi=120)
    out.plot(interactive=True).write_html(folder / "capitals.html")
    out.save(folder / "capitals.safetensors")
    say(f"\nHeatmap: {folder / 'capitals.html'} and {folder / 'capitals.png'}")


def say(text: str) -> None:
    """Print a line at once, in order with the progress bar."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
