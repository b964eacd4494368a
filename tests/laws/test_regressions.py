"""What once gave a wrong number, or an error from deep inside, and must not again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight import NNsight
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from nnpatch_core import (
    Component,
    DecoderAPI,
    MultiSite,
    Outcome,
    PromptPairs,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    cache_average,
    decoder_components,
    execution_order,
)
from nnpatch_core.errors import AdapterError, PatchingError, PositionError
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer

#: Padding is what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

SOURCE, TARGET = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 9, 7, 8]])
ANSWERS = (torch.tensor([1]), torch.tensor([2]))


def sweep(
    sites: Any,
    model: Any = None,
    source: torch.Tensor = SOURCE,
    target: torch.Tensor = TARGET,
    **options: Any,
) -> Outcome:
    options = {"progress": False, **options}
    model = model or tiny_model()
    return activation_patching(model, tiny_api(), sites, source, target, *ANSWERS, **options)


def traced(model: Any, tokens: torch.Tensor, visit: Callable[..., Any]) -> None:
    with model.trace(tokens):
        visit(model)


def test_metric_that_works_in_place_changes_no_other() -> None:
    def masked(logits: Tensor) -> Tensor:
        logits[:, 10:] = -1e9
        return logits.softmax(-1)[:, 1]

    alone = sweep(Sites("resid"), metric="answer_probability")
    both = sweep(Sites("resid"), metric=[masked, "answer_probability"])
    beside = both.for_metric("answer_probability")
    assert torch.equal(beside.baseline.source, alone.baseline.source)
    assert torch.equal(beside["resid"], alone["resid"])


def test_metric_with_an_optional_context_is_given_it() -> None:
    def gap(logits: Tensor, context: Any = None) -> Tensor:
        assert context is not None
        return logits.gather(-1, context.source_answer_index[:, None])[:, 0]

    def scaled(logits: Tensor, temperature: Any = 2.0) -> Tensor:
        return logits[:, 1] / temperature

    out = sweep(Sites("resid"), metric=[gap, scaled])
    torch.testing.assert_close(out.baseline.source / 2, out.for_metric("scaled").baseline.source)


def test_two_adapters_in_one_list_do_not_meet() -> None:
    other = DecoderAPI("Other", ("llama",), {"mlp": Component("input_layernorm")})
    sites = [Site.get_site(api, "mlp", 1, seq_pos=[-1]) for api in (tiny_api(), other)]
    together = sweep(Sites.from_sites(sites), engine="full")["mlp"]
    apart = [sweep(Sites.from_sites([site]), engine="full")["mlp"][0] for site in sites]
    assert together.tolist() == [value.item() for value in apart]
    assert apart[0] != apart[1]


class Wrapper(nn.Module):
    """Passes everything on, as compiled models and adapters of weights do."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model
        self.config = model.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:this sweep runs:nnpatch_core.errors.EngineWarning")
