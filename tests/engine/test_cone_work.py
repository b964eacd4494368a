"""The cone engine runs what a patch can reach and no more, up to the columns of the head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnpatch_core import Site, Sites
from nnpatch_core.engine.cone import unembedding
from nnpatch_core.testing import tiny_model, traces
from nnpatch_gemma import Gemma2
from nnpatch_llama import Llama3
from tests.helpers.engines import check_cone, cut_by, of_rows
from tests.helpers.families import FAMILIES
from tests.helpers.metrics import answer_logit
from tests.helpers.oracle import COMPONENTS, random_prompts
from tests.helpers.pairs import LAYERS, Pairs, unlike, unlike_pairs

#: Padding is what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

# What need not be run.


def layers_run(model: Any) -> list[int]:
    """Will hold for each layer the tokens that have passed it, of all rows."""
    counts = [0] * LAYERS

    def count(number: int, output: Tensor) -> None:
        counts[number] += output.shape[0] * output.shape[1]

    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(
            lambda module, args, output, number=number: count(number, output)
        )
    return counts


#: Prompts that part at position 0, in the middle, at the last token, and never; two are padded.
BEFORE = random_prompts((7, 7, 5, 6), seed=1)
OTHER = unlike(BEFORE)
PARTING = [0, 4, 4, 6]
PARTED = [
    one[:at] + two[at:] for one, two, at in zip(BEFORE, OTHER, PARTING, strict=True)
]  # fmt: skip
PARTING_PAIRS = Pairs("llama", BEFORE, PARTED)
WIDTH = 7


def parting(row: int) -> int:
    """The first position in the batch where a prompt's runs differ; its width if none does."""
    return PARTING[row] + WIDTH - len(BEFORE[row])


def test_nothing_left_of_where_a_prompt_parts_from_its_source_is_run() -> None:
    sites = Sites(COMPONENTS, seq_pos_type="each")
    out = PARTING_PAIRS.sweep(sites, "cone")
    for name in COMPONENTS:
        cells = out.cells[name]
        positions = cells.index[:, [axis.name for axis in cells.axes].index("position")]
        for row in range(4):
            assert torch.equal(cells.elided[:, row], positions < parting(row)), (name, row)
        unpatched = out.baseline.target.expand(len(positions), -1)
        assert torch.equal(out.raw["logit_difference"][name][cells.elided], unpatched[cells.elided])


@pytest.mark.parametrize(
    ("names", "layers"),
    [(["resid_pre", "mlp", "resid"], [0, 1, 2]), (["resid"], [1, 2]), (["resid"], [2]), ("q", [1])],
)
def test_what_is_elided_costs_nothing(names: Any, layers: list[int]) -> None:
    """Each row that is run passes the layers above its entry, from its own token on."""
    model = tiny_model("llama")
    counts = layers_run(model)
    sites = Sites(names, layers, "each", heads=[3] if names == "q" else None)
    with cut_by(0.0, 10**6), traces(model) as seen:
        out = PARTING_PAIRS.sweep(sites, "cone", model)
    assert out.info["engine"] == "cone"
    # The first layer of each cell's rows: `resid` enters after its own.
    entries = [layer + (name == "resid") for name in out for layer in layers]
    # The source run and the target run, and of each number of tokens an unpatched row; of the
    # longest and of single tokens one of each of the four prompts, and one that enters with the
    # last.
    watched = sum(range(2, WIDTH)) + 4 * (WIDTH + 1)
    expected = [
        2 * 4 * WIDTH + watched * (layer >= min(entries)) + (WIDTH + 1) * (layer >= max(entries))
        for layer in range(LAYERS)
    ]
    for position in range(WIDTH):
        rows = sum(parting(row) <= position for row in range(4))
        for layer in range(LAYERS):
            entered = sum(entry <= layer for entry in entries)
            expected[layer] += entered * rows * (WIDTH - position)
    assert counts == expected
    starts = [WIDTH - trace.tokens for trace in of_rows(seen)]
    # Rows that pass no layer may as well run together.
    apart = min(entries) < LAYERS
    assert sorted(starts) == (list(range(min(map(parting, range(4))), WIDTH)) if apart else [0])


