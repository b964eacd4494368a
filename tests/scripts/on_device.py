"""Every kind of sweep on a device, held against the same on the CPU, and against plain hooks.

    python tests/scripts/on_device.py --device cuda

Random models of a few families, left padding, float32 and bfloat16. Printed are the largest gaps
between raw values; one above its tolerance, and whatever fails, ends the script with status 1.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nnpatch_core import (
    Circuit,
    Outcome,
    PromptPairs,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    cache_average,
    edge_patching,
    evaluate_circuit,
    path_patching,
    plan_sweep,
    steer,
)
from nnpatch_core.errors import AdapterWarning, PromptWarning, StatisticsWarning
from nnpatch_core.plugins import find_adapter
from nnpatch_core.subspace import Subspace, collect, sweep_steering, train_subspace
from nnpatch_core.testing import tiny_model, tiny_tokenizer

FAMILIES = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi3")
#: As shares of the largest number: the order of sums differs from device to device.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 6e-2}
#: What matrix products in TF32 leave of float32.
TF32 = 2e-2
NAMES = ("resid", "attn", "mlp", "q", "k", "v", "o")
SITES = Sites(NAMES, seq_pos_type="each")
SOURCE = torch.tensor(
    [[5, 6, 7, 8, 9, 4, 3, 11, 12], [0, 0, 13, 14, 15, 4, 3, 16, 9], [0, 7, 8, 9, 20, 21, 22, 5, 6]]
)
TARGET = SOURCE.clone()
TARGET[:, 4] = torch.tensor([30, 31, 32])
MASK = torch.ones_like(SOURCE)
MASK[1, :2] = MASK[2, :1] = 0
ANSWERS = torch.tensor([40, 41, 42]), torch.tensor([50, 51, 52])
#: Of padding, of adapters that are inferred, and of few prompts.
EXPECTED = (PromptWarning, AdapterWarning, StatisticsWarning)
#: Where a layer of Llama has a component, and whether it is the module's input.
PLACES = {"resid": ("", False), "q": ("self_attn.q_proj", False), "o": ("self_attn.o_proj", True)}


class Report:
    """What was compared, and what went wrong."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def gap(self, name: str, one: Outcome, other: Outcome, allowed: float) -> None:
        """Compare two outcomes' raw values."""
        worst, scale = 0.0, 0.0
        for each in other:
            ours, theirs = (self._raw(out, each) for out in (one, other))
            # Layers that were not swept are nan in both.
            swept = ~theirs.isnan()
            worst = max(worst, float((ours - theirs)[swept].abs().max()))
            scale = max(scale, float(theirs[swept].abs().max()))
        self.number(name, worst, scale, allowed)

    def number(self, name: str, worst: float, scale: float, allowed: float) -> None:
        """Note a gap, beside the largest number that was compared."""
        # Of divergences near 0, the logits' rounding counts.
        fine = worst <= allowed * max(scale, 0.1)
        self.say(f"{'ok   ' if fine else 'WRONG'} {name}: {worst:.2e} of {scale:.3g}")
        if not fine:
            self.wrong.append(name)

    def engine(self, out: Outcome) -> None:
        """Only the cone is of interest: a fallback would be compared with itself."""
        if out.info["engine"] != "cone":
            self.say(f"WRONG engine {out.info['engine']}: {out.info.get('fallback')}")
            self.wrong.append("engine")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Whatever fails in it is told, and what was warned of."""
        begun = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for expected in EXPECTED:
                warnings.simplefilter("ignore", expected)
            try:
                yield
            except Exception:
                told = traceback.format_exc().splitlines()
                self.say(f"WRONG {name}: " + "\n      ".join(told[-12:]))
                self.wrong.append(name)
        for text in dict.fromkeys(f"{each.category.__name__}: {each.message}" for each in caught):
            self.say(f"      warned: {text[:300]}")
        self.say(f"      {name}: {time.perf_counter() - begun:.2f} s")

    @staticmethod
    def say(text: str) -> None:
        """A line at once."""
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    @staticmethod
    def _raw(out: Outcome, name: str) -> Tensor:
        return out.patched(name) if out.scale == "restored" else out[name]


def wide(family: str | Any, dtype: torch.dtype = torch.float32) -> Any:
    """A random model whose activations are large enough for patches to be seen."""
    model = tiny_model(family) if isinstance(family, str) else family
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                width = 1.0 if "embed" in name else weight.shape[-1] ** -0.5
                drawn = torch.randn(weight.shape, generator=generator)
                weight.copy_(1.5 * width * drawn)
    return model.to(dtype).eval()


def activation(model: Any, sites: Any = SITES, mask: Tensor = MASK, **options: Any) -> Outcome:
    """The sweep of all kinds of sites."""
    given = {"progress": False, "attention_mask": mask, **options}
    return activation_patching(model, None, sites, SOURCE, TARGET, *ANSWERS, **given)


def ablation(model: Any, **options: Any) -> Outcome:
    """The same, of one run."""
    given = {"progress": False, "attention_mask": MASK, **options}
    return ablation_patching(model, None, SITES, TARGET, *ANSWERS, **given)


def attribution(model: Any, **options: Any) -> Outcome:
    """Its estimate."""
    given = {"progress": False, "attention_mask": MASK, **options}
    if "ablation" in given:
        return attribution_patching(model, None, SITES, None, TARGET, *ANSWERS, **given)
    return attribution_patching(model, None, SITES, SOURCE, TARGET, *ANSWERS, **given)


KINDS: Mapping[str, Callable[[Any], Outcome]] = {
    "activation, cone": lambda model: activation(model, engine="cone"),
    "activation, full": lambda model: activation(model, engine="full"),
    "activation, a prompt at a time": lambda model: activation(model, batch_size=1),
    "activation, all of the vocabulary": lambda model: activation(model, metric="kl_divergence"),
    "activation, screened": lambda model: activation(model, screen="attribution", top_k=20),
    "activation, no padding": lambda model: activation(model, mask=torch.ones_like(MASK)),
    "zero, cone": lambda model: ablation(model, method="zero", engine="cone"),
    "zero, full": lambda model: ablation(model, method="zero", engine="full"),
    "mean, cone": lambda model: ablation(model, method="mean", engine="cone"),
    "mean, full": lambda model: ablation(model, method="mean", engine="full"),
    "resample": lambda model: ablation(model, method="resample", seed=0),
    "attribution": attribution,
    "attribution, zero": lambda model: attribution(model, ablation="zero"),
    "attribution, steps": lambda model: attribution(model, steps=3),
    "attribution, QK fix and GradDrop": lambda model: attribution(
        model, qk_fix=True, grad_drop=True
    ),
}


def families(report: Report, device: torch.device, names: Sequence[str]) -> None:
    """Each kind of sweep, in float32, on the device and on the CPU."""
    for family in names:
        kinds = KINDS if family == "llama" else dict(list(KINDS.items())[:1])
        host = wide(family)
        moved = copy.deepcopy(host).to(device)
        for name, run in kinds.items():
            with report.part(f"{family}: {name}"):
                out = run(moved)
                report.gap(f"{family}: {name}, {out.info.get('engine')}", out, run(host), 2e-5)


def rounded(report: Report, device: torch.device) -> None:
    """Both engines in bfloat16, beside float32."""
    exact = activation(wide("llama"), engine="full")
    for implementation in ("sdpa", "eager"):
        model = wide("llama", torch.bfloat16).to(device)
        model.set_attn_implementation(implementation)
        with report.part(f"bfloat16, {implementation}"):
            cone = activation(model)
            report.engine(cone)
            full = activation(model, engine="full")
            allowed = ROUNDING[torch.bfloat16]
            report.gap(f"bfloat16, {implementation}: cone and full", cone, full, allowed)
            report.gap(f"bfloat16, {implementation}: full and float32", full, exact, 2 * allowed)
        with report.part(f"bfloat16, {implementation}: attribution"):
            report.gap("bfloat16: attribution", attribution(model), attribution(wide("llama")), 0.2)


def ambient(report: Report, device: torch.device) -> None:
    """Where torch makes its tensors, where prompts lie, and where recorded runs do."""
    model = wide("llama")
    exact = {"cone": activation(model), "zero": ablation(model), "estimate": attribution(model)}
    runs: Mapping[str, Callable[..., Outcome]] = {
        "cone": activation,
        "zero": ablation,
        "estimate": attribution,
    }
    moved = copy.deepcopy(model).to(device)
    for name, run in runs.items():
        with report.part(f"default device {device}: {name}"):
            torch.set_default_device(device)
            try:
                out = run(moved)
                out.interval(NAMES[0])
            finally:
                torch.set_default_device(None)
            report.gap(f"default device {device}: {name}", out, exact[name], 2e-5)
    with report.part("prompts on the device"):
        there = (each.to(device) for each in (SOURCE, TARGET, *ANSWERS))
        mask = MASK.to(device)
        out = activation_patching(moved, None, SITES, *there, attention_mask=mask, progress=False)
        report.gap("prompts on the device", out, exact["cone"], 2e-5)
    for budget in ("200 KiB", "400 KiB", "2 MiB"):
        with report.part(f"memory_budget {budget}"):
            out = activation(moved, memory_budget=budget)
            report.gap(f"memory_budget {budget}, {out.info['engine']}", out, exact["cone"], 2e-5)
    with report.part("checkpoint and plan"), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sweep"
        activation(moved, checkpoint=path)
        report.gap("checkpoint", activation(moved, checkpoint=path), exact["cone"], 2e-5)
        exact["cone"].save(Path(folder) / "outcome")
        plan_sweep(moved, None, SITES, SOURCE, TARGET, attention_mask=MASK)
    with report.part("means of other prompts"):
        out, theirs = (
            ablation(each, method="mean", reference=(SOURCE, MASK)) for each in (moved, model)
        )
        report.gap("means of other prompts", out, theirs, 2e-5)
    with report.part("sites in traces of one's own"):
        own_traces(report, model, moved)
    with report.part("autocast"), torch.autocast(device.type, torch.bfloat16):
        out = activation(moved)
        report.engine(out)
        full = activation(moved, engine="full")
    report.gap("autocast: cone and full", out, full, 6e-2)


def own_traces(report: Report, host: Any, moved: Any) -> None:
    """A head patched by hand, on both, and the mean over prompts."""
    from nnsight import NNsight

    found = []
    for model in (host, moved):
        traced = NNsight(model)
        site = Site.get_site(find_adapter(None, model), "o", 1, 2, [-1])
        device = next(model.parameters()).device
        with torch.no_grad():
            with traced.trace(input_ids=SOURCE[:1].to(device)):
                site.cache(traced)
            with traced.trace(input_ids=TARGET[:1].to(device)):
                site.patch(traced)
                logits = traced.output.logits[:, -1].save()
            found.append([logits.float().cpu()])
            cache_average(traced, [site], SOURCE[:2])
            with traced.trace(input_ids=TARGET[:1].to(device)):
                site.patch(traced)
                logits = traced.output.logits[:, -1].save()
            found[-1].append(logits.float().cpu())
    for one, other, name in zip(*found, ("of a run", "of a mean"), strict=True):
        gap = float((one - other).abs().max())
        report.number(f"a trace of one's own, {name}", gap, float(one.abs().max()), 2e-5)


def precisions(report: Report, device: torch.device) -> None:
    """A wider Llama in float32, with TF32 and without, and in bfloat16, against plain hooks."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=1000,
    )
    for title, dtype, precision in (
        ("float32, TF32 off", torch.float32, "highest"),
        ("float32, TF32 on", torch.float32, "high"),
        ("bfloat16", torch.bfloat16, "highest"),
    ):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            model = wide(LlamaForCausalLM(config), dtype).to(device)
            sites = Sites(("resid", "q", "o"), layers=[1, 15, 28], seq_pos_type="lastk", seq_pos=3)
            with report.part(title):
                cone = activation(model, sites)
                report.engine(cone)
                full = activation(model, sites, engine="full")
                allowed = TF32 if precision == "high" else ROUNDING[dtype]
                report.gap(f"{title}: cone and full", cone, full, allowed)
                worst, scale = by_hooks(copy.deepcopy(model), full)
                report.number(f"{title}: full and plain hooks", worst, scale, allowed)
        finally:
            torch.set_float32_matmul_precision(before)


