"""What holds of learning, whatever stands around it; and what is kept of it."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

from nnpatch_core import PromptPairs, Site, Sites
from nnpatch_core.errors import (
    AnswerWarning,
    CheckpointError,
    CheckpointWarning,
    EngineWarning,
    GradientError,
    PromptWarning,
)
from nnpatch_core.subspace import Subspace, Trained, train_subspace
from nnpatch_core.subspace import checkpoint as of_checkpoint
from nnpatch_core.subspace import learning as of_learning
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.learning_oracle import Pair
from tests.helpers.lessons import QUICK, as_pairs, last, learned, some_pairs, taught_pairs, text
from tests.helpers.lessons import tokenizer as known_words


def numbers(trained: Trained) -> list[Any]:
    """All that is learned and measured, to be compared to the last bit."""
    found: list[Any] = [trained.subspace.basis.tolist(), sorted(trained.seen)]
    # Of what was not learned from there is nan.
    found += [[str(value) for value in attrs.astuple(each)] for each in trained.history]
    found += [str(trained.evaluation)]
    for name, control in trained.controls.items():
        basis = None if control.subspace is None else control.subspace.basis.tolist()
        found.append([name, basis, control.answers, attrs.astuple(control.accuracy)])
    return found


#: Learns the subspace and one control.
BOTH: dict[str, Any] = {"random_labels": True}


@functools.cache
def expected() -> list[Any]:
    return numbers(learned(tiny_model("llama"), **BOTH))


def left_as_it_was(model: nn.Module) -> None:
    """No hook, gradient or flag is left on a model that is fresh."""
    for module in model.modules():
        assert not module.training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    for weight in model.parameters():
        assert weight.grad is None
        assert weight.requires_grad


# Seeds, and what is set for all of torch.


def test_the_same_call_gives_the_same_to_the_last_bit() -> None:
    model = tiny_model("llama")
    for _ in range(2):
        torch.randn(3)
        assert numbers(learned(model, **BOTH)) == expected()
    left_as_it_was(model)
    assert numbers(learned(tiny_model("llama"), seed=1, **BOTH)) != expected()


def test_the_users_random_numbers_are_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    learned(tiny_model("llama"), random_model=True, **BOTH)
    assert torch.equal(torch.random.get_rng_state(), before)


class Default:
    """torch's default device or type, while it lasts."""

    def __init__(self, device: str | None = None, dtype: torch.dtype | None = None) -> None:
        self.device, self.dtype = device, dtype

    def __enter__(self) -> None:
        if self.device is not None:
            torch.set_default_device(self.device)
        if self.dtype is not None:
            torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_device("cpu")
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


STATES: dict[str, Callable[[], Any]] = {
    "default device": lambda: Default(device="meta"),
    "float64": lambda: Default(dtype=torch.float64),
    "bfloat16": lambda: Default(dtype=torch.bfloat16),
    "no grad": torch.no_grad,
    "deterministic": lambda: Default(),
}


@pytest.mark.parametrize("state", STATES)
def test_what_is_set_for_all_of_torch_changes_nothing(state: str) -> None:
    model, pairs = tiny_model("llama"), some_pairs()
    wanted = expected()
    with STATES[state]():
        found = numbers(learned(model, pairs, **BOTH))
    assert found == wanted
    left_as_it_was(model)


def test_the_random_model_is_the_same_one_whatever_the_default() -> None:
    model, pairs = tiny_model("llama"), some_pairs()
    wanted = numbers(learned(model, pairs, random_model=True))
    for state in ("float64", "bfloat16"):
        with STATES[state]():
            assert numbers(learned(model, pairs, random_model=True)) == wanted


def test_inference_mode_has_its_own_error() -> None:
    with (
        torch.inference_mode(),
        pytest.raises(GradientError, match="leave it, or use"),
    ):
        learned(tiny_model("llama"), some_pairs())