def test_a_token_that_differs_alone_changes_only_itself_below_attention() -> None:
    """At layer 0 what each token is on its own is compared by itself."""
    (prompt,) = random_prompts((7,), seed=1)
    changed = (*prompt[:3], prompt[3] % 60 + 3, *prompt[4:])
    beside = random_prompts((7,), seed=5)
    pairs = Pairs("llama", [prompt, *beside], [changed, *unlike(beside)])
    names = ["resid_pre", "q", "k", "v", "o", "mlp"]
    out = pairs.sweep(Sites(names, layers=[0], heads=[0], seq_pos_type="each"), "cone")
    for name in names:
        where = (~out.cells[name].elided[:, 0]).nonzero().flatten().tolist()
        assert where == ([3, 4, 5, 6] if name in ("o", "mlp") else [3])
        assert not out.cells[name].elided[:, 1].any()


def test_each_head_is_compared_by_its_own_columns() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        # The second head's queries are the same for every token, the third one's nearly so.
        model.model.layers[1].self_attn.q_proj.weight[8:16].zero_()
        model.model.layers[1].self_attn.q_proj.weight[17:24].zero_()
    pairs = unlike_pairs("llama", 5, 5)
    sites = Sites("q", layers=[1], seq_pos_type="last")
    found = pairs.sweep(sites, "cone", model)
    assert found.cells["q"].elided.tolist() == [[head == 1] * 2 for head in range(4)]
    check_cone(found, pairs.sweep(sites, "full", model))
    together = Sites.from_sites([Site.get_site(Llama3, "q", 1, None, [-1])])
    assert not pairs.sweep(together, "cone", model).cells["q"].elided.any()


def test_two_runs_of_one_prompt_are_not_run() -> None:
    prompts = random_prompts((6, 6), seed=1)
    pairs = Pairs("gemma2", prompts, [unlike(prompts)[0], prompts[1]])
    sites = Sites(COMPONENTS, seq_pos_type="each")
    out = pairs.sweep(sites, "cone")
    check_cone(out, pairs.sweep(sites, "full"))
    for name in COMPONENTS:
        assert out.cells[name].elided[:, 1].all()
        assert not out.cells[name].elided[:, 0].any()


def test_zeros_where_zeros_were() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    pairs = unlike_pairs("llama", 8, 5, 7)
    sites = Sites("mlp", layers=[1], seq_pos_type="each")
    with traces(model) as seen:
        out = pairs.ablate(sites, "cone", model)
    assert out.info["engine"] == "cone"
    assert out.cells["mlp"].elided.all()
    assert of_rows(seen) == []
    unpatched = out.baseline.target
    assert torch.equal(out.patched("mlp")[1], unpatched.expand(8, -1))
    with traces(model) as seen:
        other = pairs.ablate(Sites("mlp", layers=[2]), "cone", model)
    assert not other.cells["mlp"].elided.any()
    assert of_rows(seen)


@pytest.mark.parametrize(
    ("overhead", "tokens_at_once", "count"), [(0.0, 10**6, 7), (1e6, 10**6, 1), (0.0, 1, 7 * 9)]
)
def test_rows_are_cut_by_what_a_machine_costs(
    overhead: float, tokens_at_once: int, count: int
) -> None:
    pairs = unlike_pairs("llama", 7, 7, 7)
    sites = Sites("resid_pre", seq_pos_type="each")
    with cut_by(overhead, tokens_at_once), traces(pairs.model) as seen:
        pairs.sweep(sites, "cone")
    assert len(of_rows(seen)) == count


# The head.


