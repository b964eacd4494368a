"""The model card of a subspace: it says what is known, and "not said" of the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from nnpatch_core._printable import printable
from nnpatch_core._version import __version__
from nnpatch_core.spaces.files.content import Content, as_json
from nnpatch_core.spaces.files.repositories import is_repo_id

#: By which a card is known as ours, and may be replaced.
MARK = "<!-- nnpatch subspace: written anew whenever the subspace is saved here -->"
_NOT_SAID = "not said"
#: How a record names the last position of each prompt.
_LAST = "'last'"
_TAG = re.compile(r"[a-z0-9][a-z0-9_-]{0,40}")
#: What would be markup, or HTML, or mathematics.
_MARKUP = re.compile(r"([\\`*_\[\]<>|~$&#^{}])")
#: How much of one text, and how many entries of a list a card shows.
_LONGEST, _MOST = 400, 8


def model_card(content: Content, name: str) -> str:
    """The text of a `README.md`, with the front matter that the hub reads.

    Args:
        content: of the subspace.
        name: by which the card's example loads it: of a repository, or of the folder itself.
    """
    info = as_json(content.info)
    width, rank = content.basis.shape
    of = f" of {_text(info['model'])}" if "model" in info else ""
    parts = [
        _front_matter(info),
        MARK,
        f"# A subspace of rank {rank}{of}",
        "A linear subspace of a language model's activations, for "
        "[nnpatch](https://github.com/nnpatch/nnpatch).",
        _table(("", ""), _facts(content, info)),
        "## Training data",
        _said(info, "data"),
        "## Training",
        _said(info, "training"),
        "## Metrics",
        _figures(info.get("metrics")),
        "## Controls",
        _figures(info.get("controls")),
        "## Use",
        _example(content, info, name),
        "## Files",
        f"`model.safetensors` has the basis, `[{width}, {rank}]`"
        + (f", and the mean, `[{width}]`" if content.mean is not None else "")
        + f"; `config.json` has what this page says. Written by nnpatch-core {__version__}.",
    ]
    rest = {key: value for key, value in info.items() if key not in _SHOWN}
    if rest:
        parts[-2:-2] = ["## Further", _table(("", ""), _rows(rest))]
    return "\n\n".join(parts) + "\n"


#: Entries of `info` that have a place of their own.
_SHOWN = (
    "model",
    "model_type",
    "method",
    "data",
    "training",
    "metrics",
    "controls",
    "nnpatch-core",
)


def _front_matter(info: Mapping[str, Any]) -> str:
    """Nothing of others stands here but names of a known form."""
    tags = ["nnpatch", "subspace", "interpretability", "activation-patching"]
    kind = info.get("model_type")
    if isinstance(kind, str) and _TAG.fullmatch(kind) and kind not in tags:
        tags.append(kind)
    lines = ["---", "library_name: nnpatch", "tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    model = info.get("model")
    if is_hub_id(model):
        lines.append(f"base_model: {json.dumps(model)}")
    return "\n".join([*lines, "---"])


def is_hub_id(model: Any) -> TypeGuard[str]:
    """Whether a model's name looks like one on the hub: an owner and a name, and no local path."""
    # A bare name may be anything.
    return is_repo_id(model) and "/" in model and not Path(model).exists()


