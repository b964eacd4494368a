"""Metrics that read positions, and data of each prompt: what they are given, what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nnpatch_core import (
    MetricContext,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    per_prompt,
    reads_positions,
    reads_tokens,
)
from nnpatch_core.engine.cone import unembedding
from nnpatch_core.errors import (
    CheckpointError,
    ConfidenceError,
    MemoryBudgetError,
    MetricError,
    UnknownNameError,
)
from nnpatch_core.metrics import answer_sets, reading_of
from nnpatch_core.seq_pos import Span
from nnpatch_core.testing import tiny_api, tiny_model, traces
from tests.helpers.counted import Counted

SOURCE = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6], [9, 4, 3, 12]])
TARGET = torch.tensor([[5, 9, 7, 8], [9, 18, 7, 6], [9, 14, 3, 12]])
ANSWERS = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
SITES = Sites(["mlp", "resid"], layers=[1], seq_pos_type="each")
PADDED = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")


def sweep(metric: Any, patch: Callable[..., Any] = activation_patching, **options: Any) -> Any:
    prompts = [TARGET] if patch is ablation_patching else [SOURCE, TARGET]
    model = options.pop("model", None) or tiny_model("llama")
    options = {"sites": SITES, "progress": False, **options}
    sites = options.pop("sites")
    return patch(model, tiny_api(), sites, *prompts, *ANSWERS, metric=metric, **options)


ENTRIES: dict[str, Callable[..., Any]] = {
    "activation": activation_patching,
    "zero": ablation_patching,
    "attribution": attribution_patching,
}
entries = pytest.mark.parametrize("patch", ENTRIES.values(), ids=ENTRIES)


def refused(
    metric: Any, patch: Callable[..., Any] = activation_patching, **options: Any
) -> tuple[Exception, int]:
    """The error of a sweep, and how many forwards came before it."""
    model = Counted(tiny_model("llama"))
    with pytest.raises(MetricError) as told:
        sweep(metric, patch, model=model.model, **options)
    return told.value, model.forwards


# What a metric is given --------------------------------------------------------------------------


def whole(tokens: Tensor) -> Tensor:
    """`[batch, seq, vocab]` by the model alone."""
    with torch.no_grad():
        return tiny_model("llama")(tokens).logits


FORMS: dict[str, Any] = {
    "list": [-1, -3],
    "tuple": (3, 1),
    "range": range(3, 0, -2),
    "numpy": [np.int64(3), np.int64(1)],
    "tensor": torch.tensor([3, -3]),
    "rows": torch.tensor([[3, 1]] * 3, dtype=torch.int32),
    "function": lambda context: torch.tensor([[-1, 1]]).expand(len(context.tokens), -1),
    "name": ["last", 1],
}


@pytest.mark.parametrize("form", FORMS)
@entries
def test_the_forms_of_positions(patch: Callable[..., Any], form: str) -> None:
    seen: list[tuple[Tensor, MetricContext]] = []

    @per_prompt
    @reads_positions(FORMS[form])
    def mine(logits: Tensor, context: MetricContext) -> Tensor:
        seen.append((logits, context))
        return logits[:, 0, 2] + 2 * logits[:, 1, 3]

    out = sweep(mine, patch)
    target = whole(TARGET)
    expected = target[:, 3, 2] + 2 * target[:, 1, 3]
    torch.testing.assert_close(out.baseline.target, expected, atol=1e-5, rtol=0)
    logits, context = seen[1]
    torch.testing.assert_close(logits.detach(), target[:, [3, 1]], atol=1e-5, rtol=0)
    assert context.positions is not None
    assert context.positions.tolist() == [[3, 1]] * 3
    assert context.target_logits.shape == logits.shape == context.source_logits.shape


def test_each_run_has_its_own_tokens_and_each_metric_its_own_logits() -> None:
    seen: dict[str, list[Any]] = {"mine": [], "other": []}

    @reads_positions([0, 2])
    def mine(logits: Tensor, context: MetricContext) -> Tensor:
        assert context.tokens is not None
        assert context.mask is not None
        seen["mine"].append((context.tokens.tolist(), logits.shape[1:]))
        assert context.mask.all()
        return logits[:, 1, 0]

    @reads_positions([2, 1, 3])
    def third(logits: Tensor) -> Tensor:
        return logits[:, 0, 0]

    def other(logits: Tensor, context: MetricContext) -> Tensor:
        assert context.positions is None
        seen["other"].append((logits.shape, context.source_logits.shape))
        return logits[:, 0]

    out = sweep([mine, third, other])
    tokens = [each for each, _ in seen["mine"][:2]]
    assert tokens == [SOURCE.tolist(), TARGET.tolist()]
    assert all(shape == (2, 64) for _, shape in seen["mine"])
    assert {*map(str, seen["other"])} == {str((torch.Size([3, 64]),) * 2)}
    assert out.raw["mine"]["resid"].equal(out.raw["third"]["resid"])


def _prefers(row: int, one: Tensor, other: Tensor) -> bool:
    source, target = (whole(tokens)[row, -1] for tokens in (SOURCE, TARGET))
    return bool(source[one[row]] > source[other[row]] and target[one[row]] < target[other[row]])


def test_confidence_looks_at_the_last_token() -> None:
    gap = whole(SOURCE)[:, -1] - whole(TARGET)[:, -1]
    # Answers that each prompt prefers by as much as can be: by the logits less what both share.
    one, other = gap.argmax(-1), gap.argmin(-1)
    kept = [row for row in range(3) if _prefers(row, one, other)]
    own = one[kept], other[kept]
    assert kept

    @reads_positions([1])
    def mine(logits: Tensor) -> Tensor:
        return logits[:, 0, 0]

    def confident(source: Tensor, target: Tensor) -> None:
        activation_patching(
            tiny_model("llama"),
            tiny_api(),
            SITES,
            SOURCE[kept],
            TARGET[kept],
            source,
            target,
            metric=mine,
            force_model_confidence=True,
            progress=False,
        )

    confident(*own)
    with pytest.raises(ConfidenceError):
        confident(*own[::-1])


def test_the_positions_of_a_span() -> None:
    """A name is resolved for both runs by whoever knows the prompts."""

    @reads_positions(["S2", -1])
    def mine(logits: Tensor) -> Tensor:
        return logits[:, 0, 0]

    nothing = torch.empty(3, 0)
    context = MetricContext(*ANSWERS, nothing, nothing, tokens=SOURCE, mask=torch.ones(3, 4))
    spans = {"S2": (torch.tensor([[0], [1], [2]]), torch.tensor([[1], [1], [0]]))}
    found = reading_of({"mine": mine}, context, context, lambda name: spans[name])
    assert found is not None
    assert found.source.tolist() == [[0, 3], [1, 3], [2, 3]]
    assert found.target.tolist() == [[1, 3], [1, 3], [0, 3]]
    assert found.columns == {"mine": (0, 1)}
    assert found.last is None


@pytest.mark.filterwarnings("ignore:span 'S2' begins:nnpatch_core.errors.PromptWarning")
@entries
def test_a_metric_reads_the_span_of_each_run(patch: Callable[..., Any]) -> None:
    ends = torch.tensor([[[0, 2], [1, 3], [2, 3]], [[1, 2], [0, 1], [2, 4]]])
    spans = {"S2": Span(source=ends[0], target=ends[1])}

    @per_prompt
    @reads_positions(["S2"])
    def mine(logits: Tensor) -> Tensor:
        return logits[:, 0, 2]

    out = sweep(mine, patch, spans=spans)
    rows = torch.arange(3)
    found = whole(TARGET)[rows, ends[1, :, 1] - 1, 2]
    torch.testing.assert_close(out.baseline.target, found, atol=1e-5, rtol=0)
    if patch is not ablation_patching:
        found = whole(SOURCE)[rows, ends[0, :, 1] - 1, 2]
        torch.testing.assert_close(out.baseline.source, found, atol=1e-5, rtol=0)


# What is refused, before the model runs ----------------------------------------------------------


def raising(context: MetricContext) -> Tensor:
    raise ValueError("no")


POSITIONS: dict[str, tuple[Any, str]] = {
    "out of range": ([4], "position 4, out of range for prompts of 4 tokens: allowed are -4 to 3"),
    "far left": ([-5], "position -5, out of range"),
    "a bool": ([True], "must be an integer, got True"),
    "half": ([0.5], "must be an integer, got 0.5"),
    "none": ([], "no position"),
    "a number": (2, "2: it must be a list of positions"),
    "span": ("S2", "reads the span 'S2': no span 'S2': these prompts have no spans"),
    "floats": (torch.ones(3, 2), "torch.float32, not integers"),
    "rows": (torch.ones(2, 2, dtype=torch.int64), r"must be \[batch, positions\] = \[3, any\]"),
    "meta": (torch.ones(3, 2, dtype=torch.int64, device="meta"), "cannot be read"),
    "raises": (raising, "declares with reads_positions raised ValueError: no"),
    "a list of a function": (lambda context: [[1]], r"gives \[\[1\]\]: it must give a tensor"),
    "uneven": (
        lambda context: torch.zeros(3, 1 + int(context.tokens[0, 1] == 9), dtype=torch.int64),
        "1 positions of the source run and 2 of the target run",
    ),
}


@pytest.mark.parametrize("case", POSITIONS)
def test_positions_that_are_none(case: str) -> None:
    wanted, told = POSITIONS[case]

    @reads_positions(wanted)
    def mine(logits: Tensor) -> Tensor:
        return logits[:, 0, 0]

    error, forwards = refused(mine)
    assert re.search(told, str(error)), error
    assert "'mine'" in str(error)
    assert not forwards


@PADDED
@pytest.mark.parametrize("wanted", [[0], torch.tensor([[1], [0], [2]])])
def test_positions_that_are_padding_in_a_prompt(wanted: Any) -> None:
    @reads_positions(wanted)
    def mine(logits: Tensor) -> Tensor:
        return logits[:, 0, 0]

    error, forwards = refused(mine, attention_mask=MASK)
    assert "position 0 of the left-padded batch, which is padding in prompt 1" in str(error)
    assert not forwards


def test_only_what_can_be_called_declares_positions() -> None:
    with pytest.raises(MetricError, match="can be called, got 'loss'"):
        reads_positions([1])("loss")  # type: ignore[type-var]


METRIC_DATA: dict[str, tuple[Any, str]] = {
    "a tensor": (torch.ones(3), "must be a mapping of names to tensors"),
    "a number": ({1: torch.ones(3)}, "names in metric_data must be strings, got 1"),
    "a list": ({"weight": [1, 2, 3]}, r"\['weight'\] must be a torch tensor .*got list"),
    "short": ({"weight": torch.ones(2)}, r"a row for each of 3 prompts, and its shape is \[2\]"),
    "one number": ({"weight": torch.tensor(1.0)}, r"and its shape is \[\]"),
    "meta": ({"weight": torch.ones(3, device="meta")}, "no numbers that can be read"),
}


@pytest.mark.parametrize("case", METRIC_DATA)
@entries
def test_data_that_is_none(patch: Callable[..., Any], case: str) -> None:
    data, told = METRIC_DATA[case]
    error, forwards = refused("logit_difference", patch, metric_data=data)
    assert re.search(told, str(error)), error
    assert not forwards


SETS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, r"reads metric_data\['source_answers'\].*metric_data has nothing"),
    "one": ({"source_answers": [[1], [2], [3]]}, r"\['target_answers'\].*has 'source_answers'"),
    "flat": (
        {"source_answers": [1, 2, 3], "target_answers": [1, 2, 3]},
        r"token ids \[batch, any\], and it is \[3\] of torch.int64",
    ),
    "floats": (
        {"source_answers": [[1.0]] * 3, "target_answers": [[1]] * 3},
        r"it is \[3, 1\] of torch.float32",
    ),
    "empty row": (
        {"source_answers": [[1, 2], [-1, -1], [3, -1]], "target_answers": [[1]] * 3},
        r"\['source_answers'\] has none for prompt 1",
    ),
    "-100": (
        {"source_answers": [[1, -100]] * 3, "target_answers": [[1]] * 3},
        "holds the id -100",
    ),
}


@pytest.mark.parametrize("case", SETS)
@entries
def test_answer_sets_that_are_none(patch: Callable[..., Any], case: str) -> None:
    data, told = SETS[case]
    tensors = {name: torch.tensor(value) for name, value in data.items()}
    error, forwards = refused("answer_set_difference", patch, metric_data=tensors)
    assert re.search(told, str(error)), error
    assert not forwards


def test_an_answer_beyond_the_vocabulary() -> None:
    data = {"source_answers": torch.full((3, 1), 64), "target_answers": torch.ones(3, 1).long()}
    error, forwards = refused("answer_set_difference", metric_data=data)
    assert "holds the id 64; the model's vocabulary is 0 to 63" in str(error)
    assert not forwards


def test_a_way_to_make_one_number_of_a_set() -> None:
    with pytest.raises(UnknownNameError, match="unknown how 'max'; there are logsumexp, mean"):
        answer_sets("max")


def test_sets_of_other_names_and_their_order() -> None:
    data = {"greater": torch.tensor([[1, 2]] * 3), "less": torch.tensor([[3, -1]] * 3)}
    there = sweep(answer_sets(right="greater", wrong="less"), metric_data=data)
    shuffled = {"greater": torch.tensor([[-1, 2, 1]] * 3), "less": torch.tensor([[3]] * 3)}
    back = sweep(answer_sets(right="greater", wrong="less"), metric_data=shuffled)
    assert (there["resid"] - back["resid"]).abs().max() < 1e-5
    sets = {"answers": ANSWERS[0][:, None], "others": ANSWERS[1][:, None]}
    for how in ("logsumexp", "mean"):
        one = sweep(answer_sets(how, right="answers", wrong="others"), metric_data=sets)
        assert (one["resid"] - sweep("logit_difference")["resid"]).abs().max() < 1e-5


@PADDED
def test_the_loss_of_a_prompt_of_one_token() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]])
    error, forwards = refused("loss", attention_mask=mask)
    assert "prompt 1 has but one token" in str(error)
    assert not forwards


# Trials on the unpatched runs --------------------------------------------------------------------


def test_data_that_is_changed_in_place_is_found_and_is_no_others() -> None:
    own = torch.ones(3)

    def mine(logits: Tensor, context: MetricContext) -> Tensor:
        context.data["weight"].mul_(2)
        return logits[:, 0] * context.data["weight"]

    error, _ = refused(mine, metric_data={"weight": own})
    assert "changes its context in place" in str(error)
    assert own.eq(1).all()


@reads_positions([0, 1])
def of_tokens(logits: Tensor, context: MetricContext) -> Tensor:
    assert context.tokens is not None
    context.tokens[0, 0] = 7
    return logits[:, 0, 0]


@reads_positions([0, 1])
def of_source(logits: Tensor, context: MetricContext) -> Tensor:
    context.source_logits.mul_(2)
    return logits[:, 0, 0] + context.source_logits[:, 1, 1]


@pytest.mark.parametrize("metric", [of_tokens, of_source])
def test_a_context_that_is_changed_in_place(metric: Any) -> None:
    error, _ = refused([metric, "logit_difference"])
    assert "changes its context in place" in str(error)


@entries
def test_a_metric_that_is_no_prompts_own(patch: Callable[..., Any]) -> None:
    @per_prompt
    @reads_positions([1, 2])
    def mine(logits: Tensor) -> Tensor:
        return logits[:, 1, 0] - logits[:, 0, 0].mean()

    error, _ = refused(mine, patch)
    assert "declared with per_prompt, but gives a prompt another number" in str(error)


@entries
@pytest.mark.parametrize("alone", [False, True])
def test_tokens_that_are_not_declared(patch: Callable[..., Any], alone: bool) -> None:
    @reads_positions([1, 2])
    @reads_tokens(lambda context: context.source_answer_index[:, None])
    def mine(logits: Tensor, context: MetricContext) -> Tensor:
        own = logits.gather(-1, context.source_answer_index[:, None, None].expand(-1, 2, 1))
        return own.sum((1, 2)) + (logits[:, 1] > own[:, 1]).sum(-1)

    error, _ = refused(per_prompt(mine) if alone else mine, patch)
    assert "did not declare with reads_tokens" in str(error)


@PADDED
@entries
@pytest.mark.parametrize("alone", [False, True])
def test_logits_at_padding(patch: Callable[..., Any], alone: bool) -> None:
    """There are none: a metric that makes a number of what is nan there is found."""

    @reads_positions(lambda context: torch.arange(3).expand(len(context.tokens), -1))
    def mine(logits: Tensor) -> Tensor:
        return logits.nan_to_num(0.25)[..., 3].sum(1)

    error, _ = refused(per_prompt(mine) if alone else mine, patch, attention_mask=MASK)
    assert "reads logits at padding" in str(error)


# Checkpoints -------------------------------------------------------------------------------------


def read_at(place: int) -> Any:
    """One metric whatever is read: what tells two apart is where it reads."""
    return reads_positions(torch.tensor([[place]] * 3))(_of_mine)


def _of_mine(logits: Tensor, context: MetricContext) -> Tensor:
    return logits[:, 0, 0] * context.data["weight"]


def test_a_checkpoint_is_of_the_same_data(tmp_path: Path) -> None:
    file, weight = tmp_path / "sweep.ckpt", {"weight": torch.tensor([1.0, 2.0, 3.0])}
    metric = {"mine": lambda logits, context: logits[:, 0] * context.data["weight"]}
    first = sweep(metric, metric_data=weight, checkpoint=file)
    again = sweep(metric, metric_data=weight, checkpoint=file)
    assert first.raw["mine"]["resid"].equal(again.raw["mine"]["resid"])
    with pytest.raises(CheckpointError, match="metric_data"):
        sweep(metric, metric_data={**weight, "more": torch.ones(3)}, checkpoint=file)


def test_a_checkpoint_is_of_the_same_positions(tmp_path: Path) -> None:
    file, weight = tmp_path / "sweep.ckpt", {"weight": torch.ones(3)}
    sweep(read_at(1), metric_data=weight, checkpoint=file)
    sweep(read_at(1), metric_data=weight, checkpoint=file)
    with pytest.raises(CheckpointError, match="positions read"):
        sweep(read_at(2), metric_data=weight, checkpoint=file)


# What is computed --------------------------------------------------------------------------------


@PADDED
@pytest.mark.parametrize("few", [False, True])
def test_the_cone_projects_what_is_read_and_no_more(
    monkeypatch: pytest.MonkeyPatch, few: bool
) -> None:
    """Positions of each prompt's own, right of where a run begins; and of the ids declared."""
    read = torch.tensor([[1, 2], [2, 3], [3, 1]])

    def mine(logits: Tensor) -> Tensor:
        return logits[..., 3].sum(1) - logits[..., 7].sum(1)

    metric = reads_positions(read)(mine)
    if few:
        metric = reads_tokens(lambda context: torch.tensor([[3, 7]]))(metric)
    shapes: list[tuple[int, ...]] = []

    def counted(seen: Tensor, weight: Tensor, bias: Any) -> Tensor:
        shapes.append((seen.shape[:-1].numel(), len(weight)))
        return torch.nn.functional.linear(seen, weight, bias)

    monkeypatch.setattr(unembedding, "linear", counted)
    out = sweep(per_prompt(metric), attention_mask=MASK)
    assert out.info["engine"] == "cone"
    assert {ids for _, ids in shapes} == {2 if few else 64}
    # Each run projects what it reads at or right of its bucket's first token; beside the patched
    # runs go some unpatched ones, which are compared: here, with one bucket, one of each prompt.
    assert len(shapes) == 1
    patched = sum(
        int((~cells.elided).sum(0)[row]) * int((read[row] >= 1).sum())
        for cells in out.cells.values()
        for row in range(3)
    )
    assert shapes[0][0] == patched + int((read >= 1).sum()) + 2