def test_autocast_is_for_the_model() -> None:
    model, pairs = tiny_model("llama"), some_pairs()
    plain = learned(model, pairs)
    with torch.autocast("cpu", torch.bfloat16):
        found = learned(model, pairs)
        again = learned(model, pairs)
    assert numbers(found) == numbers(again)
    basis = found.subspace.basis
    assert basis.dtype == torch.float32
    torch.testing.assert_close(basis.T @ basis, torch.eye(1), atol=1e-6, rtol=0)
    for one, other in zip(found.history, plain.history, strict=True):
        assert one.held_out_loss != other.held_out_loss
        assert one.held_out_loss == pytest.approx(other.held_out_loss, abs=0.05)


def training(model: Any) -> Any:
    model.train()
    model.model.layers[1].eval()
    return model


def frozen(model: Any) -> Any:
    return model.requires_grad_(False)


def half_frozen(model: Any) -> Any:
    model.model.layers[1].requires_grad_(False)
    return model


@pytest.mark.parametrize("mode", [training, frozen, half_frozen])
def test_what_is_set_on_the_model_stays_so(mode: Callable[[Any], Any]) -> None:
    model = mode(tiny_model("llama", attention_dropout=0.5))
    asked = {path: weight.requires_grad for path, weight in model.named_parameters()}
    flags = {path: module.training for path, module in model.named_modules()}
    assert numbers(learned(model, **BOTH)) == expected()
    assert {path: weight.requires_grad for path, weight in model.named_parameters()} == asked
    assert {path: module.training for path, module in model.named_modules()} == flags
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_on_the_model_after_an_error(error: type[BaseException]) -> None:
    model = tiny_model("llama")
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, 1, error)
        with pytest.raises(error):
            learned(model)
    left_as_it_was(model)
    assert numbers(learned(model, **BOTH)) == expected()


def test_a_hook_of_the_users_runs_in_each_step() -> None:
    model, seen = tiny_model("llama"), list[int]()

    def doubled(_: nn.Module, args: Any, output: Any) -> Any:
        seen.append(len(output))
        return output * 2

    handle = model.model.layers[2].mlp.register_forward_hook(doubled)
    with pytest.warns(EngineWarning, match="forward hook"):
        found = learned(model)
    assert found.evaluation.engine == "full"
    assert len(seen) > 10
    cone = learned(model, engine="cone")
    assert cone.history[-1].held_out_loss == pytest.approx(found.history[-1].held_out_loss, 1e-4)
    assert len(model.model.layers[2].mlp._forward_hooks) == 1
    handle.remove()
    plain = learned(model)
    assert plain.history[-1].held_out_loss != pytest.approx(found.history[-1].held_out_loss, 1e-4)


# The course of learning.


def test_the_history_is_that_of_a_loop_by_hand() -> None:
    """AdamW on the basis, by torch; losses of the oracle are test_training_oracle.py's."""
    options: dict[str, Any] = {"epochs": 3, "batch_size": 4, "lr": 0.02, "warmup": 0.25}
    found = learned(tiny_model("llama"), patience=None, held_out=[0, 5], **options)
    assert [each.epoch for each in found.history] == [0, 1, 2, 3]
    assert [each.steps for each in found.history] == [0, 3, 6, 9]
    first = found.history[0]
    assert math.isnan(first.loss)
    assert math.isnan(first.accuracy)
    rise = 0.25 * 9
    rates = [
        0.02 * min((step + 1) / rise if step + 1 < rise else (9 - step) / (9 - rise), 1.0)
        for step in range(9)
    ]
    assert [each.lr for each in found.history] == pytest.approx(
        [rates[0], rates[2], rates[5], rates[8]]
    )
    frame = found.to_dataframe()
    assert list(frame["epoch"]) == [0, 1, 2, 3]
    assert found.best == min(found.history, key=lambda each: each.held_out_loss)
    assert found.history[-1].loss < found.history[1].loss