@torch.no_grad()
def by_hooks(model: Any, out: Outcome) -> tuple[float, float]:
    """The largest gap of a few cells from plain hooks, and the largest value."""
    worst, scale = 0.0, 0.0
    for name in out:
        for layer in (1, 15, 28):
            for position in (6, 8):
                head = None if name == "resid" else 0
                value = by_hook(model, name, layer, position, head)
                index = (layer, position, *(() if head is None else (head,)))
                worst = max(worst, float((out.patched(name)[index] - value).abs().max()))
                scale = max(scale, float(value.abs().max()))
    return worst, scale


def by_hook(model: Any, name: str, layer: int, position: int, head: int | None) -> Tensor:
    """The logit differences of one cell."""
    device = next(model.parameters()).device
    given = {
        "attention_mask": MASK.to(device),
        "position_ids": (MASK.cumsum(1) - 1).clamp(min=0).to(device),
        "use_cache": False,
    }
    width = slice(None) if head is None else slice(64 * head, 64 * head + 64)
    kept: list[Tensor] = []

    def visit(value: Tensor) -> Tensor:
        if not kept:
            kept.append(value.clone())
            return value
        edited = value.clone()
        edited[:, position, width] = kept[0][:, position, width]
        return edited

    def before(_: Any, inputs: Any) -> Any:
        return (visit(inputs[0]), *inputs[1:])

    def after(_: Any, __: Any, output: Any) -> Any:
        return visit(output)

    path, of_input = PLACES[name]
    module = model.model.layers[layer].get_submodule(path)
    hooked = module.register_forward_pre_hook if of_input else module.register_forward_hook
    hook = hooked(before if of_input else after)
    model(SOURCE.to(device), **given)
    logits = model(TARGET.to(device), **given).logits[:, -1].float().cpu()
    hook.remove()
    rows = torch.arange(len(logits))
    difference: Tensor = logits[rows, ANSWERS[0]] - logits[rows, ANSWERS[1]]
    return difference


