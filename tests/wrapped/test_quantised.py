"""Models with rounded weights: the numbers of what they compute, or a reason why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnpatch_core import (
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    edge_patching,
    plan_sweep,
)
from nnpatch_core.engine.cone.unembedding import find_unembedding
from nnpatch_core.errors import CheckpointError, GradientError
from nnpatch_core.sweep.checksum import checksum
from nnpatch_core.testing import tiny_model
from tests.helpers.oracle import Oracle, Place
from tests.helpers.samples import LONGER

COMPONENTS = ("resid", "q", "o", "mlp")
SITES = Sites(COMPONENTS, seq_pos_type="custom", seq_pos=[-1, -3])
SOURCE, TARGET, ANSWERS = LONGER
ROUNDING = 1e-5


class Rounded(Tensor):
    """A weight as some libraries keep it: a type of tensor that only a few functions know."""

    numbers: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> Rounded:
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers: Tensor, scale: Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scale"], None

    def plain(self) -> Tensor:
        return self.numbers * self.scale

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is nn.functional.linear:
            given, weight, *rest = args
            return nn.functional.linear(given, weight.plain(), *rest)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(f"{function} of a rounded weight")


def rounded(weight: Tensor) -> Rounded:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return Rounded((weight / scale).round().to(torch.int8), scale)


def linears(model: nn.Module, head: bool) -> list[tuple[str, nn.Linear]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (head or name != "lm_head")
    ]


def by_type_of_tensor(model: nn.Module, head: bool = True) -> nn.Module:
    """As torchao does it: the module stays, its weight is of another type."""
    for _, module in linears(model, head):
        module.weight = nn.Parameter(rounded(module.weight.detach()), requires_grad=False)
    return model


class Whole(nn.Module):
    """As bitsandbytes and HQQ do it: a module of its own, with whole numbers.

    Args:
        module: what it stands for.
        how: what its kernel does: `"plain"`, `"no graph"`, `"no graph, once run without one"`,
            `"another gradient"`.
    """

    def __init__(self, module: nn.Linear, how: str = "plain") -> None:
        super().__init__()
        found = rounded(module.weight.detach())
        self.weight = nn.Parameter(found.numbers, requires_grad=False)
        self.register_buffer("scale", found.scale)
        self.in_features, self.out_features = module.in_features, module.out_features
        self.how, self.kept = how, True

    def forward(self, given: Tensor) -> Tensor:
        if self.how == "no graph" or not self.kept:
            given = given.detach()
        if self.how == "no graph, once run without one" and not torch.is_grad_enabled():
            self.kept = False
        found = nn.functional.linear(given, self.weight * self.scale)
        return found * 2 - found.detach() if self.how == "another gradient" else found


def by_modules(model: nn.Module, how: str = "plain", head: bool = False) -> nn.Module:
    for name, module in linears(model, head):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Whole(module, how))
    return model


def dequantised(head: bool = True) -> nn.Module:
    """The same numbers, in plain weights."""
    model = tiny_model("llama")
    for _, module in linears(model, head):
        with torch.no_grad():
            module.weight.copy_(rounded(module.weight.detach()).plain())
    return model


KINDS: dict[str, tuple[Callable[[nn.Module], nn.Module], bool]] = {
    "a type of tensor": (by_type_of_tensor, True),
    "a type of tensor, but for the head": (lambda model: by_type_of_tensor(model, False), False),
    "modules": (by_modules, False),
    "modules, the head too": (lambda model: by_modules(model, head=True), True),
}


def sweep(model: nn.Module, **options: Any) -> Any:
    return activation_patching(
        model, None, SITES, SOURCE, TARGET, *ANSWERS, progress=False, **options
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["cone", "full"])
def test_activation_patching_is_that_of_plain_hooks(kind: str, engine: str) -> None:
    quantise, head = KINDS[kind]
    out = sweep(quantise(tiny_model("llama")), engine=engine)
    oracle = Oracle(dequantised(head), "llama")
    source, target = (tuple(each[0].tolist()) for each in (SOURCE, TARGET))
    moved = 0.0
    for name in COMPONENTS:
        for layer in range(3):
            for head_number in oracle.heads(name):
                logits = oracle.patched(target, source, Place(name, layer, head_number, (3,)))
                expected = (logits[ANSWERS[0]] - logits[ANSWERS[1]])[0]
                index = (layer, 3) if head_number is None else (layer, 3, head_number)
                found = out.patched(name)[index][0]
                torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0)
                moved = max(moved, float((expected - out.baseline.target).abs()))
    assert moved > 0.1
    # Rounding is seen: these are not the numbers of the model before it.
    plain = sweep(tiny_model("llama"))
    assert (plain.baseline.target - out.baseline.target).abs() > 100 * ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_are_those_of_the_same_numbers_in_plain_weights(kind: str) -> None:
    quantise, head = KINDS[kind]
    models = quantise(tiny_model("llama")), dequantised(head)
    for options in ({}, {"qk_fix": True, "grad_drop": True}, {"steps": 2}):
        found, expected = (
            attribution_patching(
                model, None, SITES, SOURCE, TARGET, *ANSWERS, progress=False, **options
            )
            for model in models
        )
        for name in COMPONENTS:
            assert expected[name].abs().max() > 0.01
            torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_other_entry_points(kind: str) -> None:
    quantise, head = KINDS[kind]
    model, plain = quantise(tiny_model("llama")), dequantised(head)
    found, expected = (
        ablation_patching(
            each, None, SITES, TARGET, *ANSWERS, method="mean", engine="cone", progress=False
        )
        for each in (model, plain)
    )
    for name in COMPONENTS:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)
    nodes = {"senders": ["input", "a0.h1", "m1"], "progress": False}
    for method in ("exact", "eap"):
        one, other = (
            edge_patching(each, None, SOURCE, TARGET, *ANSWERS, method=method, **nodes)
            for each in (model, plain)
        )
        torch.testing.assert_close(one.matrix, other.matrix, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert sweep(model, screen="attribution", top_k=5).screening is not None
    plans = [plan_sweep(each, None, SITES, SOURCE, TARGET) for each in (model, plain)]
    assert plans[0].token_layers == plans[1].token_layers


def test_a_head_of_another_type_of_tensor_is_left_alone() -> None:
    """Its rows cannot be taken, or are rounded otherwise by themselves."""
    assert find_unembedding(tiny_model("llama")) is not None
    assert find_unembedding(by_type_of_tensor(tiny_model("llama"))) is None
    assert find_unembedding(by_type_of_tensor(tiny_model("llama"), head=False)) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_knows_the_weights(kind: str, tmp_path: Path) -> None:
    quantise, _ = KINDS[kind]
    model = quantise(tiny_model("llama"))
    file = tmp_path / "checkpoint.safetensors"
    first = sweep(model, checkpoint=file)
    again = sweep(model, checkpoint=file)
    for name in COMPONENTS:
        assert torch.equal(again[name].nan_to_num(), first[name].nan_to_num())
    with pytest.raises(CheckpointError, match="model"):
        sweep(quantise(tiny_model("llama", seed=1)), checkpoint=file)


def test_a_bit_of_a_rounded_weight_changes_its_checksum() -> None:
    model = by_type_of_tensor(tiny_model("llama"))
    before = checksum(model)
    assert checksum(by_type_of_tensor(tiny_model("llama"))) == before
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.numbers[0, 0] += 1
    assert checksum(model) != before
    weight.numbers[0, 0] -= 1
    assert checksum(model) == before
    weight.scale[0] *= 2
    assert checksum(model) != before


class Opaque(Rounded):
    """One that does not show its parts."""

    __tensor_flatten__ = None  # type: ignore[assignment]

    def __getattribute__(self, name: str) -> Any:
        if name == "__tensor_flatten__":
            raise AttributeError(name)
        return super().__getattribute__(name)


def test_a_weight_that_does_not_show_its_parts_counts_by_its_shape() -> None:
    model = tiny_model("llama")
    up = model.model.layers[1].mlp.up_proj
    found = rounded(up.weight.detach())
    up.weight = nn.Parameter(Opaque(found.numbers, found.scale), requires_grad=False)
    before = checksum(model)
    up.weight.numbers[0, 0] += 1
    assert checksum(model) == before


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no graph", "has no gradient"),
        ("no graph, once run without one", "has no gradient"),
        ("another gradient", "another gradient than what it does: 2 times"),
    ],
)
def test_a_kernel_without_its_gradient_is_refused(how: str, words: str) -> None:
    """The stream around it has a gradient, so that nothing else would tell."""
    model = by_modules(tiny_model("llama"), how)
    with torch.no_grad():
        expected = model(input_ids=TARGET).logits
    model = by_modules(tiny_model("llama"), how)
    with pytest.raises(GradientError, match=rf"quantised.*q_proj.*Whole.*{words}"):
        attribution_patching(model, None, SITES, SOURCE, TARGET, *ANSWERS, progress=False)
    with pytest.raises(GradientError, match=rf"quantised.*q_proj.*Whole.*{words}"):
        edge_patching(model, None, SOURCE, TARGET, *ANSWERS, method="eap", progress=False)
    assert torch.equal(model(input_ids=TARGET).logits, expected)
    assert sweep(model).info["engine"] == "cone"


def test_a_try_leaves_nothing_behind() -> None:
    model = by_modules(tiny_model("llama")).train()
    flags = {name: module.training for name, module in model.named_modules()}
    with torch.no_grad():
        attribution_patching(model, None, SITES, SOURCE, TARGET, *ANSWERS, progress=False)
    assert flags == {name: module.training for name, module in model.named_modules()}
    assert all(weight.grad is None for weight in model.parameters())


# The libraries themselves, where they are installed.


def torchao(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def quanto(model: nn.Module) -> nn.Module:
    library = pytest.importorskip("optimum.quanto")
    library.quantize(model, weights=library.qint8)
    library.freeze(model)
    return model


def hqq(model: nn.Module) -> nn.Module:
    library = pytest.importorskip("hqq.core.quantize")
    config = library.BaseQuantizeConfig(nbits=8, group_size=16)
    for name, module in linears(model, head=False):
        parent, _, own = name.rpartition(".")
        new = library.HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
        setattr(model.get_submodule(parent), own, new)
    return model


def bitsandbytes(model: nn.Module) -> nn.Module:
    library = pytest.importorskip("bitsandbytes")
    for name, module in linears(model, head=False):
        parent, _, own = name.rpartition(".")
        size = module.in_features, module.out_features
        new = library.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
        new.load_state_dict(module.state_dict())
        setattr(model.get_submodule(parent), own, new)
    return model.to("cpu").eval()


@pytest.mark.parametrize("quantise", [torchao, quanto, hqq, bitsandbytes])
@pytest.mark.filterwarnings("ignore")
def test_the_libraries(quantise: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = quantise(tiny_model("llama"))
    oracle = Oracle(tiny_model("llama"), "llama")
    # The model itself, as some of these cannot be copied.
    oracle.model = model
    out = sweep(model, engine="cone", checkpoint=tmp_path / "checkpoint.safetensors")
    source, target = (tuple(each[0].tolist()) for each in (SOURCE, TARGET))
    for name in ("resid", "mlp"):
        logits = oracle.patched(target, source, Place(name, 1, None, (3,)))
        expected = (logits[ANSWERS[0]] - logits[ANSWERS[1]])[0]
        torch.testing.assert_close(out.patched(name)[1, 3, 0], expected, atol=1e-4, rtol=0)
    cut = Sites("resid", layers=[1], seq_pos_type="each")
    whole = attribution_patching(
        model, None, cut, SOURCE, TARGET, *ANSWERS, steps=16, progress=False
    )
    # Those that round their input too are not quite what their gradient says.
    assert abs(float(whole["resid"][1].sum()) - 1) < (0.1 if quantise is bitsandbytes else 1e-3)
