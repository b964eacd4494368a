"""An outcome knows which cells were swept, what they are called, and survives being saved."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nnpatch_core import (
    MultiSite,
    Outcome,
    PromptPairs,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
)
from nnpatch_core.errors import OutcomeError
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer

#: Padding is what is tested here, so that what it mixes needs no word.
pytestmark = [
    pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning"),
]
#: The columns of a frame that say how sure a value is.
SURE = ["value", "low", "high", "p_value"]

SOURCE_TEXTS = ["The capital of France is", "My capital of all Germany is"]
TARGET_TEXTS = ["The capital of Japan is", "My capital of all Greece is"]
SOURCE_ANSWERS = [" Paris", " Berlin"]
TARGET_ANSWERS = [" Tokyo", " Athens"]
SEQ_LEN = 6
METRICS = ["logit_difference", "answer_probability"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def pairs() -> PromptPairs:
    texts = [*SOURCE_TEXTS, *TARGET_TEXTS, *SOURCE_ANSWERS, *TARGET_ANSWERS]
    return PromptPairs.from_texts(
        SOURCE_TEXTS, TARGET_TEXTS, SOURCE_ANSWERS, TARGET_ANSWERS, tiny_tokenizer(texts)
    )


@pytest.fixture(scope="module")
def out(model: Any, pairs: PromptPairs) -> Outcome:
    """The last two positions of layers 0 and 2, and of components with heads the second head."""
    sites = Sites(["resid", "k", "o"], layers=[0, 2], seq_pos_type="lastk", seq_pos=2, heads=[1])
    return activation_patching(
        model, None, sites, **pairs.arguments(), metric=METRICS, progress=False
    )


@pytest.fixture(scope="module")
def listed(model: Any, pairs: PromptPairs) -> Outcome:
    """A user's own list of sites, in which one name has two cells."""
    mlp, attn, late = (
        Site.get_site(tiny_api(), name, layer=layer, seq_pos=[-1])
        for name, layer in (("mlp", 1), ("attn", 0), ("mlp", 2))
    )
    sites = Sites.from_sites([mlp, MultiSite([attn, mlp], name="both"), late])
    return activation_patching(model, None, sites, **pairs.arguments(), progress=False)


@pytest.fixture(scope="module")
def ablated(model: Any, pairs: PromptPairs) -> Outcome:
    return ablation_patching(
        model,
        None,
        Sites("mlp"),
        pairs.source_tokens,
        pairs.source_answer_index,
        pairs.target_answer_index,
        attention_mask=pairs.source_attention_mask,
        progress=False,
    )


@pytest.fixture(params=["out", "listed", "ablated"])
def any_outcome(request: pytest.FixtureRequest) -> Outcome:
    return request.getfixturevalue(request.param)


SHAPES = {"resid": (3, SEQ_LEN), "k": (3, SEQ_LEN, 2), "o": (3, SEQ_LEN, 4)}


def swept(name: str) -> torch.Tensor:
    expected = torch.zeros(SHAPES[name], dtype=torch.bool)
    for layer in (0, 2):
        for position in (SEQ_LEN - 2, SEQ_LEN - 1):
            expected[(layer, position, *[1] * (len(SHAPES[name]) - 2))] = True
    return expected


# A mapping --------------------------------------------------------------------------------------


def test_outcome_is_a_mapping(out: Outcome) -> None:
    assert list(out) == list(out.keys()) == ["resid", "k", "o"]
    assert len(out) == 3
    assert "resid" in out
    assert "mlp" not in out
    assert {name: tuple(value.shape) for name, value in out.items()} == SHAPES
    assert out.get("mlp") is None
    assert dict(out)["k"].equal(out["k"])
    # Two are compared by their tensors; `==` on a mapping of tensors would have no answer.
    assert len({out, out.for_metric("logit_difference")}) == 2
    assert out != dict(out)


def test_outcome_is_a_mapping_only_of_what_was_swept(out: Outcome) -> None:
    for read in (out.__getitem__, out.swept, out.patched, out.per_prompt, out.axes):
        with pytest.raises(KeyError, match=r"'mlp' was not swept; there are .*'resid', 'k', 'o'"):
            read("mlp")