def test_whole_forwards_project_what_some_prompt_reads() -> None:
    model = tiny_model("llama")
    seen: list[tuple[int, ...]] = []
    model.lm_head.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[:2])))
    metric = reads_positions([1, 2])(lambda logits: logits[:, 0, 1] + logits[:, 1, 2])
    sweep({"mine": metric}, model=model, engine="full")
    sweep({"mine": metric}, attribution_patching, model=model)
    assert {*seen} == {(3, 2)}


def test_what_no_metric_can_see_is_known_without_a_run() -> None:
    metric = {"mine": reads_positions([0, 1])(lambda logits: logits[:, 0, 1] + logits[:, 1, 2])}
    model = tiny_model("llama")
    with traces(model) as seen:
        out = sweep(metric, model=model, engine="cone")
    assert out.raw["mine"]["resid"][2:].eq(out.baseline.target).all()
    assert out.cells["resid"].elided[2:].all()
    assert not out.cells["resid"].elided[1].any()
    # Two runs are recorded; one bucket has the rest, from token 1 on.
    assert [trace.tokens for trace in seen] == [4, 4, 3]
    full = sweep(metric, engine="full")
    estimate = sweep(metric, attribution_patching)
    for name in out:
        assert (out[name] - full[name]).abs().max() < 1e-5
        assert estimate.exact(name)[1, 2:].all()
        assert not estimate.exact(name)[1, 1]


def test_in_the_last_layer_the_tokens_that_are_read_are_not_unread() -> None:
    sites = Sites("resid", layers=[2], seq_pos_type="each")
    metric = {"mine": reads_positions([1, 2])(lambda logits: logits[:, 0, 1] + logits[:, 1, 2])}
    out = sweep(metric, attribution_patching, sites=sites)
    exact = sweep(metric, sites=sites)
    assert out.unread("resid")[2].tolist() == [True, False, False, True]
    assert (out.raw["mine"]["resid"] - exact.raw["mine"]["resid"]).abs().max() > 0
    assert out.elided("resid")[2, 0]


def test_logits_that_do_not_fit_are_refused_before_a_run() -> None:
    model = Counted(tiny_model("llama"))
    metric = {"mine": reads_positions([0, 1, 2, 3])(lambda logits: logits[:, 1, 0])}
    sweep({"mine": lambda logits: logits[:, 0]}, memory_budget="80 KiB")
    with pytest.raises(
        MemoryBudgetError, match=r"logits of \d+ runs at 4 positions, which"
    ) as told:
        sweep(metric, model=model.model, memory_budget="80 KiB")
    assert "let metrics read fewer positions" in str(told.value)
    assert not model.forwards
