"""Adapters read off models: the table that comes out, what is missing and why, and refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import pytest
import torch
from nnsight import NNsight
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from nnpatch_core import Component, DecoderAPI, Sites, activation_patching
from nnpatch_core.errors import AdapterError
from nnpatch_core.infer import infer_adapter, put_to_test, read_model
from nnpatch_core.testing import CHECKS, tiny_model
from nnpatch_llama import Llama3
from tests.helpers.oracle import COMPONENTS, lay_out, random_prompts

#: nnsight says so of BERT's modules called `output`, which is of no use to anybody here.
pytestmark = pytest.mark.filterwarnings("ignore:Module .* has a submodule named:UserWarning")

LLAMA = """
    resid_pre input  of .
    q         output of self_attn.q_proj  query
    k         output of self_attn.k_proj  key_value
    v         output of self_attn.v_proj  key_value
    o         input  of self_attn.o_proj  query
    attn      output of self_attn
    mlp       output of mlp
    resid     output of .
"""
POST_NORMS = """
    resid_pre input  of .
    q         output of self_attn.q_proj  query
    k         output of self_attn.k_proj  key_value
    v         output of self_attn.v_proj  key_value
    o         input  of self_attn.o_proj  query
    attn      output of post_attention_layernorm
    mlp       output of post_feedforward_layernorm
    resid     output of .
"""
LINEAR = """
    resid_pre input  of .
    attn      output of linear_attn
    mlp       output of mlp
    resid     output of .