def test_z_is_o(out: Outcome) -> None:
    assert "z" in out
    assert out["z"].equal(out["o"])
    assert out.swept("z").equal(out.swept("o"))
    assert out.axes("z") == out.axes("o")
    torch.testing.assert_close(out.patched("z"), out.patched("o"), equal_nan=True)
    torch.testing.assert_close(out.per_prompt("z"), out.per_prompt("o"), equal_nan=True)


def test_sweeping_z_gives_what_o_does(model: Any, pairs: PromptPairs) -> None:
    # In the full engine, where what else is swept does not change the last digits.
    z, o = (
        activation_patching(
            *(model, None, Sites(name, layers=[2], seq_pos_type="lastk", seq_pos=1, heads=[1])),
            **pairs.arguments(),
            engine="full",
            progress=False,
        )
        for name in ("z", "o")
    )
    assert list(z) == ["z"]
    assert torch.equal(z["z"], o["o"])
    assert z["z"][2, -1, 1] != 0


def test_repr_is_one_short_line(any_outcome: Outcome) -> None:
    assert repr(any_outcome).startswith(f"Outcome({any_outcome.kind}, logit_difference: ")
    assert len(repr(any_outcome)) < 100


# Which cells were swept -------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_swept_cells(out: Outcome, name: str) -> None:
    expected = swept(name)
    assert out.swept(name).equal(expected)
    assert out.swept(name).dtype == torch.bool
    # A cell that was not swept is 0 in the tensor, and nan where there is room for it.
    assert (out[name][~expected] == 0).all()
    for values in (out.patched(name), out.per_prompt(name)):
        assert values.shape == (*SHAPES[name], 2)
        assert values.isnan().all(-1).equal(~expected)
        assert values.isfinite().all(-1).equal(expected)


def test_everything_is_swept_by_default(model: Any, pairs: PromptPairs) -> None:
    sites = Sites("k", seq_pos_type="each")
    full = activation_patching(model, None, sites, **pairs.arguments(), progress=False)
    assert full.swept("k").all()
    assert full["k"].shape == SHAPES["k"]


def test_a_measured_zero_is_told_from_a_cell_that_was_not_swept(
    model: Any, pairs: PromptPairs
) -> None:
    # Both runs begin with the same tokens, so patching them moves nothing.
    sites = Sites("resid", layers=[0], seq_pos_type="custom", seq_pos=[1])
    still = activation_patching(model, None, sites, **pairs.arguments(), progress=False)
    assert still["resid"][0, 1] == 0
    assert still.swept("resid").nonzero().tolist() == [[0, 1]]
    frame = still.to_dataframe()
    assert frame["value"].notna().sum() == 1
    assert frame["value"].dropna().tolist() == [0.0]


# Values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", SHAPES)
def test_values_are_what_was_patched_on_the_scale_of_the_runs(
    out: Outcome, name: str, metric: str
) -> None:
    seen = out.for_metric(metric)
    patched = seen.patched(name)[swept(name)].double()
    source, target = seen.baseline.source.double(), seen.baseline.target.double()
    whole = (patched.mean(-1) - target.mean()) / (source.mean() - target.mean())
    each = (patched - target) / (source - target)
    torch.testing.assert_close(seen[name][swept(name)].double(), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        seen.per_prompt(name)[swept(name)].double(), each, rtol=1e-4, atol=1e-5
    )


def test_per_prompt_of_an_ablation_is_the_change_in_the_metric(ablated: Outcome) -> None:
    change = ablated.patched("mlp") - ablated.baseline.source
    torch.testing.assert_close(ablated.per_prompt("mlp"), change)
    torch.testing.assert_close(ablated["mlp"], change.mean(-1))
    assert ablated.scale == "change"
    assert ablated.kind == "ablation (zero)"


def test_per_prompt_is_each_prompt_swept_alone(
    model: Any, pairs: PromptPairs, out: Outcome
) -> None:
    arguments = pairs.arguments()
    tokenizer = arguments.pop("tokenizer")
    sites = Sites("resid", layers=[0, 2], seq_pos_type="lastk", seq_pos=2)
    for prompt in range(2):
        alone = {name: value[prompt : prompt + 1] for name, value in arguments.items()}
        single = activation_patching(
            model, None, sites, **alone, tokenizer=tokenizer, progress=False
        )
        torch.testing.assert_close(
            out.per_prompt("resid")[..., prompt],
            single.per_prompt("resid")[..., 0],
            equal_nan=True,
            rtol=1e-4,
            atol=1e-4,
        )


