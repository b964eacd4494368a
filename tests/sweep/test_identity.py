"""A checkpoint knows the sweep that it is of by all that its numbers depend on."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from nnsight import NNsight
from torch import Tensor, nn

from nnpatch_core import (
    Component,
    DecoderAPI,
    Heads,
    MetricContext,
    MultiSite,
    Outcome,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    decoder_components,
    edge_patching,
    fused_projections,
)
from nnpatch_core.errors import CheckpointError, CheckpointWarning, EngineWarning
from nnpatch_core.sweep.fingerprint import fingerprint
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer
from tests.helpers import fingerprinted
from tests.helpers.fingerprinted import (
    METRICS,
    Probe,
    Scaled,
    Slotted,
    by_global,
    by_helper,
    by_set,
    by_tensor,
    closing_over,
    plain,
    with_default,
    wrapped,
)
from tests.helpers.paths import ROOT
from tests.helpers.samples import TWO

#: Padding is a part of what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

SOURCE, TARGET, ANSWERS = TWO
COMPONENTS = decoder_components()


def sweep(
    path: Path | None,
    api: DecoderAPI | None = None,
    sites: Any = None,
    model: Any = None,
    **options: Any,
) -> Outcome:
    return activation_patching(
        model or tiny_model("llama"),
        api or tiny_api(),
        sites or Sites("mlp", seq_pos_type="each"),
        SOURCE,
        TARGET,
        *ANSWERS,
        checkpoint=path,
        progress=False,
        **options,
    )


def numbers(out: Outcome) -> torch.Tensor:
    return torch.cat([out.raw[metric][name].flatten() for metric in out.metrics for name in out])


def of_other_code() -> Callable[[Tensor, Any], Tensor]:
    def plain(logits: Tensor, context: Any) -> Tensor:
        return logits.gather(1, context.source_answer_index[:, None])[:, 0] * 1

    return plain


class Rescaled(Scaled):
    factor = 2.0


class Rewritten(Scaled):
    def part(self, logits: Tensor) -> Tensor:
        return logits[:, 1]


def made(line: str) -> Any:
    """An object of a class that was made by `exec`, as in a notebook's magic."""
    space: dict[str, Any] = {}
    exec(f"class Made:\n    def __call__(self, logits):\n        {line}\n", space)
    return space["Made"]()


class Private(nn.Module):
    """A module of one's own, which keeps what it computes by as it likes."""

    def __init__(self, by: Any) -> None:
        super().__init__()
        self._by = by

    def forward(self, logits: Tensor) -> Tensor:
        return logits[:, 0] * self._by


def hooked(by: float) -> Private:
    module = Private(1.0)
    module.register_forward_hook(lambda *given: given[-1] * by)
    return module


class Kind(Enum):
    """One whose value is looked up."""

    ONE = 1.0


class Other(Enum):
    ONE = 2.0


Other.__qualname__ = Kind.__qualname__


