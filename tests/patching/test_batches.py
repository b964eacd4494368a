"""Sweeps over batches of prompts: the outcome of one sweep, or its means and moments."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nnpatch_core import (
    MetricContext,
    Outcome,
    PromptPairs,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
)
from nnpatch_core.errors import (
    MetricError,
    OutcomeError,
    PatchingError,
    PositionError,
    PromptWarning,
    TokensError,
    UnknownNameError,
)
from nnpatch_core.testing import tiny_model, tiny_tokenizer, traces

WORDS = "Then Mary Sue Anne John Lee went to the shop and a bar ,".split()  # noqa: SIM905
TOKENIZER = tiny_tokenizer([" " + " ".join(WORDS), *WORDS])
MODEL = tiny_model("llama", vocab_size=len(TOKENIZER))
NAMES = ["Mary", "Sue", "Anne", "John", "Lee"]
ENTRIES: dict[str, Callable[..., Outcome]] = {
    "activation": activation_patching,
    "ablation": ablation_patching,
    "attribution": attribution_patching,
}
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def made(count: int, seed: int = 0, longest: int = 3) -> PromptPairs:
    """Pairs of several lengths, with spans."""
    draw = random.Random(seed)
    fills, others, answers, wrong = [], [], [], []
    for _ in range(count):
        a, b = draw.sample(NAMES, 2)
        lead = " ".join(["Then", *["the"] * draw.randrange(longest)])
        fills.append({"lead": lead, "A": a, "B": b})
        others.append({"lead": lead, "A": b, "B": a})
        answers.append(f" {a}")
        wrong.append(f" {b}")
    return PromptPairs.from_template(
        "{lead} , {A} and {B} went to the shop and {B} to",
        fills, others, answers, wrong, TOKENIZER, extra={"kind": [n % 2 for n in range(count)]},
    )  # fmt: skip


SITES = {
    "spans": Sites(["resid", "q"], seq_pos_type="spans", seq_pos=["A", "B[1]", "last"]),
    "each": Sites(["resid", "k"], layers=[0, 2], seq_pos_type="each"),
    "last": Sites(["mlp", "o"], seq_pos_type="last"),
    "list": Sites.from_sites([Site.get_site("Llama3", "resid", n, seq_pos=[-1]) for n in (0, 1)]),
}


def swept(entry: str, pairs: Any, sites: str = "spans", **options: Any) -> Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)
        return ENTRIES[entry](MODEL, None, SITES[sites], pairs, progress=False, **options)


def assert_same(found: Outcome, expected: Outcome) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert found.axes(name) == expected.axes(name)
        torch.testing.assert_close(found[name], expected[name], **CLOSE)
        assert torch.equal(found.swept(name), expected.swept(name))
        assert torch.equal(found.elided(name), expected.elided(name))
        assert torch.equal(found.exact(name), expected.exact(name))


@given(
    entry=st.sampled_from(sorted(ENTRIES)),
    sites=st.sampled_from(sorted(SITES)),
    count=st.integers(1, 7),
    size=st.integers(1, 4),
    seed=st.integers(0, 5),
)
@settings(deadline=None, max_examples=25)
def test_batches_are_one_sweep(entry: str, sites: str, count: int, size: int, seed: int) -> None:
    pairs = made(count, seed)
    whole = swept(entry, pairs, sites)
    gaps = whole.baseline.source - whole.baseline.target
    # A value is a share of their mean: where they cancel out, rounding is all that is left of it.
    divided = whole.scale != "change"
    share = float(gaps.mean().abs() / gaps.abs().mean())
    assume(not divided or share > 0.01)
    joined = swept(entry, pairs.batches(size), sites)
    assert_same(joined, whole)
    for name in whole:
        torch.testing.assert_close(
            joined.patched(name), whole.patched(name), **CLOSE, equal_nan=True
        )
        torch.testing.assert_close(
            joined.per_prompt(name), whole.per_prompt(name), rtol=1e-3, atol=1e-2, equal_nan=True
        )
        assert torch.equal(joined.cells[name].present, whole.cells[name].present)
    assert joined.prompts.columns == whole.prompts.columns
    assert [joined.prompts.text(n) for n in range(count)] == [
        whole.prompts.text(n) for n in range(count)
    ]
    means = swept(entry, pairs.batches(size), sites, keep="means")
    assert_same(means, whole)
    assert means.count == count
    # It is of what each prompt has left over, whose rounding is divided by the mean gap too.
    rounding = 1e-5 / share if divided and share < 0.05 else 1e-4
    for name in whole:
        torch.testing.assert_close(
            means.standard_error(name), whole.standard_error(name), rtol=1e-3, atol=rounding,
            equal_nan=True,
        )  # fmt: skip


@pytest.mark.parametrize("form", ["list", "tuple", "generator", "iterable"])
def test_every_form_of_batches(form: str) -> None:
    pairs = made(4)

    class Loader:
        def __iter__(self) -> Iterator[PromptPairs]:
            return pairs.batches(2)

    forms: dict[str, Any] = {
        "list": [*pairs.batches(2)],
        "tuple": tuple(pairs.batches(2)),
        "generator": pairs.batches(2),
        "iterable": Loader(),
    }
    assert_same(swept("activation", forms[form]), swept("activation", pairs))


def test_standard_errors_are_those_of_a_ratio_of_means() -> None:
    """By the jackknife, which knows nothing of the delta method."""
    pairs = made(40, longest=1)
    out = swept("activation", pairs)
    patched, base = out.patched("resid").double(), out.baseline

    def value(kept: list[int]) -> Tensor:
        s, t = base.source[kept].double().mean(), base.target[kept].double().mean()
        return (patched[..., kept].mean(-1) - t) / (s - t)

    everyone = list(range(40))
    left = torch.stack([value([n for n in everyone if n != out_]) for out_ in everyone])
    jackknife = (39 / 40 * (left - left.mean(0)).square().sum(0)).sqrt()
    torch.testing.assert_close(out.standard_error("resid"), jackknife, rtol=0.15, atol=2e-3)
    change = swept("ablation", pairs)
    moved = change.per_prompt("resid").double()
    expected = moved.std(-1) / 40**0.5
    torch.testing.assert_close(change.standard_error("resid"), expected, rtol=1e-3, atol=1e-6)


def test_one_prompt_has_no_error_to_tell() -> None:
    out = swept("activation", made(1))
    assert out.standard_error("resid").isinf().all()


@pytest.mark.parametrize("repair", [{}, {"steps": 2}, {"grad_drop": True}])
def test_repaired_estimates_in_batches(repair: dict[str, Any]) -> None:
    pairs = made(5, seed=2)
    whole = swept("attribution", pairs, **repair)
    assert_same(swept("attribution", pairs.batches(2), **repair), whole)
    assert_same(swept("attribution", pairs.batches(2), keep="means", **repair), whole)


def test_an_ablation_by_means_averages_its_data_once() -> None:
    pairs, data = made(6), made(3, seed=9)
    reference = (data.source_tokens, data.source_attention_mask)
    whole = swept("ablation", pairs, method="mean", reference=[reference])
    with traces(MODEL) as seen:
        found = swept("ablation", pairs.batches(2), method="mean", reference=iter([reference]))
    assert_same(found, whole)
    with traces(MODEL) as once:
        swept("ablation", made(2), method="mean", reference=[reference])
    with traces(MODEL) as zero:
        swept("ablation", pairs.batches(2), method="zero")
    with traces(MODEL) as one:
        swept("ablation", made(2), method="zero")
    assert len(seen) - len(zero) == len(once) - len(one) == 1


MEANS: dict[str, Callable[[Outcome], Any]] = {
    "per_prompt": lambda out: out.per_prompt("resid"),
    "patched": lambda out: out.patched("resid"),
    "by_group": lambda out: out.by_group("kind"),
    "magnitudes": lambda out: out.magnitudes(),
    "frame": lambda out: out.to_dataframe(per_prompt=True),
    "array": lambda out: out.to_xarray(per_prompt=True),
}


@pytest.mark.parametrize("asked", MEANS)
def test_means_have_no_single_prompt(asked: str) -> None:
    out = swept("activation", made(3), keep="means")
    assert repr(out).endswith("means of 3 prompts)")
    with pytest.raises(OutcomeError, match=r"means over 3 prompts alone: sweep with keep="):
        MEANS[asked](out)


def test_means_are_saved_shown_and_drawn(tmp_path: Path) -> None:
    out = swept("activation", made(3), keep="means")
    path = tmp_path / "means.safetensors"
    out.save(path)
    loaded = Outcome.load(path)
    assert_same(loaded, out)
    assert loaded.count == 3
    torch.testing.assert_close(loaded.standard_error("resid"), out.standard_error("resid"))
    assert f"3 of {made(3).batch.seq_len} tokens" in loaded._repr_html_()
    assert loaded.plot().axes
    assert len(loaded.to_dataframe()) == len(swept("activation", made(3)).to_dataframe(level=None))


def relative(logits: Tensor, context: MetricContext) -> Tensor:
    own = logits[:, 1] - logits[:, 2]
    return own - own.mean()


REFUSED: dict[str, tuple[dict[str, Any], type[PatchingError], str]] = {
    "metric": ({"metric": relative}, MetricError, "'relative' is not declared for each prompt"),
    "screen": ({"screen": "attribution", "top_k": 2}, PatchingError, "screen= does not go with"),
    "checkpoint": ({"checkpoint": "here"}, PatchingError, "checkpoint= does not go with"),
    "data": ({"metric_data": {"a": torch.ones(2)}}, PatchingError, "metric_data= does not go"),
    "keep": ({"keep": "all"}, UnknownNameError, "unknown keep 'all'; there are prompts, means"),
    "progress": ({"progress": "no"}, PatchingError, "progress must be True or False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_all_prompts_is_refused_first(case: str) -> None:
    options, error, match = REFUSED[case]
    given = {"progress": False, **options}
    with traces(MODEL) as seen, pytest.raises(error, match=match):
        activation_patching(MODEL, None, SITES["last"], made(4).batches(2), **given)
    assert not seen


ABLATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "resample": ({"method": "resample"}, "it draws among all of them"),
    "mean": ({"method": "mean"}, "'mean' without reference= does not go with batches"),
    "each": (
        {"method": "mean", "per_position": True, "reference": torch.ones(1, 3).long()},
        "'mean' per_position=True does not go with batches",
    ),
}


@pytest.mark.parametrize("case", ABLATIONS)
def test_ablations_that_need_all_prompts_are_refused(case: str) -> None:
    options, match = ABLATIONS[case]
    with traces(MODEL) as seen, pytest.raises(PatchingError, match=match):
        swept("ablation", made(4).batches(2), **options)
    assert not seen


def test_means_of_one_batch_refuse_what_batches_refuse() -> None:
    with pytest.raises(MetricError, match="keep='means' do not show it all"):
        swept("activation", made(2), metric=relative, keep="means")


def test_positions_of_each_prompt_are_refused() -> None:
    sites = Sites("resid", seq_pos_type="custom", seq_pos=[[-1], [-2]])
    with pytest.raises(PositionError, match=r"\[batch, k\], which does not go with several"):
        activation_patching(MODEL, None, sites, made(4).batches(2), progress=False)


def test_positions_from_the_start_need_one_width() -> None:
    sites = Sites("resid", seq_pos_type="custom", seq_pos=[1])
    same = made(4, longest=1)
    activation_patching(MODEL, None, sites, same.batches(2), progress=False)
    short, long = made(1, longest=1), made(3, seed=1)
    assert short.batch.seq_len != long.batch.seq_len
    with (
        pytest.warns(PromptWarning, match="tokens"),
        pytest.raises(PositionError, match=r"batch 1 has prompts of \d+ tokens, and the first"),
    ):
        activation_patching(MODEL, None, sites, [long, short], progress=False)


def test_columns_that_mix_over_batches_are_told_once() -> None:
    short = made(1, longest=1)
    fills = [{"A": "Mary"}]
    long = PromptPairs.from_template(
        "Then the shop , a bar , {A} went to", fills, [{"A": "Sue"}], [" Mary"], [" Sue"], TOKENIZER
    )
    batches = [short, long, long, short]
    with pytest.warns(PromptWarning) as caught:
        activation_patching(MODEL, None, SITES["each"], batches, progress=False)
    (warning,) = caught
    assert str(warning.message).startswith("batch 1: prompts have ")


def test_a_column_that_a_batch_lacks_is_missing_there() -> None:
    one, other = made(2), made(1, seed=3)
    bare = PromptPairs.from_texts(
        [other.pairs[0].source],
        [other.pairs[0].target],
        [other.pairs[0].source_answer],
        [other.pairs[0].target_answer],
        TOKENIZER,
    )
    out = swept("activation", [one, bare], "last")
    assert out.prompts.columns["kind"] == (0, 1, None)
    assert list(out.by_group("kind")) == [0, 1, None]


def test_a_warning_before_an_error_is_told() -> None:
    mixed = made(3, seed=1)
    with (
        pytest.warns(PromptWarning, match="prompts have"),
        pytest.raises(PatchingError, match="not confident"),
    ):
        activation_patching(
            MODEL, None, SITES["each"], [mixed], force_model_confidence=True, progress=False
        )


BAD: dict[str, tuple[Any, str]] = {
    "empty": (iter(()), "without batches"),
    "tokens": (iter([torch.ones(1, 2).long()]), "batch 0 is tensor"),
    "later": ([made(1), "text"], "batch 1 is 'text'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_batch_is_told(case: str) -> None:
    batches, match = BAD[case]
    with pytest.raises(TokensError, match=match):
        swept("activation", batches)


def test_a_fault_of_a_batch_names_it() -> None:
    bad = made(2)
    broken = itertools.chain(made(3).batches(3), [bad.swapped()])
    with pytest.raises(PatchingError) as caught:
        swept("activation", broken, force_model_confidence=True)
    (note,) = caught.value.__notes__
    assert "in batch 0 of source_tokens, whose first prompt is number 0" in note


def equal() -> PromptPairs:
    """A pair whose runs differ, but not in any answer's logit."""
    fills = [{"A": "Mary", "B": "Sue"}]
    return PromptPairs.from_template(
        "{A} and {B} went to", fills, fills, [" Mary"], [" Sue"], TOKENIZER
    )


def test_means_of_all_batches_are_compared_and_not_of_each() -> None:
    """The runs of a batch may be equal in a metric, where those of all are not."""
    batches = [equal(), made(2, longest=1)]
    found = swept("activation", batches, "last")
    assert found.count == 3
    target = found.baseline.target
    expected = (found.patched("mlp").mean(-1) - target.mean()) / (
        found.baseline.source.mean() - target.mean()
    )
    torch.testing.assert_close(found["mlp"], expected, **CLOSE)
    torch.testing.assert_close(
        swept("activation", batches, "last", keep="means")["mlp"], expected, **CLOSE
    )
    with pytest.raises(MetricError, match="would divide by 0"):
        swept("activation", [equal(), equal()], "last")


@pytest.mark.parametrize("size", [0, -1, 1.5, "two"])
def test_a_batch_has_a_size(size: Any) -> None:
    with pytest.raises(TokensError, match="size of a batch"):
        made(2).batches(size)