def subspaces(report: Report, device: torch.device) -> None:
    """Patched, learned, collected and steered, on the device and on the CPU."""
    host = wide("llama")
    moved = copy.deepcopy(host).to(device)
    halves = {"resid": Subspace.random(32, 3), "o": Subspace.random(8, 2)}
    for name, space in halves.items():
        sites = Sites(name, seq_pos_type="each", subspace=space)
        for engine in ("cone", "full"):
            with report.part(f"subspace of {name}, {engine}"):
                out, theirs = (activation(each, sites, engine=engine) for each in (moved, host))
                report.gap(f"subspace of {name}, {engine}", out, theirs, 2e-5)
    words = [f" w{number}" for number in range(12)]
    others = words[1:] + words[:1]
    pairs = PromptPairs.from_texts(
        [f"a{word} b c" for word in words],
        [f"a{word} b c" for word in others],
        words,
        others,
        tiny_tokenizer([f"a{word} b c" for word in words]),
    )
    site = Site.get_site(find_adapter(None, host), "resid", 1, seq_pos=[1])
    for engine in ("cone", "full"):
        with report.part(f"learned, {engine}"):
            options = {"rank": 2, "epochs": 4, "batch_size": 4, "engine": engine, "kl": 0.1}
            one, other = (
                train_subspace(each, None, site, pairs, progress=False, **options)
                for each in (moved, host)
            )
            losses = [
                torch.tensor([epoch.held_out_loss for epoch in each.history])
                for each in (one, other)
            ]
            gap = float((losses[0] - losses[1]).abs().max())
            report.number(f"losses of learning, {engine}", gap, float(losses[1].max()), 1e-3)
            spans = [each.subspace.basis @ each.subspace.basis.T for each in (one, other)]
            gap = float((spans[0] - spans[1]).abs().max())
            report.number(f"what was learned, {engine}", gap, 1.0, 1e-2)
    last = Site.get_site(find_adapter(None, host), "resid", 1, seq_pos=[-1])
    knob = Subspace.random(32, 1, site=last)
    with report.part("collected and steered"):
        rows = [collect(each, knob, pairs, progress=False).values for each in (moved, host)]
        gap = float((rows[0] - rows[1]).abs().max())
        report.number("coordinates", gap, float(rows[1].abs().max()), 2e-5)
        curves = [
            sweep_steering(each, knob, [-9.0, 9.0], pairs, progress=False) for each in (moved, host)
        ]
        found = [each.source.probability for each in curves]
        report.number("a curve", float((found[0] - found[1]).abs().max()), 1.0, 2e-5)
    for dtype in (torch.float32, torch.bfloat16):
        with report.part(f"generated, {dtype}"):
            texts = []
            for model in (copy.deepcopy(moved).to(dtype), copy.deepcopy(host).to(dtype)):
                given = {
                    "input_ids": SOURCE.to(model.device),
                    "attention_mask": MASK.to(model.device),
                    "max_new_tokens": 6,
                    "do_sample": False,
                    "pad_token_id": 0,
                }
                plain = model.generate(**given)
                with steer(model, knob, torch.tensor([60.0, -60.0, 60.0])):
                    steered = model.generate(**given)
                if not torch.equal(model.generate(**given), plain):
                    raise AssertionError("steering is not off again")
                texts.append((plain.cpu(), steered.cpu()))
            (plain, steered), (_, expected) = texts
            if dtype == torch.float32 and not torch.equal(steered, expected):
                raise AssertionError(f"{steered} on the device, {expected} on the CPU")
            report.say(f"      steered text differs: {not torch.equal(plain, steered)}")