"""


def fused(layout: str, qkv: str, o: str, attn: str, mlp: str) -> str:
    return f"""
        resid_pre input  of .
        q         output of {qkv}  query      {layout}(part='q')
        k         output of {qkv}  key_value  {layout}(part='k')
        v         output of {qkv}  key_value  {layout}(part='v')
        o         input  of {o}    query
        attn      output of {attn}
        mlp       output of {mlp}
        resid     output of .
    """


@attrs.frozen
class Expected:
    """What is to be read off a tiny model.

    Args:
        table: that of most layers.
        layers: path of the list of layers.
        key_value: the config's attribute, or the number.
        residual: what a layer adds up to.
        kinds: the tables of the other layers.
        missing: for each component that some layer lacks, words of the reason.
        settings: of the model.
    """

    table: str
    layers: str = "model.layers"
    key_value: str | int = "num_key_value_heads"
    residual: str | None = "sum"
    kinds: Mapping[str, str] = attrs.field(factory=dict)
    missing: Mapping[str, str] = attrs.field(factory=dict)
    settings: Mapping[str, Any] = attrs.field(factory=dict)


FALCON = ("self_attention.query_key_value", "self_attention.dense", "self_attention", "mlp")
NO_HEADS = "layers [0, 2]: nothing before linear_attn.{} does to its heads what q, k or v would"
NO_ATTENTION = "layers [0, 2]: the layer has no attention that could be told"
HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}

EXPECTED = {
    "llama": Expected(LLAMA),
    "mixtral": Expected(LLAMA),
    "qwen3": Expected(LLAMA),
    "gemma2": Expected(POST_NORMS),
    "granite": Expected(LLAMA, residual="scaled", settings={"residual_multiplier": 0.5}),
    "gpt2": Expected(fused("Fused", "attn.c_attn", "attn.c_proj", "attn", "mlp"), "transformer.h"),
    "gpt_neox": Expected(
        fused("Interleaved", "attention.query_key_value", "attention.dense", "attention", "mlp"),
        "gpt_neox.layers",
    ),
    "phi3": Expected(fused("Fused", "self_attn.qkv_proj", "self_attn.o_proj", "self_attn", "mlp")),
    # One key/value head, which the config does not say.
    "falcon": Expected(
        fused("Fused", *FALCON),
        "transformer.h",
        key_value=1,
        missing={"key_value_heads": "no attribute of the config is 1"},
    ),
    "falcon, by group": Expected(
        fused("Interleaved", *FALCON),
        "transformer.h",
        key_value="num_kv_heads",
        settings={"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "bloom": Expected(
        fused(
            "Interleaved",
            "self_attention.query_key_value",
            "self_attention.dense",
            "self_attention.dense",
            "mlp.dense_4h_to_h",
        ),
        "transformer.h",
    ),
    "mpt": Expected(
        fused("Fused", "attn.Wqkv", "attn.out_proj", "attn", "ffn.down_proj"),
        "transformer.blocks",
    ),
    "opt": Expected(
        LLAMA.replace("o_proj", "out_proj").replace("of mlp", "of fc2"), "model.decoder.layers"
    ),
    # A norm follows each sum.
    "bert": Expected(
        """
        resid_pre input  of .
        q         output of attention.self.query    query
        k         output of attention.self.key      key_value
        v         output of attention.self.value    key_value
        o         input  of attention.output.dense  query
        attn      output of attention.output.dense
        mlp       output of output.dense
        resid     output of .
        """,
        "bert.encoder.layer",
        residual=None,
    ),
    "qwen3_next": Expected(
        LINEAR,
        kinds={
            "self_attn": LLAMA.replace("q_proj  query", "q_proj query PartOfHead(index=0, parts=2)")
        },
        missing=dict.fromkeys("qkvo", NO_HEADS.format("out_proj")),
    ),
    "olmo_hybrid": Expected(
        LINEAR,
        kinds={"post_feedforward_layernorm": POST_NORMS},
        missing=dict.fromkeys("qkvo", NO_HEADS.format("o_proj")),
        settings=HYBRID,
    ),
    "lfm2": Expected(
        """
        resid_pre input  of .
        mlp       output of feed_forward
        resid     output of .
        """,
        # What a convolution adds is not among the components.
        residual=None,
        kinds={
            "self_attn": LLAMA.replace("o_proj", "out_proj").replace("of mlp", "of feed_forward")
        },
        missing={**dict.fromkeys("qkvo", NO_ATTENTION), "attn": "layers [0, 2]: no module gives"},
        settings={"layer_types": ["conv", "full_attention", "conv"]},
    ),
    # Keys and values of all heads come from one latent vector.
    "deepseek_v3": Expected(
        """
        resid_pre input  of .
        q         output of self_attn.q_b_proj  query
        o         input  of self_attn.o_proj    query
        attn      output of self_attn
        mlp       output of mlp
        resid     output of .
        """,
        missing={
            "k": "none of self_attn.q_a_proj, self_attn.q_b_proj, self_attn.kv_a_proj_with_mqa "
            "does to each head what k does",
            "v": "does to each head what v does",
        },
    ),
    "mamba": Expected(
        """
        resid_pre input  of .
        resid     output of .
        """,
        "backbone.layers",
        residual=None,
        missing={
            **dict.fromkeys("qkvo", "mixer is not called attention"),
            "attn": "mixer, which mixes tokens, is not called attention",
            "mlp": "no module gives what the layer adds to the residual stream as mlp",
        },
    ),
}


def written(table: Mapping[str, Component]) -> list[str]:
    """A table in the words of this file."""
    assert all(row.item == 0 for row in table.values())
    rows = []
    for name, row in table.items():
        words = [name, row.side, "of", row.module or ".", row.heads or "", row.columns or ""]
        rows.append(" ".join(str(word) for word in words if word != ""))
    return rows


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_table_that_is_read_off(name: str) -> None:
    expected, family = EXPECTED[name], name.partition(",")[0]
    model = tiny_model(family, **expected.settings)
    found = read_model(model)
    adapter = found.adapter
    assert written(adapter.components) == lines(expected.table)
    assert {mark: written(table) for mark, table in adapter.kinds.items()} == {
        mark: lines(text) for mark, text in expected.kinds.items()
    }
    assert adapter.layers == expected.layers
    assert adapter.model_types == (family,)
    assert adapter.query_heads == "num_attention_heads"
    assert adapter.key_value_heads == expected.key_value
    assert adapter.residual == expected.residual
    assert adapter.padding
    assert set(found.missing) == set(expected.missing)
    for component, words in expected.missing.items():
        assert words in found.missing[component]


#: Where read_model and the checks are the same code for all, some of each kind are enough, with as
#: many layers as they have kinds of them.
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 1},
    "falcon, by group": {"num_hidden_layers": 1},
    "qwen3_next": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "deepseek_v3": {"num_hidden_layers": 1},
    "bert": {"num_hidden_layers": 1},
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_inferred_passes_the_kit(name: str) -> None:
    model = tiny_model(name.partition(",")[0], **{**EXPECTED[name].settings, **KINDS[name]})
    adapter = infer_adapter(model)
    assert isinstance(adapter, DecoderAPI)
    read = read_model(model).adapter
    assert (adapter.components, adapter.kinds) == (read.components, read.kinds)


@pytest.mark.parametrize(
    ("family", "name"), [("gpt_neox", "GptNeox"), ("qwen3", "Qwen3"), ("gpt-sw3", "GptSw3")]
)
def test_the_adapters_name(family: str, name: str) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    model.config.model_type = family
    assert read_model(model).adapter.name == name
    assert read_model(model, "Mine").adapter.name == "Mine"
    assert read_model(model, "Mine").adapter.model_types == (family,)


# By what modules do, not by what they are called.


def renamed(module: nn.Module, names: Callable[[str], str], kind: str) -> None:
    """Give a module's children other names, and its class another one, while it works as before."""
    aliases = {name: names(name) for name, _ in module.named_children()}
    children = {aliases[name]: child for name, child in module.named_children()}

    class Renamed(type(module)):
        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(aliases.get(name, name))

    module._modules.clear()
    module._modules.update(children)
    Renamed.__name__ = Renamed.__qualname__ = kind
    module.__class__ = Renamed