#: Pairs that must not be taken for each other.
PAIRS = {
    "private attribute of a module": (Private(1.0), Private(2.0)),
    "private tensor of a module": (Private(torch.ones(2)), Private(torch.zeros(2))),
    "hook of a module": (hooked(1.0), hooked(2.0)),
    "value of a member": (closing_over(Kind.ONE), closing_over(Other.ONE)),
    "code": (plain, of_other_code()),
    "closure": (closing_over(2.0), closing_over(2.0000001)),
    "closed-over tensor": (closing_over(torch.ones(2)), closing_over(torch.tensor([1.0, 1.5]))),
    "closed-over function": (closing_over(plain), closing_over(of_other_code())),
    "sign of zero": (closing_over(0.0), closing_over(-0.0)),
    "type of a number": (closing_over(1), closing_over(1.0)),
    "default": (with_default, functools.partial(with_default)),
    "argument": (
        functools.partial(with_default, column=0),
        functools.partial(with_default, column=1),
    ),
    "attribute": (Scaled(2.0), Scaled(3.0)),
    "attribute in a list": (Scaled(2.0, ["a"]), Scaled(2.0, ["b"])),
    "attribute of the class": (Scaled(2.0), Rescaled(2.0)),
    "code of a method": (Scaled(2.0), Rewritten(2.0)),
    "slot": (Slotted(torch.ones(2)), Slotted(torch.zeros(2))),
    "array": (Slotted(np.ones(2)), Slotted(np.ones(2, dtype=np.float32))),
    "attribute of a module": (Probe(1.0), Probe(2.0)),
    "self of a method": (Scaled(2.0).part, Scaled(3.0).part),
    # One of its own, as `wraps` changes what it is given.
    "wrapper that calls itself another": (wrapped, functools.wraps(plain)(closing_over(1.0))),
    "class of no module": (made("return 1"), made("return 2")),
    "set": (closing_over({"a", "b"}), closing_over({"a", "c"})),
    "mapping": (closing_over({"a": [1]}), closing_over({"a": [2]})),
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_differs_has_another_word(name: str) -> None:
    one, another = map(fingerprint, PAIRS[name])
    assert one.digest != another.digest
    assert one.untold == another.untold == ()


@pytest.mark.parametrize("name", METRICS)
def test_what_is_the_same_has_the_same_word_after_use(name: str) -> None:
    metric = METRICS[name]
    before = fingerprint(metric)
    if name not in ("class", "recursive"):
        takes_context = name in ("plain", "declared", "wrapped")
        for _ in range(20):  # bytecode is rewritten as it runs
            logits = torch.rand(2, 20)
            context = type("Context", (), {"source_answer_index": ANSWERS[0]})
            metric(logits, context) if takes_context else metric(logits)
    assert fingerprint(metric) == before
    assert before.untold == ()


@pytest.mark.parametrize(
    ("metric", "name", "value"),
    [
        (by_global, "SCALE", 4.0),
        (by_helper, "SCALE", 4.0),
        (by_helper, "helper", plain),
        (by_tensor, "WEIGHTS", torch.tensor([1.0, 3.0])),
        (by_set, "NAMES", {"alpha"}),
    ],
)
def test_the_globals_that_it_reads_count(
    monkeypatch: pytest.MonkeyPatch,
    metric: Callable[..., Any],
    name: str,
    value: float | Callable[..., Any],
) -> None:
    before, unrelated = fingerprint(metric), fingerprint(plain)
    monkeypatch.setattr(fingerprinted, name, value)
    assert fingerprint(metric) != before
    assert fingerprint(plain) == unrelated


def test_of_a_module_what_it_takes_of_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_helpers.py").write_text(
        "factor = 2.0\nunused = 1\ndef double(x):\n    return x * factor\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import my_helpers  # type: ignore[import-not-found]

    space = {"my_helpers": my_helpers}
    exec("def metric(logits):\n    return my_helpers.double(logits[:, 0])\n", space)
    before = fingerprint(space["metric"])
    my_helpers.unused = 2
    assert fingerprint(space["metric"]) == before
    my_helpers.factor = 3.0
    assert fingerprint(space["metric"]) != before


def test_where_the_code_stands_does_not_count() -> None:
    spaces: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    code = "def metric(logits):\n    return logits[:, 0] * 2\n"
    for space, lines in zip(spaces, ("", "\n\n\n"), strict=True):
        exec(compile(lines + code, f"file{len(lines)}", "exec"), space)
    one, another = (fingerprint(space["metric"]) for space in spaces)
    assert one == another


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from nnpatch_core.sweep.fingerprint import fingerprint
from tests.helpers.fingerprinted import METRICS
for name, metric in METRICS.items():
    print(name, fingerprint(metric).digest)
"""


def test_another_process_finds_the_same_words() -> None:
    found = {}
    seed = "7" if os.environ.get("PYTHONHASHSEED") != "7" else "8"
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT)],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    for line in told.stdout.splitlines():
        name, digest = line.split()
        found[name] = digest
    assert found == {name: fingerprint(metric).digest for name, metric in METRICS.items()}


def test_of_a_model_its_weights_and_settings_count() -> None:
    model = tiny_model("llama")
    traced = NNsight(model)
    for metric in (closing_over(model), closing_over(traced)):
        before = fingerprint(metric)
        assert before.untold == ()
        sweep(None, model=traced)
        assert fingerprint(metric) == before
        with torch.no_grad():
            model.lm_head.weight[3, 3] += 1
        assert fingerprint(metric) != before
    before = fingerprint(closing_over(model))
    model.config.rms_norm_eps = 1e-2
    assert fingerprint(closing_over(model)) != before


@pytest.mark.parametrize("line", ["from limits import LIMIT", "from . import LIMIT"])
def test_what_code_imports_as_it_runs_counts(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("limits")
    monkeypatch.setitem(sys.modules, "limits", module)
    space: dict[str, Any] = {"__package__": "limits"}
    exec(f"def metric(logits):\n    {line}\n    return logits[:, 0] * LIMIT\n", space)
    found = []
    for limit in (1.0, 2.0, 1.0):
        monkeypatch.setattr(module, "LIMIT", limit, raising=False)
        found.append(fingerprint(space["metric"]))
    assert found[0] == found[2] != found[1]
    assert found[0].untold == ()


def test_a_module_that_is_looked_up_later_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("limits")
    monkeypatch.setitem(sys.modules, "limits", module)
    space: dict[str, Any] = {}
    exec("def metric(logits):\n    import limits\n    return logits * limits.LIMIT\n", space)
    for metric in (space["metric"], closing_over(module)):
        assert fingerprint(metric).untold == ("the module limits",)
    # A library's is known by its release.
    assert fingerprint(closing_over(torch.nn)).untold == ()
    assert fingerprint(closing_over(os.path)).untold == ()


@pytest.mark.parametrize("base", ["object", "torch.nn.Module"])
def test_metrics_of_a_notebook_are_known(base: str) -> None:
    """There `__main__` has no file."""
    code = f"""
import torch
class M({base}):
    def __call__(self, logits): return logits[:, 0]
from nnpatch_core.sweep.fingerprint import fingerprint
print(fingerprint(M()).untold)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("()\n", 0), done.stderr


def test_what_cannot_be_told_is_said() -> None:
    tokenizer = tiny_tokenizer(["a b"])
    found = fingerprint(lambda logits: logits[:, len(tokenizer)])
    assert found.untold != ()
    assert all("okenizer" in name for name in found.untold)
    loop: list[Any] = []
    loop.append(loop)
    assert fingerprint(loop).untold == ()
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert "nested too deeply" in fingerprint(deep).untold[0]
    assert "more than" in fingerprint([[each] for each in range(100_000)]).untold[0]


# Checkpoints ------------------------------------------------------------------------------------


class Switch:
    """0 more in unpatched runs: their numbers do not tell what it does in patched ones."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, logits: Tensor, context: MetricContext) -> torch.Tensor:
        value = plain(logits, context)
        known = (value == plain(context.source_logits, context)) | (
            value == plain(context.target_logits, context)
        )
        return torch.where(known, value, value + self.by)


def test_a_metric_of_the_same_name_and_baseline_is_told_apart(tmp_path: Path) -> None:
    options = {"metric": {"mine": Switch(1.0)}, "engine": "full"}
    first = sweep(tmp_path / "c", **options)
    assert numbers(sweep(tmp_path / "c", **options)).equal(numbers(first))
    with pytest.raises(CheckpointError, match=r"another sweep .*metric: mine .* then, mine .* now"):
        sweep(tmp_path / "c", metric={"mine": Switch(2.0)}, engine="full")


def test_what_a_metric_depends_on_and_cannot_be_compared_is_said_on_resuming(
    tmp_path: Path,
) -> None:
    tokenizer = tiny_tokenizer(["a b"])

    def metric(logits: Tensor) -> Tensor:
        return logits[:, 0] * len(tokenizer)

    first = sweep(tmp_path / "c", metric=metric)
    with pytest.warns(CheckpointWarning, match=r"not to be compared .*okenizer"):
        assert numbers(sweep(tmp_path / "c", metric=metric)).equal(numbers(first))


def adapter(**changed: Any) -> DecoderAPI:
    options = {"components": COMPONENTS, **changed}
    return DecoderAPI("Mended", ("llama",), **options)


def halves(width: int, heads: Heads) -> torch.Tensor:
    return torch.arange(width).view(heads.query, -1)


def backwards(width: Any, heads: Any) -> Any:
    return halves(width, heads).flip(0)


def with_row(name: str, **changed: Any) -> dict[str, Component]:
    return {**COMPONENTS, name: attrs.evolve(COMPONENTS[name], **changed)}


#: The whole sweep is of `mlp`: rows of others count too, for they tell that the table was mended.
MENDED = {
    "path": {"components": with_row("mlp", module="mlp.down_proj")},
    "side": {"components": with_row("mlp", side="input")},
    "another row": {"components": with_row("attn", module="self_attn.o_proj")},
    "columns": {"components": with_row("o", columns=backwards)},
    "heads": {"query_heads": 2},
    "fewer rows": {"components": {"mlp": COMPONENTS["mlp"], "resid": COMPONENTS["resid"]}},
    "kinds": {"kinds": {"mlp.gate_proj": with_row("attn", module="self_attn.o_proj")}},
    "residual": {"residual": "scaled"},
    "padding": {"padding": False},
    "cone": {"cone": False},
}


@pytest.mark.parametrize("what", MENDED)
def test_a_mended_table_of_the_same_name_is_told_apart(tmp_path: Path, what: str) -> None:
    options = {"engine": "full"}
    first = sweep(tmp_path / "c", adapter(), **options)
    assert numbers(sweep(tmp_path / "c", adapter(), **options)).equal(numbers(first))
    with pytest.raises(CheckpointError, match=r"adapter: Mended .* then, Mended .* now"):
        sweep(tmp_path / "c", adapter(**MENDED[what]), **options)


def test_columns_that_are_the_same_numbers_are_the_same(tmp_path: Path) -> None:
    """Another spelling of the same table is no other sweep."""
    one = adapter(components=with_row("o", columns=halves))
    another = adapter(components=with_row("o", columns=lambda *given: halves(*given) + 0))
    sweep(tmp_path / "c", one)
    sweep(tmp_path / "c", another)


@pytest.mark.filterwarnings("ignore:this sweep runs:nnpatch_core.errors.EngineWarning")
def test_which_adapter_is_at_which_site_counts(tmp_path: Path) -> None:
    one, another = adapter(), adapter(components=with_row("mlp", module="mlp.down_proj"))

    def sites(first: Any, second: Any) -> Any:
        return Sites.from_sites(
            [
                MultiSite([Site.get_site(first, "mlp", 1)], name="x"),
                MultiSite([Site.get_site(second, "mlp", 2)], name="x"),
            ]
        )

    sweep(tmp_path / "c", sites=sites(one, another))
    with pytest.raises(CheckpointError, match=r"sites: .* then, .* now"):
        sweep(tmp_path / "c", sites=sites(another, one))


@pytest.mark.parametrize(
    "position", [{"seq_pos_type": "last"}, {"seq_pos_type": "lastk", "seq_pos": 2}, {}]
)
def test_positions_count(tmp_path: Path, position: dict[Any, Any]) -> None:
    sweep(tmp_path / "c")
    with pytest.raises(CheckpointError, match="sites: "):
        sweep(tmp_path / "c", sites=Sites("mlp", **position))


def test_a_plugins_strategy_counts_by_the_positions_that_it_gives(tmp_path: Path) -> None:
    @attrs.frozen
    class Chosen:
        position: int
        one_by_one = False

        def expand(self, seq_len: int) -> list[tuple[int]]:
            return [(self.position,)]

    sweep(tmp_path / "c", sites=Sites("mlp", seq_pos_type=Chosen(1)))
    with pytest.raises(CheckpointError, match="sites: "):
        sweep(tmp_path / "c", sites=Sites("mlp", seq_pos_type=Chosen(2)))
    sweep(tmp_path / "c", sites=Sites("mlp", seq_pos_type="custom_constant", seq_pos=[1]))


def one_by_one(layers: list[int]) -> Any:
    """Each cell of `Sites("mlp", layers, "each")` as a site of the user's own."""
    return Sites.from_sites(
        [
            Site.get_site(tiny_api(), "mlp", layer, seq_pos=[at])
            for layer in layers
            for at in range(4)
        ]
    )


def test_a_grid_is_the_list_of_its_sites(tmp_path: Path) -> None:
    first = sweep(tmp_path / "c", sites=Sites("mlp", [0, 2], "each"))
    assert numbers(sweep(tmp_path / "c", sites=one_by_one([0, 2]))).equal(numbers(first))
    for other in ([2, 0], [0, 1], [0]):
        with pytest.raises(CheckpointError, match="sites: "):
            sweep(tmp_path / "c", sites=one_by_one(other))


#: Sweeps that must not be taken for one another, though each has as many cells.
OF_HEADS = {
    "query heads": lambda: Sites("o", [1], "last", heads=[0, 1]),
    "other heads": lambda: Sites("o", [1], "last", heads=[0, 2]),
    "other layer": lambda: Sites("o", [2], "last", heads=[0, 1]),
    "other component": lambda: Sites("q", [1], "last", heads=[0, 1]),
    "other position": lambda: Sites("o", [1], "custom", [2], heads=[0, 1]),
    "together": lambda: Sites.from_sites(
        [
            MultiSite([Site.get_site(tiny_api(), "o", 1, head, seq_pos=[-1]) for head in (0, 1)]),
            Site.get_site(tiny_api(), "o", 1, 1, seq_pos=[-1]),
        ]
    ),
    "each prompt's own": lambda: Sites("o", [1], "custom", [[3], [2]], heads=[0, 1]),
    "from elsewhere": lambda: Sites("o", [1], "custom", [3], heads=[0, 1], source_seq_pos=[2]),
}


@pytest.mark.parametrize("kind", OF_HEADS)
def test_cells_are_told_apart_by_all_that_they_are(tmp_path: Path, kind: str) -> None:
    sweep(tmp_path / "c", sites=OF_HEADS[kind]())
    for other, sites in OF_HEADS.items():
        if other == kind:
            sweep(tmp_path / "c", sites=sites())
            continue
        with pytest.raises(CheckpointError, match=r"sites: .* then|positions: .* then"):
            sweep(tmp_path / "c", sites=sites())


def test_edges_are_told_apart_by_their_senders(tmp_path: Path) -> None:
    def edges(path: Path, sender: str, method: str) -> None:
        edge_patching(
            tiny_model("llama"), tiny_api(), SOURCE, TARGET, *ANSWERS, senders=[sender],
            receivers=["m1"], method=method, checkpoint=path, progress=False,
        )  # fmt: skip

    for method in ("exact", "eap"):
        edges(tmp_path / method, "m0", method)
        edges(tmp_path / method, "m0", method)
        with pytest.raises(CheckpointError, match=r"sites: .* then, .* now"):
            edges(tmp_path / method, "a0.h1", method)


def test_what_does_not_change_numbers_does_not_count(tmp_path: Path) -> None:
    model = tiny_model("llama")
    first = sweep(tmp_path / "c", model=model)
    model.train()
    model.config._name_or_path = "elsewhere"
    again = sweep(tmp_path / "c", model=model, tokenizer=tiny_tokenizer(["a b"]))
    assert numbers(again).equal(numbers(first))
    with torch.no_grad():
        sweep(tmp_path / "c", model=model)


def eager() -> Any:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    return model


def of_another_config() -> Any:
    model = tiny_model("llama")
    model.config.rms_norm_eps = 1e-3
    return model


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (lambda: tiny_model("llama").to(torch.bfloat16), "model"),
        (eager, "attention"),
        (of_another_config, r"config\.rms_norm_eps"),
    ],
)
def test_what_changes_numbers_counts(tmp_path: Path, model: Any, what: str) -> None:
    sweep(tmp_path / "c", memory_budget=10_000_000)
    with pytest.raises(CheckpointError, match=f"{what}: .* then, .* now"):
        sweep(tmp_path / "c", model=model(), memory_budget=10_000_000)