def test_for_metric(out: Outcome) -> None:
    assert out.metrics == tuple(METRICS)
    assert out.metric == "logit_difference"
    probability = out.for_metric("answer_probability")
    assert probability.metric == "answer_probability"
    assert not probability["resid"].equal(out["resid"])
    assert probability.baseline is out.baselines["answer_probability"]
    assert ((probability.baseline.source >= 0) & (probability.baseline.source <= 1)).all()
    # The outcome itself is as it was, and the way back is the same.
    assert out.metric == "logit_difference"
    assert probability.for_metric("logit_difference")["k"].equal(out["k"])


def test_for_metric_that_was_not_measured(out: Outcome) -> None:
    with pytest.raises(OutcomeError, match=r"'kl_divergence'.*'logit_difference', 'answer_prob"):
        out.for_metric("kl_divergence")


# Strongest --------------------------------------------------------------------------------------


def test_strongest_are_the_largest_of_all_that_was_swept(out: Outcome) -> None:
    rows = out.strongest(k=100)
    assert len(rows) == sum(int(swept(name).sum()) for name in SHAPES)
    sizes = [abs(row["value"]) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    for row in rows:
        head = [row["head"]] if "head" in row else []
        value = out[row["site"]][(row["layer"], row["position"], *head)]
        assert row["value"] == value.item()
        assert row["token"] == out.tokens[row["position"]]
    assert out.strongest(k=3) == rows[:3]
    assert len(out.strongest()) == 10
    # Patching the last position of the last layer restores the answer.
    (top,) = (row for row in rows if row["site"] == "resid" and row["value"] == pytest.approx(1))
    assert (top["layer"], top["position"], top["token"]) == (2, SEQ_LEN - 1, " is")


def test_strongest_of_a_list_of_sites(listed: Outcome) -> None:
    rows = listed.strongest()
    assert {(row["site"], row["label"]) for row in rows} == {
        ("mlp", "mlp L1 [-1]"),
        ("mlp", "mlp L2 [-1]"),
        ("both", "attn L0 [-1] + mlp L1 [-1]"),
    }


# Labels -----------------------------------------------------------------------------------------


def test_labels_of_the_tokens(out: Outcome) -> None:
    """Position by position, over both runs and both prompts; one of the prompts is padded."""
    shared = ("My", "The| capital", " capital| of", " of| all")
    assert out.tokens == (*shared, " France| Germany|…", " is")


def test_label_where_every_prompt_is_padded(model: Any, pairs: PromptPairs) -> None:
    arguments: dict[str, Any] = {**pairs.arguments()}
    for name in ("source_tokens", "target_tokens"):
        arguments[name] = torch.nn.functional.pad(arguments[name], (2, 0))
    for name in ("source_attention_mask", "target_attention_mask"):
        arguments[name] = torch.nn.functional.pad(arguments[name], (2, 0))
    padded = activation_patching(
        model, None, Sites("resid", seq_pos_type="last"), **arguments, progress=False
    )
    assert padded.tokens[:3] == ("(padding)", "(padding)", "My")


def test_labels_are_those_of_the_batch_as_it_was_run(
    model: Any, pairs: PromptPairs, out: Outcome
) -> None:
    """Right padding is re-packed, so its labels are those of left padding."""
    arguments: dict[str, Any] = {**pairs.arguments()}
    for run in ("source", "target"):
        for name in (f"{run}_tokens", f"{run}_attention_mask"):
            arguments[name] = arguments[name].clone()
            arguments[name][0] = arguments[name][0].roll(-1)
    right = activation_patching(
        model, None, Sites("resid", seq_pos_type="last"), **arguments, progress=False
    )
    assert right.tokens == out.tokens


def test_labels_without_a_tokenizer_are_ids(model: Any) -> None:
    plain = activation_patching(
        model,
        None,
        Sites("resid", seq_pos_type="last"),
        torch.tensor([[5, 6, 7]]),
        torch.tensor([[5, 9, 7]]),
        torch.tensor([1]),
        torch.tensor([2]),
        progress=False,
    )
    assert plain.tokens == ("5", "6|9", "7")


def test_label_of_a_line_break_is_one_line(model: Any) -> None:
    texts = ["two\nlines", "new\nlines"]
    tokenizer = tiny_tokenizer([*texts, " yes no"])
    pairs = PromptPairs.from_texts(texts[:1], texts[1:], [" yes"], [" no"], tokenizer)
    lines = activation_patching(
        model, None, Sites("resid", seq_pos_type="last"), **pairs.arguments(), progress=False
    )
    assert lines.tokens == ("two|new", "\\n", "lines")


def test_info(out: Outcome, listed: Outcome) -> None:
    expected = {"engine": "cone", "model": "LlamaForCausalLM", "model_type": "llama"}
    assert {**expected, "adapter": "Llama3", "dtype": "torch.float32"}.items() <= out.info.items()
    for distribution in ("nnpatch-core", "nnsight", "transformers"):
        assert out.info[distribution] == metadata.version(distribution)
    # With the mark of its build, which an index may leave out.
    assert out.info["torch"] == torch.__version__
    # A list of sites keeps the adapter that each was made with.
    assert {**expected, "adapter": "TinyLlama"}.items() <= listed.info.items()


def test_info_names_the_checkpoint(pairs: PromptPairs) -> None:
    named = tiny_model()
    named.config._name_or_path = "somebody/some-model"
    sites = Sites("resid", seq_pos_type="last")
    out = activation_patching(named, None, sites, **pairs.arguments(), progress=False)
    assert out.info["model"] == "somebody/some-model"


# Tables -----------------------------------------------------------------------------------------


def test_dataframe(out: Outcome) -> None:
    frame = out.to_dataframe()
    assert list(frame.columns) == ["site", "layer", "position", "token", "head", *SURE]
    assert len(frame) == sum(int(np.prod(shape)) for shape in SHAPES.values())
    for name, shape in SHAPES.items():
        part = frame[frame["site"] == name]
        assert len(part) == np.prod(shape)
        for row in part.itertuples():
            head = [] if len(shape) == 2 else [row.head]
            place = (row.layer, row.position, *head)
            assert np.isnan(row.value) == (not swept(name)[place])
            if swept(name)[place]:
                assert row.value == out[name][place].item()
            assert row.token == out.tokens[row.position]
    assert frame.loc[frame["site"] == "resid", "head"].isna().all()
    assert frame.loc[frame["site"] == "k", "head"].unique().tolist() == [0, 1]


def test_dataframe_per_prompt(out: Outcome) -> None:
    frame = out.to_dataframe(per_prompt=True)
    columns = ["site", "layer", "position", "token", "head", "prompt"]
    assert list(frame.columns) == [*columns, "value", "patched", "source", "target"]
    assert len(frame) == 2 * len(out.to_dataframe())
    for prompt, part in frame.groupby("prompt"):
        assert part["source"].unique().tolist() == [out.baseline.source[prompt].item()]
        assert part["target"].unique().tolist() == [out.baseline.target[prompt].item()]
        for name in SHAPES:
            np.testing.assert_array_equal(
                part.loc[part["site"] == name, "patched"].to_numpy(np.float32),
                out.patched(name)[..., prompt].flatten().numpy(),
            )
            np.testing.assert_array_equal(
                part.loc[part["site"] == name, "value"].to_numpy(np.float32),
                out.per_prompt(name)[..., prompt].flatten().numpy(),
            )


@pytest.mark.parametrize(
    ("sites", "columns"),
    [
        (Sites("resid"), ["site", "layer"]),
        (Sites("resid", seq_pos_type="last"), ["site", "layer"]),
        (Sites("q"), ["site", "layer", "head"]),
        (Sites("resid", seq_pos_type="each"), ["site", "layer", "position", "token"]),
    ],
)
def test_dataframe_has_only_the_columns_that_there_are(
    model: Any, pairs: PromptPairs, sites: Sites, columns: list[str]
) -> None:
    out = activation_patching(model, None, sites, **pairs.arguments(), progress=False)
    assert list(out.to_dataframe().columns) == [*columns, *SURE]
    assert list(out.to_dataframe(level=None).columns) == [*columns, "value"]


def test_dataframe_of_a_list_of_sites(listed: Outcome) -> None:
    frame = listed.to_dataframe()
    assert list(frame.columns) == ["site", "label", *SURE]
    assert frame["site"].tolist() == ["mlp", "mlp", "both"]
    values = dict(zip(frame["label"], frame["value"], strict=True))
    assert values == {
        "mlp L1 [-1]": listed["mlp"][0].item(),
        "mlp L2 [-1]": listed["mlp"][1].item(),
        "attn L0 [-1] + mlp L1 [-1]": listed["both"][0].item(),
    }


def test_xarray(out: Outcome) -> None:
    data = out.to_xarray()
    assert list(data.data_vars) == list(SHAPES)
    assert data["resid"].dims == ("layer", "position")
    assert data["o"].dims == ("layer", "position", "head")
    # Key/value heads are another axis than query heads: there are fewer of them.
    assert data["k"].dims == ("layer", "position", "kv_head")
    assert data.coords["layer"].values.tolist() == [0, 1, 2]
    assert data.coords["position"].values.tolist() == list(range(SEQ_LEN))
    assert data.coords["head"].values.tolist() == [0, 1, 2, 3]
    assert data.coords["kv_head"].values.tolist() == [0, 1]
    assert tuple(data.coords["token"].values) == out.tokens
    for name in SHAPES:
        values = torch.where(swept(name), out[name], torch.nan)
        np.testing.assert_array_equal(data[name].values, values.numpy())
    assert (
        data.attrs.items()
        >= {
            "kind": "activation",
            "scale": "restored",
            "metric": "logit_difference",
            **out.info,
        }.items()
    )
    assert float(data["k"].sel(layer=2, position=SEQ_LEN - 1, kv_head=1)) == out["k"][2, -1, 1]


def test_xarray_per_prompt(out: Outcome) -> None:
    data = out.to_xarray(per_prompt=True)
    assert data["resid"].dims == ("layer", "position", "prompt")
    assert data["k"].dims == ("layer", "position", "kv_head", "prompt")
    for name in SHAPES:
        np.testing.assert_array_equal(data[name].values, out.per_prompt(name).numpy())


def test_xarray_of_a_list_of_sites(listed: Outcome) -> None:
    data = listed.to_xarray()
    assert data["mlp"].dims == ("site_mlp",)
    assert data.coords["site_mlp"].values.tolist() == ["mlp L1 [-1]", "mlp L2 [-1]"]
    assert data["both"].dims == ("site_both",)
    np.testing.assert_array_equal(data["mlp"].values, listed["mlp"].numpy())


@pytest.mark.parametrize(("module", "method"), [("pandas", "dataframe"), ("xarray", "xarray")])
def test_extra_that_is_not_installed(
    out: Outcome, monkeypatch: pytest.MonkeyPatch, module: str, method: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(OutcomeError, match=rf"pip install 'nnpatch-core\[{module}\]'"):
        getattr(out, f"to_{method}")()


# Saving -----------------------------------------------------------------------------------------


def same(one: Outcome, other: Outcome) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].equal(other[name])
        assert one.swept(name).equal(other.swept(name))
        assert one.axes(name) == other.axes(name)
        torch.testing.assert_close(
            one.per_prompt(name), other.per_prompt(name), rtol=0, atol=0, equal_nan=True
        )
    for field in ("kind", "scale", "metric", "metrics", "info", "tokens"):
        assert getattr(one, field) == getattr(other, field)
    assert one.to_dataframe().equals(other.to_dataframe())
    assert one.to_xarray().identical(other.to_xarray())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def test_save_and_load(any_outcome: Outcome, path: Path) -> None:
    any_outcome.save(path)
    same(Outcome.load(path), any_outcome)


def test_save_and_load_every_metric(out: Outcome, path: Path) -> None:
    out.for_metric("answer_probability").save(str(path))
    loaded = Outcome.load(str(path))
    same(loaded, out.for_metric("answer_probability"))
    same(loaded.for_metric("logit_difference"), out)


def test_save_with_names_that_contain_slashes(model: Any, pairs: PromptPairs, path: Path) -> None:
    """Names are the user's: they must not be taken apart."""
    site = Site.get_site(tiny_api(), "mlp", layer=1)
    sites = Sites.from_sites([MultiSite([site], name="a/b"), MultiSite([site], name="b")])
    metrics = {"x/a": "logit_difference", "x": "answer_probability", "ünïcode ✓": "kl_divergence"}
    out = activation_patching(
        model, None, sites, **pairs.arguments(), metric=metrics, progress=False
    )
    out.save(path)
    loaded = Outcome.load(path)
    for metric in metrics:
        same(loaded.for_metric(metric), out.for_metric(metric))


def test_no_pickle(out: Outcome, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file from a stranger must not be able to run code."""
    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    out.save(path)
    same(Outcome.load(path), out)
    with safe_open(str(path), framework="np") as file:
        assert set(file.metadata()) == {"nnpatch"}
        np.testing.assert_array_equal(
            file.get_tensor("raw/0/0"), out.raw["logit_difference"]["resid"]
        )


def test_save_replaces_an_older_file(out: Outcome, ablated: Outcome, path: Path) -> None:
    ablated.save(path)
    out.save(path)
    same(Outcome.load(path), out)
    assert list(path.parent.iterdir()) == [path]


@pytest.fixture(params=[OSError("disk full"), KeyboardInterrupt()], ids=repr)
def stop_halfway(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Call it, and from then on writing a tensor file stops halfway; it gives what is raised."""

    def half(tensors: Any, file: Any, **options: Any) -> None:
        Path(file).write_bytes(b"half of it")
        raise request.param

    def stop() -> Any:
        monkeypatch.setattr(safetensors.torch, "serialize_file", half)
        return OutcomeError if isinstance(request.param, OSError) else type(request.param)

    return stop


def test_failing_save_leaves_the_old_file_and_nothing_else(
    out: Outcome, ablated: Outcome, path: Path, stop_halfway: Callable[..., Any]
) -> None:
    ablated.save(path)
    before = path.read_bytes()
    with pytest.raises(stop_halfway()):
        out.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_failing_first_save_leaves_nothing(
    out: Outcome, path: Path, stop_halfway: Callable[..., Any]
) -> None:
    with pytest.raises(stop_halfway()):
        out.save(path)
    assert list(path.parent.iterdir()) == []


def test_save_over_a_folder(out: Outcome, path: Path) -> None:
    path.mkdir()
    with pytest.raises(OutcomeError, match=f"{path.name}' is not a file: it is a folder"):
        out.save(path)
    assert list(path.parent.iterdir()) == [path]


def test_save_where_there_is_no_folder(out: Outcome, path: Path) -> None:
    with pytest.raises(OutcomeError, match=r"there is no folder .*nowhere"):
        out.save(path.parent / "nowhere" / "out.safetensors")


def test_load_of_no_file(path: Path) -> None:
    with pytest.raises(OutcomeError, match=f"{path.name} is not an outcome: there is no such"):
        Outcome.load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"site,layer,value\n",
        pickle.dumps({"resid": 1}),
        b"\xff" * 64,
    ],
    ids=["empty", "text", "pickle", "noise"],
)
def test_load_of_what_is_no_outcome(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(OutcomeError, match=f"{path.name} is not an outcome"):
        Outcome.load(path)


@pytest.mark.parametrize(
    "header", [None, {}, {"nnpatch": "{}"}, {"nnpatch": "no json"}, {"nnpatch": "[1]"}]
)
def test_load_of_tensors_that_are_no_outcome(path: Path, header: dict[Any, Any] | None) -> None:
    save_file({"resid": torch.zeros(3)}, path, metadata=header)
    with pytest.raises(OutcomeError, match=f"{path.name} is not an outcome"):
        Outcome.load(path)


def test_load_of_half_a_file(out: Outcome, path: Path) -> None:
    out.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OutcomeError, match=f"{path.name} is not an outcome"):
        Outcome.load(path)


def rewrite(path: Path, tensors: Any = (), **changed: Any) -> dict[str, Any]:
    """The file again, with another header, or with only some of its tensors."""
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["nnpatch"])
        kept = {name: file.get_tensor(name) for name in tensors or list(file.keys())}
    save_file(kept, path, metadata={"nnpatch": json.dumps({**header, **changed})})
    return header


def test_load_of_another_format(out: Outcome, path: Path) -> None:
    out.save(path)
    current = rewrite(path, format="nnpatch outcome 99")["format"]
    with pytest.raises(OutcomeError) as caught:
        Outcome.load(path)
    for part in (path.name, "nnpatch outcome 99", current):
        assert part in str(caught.value)
    rewrite(path, format=current)
    same(Outcome.load(path), out)


def test_load_of_an_outcome_that_lacks_a_tensor(out: Outcome, path: Path) -> None:
    out.save(path)
    rewrite(path, ["cells/0/index"])
    with pytest.raises(OutcomeError, match=path.name):
        Outcome.load(path)