def projected(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Will hold what the head is given to project, and the weights that it projects by."""
    seen = []

    def spy(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append((given, weight))
        return nn.functional.linear(given, weight, bias)

    monkeypatch.setattr(unembedding, "linear", spy)
    return seen


def test_only_the_columns_that_are_read_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    seen, whole_heads = projected(monkeypatch), []

    real = nn.Linear.forward

    def count(module: nn.Linear, given: Tensor) -> Tensor:
        output = real(module, given)
        if module is model.lm_head:
            whole_heads.append(output.shape)
        return output

    # No hook, as the head of a model with one there is left alone.
    monkeypatch.setattr(nn.Linear, "forward", count)
    pairs, sites = unlike_pairs("llama", 8, 5, 7), Sites("resid", seq_pos_type="each")
    with traces(model) as ran:
        out = pairs.sweep(sites, "cone", model, metric=["logit_difference", answer_logit])
    answers = sorted({*pairs.answers[0].tolist(), *pairs.answers[1].tolist()})
    assert len(seen) == len(of_rows(ran))
    for last, weight in seen:
        assert last.shape[1:] == (1, 32)
        assert torch.equal(weight, model.lm_head.weight[answers])
    # The whole head runs in the source run and the target run, and nowhere else.
    assert [shape[0] for shape in whole_heads] == [3, 3]
    expected = pairs.sweep(sites, "full", model, metric=["logit_difference", answer_logit])
    check_cone(out, expected)
    seen.clear()
    whole_heads.clear()
    with traces(model) as ran:
        pairs.sweep(sites, "cone", model, metric=["logit_difference", "kl_divergence"])
    assert seen == []
    assert len(whole_heads) == len(of_rows(ran)) + 2
    assert {shape[1] for shape in whole_heads} == {1}


def test_the_head_projects_the_last_token_even_where_the_model_would_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")

    class KeepsAll(type(model)):
        def forward(
            self,
            input_ids: Any,
            attention_mask: Any = None,
            position_ids: Any = None,
            past_key_values: Any = None,
            use_cache: Any = None,
        ) -> Any:
            return super().forward(
                input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache
            )

    model.__class__ = KeepsAll
    seen = projected(monkeypatch)
    pairs, sites = unlike_pairs("llama", 8, 5, 7), Sites("resid", seq_pos_type="each")
    check_cone(pairs.sweep(sites, "cone", model), pairs.sweep(sites, "full", model))
    assert {last.shape[1] for last, _ in seen} == {1}


#: What a model does with its logits, as strongly as it can be seen.
Granite, Cohere = FAMILIES["granite"].api, FAMILIES["cohere"].api
AFTER_THE_HEAD = {
    "capped": (Gemma2, ("gemma2", {"final_logit_softcapping": 1.5})),
    "divided": (Granite, ("granite", {"logits_scaling": 7.0})),
    "multiplied": (Cohere, ("cohere", {"logit_scale": 3.0})),
    "with a bias": (FAMILIES["phi"].api, ("phi", {})),
}


@pytest.mark.parametrize("name", AFTER_THE_HEAD)
def test_what_comes_after_the_head(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    api, (family, config) = AFTER_THE_HEAD[name]
    model = tiny_model(family, **config)
    pairs = unlike_pairs("llama", 8, 5, 7)
    sites = Sites(["resid", "mlp"], seq_pos_type="each")
    seen = projected(monkeypatch)
    found = pairs.sweep(sites, "cone", model, api=api)
    assert seen
    check_cone(found, pairs.sweep(sites, "full", model, api=api))
    if name == "capped":
        # By far: no difference can be above 3, and many would be.
        given = torch.cat([last[:, 0] for last, _ in seen])
        uncapped = nn.functional.linear(given, model.lm_head.weight)
        assert (uncapped[:, 7] - uncapped[:, 50]).abs().max() > 4
        assert found.patched("resid").nan_to_num().abs().max() <= 3


class OwnLinear(nn.Linear):
    """A projection that does more than `nn.Linear`, such as a quantised one."""

    def forward(self, given: Tensor) -> Tensor:
        return super().forward(given) * 2


def test_a_head_that_is_no_plain_matrix_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    model.lm_head.__class__ = OwnLinear
    pairs, sites = unlike_pairs("llama", 8, 5, 7), Sites("resid", seq_pos_type="each")
    seen = projected(monkeypatch)
    check_cone(pairs.sweep(sites, "cone", model), pairs.sweep(sites, "full", model))
    assert seen == []


def test_a_hook_on_all_modules_sees_all_logits() -> None:
    """It is on the unembedding too, and may look at the whole vocabulary."""
    model = tiny_model("llama")

    def centred(module: nn.Module, args: Any, output: Any) -> Any:
        return output - output.amax(-1, True) if module is model.lm_head else None

    pairs = unlike_pairs("llama", 6, 6)
    sites = Sites("mlp", seq_pos_type="last")
    hook = nn.modules.module.register_module_forward_hook(centred)
    try:
        # Of one token, so that what is taken off does not cancel.
        cone, full = (
            pairs.sweep(sites, engine, model, metric=answer_logit) for engine in ("cone", "full")
        )
    finally:
        hook.remove()
    assert cone.info["engine"] == "cone"
    torch.testing.assert_close(cone.patched("mlp"), full.patched("mlp"), rtol=1e-4, atol=1e-4)
