"""How an outcome was made, in words and as a call in Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnpatch_core._ranges import ranges
from nnpatch_core.results.reported.facts import ablation_of
from nnpatch_core.results.words import legend, model_name

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome

#: By how its kind begins, which function makes an outcome.
_FUNCTIONS = {
    "attribution": "attribution_patching",
    "ablation": "ablation_patching",
    "edge": "edge_patching",
    "path": "path_patching",
    "circuit": "evaluate_circuit",
}
_TAKEN_AWAY = {
    "zero": "set to zero",
    "mean": "set to its mean",
    "resample": "replaced by that of another prompt",
}


def question_of(outcome: Outcome) -> str:
    """The question that the sweep asks, in a sentence.

    It is made of the metric, the kind, the scale, the sites and the number of prompts.
    """
    model = model_name(outcome.info.get("model", "")) or "the model"
    cells = sum(len(each.index) for each in outcome.cells.values())
    what, prompts = ", ".join(outcome.cells), _prompts(outcome)
    how = "" if not outcome.kind.startswith("attribution") else ", as gradients estimate it"
    method = ablation_of(outcome.kind, outcome.info)
    if outcome.scale == "change":
        taken = _TAKEN_AWAY.get(method, "changed")
        return (
            f"How far does {outcome.metric} of {model} move over {prompts} when one of "
            f"{cells:,} sites ({what}) is {taken}{how}?"
        )
    given = f"is {_TAKEN_AWAY[method]}" if method else "comes from the source run"
    subject = {"edge": "edges of the model", "path": "paths of the model"}.get(
        outcome.kind.split(" ")[0], f"sites ({what})"
    )
    return (
        f"When one of {cells:,} {subject} {given}, how far does {outcome.metric} of {model} move "
        f"from the target run to the source run, over {prompts}{how}?"
    )


def scale_of(outcome: Outcome) -> str:
    """A sentence on what the values mean."""
    if outcome.scale == "restored" and not outcome.magnitude:
        return (
            f"A value is the share of the way from the target run (0) to the source run (1), by "
            f"{outcome.metric}: (mean patched - mean target) / (mean source - mean target)."
        )
    return f"A value is the {legend(outcome.scale, outcome.magnitude, outcome.metric)}."


def call_of(outcome: Outcome) -> str:
    """The call that makes an outcome, as far as it is known."""
    info = outcome.info
    word = outcome.kind.split(" ")[0]
    function = _FUNCTIONS.get(word, "activation_patching")
    model = ", ".join(info[name] for name in ("model", "dtype", "weights") if name in info)
    lines = [
        f"model,  # {_line(model) or 'the model'}",
        f"None,  # adapter: {_line(info.get('adapter', 'found by the model'))}",
        *([] if word in ("edge", "circuit") else [f"sites,  # {_line(_sites(outcome))}"]),
        *(["circuits,  # those above"] if word == "circuit" else []),
        f"pairs,  # {_prompts(outcome)}",
        f"metric={list(outcome.metrics)!r},",
    ]
    method = ablation_of(outcome.kind, info)
    if method:
        lines.append(f"{'method' if word == 'ablation' else 'ablation'}={method!r},")
    if outcome.screening is not None:
        lines.append(f"screen={outcome.screening.by!r}, top_k={outcome.screening.chosen},")
    if info.get("engine") in ("cone", "full"):
        lines.append(f"engine={info['engine']!r},")
    if "seed" in info:
        lines.append(f"seed={_line(info['seed'])},")
    body = "".join(f"    {line}\n" for line in lines)
    return f"{function}(\n{body})  # {_line(outcome.kind)}"


def _sites(outcome: Outcome) -> str:
    words = []
    for name, cells in outcome.cells.items():
        axes = [
            f"{axis.name} {_labels([axis.labels[at] for at in places])}"
            for axis, places in zip(
                cells.axes, ([*dict.fromkeys(each)] for each in cells.index.T.tolist()), strict=True
            )
            if axis.name in ("layer", "position")
        ]
        words.append(f"{name} ({', '.join(axes)})" if axes else name)
    return ", ".join(words)


def _labels(labels: list[int | str]) -> str:
    numbers = [each for each in labels if isinstance(each, int)]
    return ranges(sorted(numbers))


def _prompts(outcome: Outcome) -> str:
    what = "prompt" if outcome.scale == "change" else "pair of prompts"
    if outcome.count == 1:
        return f"1 {what}"
    return f"{outcome.count:,} {'prompts' if what == 'prompt' else 'pairs of prompts'}"


def _line(text: str) -> str:
    return " ".join(text.split())