def meaningless(attention: str) -> Any:
    """A llama none of whose modules has a name that means anything."""
    model = tiny_model("llama", num_hidden_layers=2)
    numbers = iter(range(1000))

    def name(_: str) -> str:
        return f"m{next(numbers)}"

    for layer in model.model.layers:
        numbers = iter(range(1000))
        renamed(layer.self_attn, name, attention)
        renamed(layer.mlp, name, "Thing")
        renamed(layer, name, "Thing")
    renamed(model.model, name, "Thing")
    renamed(model, name, "Thing")
    return model


def test_names_that_mean_nothing() -> None:
    model = meaningless("SomeAttention")
    plain = tiny_model("llama", num_hidden_layers=2)
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    paths = dict(zip(plain.state_dict(), model.state_dict(), strict=True))

    def path(name: str) -> str:
        """What Llama's module of layer 0 is called here, below the layer."""
        inside = paths[f"model.layers.0.{name}.weight"].removesuffix(".weight")
        return inside.partition(".0.")[2]

    adapter = infer_adapter(model)
    assert adapter.layers == paths["model.layers.0.mlp.up_proj.weight"].partition(".0.")[0]
    attention, mlp = path("self_attn.q_proj").rpartition(".")[0], path("mlp.up_proj")
    assert written(adapter.components) == lines(
        f"""
        resid_pre input  of .
        q         output of {path("self_attn.q_proj")} query
        k         output of {path("self_attn.k_proj")} key_value
        v         output of {path("self_attn.v_proj")} key_value
        o         input  of {path("self_attn.o_proj")} query
        attn      output of {attention}
        mlp       output of {mlp.rpartition(".")[0]}
        resid     output of .
        """
    )


def test_attention_that_is_not_called_so() -> None:
    found = read_model(meaningless("Thing"))
    assert "is not called attention" in found.missing["attn"]
    assert all("is not called attention" in found.missing[name] for name in "qkvo")
    assert set(found.adapter.components) == {"resid_pre", "mlp", "resid"}