# Ablations --------------------------------------------------------------------------------------


def ablate(path: Path, **options: Any) -> Outcome:
    return ablation_patching(
        tiny_model("llama"), tiny_api(), Sites("mlp", seq_pos_type="each"), TARGET, *ANSWERS,
        checkpoint=path, progress=False, **options,
    )  # fmt: skip


#: The mean at the last position is the same; that of an earlier one is not.
EARLY = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
EARLIER = torch.tensor([[9, 6, 7, 8], [5, 6, 7, 8]])


def test_each_position_of_a_mean_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnpatch_core.interventions import values

    real = values.mean_activations

    def moved(*arguments: Any) -> Any:
        means, known = real(*arguments)
        changed = {at: value.clone() for at, value in means.items()}
        for value in changed.values():
            value[0, 1] += 1
        return changed, known

    ablate(tmp_path / "c", method="mean", reference=EARLY, per_position=True)
    monkeypatch.setattr(values, "mean_activations", moved)
    with pytest.raises(CheckpointError, match=r"mean: .* then, .* now"):
        ablate(tmp_path / "c", method="mean", reference=EARLY, per_position=True)


def test_the_reference_and_how_it_is_averaged_count(tmp_path: Path) -> None:
    ablate(tmp_path / "c", method="mean", reference=EARLY)
    with pytest.raises(CheckpointError, match="mean: "):
        ablate(tmp_path / "c", method="mean", reference=EARLIER)
    with pytest.raises(CheckpointError, match="mean: "):
        ablate(tmp_path / "c", method="mean", reference=EARLY, per_position=True)