def test_each_pair_is_learned_from_once_in_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = of_learning.Learner.gradient, list[list[int]]()

    def spy(self: Any, basis: Any, pairs: Tensor) -> Any:
        seen.append(pairs.tolist())
        assert not any(module.training for module in self.interchange.sweep.patches.model.modules())
        return real(self, basis, pairs)

    monkeypatch.setattr(of_learning.Learner, "gradient", spy)
    learned(tiny_model("llama"), held_out=[0, 5, 7], epochs=2)
    # Nine pairs: the last step of an epoch has one of them.
    assert [len(each) for each in seen] == [4, 4, 1, 4, 4, 1]
    kept = [number for number in range(12) if number not in (0, 5, 7)]
    for epoch in (seen[:3], seen[3:]):
        assert sorted(number for step in epoch for number in step) == kept
    assert seen[:3] != seen[3:]


def test_a_batch_may_be_larger_than_all_pairs() -> None:
    found = learned(tiny_model("llama"), batch_size=1000)
    assert [each.steps for each in found.history] == [0, 1, 2, 3]


@pytest.mark.parametrize("patience", [1, 2, None])
def test_learning_stops_early_and_keeps_the_best(
    patience: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At this rate the loss held out goes up and down."""
    bases: list[Tensor] = []
    real = of_learning.Learner._note

    def spy(self: Any, state: Any, *arguments: Any) -> None:
        bases.append(state.basis.now().basis.detach().clone())
        real(self, state, *arguments)

    monkeypatch.setattr(of_learning.Learner, "_note", spy)
    found = learned(tiny_model("llama"), epochs=8, lr=0.5, patience=patience)
    losses = [each.held_out_loss for each in found.history]
    best = losses.index(min(losses))
    assert found.best.epoch == best
    assert 0 < best < 8
    torch.testing.assert_close(found.subspace.basis, bases[best], atol=1e-6, rtol=0)
    assert found.accuracy.value == pytest.approx(found.best.held_out_accuracy)
    if patience is None:
        assert len(losses) == 9
        return
    assert len(losses) == min(best + patience, 8) + 1
    waits = [number - losses.index(min(losses[: number + 1])) for number in range(len(losses))]
    assert all(wait < patience for wait in waits[:-1])


def test_decay_pulls_towards_the_first_basis() -> None:
    model = tiny_model("llama")
    start = Subspace.random(32, 1, 0).basis
    found = [
        learned(model, lr=0.05, epochs=4, patience=None, weight_decay=decay)
        for decay in (0.0, 0.5, 15.0)
    ]
    kept = [float((each.subspace.basis.T @ start).abs()) for each in found]
    assert kept[0] < kept[1] < kept[2] <= 1.0
    for each in found:
        basis = each.subspace.basis
        torch.testing.assert_close(basis.T @ basis, torch.eye(1), atol=1e-6, rtol=0)


def test_the_other_loss_keeps_the_rest() -> None:
    model = tiny_model("llama")
    plain, kept = (learned(model, kl=weight, patience=None) for weight in (0.0, 50.0))
    assert kept.history[0].held_out_loss > plain.history[0].held_out_loss
    assert not torch.equal(plain.subspace.basis, kept.subspace.basis)


def test_it_begins_where_it_is_told_to() -> None:
    model = tiny_model("llama")
    axes = Subspace(torch.eye(32)[:, :2])
    found = learned(model, rank=2, initial=axes, lr=1e-12, epochs=1)
    torch.testing.assert_close(found.subspace.basis, axes.basis, atol=1e-6, rtol=0)
    # And from an axis it moves as from anywhere.
    moved = learned(model, rank=2, initial=axes, epochs=6, patience=None)
    assert moved.best.epoch
    assert (moved.subspace.basis[2:].abs() > 1e-4).all()
    # What was learned stands for its subspace.
    again = learned(model, rank=2, initial=moved, lr=1e-12, epochs=1)
    torch.testing.assert_close(again.subspace.basis, moved.subspace.basis, atol=1e-6, rtol=0)


# Pairs.


def test_duplicates_stay_on_one_side() -> None:
    pairs = some_pairs(6)
    twice = as_pairs([pair for pair in taught_pairs([5] * 6, 1) for _ in range(3)])
    assert len(twice) == 3 * len(pairs)
    for seed in range(5):
        found = learned(tiny_model("llama"), twice, seed=seed, epochs=1, held_out=0.4)
        held = {tuple(row) for row in found.held_out_pairs.source_tokens.tolist()}
        assert len(found.held_out_pairs) == 3 * len(held) == 6
        assert len(found.seen) == 4


def test_a_copy_among_the_pairs_that_are_named_is_told() -> None:
    twice = as_pairs([pair for pair in taught_pairs([5] * 4, 1) for _ in range(2)])
    with pytest.warns(PromptWarning, match="1 of 3 pairs held out are of the same prompts as"):
        learned(tiny_model("llama"), twice, held_out=[0, 2, 3])


def test_the_width_of_the_padding_makes_no_other_pair() -> None:
    short = taught_pairs([4] * 5, 1)
    wide = as_pairs([*short, *taught_pairs([9], 3)])
    one = learned(tiny_model("llama"), wide, held_out=[5])
    other = learned(tiny_model("llama"), as_pairs(short), held_out=[4])
    assert other.seen < one.seen


def test_pairs_that_tell_nothing_are_left_out_and_told() -> None:
    pairs = some_pairs(8)
    answers = pairs.target_answer_index.clone()
    answers[[2, 5]] = pairs.source_answer_index[[2, 5]]
    same = attrs.evolve(pairs, target_answer_index=answers)
    with pytest.warns(
        PromptWarning, match=r"2 of 8 pairs are left out, as their two answers.*2, 5"
    ):
        found = learned(tiny_model("llama"), same, held_out=0.34)
    assert len(found.seen) + len(found.held_out_pairs) == 6
    kept = [number for number in range(8) if number not in (2, 5)]
    alone = learned(tiny_model("llama"), pairs[kept], held_out=0.34)
    torch.testing.assert_close(alone.subspace.basis, found.subspace.basis, atol=1e-5, rtol=0)


def test_a_site_that_some_prompts_lack_is_told() -> None:
    pairs = as_pairs(taught_pairs([5, 5, 5, 2, 5, 5], 1))
    site = Site.get_site(tiny_api(), "resid", 1, seq_pos=[-4])
    with pytest.warns(PromptWarning) as caught:
        found = learned(tiny_model("llama"), pairs, site, held_out=0.3)
    assert any("1 of 6 pairs are left out, as they have no token" in str(w.message) for w in caught)
    assert len(found.seen) + len(found.held_out_pairs) == 5


def test_dropped_pairs_stay_out() -> None:
    pairs = taught_pairs([5] * 8, 1)
    lost = pairs[3]._replace(other=pairs[3].answer)
    with pytest.warns(PromptWarning, match="1 of 8 pairs was dropped"):
        some = PromptPairs.from_texts(
            [text(each.source) for each in pairs],
            [text(each.target) for each in pairs],
            [text((each.answer,)) for each in pairs],
            [text((each.other,)) for each in (*pairs[:3], lost, *pairs[4:])],
            known_words(),
            faulty="drop",
        )
    assert len(some) == 7
    found = learned(tiny_model("llama"), some)
    assert len(found.seen) + len(found.held_out_pairs) == 7
    assert found.held_out_pairs.dropped == ()


@pytest.mark.filterwarnings("ignore:multi_token:nnpatch_core.errors.AnswerWarning")
@pytest.mark.parametrize("how", ["first", "all"])
def test_answers_of_several_tokens_are_told(how: Any) -> None:
    pairs = taught_pairs([5] * 6, 1)
    some = PromptPairs.from_texts(
        [text(each.source) for each in pairs],
        [text(each.target) for each in pairs],
        [text((each.answer, 9)) for each in pairs],
        [text((each.other,)) for each in pairs],
        known_words(),
        multi_token=how,
    )
    if how == "all":
        with pytest.warns(AnswerWarning, match="the first of up to 2 tokens of each answer is"):
            found = learned(tiny_model("llama"), some)
    else:
        found = learned(tiny_model("llama"), some)
    assert len(found.seen) + len(found.held_out_pairs) == 6


def test_pairs_of_one_token() -> None:
    pairs = as_pairs([Pair((n,), (n + 20,), n + 1, n + 21) for n in range(6, 16)])
    found = learned(tiny_model("llama"), pairs)
    assert found.evaluation.engine == "cone"
    full = learned(tiny_model("llama"), pairs, engine="full")
    assert full.history[-1].held_out_loss == pytest.approx(found.history[-1].held_out_loss, 1e-4)


def test_sites_of_one_cell_are_a_site() -> None:
    one = learned(tiny_model("llama"), site=Sites("resid", [1], "last"))
    assert numbers(one) == numbers(learned(tiny_model("llama")))


@pytest.mark.parametrize("engine", ["cone", "full"])
def test_a_model_in_bfloat16(engine: str) -> None:
    model = tiny_model("llama").bfloat16()
    found = learned(model, engine=engine, lr=0.05, epochs=6)
    assert found.subspace.basis.dtype == torch.float32
    assert found.history[-1].held_out_loss < found.history[0].held_out_loss


def test_logits_that_are_huge() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    found = learned(model, kl=0.1)
    assert all(math.isfinite(each.held_out_loss) for each in found.history)


# The bar.


@pytest.mark.parametrize("shown", [True, False])
def test_the_bar(shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    learned(tiny_model("llama"), progress=shown, epochs=2, **BOTH)
    told = stream.getvalue()
    if not shown:
        assert told == ""
        return
    assert "learning random labels" in told
    assert "loss" in told
    assert "accuracy" in told
    assert "12/12" in told


# On disk.


def stopped(patch: Any, after: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Learning breaks off in the middle of an epoch, after so many steps."""
    real, left = of_learning.Learner.gradient, [after]

    def breaking(*arguments: Any) -> Any:
        if not left[0]:
            raise error
        left[0] -= 1
        return real(*arguments)

    patch.setattr(of_learning.Learner, "gradient", breaking)


#: Three steps an epoch, three epochs, of the subspace and of a control.
@pytest.mark.parametrize("after", range(0, 18, 2))
def test_what_was_stopped_goes_on_as_if_it_had_not_been(after: int, tmp_path: Path) -> None:
    file = tmp_path / "learning.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, after)
        with pytest.raises(KeyboardInterrupt):
            learned(tiny_model("llama"), checkpoint=file, **BOTH)
    torch.randn(after + 1)
    real, steps = of_learning.Learner.gradient, list[int]()

    def counted(*given: Any) -> Any:
        steps.append(1)
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_learning.Learner, "gradient", counted)
        found = learned(tiny_model("llama"), checkpoint=file, **BOTH)
    assert numbers(found) == expected()
    # Whole epochs are not run again.
    assert len(steps) == 18 - after // 3 * 3
    steps.clear()
    assert numbers(learned(tiny_model("llama"), checkpoint=str(file), **BOTH)) == expected()
    assert [path.name for path in tmp_path.iterdir()] == ["learning.safetensors"]