class MisnamedAttention(nn.Module):
    """Attention whose projections have each other's names."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.k_proj, self.v_proj, self.q_proj = own.q_proj, own.k_proj, own.v_proj
        self.up_proj = own.o_proj

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **_: Any) -> Any:
        projections = (self.k_proj, self.v_proj, self.q_proj)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (4, -1)).transpose(1, 2)
            for projection in projections
        )
        mixed = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, is_causal=attention_mask is None
        )
        return self.up_proj(mixed.transpose(1, 2).flatten(2)), None


class MisnamedLayer(LlamaDecoderLayer):
    """A layer whose attention is called MLP, and its MLP attention."""

    mlp: Any

    def __init__(self, own: Any, config: Any, number: int) -> None:
        super().__init__(config, number)
        self.self_attn, self.mlp = own.mlp, MisnamedAttention(own.self_attn)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + self.mlp(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.self_attn(self.post_attention_layernorm(hidden_states))


def test_names_that_mean_something_else() -> None:
    model = tiny_model("llama", num_hidden_layers=2, num_key_value_heads=4)
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = MisnamedLayer(layer, model.config, number).eval()
    assert written(infer_adapter(model).components) == lines(
        """
        resid_pre input  of .
        q         output of mlp.k_proj   query
        k         output of mlp.v_proj   key_value
        v         output of mlp.q_proj   key_value
        o         input  of mlp.up_proj  query
        attn      output of mlp
        mlp       output of self_attn
        resid     output of .
        """
    )


# However a model is wrapped or cast, and what is left of it.


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(NNsight, id="nnsight"),
        pytest.param(lambda model: model.to(torch.bfloat16), id="bfloat16"),
        pytest.param(lambda model: model.train(), id="in training mode"),
    ],
)
def test_other_models_of_a_family(wrap: Callable[[Any], Any]) -> None:
    adapter = infer_adapter(wrap(tiny_model("llama", num_hidden_layers=1, attention_dropout=0.5)))
    assert written(adapter.components) == lines(LLAMA)


def test_double_precision() -> None:
    adapter = infer_adapter(tiny_model("llama", num_hidden_layers=1).double())
    assert written(adapter.components) == lines(LLAMA)


def test_frozen_parameters() -> None:
    adapter = infer_adapter(tiny_model("llama", num_hidden_layers=1).requires_grad_(False))
    assert written(adapter.components) == lines(LLAMA)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    model.model.layers[1].train()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    grad = torch.is_grad_enabled()
    infer_adapter(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled() == grad
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(
        [*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks]
        for module in model.modules()
    )


def test_sweeps_with_an_inferred_adapter_give_the_same_numbers() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    lengths = (6, 4)
    tokens, mask = lay_out(random_prompts(lengths, seed=1), "left")
    others, _ = lay_out(random_prompts(lengths, seed=2), "left")
    answers = torch.tensor([5, 7]), torch.tensor([9, 11])
    found, expected = (
        activation_patching(
            model,
            api,
            Sites(COMPONENTS, seq_pos_type="last"),
            tokens,
            others,
            *answers,
            attention_mask=mask,
            progress=False,
        )
        for api in (infer_adapter(model), Llama3)
    )
    assert list(found) == list(expected)
    for name in COMPONENTS:
        assert torch.equal(found.patched(name), expected.patched(name))
        assert expected[name].any()


# Layers that differ, and have no mark or no number of their own.


class NormsAfter(LlamaDecoderLayer):
    """Llama's modules, but the norms stand where they may be added to the residual stream."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attn, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        hidden_states = hidden_states + self.post_attention_layernorm(attn)
        return hidden_states + self.mlp(self.input_layernorm(hidden_states))


class MlpFirst(LlamaDecoderLayer):
    """Llama's modules, the MLP before attention, and one module that does nothing."""

    def __init__(self, config: Any, number: int) -> None:
        super().__init__(config, number)
        self.mark = nn.Identity()

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        mlp = self.mlp(normed)
        attn, _ = self.self_attn(hidden_states=normed, **kwargs)
        return hidden_states + mlp + attn


def with_another_layer(kind: type[nn.Module]) -> Any:
    """A llama whose second layer is of another kind."""
    model = tiny_model("llama")
    layer = kind(model.config, 1).eval()
    layer.load_state_dict(model.model.layers[1].state_dict())
    model.model.layers[1] = layer
    return model


def test_a_component_that_is_elsewhere_in_a_layer_without_a_mark() -> None:
    found = read_model(with_another_layer(NormsAfter))
    reason = "it is elsewhere in some layers, which no module tells apart"
    assert dict(found.missing) == {"attn": reason}
    assert not found.adapter.kinds
    assert written(found.adapter.components) == [
        line for line in lines(LLAMA) if not line.startswith("attn")
    ]


def test_what_is_left_without_it_passes_the_kit() -> None:
    assert "attn" not in infer_adapter(with_another_layer(NormsAfter)).components