def test_position_ids_reach_a_wrapped_model() -> None:
    """Absolute positions would be wrong for a left-padded prompt."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
    api = DecoderAPI("GPT2", ("gpt2",), {"resid": Component("")}, layers="inner.transformer.h")
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    padding = torch.tensor([[60, 61]])
    out = activation_patching(
        Wrapper(model),
        api,
        Sites("resid", seq_pos_type="last"),
        torch.cat([SOURCE, padding], 1),
        torch.cat([TARGET, padding], 1),
        *ANSWERS,
        attention_mask=mask,
        progress=False,
    )
    logits = model(SOURCE).logits[0, -1]
    torch.testing.assert_close(out.baseline.source[0], logits[1] - logits[2], atol=1e-5, rtol=0)


def test_activation_without_an_axis_of_prompts_is_refused() -> None:
    class Flattens(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.flatten(1)

    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.flat = Flattens()
        layer.mlp.register_forward_hook(lambda module, args, out: module.flat(out).view_as(out))
    table = {**decoder_components(), "mlp": Component("mlp.flat")}
    api = DecoderAPI("Flat", ("llama",), table)
    with pytest.raises(AdapterError, match=r"\[batch, seq, width\].*'mlp.flat' is \[1, 128\]"):
        activation_patching(model, api, Sites("mlp"), SOURCE, TARGET, *ANSWERS, progress=False)


@pytest.mark.filterwarnings("ignore:this sweep runs:nnpatch_core.errors.EngineWarning")
def test_activation_with_positions_before_prompts_is_refused() -> None:
    class Transposes(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.transpose(0, 1)

    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.flip = Transposes()
        layer.mlp.register_forward_hook(lambda module, args, out: module.flip(out).transpose(0, 1))
    api = DecoderAPI("Flipped", ("llama",), {"mlp": Component("mlp.flip")})
    with pytest.raises(AdapterError, match=r"\[batch, seq, width\].*\[4, 1, 32\].*\[1, 4\]"):
        activation_patching(model, api, Sites("mlp"), SOURCE, TARGET, *ANSWERS, progress=False)
    with pytest.raises(AdapterError, match=r"\[batch, seq, width\].*\[4, 1, 32\].*\[1, 4\]"):
        ablation_patching(model, api, Sites("mlp"), SOURCE, *ANSWERS, progress=False)


@pytest.mark.parametrize("lengths", [(3, 1), (3, 2)])
def test_mean_over_batches_of_other_lengths_is_refused(lengths: tuple[int, int]) -> None:
    site = Site.get_site(tiny_api(), "mlp", 1)
    batches = [torch.arange(3, 3 + length)[None] for length in lengths]
    with pytest.raises(PositionError, match=f"over 3 positions, and this run has {lengths[1]}"):
        cache_average(tiny_model(), [site], batches)


def test_cache_of_another_shape_is_refused() -> None:
    model = NNsight(tiny_model())
    site = Site.get_site(tiny_api(), "mlp", 1)
    traced(model, SOURCE[:, :1], site.cache)
    with pytest.raises(PatchingError, match=r"mlp L1 has the shape \[1, 4, 32\].*\[1, 1, 32\]"):
        traced(model, TARGET, site.patch)


@pytest.mark.parametrize(
    ("place", "says"), [(("mlp", 11), "layer 11 .* 0 to 2"), (("q", 1, 11), "head 11 .* 0 to 3")]
)
def test_site_that_the_model_lacks_is_refused_in_ones_own_trace(
    place: tuple[Any, ...], says: str
) -> None:
    model = NNsight(tiny_model())
    site = Site.get_site(tiny_api(), *place)
    with pytest.raises(PatchingError, match=says), model.trace(SOURCE):
        site.cache(model)


def test_what_is_padding_in_every_prompt_is_no_cell() -> None:
    """A measured 0 must not look like one that was never measured."""
    tokens = torch.tensor([[3, 3, 5, 6, 7, 8], [3, 3, 3, 3, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
    other = tokens.clone()
    other[:, -2] = 9
    out = activation_patching(
        tiny_model(),
        tiny_api(),
        Sites("resid", seq_pos_type="each"),
        tokens,
        other,
        torch.tensor([1, 1]),
        torch.tensor([2, 2]),
        attention_mask=mask,
        progress=False,
    )
    assert out.swept("resid").all(0).tolist() == [False, False, True, True, True, True]
    assert out.to_dataframe()["value"].isna().sum() == 2 * 3
    own = out.per_prompt("resid")
    assert own[:, 2:4, 1].isnan().all()
    assert not own[:, 2:4, 0].isnan().any()
    assert {row["position"] for row in out.strongest(100)} == {2, 3, 4, 5}


def test_runs_that_overflow_are_seen_and_drawn() -> None:
    sites = Sites("resid", seq_pos_type="each")

    def plain(logits: Tensor) -> Tensor:
        return logits[:, 1]

    before = sweep(sites, metric=plain, engine="full")
    measured = before.raw["plain"]["resid"].flatten()
    unpatched = torch.cat([before.baseline.source, before.baseline.target])
    worst = [value for value in measured if value not in unpatched][:2]

    def overflows(logits: Tensor) -> Tensor:
        found = plain(logits)
        found[found == worst[0]] = torch.nan
        found[found == worst[1]] = torch.inf
        return found

    out = sweep(sites, metric=overflows, engine="full")
    first, second = (row["value"] for row in out.strongest(2))
    assert math.isnan(first)
    assert math.isinf(second)
    out.plot()
    out.plot(interactive=True)


def test_layers_that_are_one_module_are_refused() -> None:
    model = tiny_model()
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(AdapterError, match="occurs twice"):
        sweep(Sites("mlp"), model)


def test_item_of_an_input_is_refused() -> None:
    with pytest.raises(ValueError, match="first argument"):
        Component("", "input", item=1)


def test_strategy_that_gives_a_generator() -> None:
    class Generated:
        one_by_one = True

        def expand(self, seq_len: int) -> Iterator[Any]:
            return ((position,) for position in range(seq_len))

    assert bool(sweep(Sites("resid", seq_pos_type=Generated())).swept("resid").all())


def test_api_is_looked_at_beside_sites_of_ones_own() -> None:
    site = Site.get_site(tiny_api(), "mlp", 1)
    with pytest.raises(PatchingError, match="NoSuchAdapter"):
        activation_patching(
            tiny_model(), "NoSuchAdapter", Sites.from_sites([site]), SOURCE, TARGET, *ANSWERS
        )


def test_list_of_sites_that_is_called_like_an_alias() -> None:
    cell = MultiSite([Site.get_site(tiny_api(), "mlp", 1)], name="z")
    assert sweep(Sites.from_sites([cell]))["z"].shape == (1,)


@pytest.mark.filterwarnings("ignore:this sweep runs:nnpatch_core.errors.EngineWarning")
def test_module_that_is_called_like_a_value_of_nnsight() -> None:
    """BERT's layers have modules called `output`."""

    class Output(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.output = Output()
        layer.mlp.register_forward_hook(lambda module, args, out: module.output(out))
    table = {**decoder_components(), "mlp": Component("mlp.output")}
    api = DecoderAPI("Named", ("llama",), table)
    with pytest.warns(UserWarning, match="E_output"):
        out = activation_patching(
            model, api, Sites("mlp"), SOURCE, TARGET, *ANSWERS, progress=False
        )
    torch.testing.assert_close(out["mlp"], sweep(Sites("mlp"))["mlp"])


def test_pairs_feed_an_ablation() -> None:
    prompts = ["The capital of France is", "The capital of Japan is"]
    tokenizer = tiny_tokenizer([*prompts, " Paris Tokyo"])
    pairs = PromptPairs.from_texts(prompts[:1], prompts[1:], [" Paris"], [" Tokyo"], tokenizer)
    sites = Sites("mlp", seq_pos_type="each")
    arguments = pairs.ablation_arguments()
    out = ablation_patching(tiny_model(), None, sites, **arguments, progress=False)
    assert out.tokens == ("The", " capital", " of", " France", " is")


@pytest.mark.parametrize("token", ["$^", "<s>"])
def test_tokens_that_look_like_markup_are_drawn(token: str, tmp_path: Path) -> None:
    prompts = [f"a {token} is", "a b is"]
    tokenizer = tiny_tokenizer([*prompts, " c d"])
    pairs = PromptPairs.from_texts(prompts[:1], prompts[1:], [" c"], [" d"], tokenizer)
    out = activation_patching(
        tiny_model(), None, Sites("resid", seq_pos_type="each"), **pairs.arguments(), progress=False
    )
    out.plot().savefig(tmp_path / "out.png")
    labels = out.plot(interactive=True).layout.xaxis.ticktext
    assert labels[1] == {"$^": "$^|b", "<s>": "&lt;s&gt;|b"}[token]


def test_sites_are_handed_out_in_execution_order() -> None:
    sites = Sites(["o", "resid"], layers=[2, 0], heads=[3, 1], seq_pos_type="last")
    found = sites.get_sites_dict(tiny_model(), tiny_api(), SOURCE)
    for listed in found.values():
        assert list(execution_order(listed)) == listed
    assert [(site.layer, site.head) for site in found["o"]] == [(0, 1), (0, 3), (2, 1), (2, 3)]