def test_where_a_donor_has_padding_counts(tmp_path: Path) -> None:
    """Left of what is put there, so that only what it makes of the rest tells."""
    wide = torch.tensor([[7, 7, 5, 6, 7, 8], [7, 7, 5, 6, 7, 4]])
    ones = torch.ones_like(wide)
    padded = ones.clone()
    padded[:, 0] = 0
    ablate(tmp_path / "c", method="resample", reference=(wide, ones))
    with pytest.raises(CheckpointError, match="reference: "):
        ablate(tmp_path / "c", method="resample", reference=(wide, padded))


def test_what_a_screen_chose_counts(tmp_path: Path) -> None:
    options = {"screen": "attribution", "top_k": 2}
    sweep(tmp_path / "c", spot_checks=2, seed=0, **options)
    with pytest.raises(CheckpointError, match="sites: "):
        sweep(tmp_path / "c", spot_checks=2, seed=3, **options)
    with pytest.raises(CheckpointError, match="sites: "):
        sweep(tmp_path / "c", spot_checks=1, seed=0, **options)


def test_fused_columns_count() -> None:
    """A module that does not tell its width: the code of the columns stands for them."""
    one = fused_projections("qkv", "o", lambda part: functools.partial(halves))["q"]
    another = fused_projections("qkv", "o", lambda part: functools.partial(backwards))["q"]
    assert fingerprint(one.columns) != fingerprint(another.columns)


def halving(_: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tuple(None if each is None else each * 0.5 for each in inputs)


@pytest.mark.parametrize("kind", ["sites", "edges"])
def test_hooks_that_change_gradients_count_where_there_are_gradients(
    tmp_path: Path, kind: str
) -> None:
    def estimated(hooked: bool) -> None:
        model = tiny_model("llama")
        if hooked:
            model.model.layers[1].mlp.register_full_backward_hook(halving)
        given = (SOURCE, TARGET, *ANSWERS)
        options: dict[str, Any] = {"checkpoint": tmp_path / "c", "progress": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EngineWarning)
            if kind == "edges":
                edge_patching(model, tiny_api(), *given, method="eap", **options)
            else:
                attribution_patching(model, tiny_api(), Sites("mlp"), *given, **options)

    estimated(False)
    with pytest.raises(CheckpointError, match=r"another sweep .*hooks: none then"):
        estimated(True)
    # A sweep that is measured has no gradients.
    sweep(tmp_path / "d")
    model = tiny_model("llama")
    model.model.layers[1].mlp.register_full_backward_hook(halving)
    assert "resumed" in sweep(tmp_path / "d", model=model).info