def test_a_layer_that_runs_in_another_order() -> None:
    adapter = infer_adapter(with_another_layer(MlpFirst))
    assert written(adapter.components) == lines(LLAMA)
    resid_pre, *heads, mlp, resid = lines(LLAMA)
    assert written(adapter.kinds["mark"]) == [resid_pre, mlp, *heads, resid]


def test_layers_with_other_numbers_of_heads() -> None:
    model, other = tiny_model("llama"), tiny_model("llama", num_key_value_heads=4)
    model.model.layers[1].self_attn = other.model.layers[1].self_attn
    reason = "the number of key/value heads differs from layer to layer"
    missing = read_model(model).missing
    assert (missing["k"], missing["v"]) == (reason, reason)
    adapter = infer_adapter(model)
    assert written(adapter.components) == [line for line in lines(LLAMA) if line[0] not in "kv"]


# Refusals.


class Noisy(nn.Module):
    def __init__(self, inner: nn.Module, size: float) -> None:
        super().__init__()
        self.inner, self.size = inner, size

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        found = self.inner(*args, **kwargs)
        return found + self.size * torch.randn_like(found)


def never_given(model: Any, *names: str) -> None:
    def drop(_: Any, args: tuple, kwargs: dict) -> tuple:
        return args, {**kwargs, **dict.fromkeys(names)}

    model.model.register_forward_pre_hook(drop, with_kwargs=True)


def noise(size: float) -> Any:
    model = tiny_model("llama", num_hidden_layers=2)
    model.model.layers[1] = Noisy(model.model.layers[1], size)
    return model


def wrong_count() -> Any:
    model = tiny_model("llama", num_hidden_layers=2)
    model.config.num_hidden_layers = 3
    return model


@pytest.mark.parametrize(
    ("make", "check"),
    [
        pytest.param(lambda: noise(1e-6), "check_identity_patch", id="a little noise"),
        pytest.param(lambda: noise(1.0), "check_identity_patch", id="noise"),
        pytest.param(
            lambda: tiny_model("bert", is_decoder=False, num_hidden_layers=1),
            "check_causal",
            id="encoder",
        ),
        pytest.param(wrong_count, "check_layers", id="another number of layers"),
    ],
)
def test_a_model_for_which_a_check_fails(make: Callable[[], Any], check: str) -> None:
    model = make()
    with pytest.raises(AdapterError) as error:
        infer_adapter(model)
    words = f"the adapter inferred for {type(model).__name__} (model_type "
    assert words in str(error.value)
    assert f"{check}: " in str(error.value)
    assert f" of {len(CHECKS)} checks" in str(error.value)


def test_a_model_that_does_not_leave_padding_out() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    never_given(model, "attention_mask", "position_ids")
    adapter, results = put_to_test(read_model(model).adapter, model)
    assert not adapter.padding
    assert [result.check for result in results if result.status == "skipped"] == ["check_padding"]
    assert not infer_adapter(model).padding


def no_list() -> Any:
    model = tiny_model("llama")
    model.model.layers = nn.Sequential(*model.model.layers)
    return model


def not_one_after_the_other() -> Any:
    model = tiny_model("llama")
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    return model


def does_not_run() -> Any:
    model = tiny_model("llama")
    del model.model.layers[1].self_attn.q_proj
    return model


def without_config() -> Any:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(2, 2)])
    return model


def without_vocabulary() -> Any:
    model: Any = tiny_model("llama")
    model.get_input_embeddings = lambda: None
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (no_list, "has no list of modules that run one after the other"),
        (not_one_after_the_other, "has no list of modules that run one after the other"),
        (does_not_run, "does not run on plain tokens: AttributeError: .*q_proj"),
        (without_config, "Module .* has no config with a model_type"),
        (without_vocabulary, "has no input embedding to draw prompts for"),
        (lambda: None, "NoneType"),
        (lambda: "llama", "str"),
        (lambda: nn.Linear(2, 2), "Linear"),
    ],
)
def test_what_is_no_model_to_read(make: Callable[[], Any], words: str) -> None:
    for function in (infer_adapter, read_model):
        with pytest.raises(AdapterError, match=words):
            function(make())
