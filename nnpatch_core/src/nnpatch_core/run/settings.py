"""The settings of a run: one table for the command line, a TOML file and the help of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import attrs

from nnpatch_core._hints import did_you_mean
from nnpatch_core._printable import shown
from nnpatch_core.errors import SettingsError, ShardError
from nnpatch_core.run.numbers import read_numbers
from nnpatch_core.sweep import Share

#: The kinds of analysis.
METHODS = ("activation", "attribution", "ablation", "path", "edges", "circuit", "subspace")
#: Methods that sweep over sites of the model; with a source run.
SITES = ("activation", "ablation", "attribution", "subspace")
PAIRED = tuple(name for name in METHODS if name != "ablation")

#: The groups of the help, in their order.
PROMPTS, MODEL, WHERE, HOW, RUNNING, OUTPUT = (
    "Prompts",
    "Model",
    "What is patched",
    "How it is measured",
    "Running",
    "Output",
)


@attrs.frozen
class Option:
    """A setting, beside its name, type and default.

    Args:
        words: its help, in a line.
        group: where the help has it.
        methods: the methods that it means something with.
        choices: all values that there are; none is any.
        least: the least number.
    """

    words: str
    group: str
    methods: tuple[str, ...] = METHODS
    choices: tuple[str, ...] = ()
    least: float | None = None


def _option(default: Any, words: str, group: str, **options: Any) -> Any:
    return attrs.field(default=default, metadata={"option": Option(words, group, **options)})


@attrs.frozen(kw_only=True)
class Settings:
    """All that a run is told; None is a default that the help of its option names."""

    # The prompts.
    table: Path = _option(  # noqa: RUF009 - a field
        Path(), "A CSV, JSONL, JSON or Parquet file, with a pair of prompts in each row.", PROMPTS
    )
    columns: tuple[str, ...] = _option(
        (), "Your names of columns, as source=question; known names are found by themselves.",
        PROMPTS,
    )  # fmt: skip
    spans: tuple[str, ...] = _option(
        (),
        "Parts of the prompts by name, as subject=COLUMN; COLUMN:1 is the second place where its "
        "text stands, ONE/OTHER the columns of source and target.",
        PROMPTS,
    )
    layout: str | None = _option(None, "A data set's own layout.", PROMPTS)
    chat: bool = _option(False, "Put prompts into the model's chat template.", PROMPTS)
    system: str | None = _option(None, "The system message, with --chat.", PROMPTS)
    answers: str = _option(
        "auto", "Whether answers are texts or token ids.", PROMPTS, choices=("auto", "ids", "texts")
    )
    space: bool = _option(
        True, "Join an answer to its prompt by a space, where neither has one.", PROMPTS
    )
    multi_token: str = _option(
        "raise",
        "What to do about an answer of several tokens: refuse it, take its first, leave out the "
        "pair, or take all (for metrics of whole answers).",
        PROMPTS,
        choices=("raise", "first", "drop", "all"),
    )
    faulty: str = _option(
        "raise", "Refuse a table with faulty rows, or leave these out.", PROMPTS,
        choices=("raise", "drop"),
    )  # fmt: skip
    limit: int | None = _option(None, "Take the first pairs alone, so many.", PROMPTS, least=1)
    swap: bool = _option(
        False, "Exchange source and target: the other direction.", PROMPTS, methods=PAIRED
    )

    # The model.
    model: str = _option("", "A model's folder, a GGUF file, or its name on the hub.", MODEL)
    tokenizer: str | None = _option(None, "Its tokenizer, where that is elsewhere.", MODEL)
    revision: str | None = _option(None, "A branch, tag or commit on the hub.", MODEL)
    gguf_file: str | None = _option(None, "The GGUF file in the model's folder.", MODEL)
    dtype: str = _option(
        "float32", "The type of the weights; auto is the one they are stored in.", MODEL,
        choices=("float32", "bfloat16", "float16", "float64", "auto"),
    )  # fmt: skip
    device: str | None = _option(
        None, "Where the model runs, as cuda:0. By default a GPU, if there is one.", MODEL
    )
    device_map: str | None = _option(
        None, "Lay the model over devices, as accelerate does with 'auto'.", MODEL
    )
    attention: str | None = _option(None, "The attention implementation, as eager or sdpa.", MODEL)
    quantize: str | None = _option(
        None, "Load the weights in fewer bits, by bitsandbytes.", MODEL, choices=("8bit", "4bit")
    )
    peft: str | None = _option(None, "The folder, or name on the hub, of a PEFT adapter.", MODEL)
    api: str | None = _option(
        None, "The name of the adapter; by default that of the model's type.", MODEL
    )

    # What is patched.
    sites: tuple[str, ...] = _option(
        (),
        "Components, as resid or o. By default resid, attn and mlp at each position, and o by head "
        "at the last.",
        WHERE,
        methods=SITES,
    )
    layers: tuple[str, ...] = _option((), "Layers, as 0-5,8. By default all.", WHERE, methods=SITES)
    heads: tuple[str, ...] = _option((), "Heads, as 0-2. By default all.", WHERE, methods=SITES)
    positions: str | None = _option(
        None, "A position strategy, as each, last, lastk, custom, spans or all.", WHERE,
        methods=(*SITES, "edges"),
    )  # fmt: skip
    at: tuple[str, ...] = _option(
        (), "For that strategy: a number, positions, or names of spans.", WHERE,
        methods=(*SITES, "edges"),
    )  # fmt: skip
    source_at: tuple[str, ...] = _option(
        (), "Positions in the source prompts, where those of --at are other ones there.", WHERE,
        methods=("activation", "attribution"),
    )  # fmt: skip
    subspace: str | None = _option(
        None,
        "Patch in a subspace alone: the folder of one, its name on the hub, or the folder of a run "
        "of method subspace, each of whose layers has its own.",
        WHERE,
        methods=("activation", "ablation", "attribution"),
    )
    senders: tuple[str, ...] = _option(
        (), "Nodes that write, as input, a5.h1 or m7.", WHERE, methods=("path", "edges")
    )
    receivers: tuple[str, ...] = _option(
        (), "Nodes that read, as 'a9.h3<q>', m7 or logits.", WHERE, methods=("path", "edges")
    )
    path: tuple[str, ...] = _option(
        (), "All nodes of one path, as a0.h1,m2,logits, in place of senders and receivers.", WHERE,
        methods=("path",),
    )  # fmt: skip
    through: str | None = _option(
        None, "Recompute the MLPs between them.", WHERE, methods=("path",), choices=("mlps",)
    )

    # How it is measured.
    method: str = _option("activation", "The kind of analysis.", HOW, choices=METHODS)
    metrics: tuple[str, ...] = _option(
        (), "Metrics, by name. By default logit_difference.", HOW,
        methods=tuple(name for name in METHODS if name != "subspace"),
    )  # fmt: skip
    confident: bool = _option(
        False, "Refuse prompts whose own runs do not prefer their own answers.", HOW,
        methods=("activation", "attribution", "path", "edges"),
    )  # fmt: skip
    ablation: str | None = _option(
        None, "What is put in place of what is taken away; method ablation takes zero by default.",
        HOW,
        methods=("ablation", "attribution", "edges", "circuit"),
        choices=("zero", "mean", "resample"),
    )  # fmt: skip
    reference: Path | None = _option(  # noqa: RUF009 - a field
        None,
        "A table of prompts that means are taken over, or that are drawn from: with other answers, "
        "too. By default the table's own prompts.",
        HOW,
        methods=("ablation", "attribution", "edges", "circuit"),
    )
    per_position: bool = _option(
        False, "A mean of its own for each position.", HOW,
        methods=("ablation", "attribution", "edges", "circuit"),
    )  # fmt: skip
    estimate: str | None = _option(
        None, "For edges and circuits: the estimate of all edges.", HOW,
        methods=("edges", "circuit"),
        choices=("eap", "eap-ig-inputs", "eap-ig-activations", "clean-corrupted"),
    )  # fmt: skip
    screen: str | None = _option(
        None, "Estimate all cells first, and measure the most promising.", HOW,
        methods=("activation",), choices=("attribution", "atp*"),
    )  # fmt: skip
    top_k: int | None = _option(
        None, "So many are measured of those that an estimate puts first.", HOW,
        methods=("activation", "edges", "circuit"), least=0,
    )  # fmt: skip
    spot_checks: int | None = _option(
        None, "So many of the others are measured too, as a check. By default as many.", HOW,
        methods=("activation", "edges"), least=0,
    )  # fmt: skip
    steps: int | None = _option(
        None, "Points of an integrated gradient.", HOW,
        methods=("attribution", "edges", "circuit"), least=1,
    )  # fmt: skip
    qk_fix: bool = _option(
        False, "Recompute attention for queries and keys, as AtP* does.", HOW,
        methods=("attribution",),
    )  # fmt: skip
    grad_drop: bool = _option(
        False, "Leave out the gradient of one layer after the other, as AtP* does.", HOW,
        methods=("attribution",),
    )  # fmt: skip
    faithfulness: float = _option(
        0.9, "How faithful the circuit is to be.", HOW, methods=("circuit",)
    )
    evaluations: int = _option(
        150, "How many circuits may run on the way.", HOW, methods=("circuit",), least=1
    )
    prune: str | None = _option(
        None, "How edges are dropped. By default blocks.", HOW, methods=("circuit",),
        choices=("blocks", "acdc"),
    )  # fmt: skip
    threshold: float | None = _option(
        None, "By how much an edge must change the faithfulness, with --prune acdc.", HOW,
        methods=("circuit",), least=0,
    )  # fmt: skip
    rank: int = _option(1, "The directions of the subspace.", HOW, methods=("subspace",), least=1)
    epochs: int = _option(
        20, "How often the pairs are gone through.", HOW, methods=("subspace",), least=1
    )
    held_out: float = _option(
        0.2, "The share of the pairs that is held out.", HOW, methods=("subspace",)
    )
    lr: float = _option(0.01, "The highest learning rate.", HOW, methods=("subspace",))
    weight_decay: float = _option(
        0.0, "The weight decay of learning.", HOW, methods=("subspace",), least=0
    )
    warmup: float = _option(
        0.1, "The share of the steps over which the rate rises.", HOW, methods=("subspace",),
        least=0,
    )  # fmt: skip
    kl: float = _option(
        0.0, "The weight of a loss that keeps all other answers as they are.", HOW,
        methods=("subspace",), least=0,
    )  # fmt: skip
    patience: int = _option(
        5, "Stop after so many epochs without a lower loss.", HOW, methods=("subspace",), least=1
    )
    random_labels: bool = _option(
        True, "Learn the control with random labels, too.", HOW, methods=("subspace",)
    )
    random_model: bool = _option(
        False, "Learn the control on a model with random weights, too.", HOW, methods=("subspace",)
    )
    seed: int | None = _option(None, "The seed of whatever is drawn at random.", HOW)

    # Running.
    engine: str = _option(
        "auto", "cone computes what a patch can reach, full runs whole forwards.", RUNNING,
        methods=("activation", "ablation", "path", "edges", "subspace"),
        choices=("auto", "cone", "full"),
    )  # fmt: skip
    batch_size: int | None = _option(
        None, "How many prompts run together, at most; of a subspace, the pairs of a step.",
        RUNNING, least=1,
    )  # fmt: skip
    memory_budget: str | None = _option(
        None, "Memory beside the weights, as '4 GiB'. By default half of what is free.", RUNNING
    )
    keep: str = _option(
        "prompts", "Keep the numbers of each prompt, or their means alone.", RUNNING,
        methods=("activation", "ablation", "attribution", "path"), choices=("prompts", "means"),
    )  # fmt: skip
    shard: str | None = _option(
        None, "Measure one of several shards alone, as 3/16; nnpatch merge puts them together.",
        RUNNING, methods=("activation", "ablation", "attribution", "path", "edges"),
    )  # fmt: skip
    threads: int | None = _option(None, "Threads of the processor.", RUNNING, least=1)

    # Output.
    out: Path | None = _option(  # noqa: RUF009 - a field
        None, "The folder for all files. By default nnpatch-TABLE, in the current folder.", OUTPUT
    )
    level: float = _option(
        0.95, "The level of all intervals: of tables, pictures and the report.", OUTPUT,
        methods=tuple(name for name in METHODS if name != "subspace"),
    )  # fmt: skip
    width: float = _option(
        0.2, "How wide intervals may be before the report asks for more prompts.", OUTPUT
    )
    question: str | None = _option(None, "The question, as the report is to say it.", OUTPUT)


def option_of(field: Any) -> Option:
    """The option of a field of `Settings`."""
    found: Option = field.metadata["option"]
    return found


def options() -> Iterator[tuple[str, Any, Any, Option]]:
    """The name, type, default and option of each setting."""
    types = get_type_hints(Settings)
    for field in attrs.fields(Settings):
        yield field.name, types[field.name], field.default, option_of(field)


def read_settings(
    given: Mapping[str, Any], place: Callable[[str], str] = lambda name: name
) -> Settings:
    """The settings that are given, each checked by itself and beside the method.

    Args:
        given: name to value; texts that hold numbers, and lists of texts, are read as such.
        place: how an error names a setting.

    Raises:
        SettingsError: for all that is wrong at once.
    """
    known = {name: (kind, option) for name, kind, _, option in options()}
    found: dict[str, Any] = {}
    faults: list[str] = []
    for name, value in given.items():
        if name not in known:
            faults.append(f"{place(name)}: there is no such setting{did_you_mean(name, known)}")
            continue
        kind, option = known[name]
        try:
            found[name] = _checked(_read(kind, value), option)
        except ValueError as error:
            faults.append(f"{place(name)}: {error}")
    if not faults:
        faults = _beside(Settings(**found), place)
    if faults:
        raise SettingsError("\n".join(faults))
    if "shard" in found:
        # 01/2 is 1/2, and has its folder.
        found["shard"] = str(Share.of(found["shard"]))
    return Settings(**found)


def draws(settings: Settings) -> bool:
    """Whether something is drawn at random, so that a seed means something."""
    if settings.method in ("circuit", "subspace"):
        return True
    screened = settings.screen is not None or (
        settings.method == "edges" and settings.top_k is not None
    )
    return screened or settings.ablation == "resample"


def _beside(settings: Settings, place: Callable[[str], str]) -> list[str]:
    """The faults of settings that mean nothing beside the others, or lack another."""
    faults = []
    for name, _, default, option in options():
        value = getattr(settings, name)
        if value != default and settings.method not in option.methods:
            faults.append(
                f"{place(name)}: means nothing with method {settings.method!r}; it goes with "
                f"{', '.join(option.methods)}"
            )
    faults += [f"{place('shard')}: {told}" for told in _of_shard(settings)]
    if not settings.model:
        faults.append(f"{place('model')}: name a model")
    if settings.table == Path():
        faults.append(f"{place('table')}: name a table")
    if settings.method == "path" and not (
        settings.path or (settings.senders and settings.receivers)
    ):
        faults.append(f"{place('senders')}: a path needs senders and receivers")
    if settings.path and (settings.senders or settings.receivers):
        faults.append(f"{place('path')}: has all nodes, so that there are no senders and receivers")
    if settings.spot_checks is not None and settings.top_k is None:
        faults.append(f"{place('spot_checks')}: means nothing without top_k")
    if settings.threshold is not None and settings.prune != "acdc":
        faults.append(f"{place('threshold')}: means nothing without prune acdc")
    if settings.reference is not None and settings.ablation not in ("mean", "resample"):
        faults.append(f"{place('reference')}: means nothing without ablation mean or resample")
    if settings.source_at and not settings.at:
        faults.append(f"{place('source_at')}: means nothing without at")
    if settings.screen is not None and settings.top_k is None:
        faults.append(f"{place('screen')}: needs top_k, the number of cells that are measured")
    if settings.method == "activation" and settings.top_k is not None and settings.screen is None:
        faults.append(f"{place('top_k')}: means nothing without screen")
    if settings.method == "edges" and settings.top_k is not None and settings.estimate is None:
        faults.append(f"{place('top_k')}: means nothing without estimate")
    if settings.system is not None and not settings.chat:
        faults.append(f"{place('system')}: means nothing without chat")
    if settings.seed is not None and not draws(settings):
        faults.append(f"{place('seed')}: means nothing here, as nothing is drawn at random")
    for name in ("device_map", "quantize"):
        if settings.device is not None and getattr(settings, name) is not None:
            faults.append(f"{place('device')}: means nothing beside {name}, which places the model")
    if settings.at and settings.positions is None:
        faults.append(f"{place('at')}: means nothing without positions")
    for name in ("layers", "heads"):
        try:
            read_numbers(place(name), getattr(settings, name))
        except SettingsError as error:
            faults.append(str(error))
    if not 0 < settings.level < 1:
        faults.append(f"{place('level')}: must lie between 0 and 1, got {settings.level}")
    if not 0 < settings.faithfulness <= 1:
        faults.append(f"{place('faithfulness')}: must lie in (0, 1], got {settings.faithfulness}")
    if not settings.width > 0:
        faults.append(f"{place('width')}: must be above 0, got {settings.width}")
    return faults


def _of_shard(settings: Settings) -> Iterator[str]:
    """The faults of a shard."""
    if settings.shard is None:
        return
    try:
        Share.of(settings.shard)
    except ShardError as error:
        yield str(error)
    if settings.memory_budget is None:
        yield (
            "needs a memory budget (memory_budget, as '4 GiB'), the same for all shards: left to "
            "itself it is half of what is free on each machine, and it decides what runs together"
        )


def _read(kind: Any, value: Any) -> Any:
    """A value of a type; `ValueError` where it is none."""
    kinds = getattr(kind, "__args__", (kind,))
    if kind == tuple[str, ...]:
        return _texts(value)
    if Path in kinds and isinstance(value, str | Path) and str(value):
        return Path(value)
    if bool in kinds and isinstance(value, bool):
        return value
    if int in kinds and isinstance(value, int) and not isinstance(value, bool):
        return value
    if float in kinds and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if str in kinds and isinstance(value, str):
        return value
    words = {bool: "true or false", int: "a whole number", float: "a number"}
    wanted = next((words[each] for each in kinds if each in words), "a text")
    raise ValueError(f"must be {wanted}, got {shown(value)}")


def _texts(value: Any) -> tuple[str, ...]:
    given = [value] if isinstance(value, str | int) else value
    if not isinstance(given, list | tuple) or not all(
        isinstance(each, str | int) and not isinstance(each, bool) for each in given
    ):
        raise ValueError(f"must be a text or a list of texts, got {shown(value)}")
    parts = [part.strip() for each in given for part in str(each).split(",")]
    if not all(parts):
        raise ValueError(f"has an empty part: {shown(value)}")
    return tuple(parts)


def _checked(value: Any, option: Option) -> Any:
    if option.choices and value is not None and value not in option.choices:
        hint = did_you_mean(str(value), option.choices)
        raise ValueError(f"there is no {shown(value)}; there are {', '.join(option.choices)}{hint}")
    if option.least is not None and value is not None and value < option.least:
        raise ValueError(f"must be at least {option.least:g}, got {value}")
    return value