def edges(report: Report, device: torch.device) -> None:
    """Edges, measured and estimated; circuits of some of them; paths."""
    for family in ("llama", "gemma2", "gpt2", "gpt_neox"):
        # In float32, where rounding looks like no effect; and once.
        api = find_adapter(None, wide(family))
        for dtype, allowed in ROUNDING.items():
            own = wide(family, dtype)
            there = copy.deepcopy(own).to(device)
            with report.part(f"edges of {family} in {dtype}"):
                given = (SOURCE, TARGET, *ANSWERS)
                options: dict[str, Any] = {"attention_mask": MASK, "progress": False}
                found = {}
                for method in ("exact", "eap", "eap-ig-inputs"):
                    one, other = (
                        edge_patching(model, api, *given, method=method, **options)
                        for model in (there, own)
                    )
                    report.gap(f"{method} {family} {dtype}", one.outcome, other.outcome, allowed)
                    found[method] = one
                report.engine(found["exact"].outcome)
                circuits = [Circuit.from_edges(found["eap"], n=n) for n in (10, 40)]
                ours, theirs = (
                    evaluate_circuit(model, api, circuits, *given, **options).outcome
                    for model in (there, own)
                )
                report.gap(f"circuits {family} {dtype}", ours, theirs, allowed)
                senders, receivers = ["a0.h1", "m0", "input"], ["a1.h0<q>", "m1", "logits"]
                ours, theirs = (
                    path_patching(model, api, senders, receivers, *given, **options)
                    for model in (there, own)
                )
                report.gap(f"paths {family} {dtype}", ours, theirs, allowed)


PARTS: Mapping[str, Callable[[Report, torch.device], None]] = {
    "precisions": precisions,
    "rounded": rounded,
    "ambient": ambient,
    "subspaces": subspaces,
    "edges": edges,
}


def main() -> None:
    """Run all of it, or some."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=FAMILIES)
    arguments = parser.parse_args()
    report, device = Report(), torch.device(arguments.device)
    for category in EXPECTED:
        warnings.simplefilter("ignore", category)
    for part in arguments.parts:
        PARTS[part](report, device)
    families(report, device, arguments.families)
    report.say(f"{len(report.wrong)} wrong: {', '.join(report.wrong)}")
    raise SystemExit(bool(report.wrong))


if __name__ == "__main__":
    main()