def _facts(content: Content, info: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    site = content.site or {}
    width, rank = content.basis.shape
    yield "model", _value(info.get("model"))
    yield "model type", _value(info.get("model_type"))
    yield "component", _value(site.get("component"))
    yield "layer", _value(site.get("layer"))
    yield (
        "head",
        "the component as a whole" if site and site["head"] is None else _value(site.get("head")),
    )
    yield "positions", _positions(site)
    yield "width", str(width)
    yield "rank", str(rank)
    yield "coordinates are 0 at", "0" if content.mean is None else "the mean"
    yield "how it was made", _value(info.get("method"))
    if "nnpatch-core" in info:
        yield "made by nnpatch-core", _value(info["nnpatch-core"])


def _positions(site: Mapping[str, Any]) -> str:
    if not site:
        return _NOT_SAID
    if site["where"] is not None:
        return _text(site["where"])
    return "all" if site["seq_pos"] is None else _text(list(site["seq_pos"]))


def _said(info: Mapping[str, Any], name: str) -> str:
    """A text, or a table of a mapping."""
    value = info.get(name)
    if isinstance(value, Mapping) and value:
        return _table(("", ""), _rows(value))
    said = _value(value)
    return f"{said[:1].upper()}{said[1:]}." if said == _NOT_SAID else said


def _rows(value: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, each in value.items():
        yield _text(key), _value(each)


def _figures(metrics: Any) -> str:
    """Numbers with their intervals, as a table."""
    if not isinstance(metrics, Mapping) or not metrics:
        return "Not said." if metrics is None or metrics == {} else _value(metrics)
    rows = []
    for name, each in metrics.items():
        figure = each if isinstance(each, Mapping) and "value" in each else {"value": each}
        ends = [figure.get(end) for end in ("low", "high")]
        interval = _NOT_SAID if None in ends else f"{_value(ends[0])} to {_value(ends[1])}"
        more = {key: value for key, value in figure.items() if key not in ("value", "low", "high")}
        rows.append((_text(name), _value(figure["value"]), interval, _value(more) if more else ""))
    return _table(("metric", "value", "interval", ""), rows)


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _value(value: Any) -> str:
    """Any value of `info` in one line, and how much is left out of a long one."""
    if value is None or value in ("", [], {}):
        return _NOT_SAID
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return _some([f"{_text(key)}: {_value(each)}" for key, each in value.items()], "; ")
    if isinstance(value, list):
        return _some([_value(each) for each in value], ", ")
    return _text(value)


def _some(texts: list[str], between: str) -> str:
    rest = len(texts) - _MOST
    more = f"{between}and {rest} more in config.json" if rest > 0 else ""
    return between.join(texts[:_MOST]) + more


def _text(value: Any) -> str:
    """Text of others in one line, of which nothing is markup."""
    line = printable(" ".join(str(value).split()))
    if len(line) > _LONGEST:
        line = f"{line[:_LONGEST]}… (all of it in config.json)"
    return _MARKUP.sub(r"\\\1", line)


def _example(content: Content, info: Mapping[str, Any], name: str) -> str:
    load = [
        "from nnpatch_core.subspace import Subspace",
        "",
        f"subspace = Subspace.from_pretrained({_literal(name)})",
        "coordinates = subspace.project(activations)  # [..., width] to [..., rank]",
    ]
    site = content.site
    if site is None:
        parts = [load]
    else:
        component, layer = _literal(site["component"]), site["layer"]
        head = "" if site["head"] is None else f", head={site['head']}"
        heads = "" if site["head"] is None else f", heads=[{site['head']}]"
        at = site["seq_pos"]
        how = (
            f'seq_pos_type="custom_constant", seq_pos={list(at)}'
            if at is not None
            else "seq_pos_type=None"
            if site["where"] is None
            else 'seq_pos_type="last"'
        )
        patch = [
            "from nnpatch_core import PromptPairs, Sites, activation_patching",
            "",
            f"sites = Sites({component}, layers=[{layer}]{heads}, {how}, subspace=subspace)",
            "pairs = PromptPairs.from_texts(source, target, source_answers, target_answers, "
            "tokenizer)",
            "out = activation_patching(model, None, sites, **pairs.arguments())",
        ]
        at_site = "subspace"
        steer = ["from nnpatch_core.steering import Set, steer", ""]
        if site["where"] not in (None, _LAST):
            # Elsewhere in each prompt, which nobody can tell from here.
            steer.insert(0, "from nnpatch_core import Site, infer_adapter")
            at_site = "site"
            steer.append(
                f"site = Site.get_site(infer_adapter(model), {component}, {layer}{head}, "
                "seq_pos=[-1], subspace=subspace)"
            )
        steer += [
            'inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")',
            f"with steer(model, {at_site}, Set(3.0)):",
            "    model.generate(**inputs, max_new_tokens=20)",
        ]
        parts = [load, patch, steer]
    model = info.get("model")
    if is_hub_id(model):
        load[:0] = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({_literal(model)})",
            f"tokenizer = AutoTokenizer.from_pretrained({_literal(model)})",
            "",
        ]
    texts = ["Load it, and see where activations stand in it:"]
    texts += ["Patch it alone:", "Hold its coordinate while text is generated:"][: len(parts) - 1]
    blocks = ["```python\n" + "\n".join(lines) + "\n```" for lines in parts]
    return "\n\n".join(f"{text}\n\n{block}" for text, block in zip(texts, blocks, strict=True))


def _literal(text: str) -> str:
    """A literal of Python, in one line."""
    return json.dumps(text)