def test_a_random_model_goes_on_too(tmp_path: Path) -> None:
    file = tmp_path / "learning.safetensors"
    options: dict[str, Any] = {"random_model": True, **BOTH}
    whole = numbers(learned(tiny_model("llama"), **options))
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, 23)
        with pytest.raises(KeyboardInterrupt):
            learned(tiny_model("llama"), checkpoint=file, **options)
    assert numbers(learned(tiny_model("llama"), checkpoint=file, **options)) == whole


def of_another_seed() -> Any:
    return tiny_model("llama", seed=1)


def of_another_setting() -> Any:
    model = tiny_model("llama")
    model.config.rms_norm_eps = 1e-2
    return model


def halved(*given: Any) -> Any:
    """Half of what a module gives."""
    return given[-1] * 0.5


def halved_gradients(_: Any, inputs: Any, outputs: Any) -> Any:
    return tuple(None if each is None else each * 0.5 for each in inputs)


def hooked() -> Any:
    model = tiny_model("llama")
    model.model.layers[2].mlp.register_forward_hook(halved)
    return model


def hooked_gradients() -> Any:
    model = tiny_model("llama")
    model.model.layers[2].mlp.register_full_backward_hook(halved_gradients)
    return model


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "setting": ({"model": of_another_setting}, r"config\.rms_norm_eps: 1e-06 then, 0\.01 now"),
    "hook": ({"model": hooked}, "hooks: none then"),
    "hook on gradients": ({"model": hooked_gradients}, "hooks: none then"),
    "model": ({"model": of_another_seed}, "model:"),
    "dtype": ({"model": lambda: tiny_model("llama").double()}, "dtype:"),
    "site": ({"site": last("mlp")}, "site: resid L1 .* then, mlp L1 .* now"),
    "position": ({"site": Site.get_site(tiny_api(), "resid", 1, seq_pos=[-2])}, "site:"),
    "pairs": ({"pairs": some_pairs(12, 5, 2)}, "pairs:"),
    "rank": ({"rank": 2}, "options:"),
    "seed": ({"seed": 1}, "options:"),
    "epochs": ({"epochs": 4}, "options:"),
    "held out": ({"held_out": [1, 2]}, "held out:"),
    "initial": ({"initial": Subspace.random(32, 1, 9)}, "initial:"),
    "labels": ({"random_labels": True}, "learned:"),
    "engine": ({"engine": "full"}, "engine: cone then, full now"),
}


@pytest.mark.filterwarnings("ignore::nnpatch_core.errors.EngineWarning")
@pytest.mark.parametrize("name", OTHERS)
def test_the_checkpoint_of_another_call_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "learning.safetensors"
    learned(tiny_model("llama"), checkpoint=file, epochs=1)
    before = file.read_bytes()
    changed, told = OTHERS[name]
    options = {"epochs": 1, **changed}
    model = options.pop("model", lambda: tiny_model("llama"))()
    with pytest.raises(CheckpointError, match=rf"another call \(.*{told}.*name another file"):
        learned(model, options.pop("pairs", None), options.pop("site", None),
                checkpoint=file, **options)  # fmt: skip
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"nonsense", bytes(range(256)) * 8])
def test_a_file_that_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "learning.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a checkpoint of learning"):
        learned(tiny_model("llama"), checkpoint=file)
    assert file.read_bytes() == content


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "learning.safetensors"
    learned(tiny_model("llama"), checkpoint=file, epochs=1)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="damaged"):
        learned(tiny_model("llama"), checkpoint=file, epochs=1)


def test_a_full_disk_is_told_once_and_learning_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise CheckpointError("'x' could not be written: No space left on device")

    monkeypatch.setattr(of_checkpoint, "write_file", full)
    with pytest.warns(CheckpointWarning, match="No space left.*learning goes on") as caught:
        found = learned(tiny_model("llama"), checkpoint=tmp_path / "f", **BOTH)
    assert len(caught) == 1
    assert numbers(found) == expected()


def test_a_folder_is_refused_before_anything_runs(tmp_path: Path) -> None:
    model, ran = tiny_model("llama"), list[int]()
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(CheckpointError, match="it is a folder"):
        train_subspace(model, None, last(), some_pairs(), checkpoint=tmp_path, **QUICK)
    with pytest.raises(CheckpointError, match="there is no folder"):
        train_subspace(model, None, last(), some_pairs(), checkpoint=tmp_path / "a" / "b", **QUICK)
    assert not ran
