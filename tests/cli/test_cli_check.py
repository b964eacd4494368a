"""`nnpatch check`: the kit on an adapter, and its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nnpatch_core.testing import CHECKS, tiny_model
from tests.helpers.commands import (
    SMALL,
    Command,
    Misused,
    ModelFolder,
    Module,
    Refused,
    check_json,
    only,
    statuses,
)


def test_adapter_that_passes(nnpatch: Command) -> None:
    done = nnpatch("check", "Llama3")
    assert (done.code, done.err) == (0, "")
    title, header, *rows, count = done.lines
    assert title == "adapter Llama3 on llama"
    assert header.split() == ["check", "status", "reason"]
    assert [row.split() for row in rows] == [[name, "passed"] for name in CHECKS]
    assert count.strip() == f"{len(CHECKS)} passed"


def test_adapter_that_fails(wrong: str, nnpatch: Command) -> None:
    """Keys are where values are said to be, and values where keys are."""
    found = check_json(nnpatch, f"{wrong}:Swapped", code=1)
    (results,) = found["models"].values()
    told = statuses(results)
    assert list(told) == list(CHECKS)
    assert told["check_value_heads"] == told["check_execution_order"] == "failed"
    assert told["check_model_type"] == told["check_layers"] == "passed"
    reasons = {result["check"]: result["reason"] for result in results}
    assert "v L0 H0, turned round, does not turn" in reasons["check_value_heads"]
    done = nnpatch("check", f"{wrong}:Swapped", *only("value_heads", "layers"))
    assert (done.code, done.err) == (1, "")
    (line,) = [line for line in done.lines if "check_value_heads" in line]
    assert line.split(maxsplit=2)[1:] == ["failed", reasons["check_value_heads"]]
    assert done.lines[-1].strip() == "1 failed, 1 passed"


def test_layers_that_are_elsewhere(wrong: str, nnpatch: Command) -> None:
    done = nnpatch("check", f"{wrong}:Nowhere", *only("layers", "sweep"))
    assert done.code == 1
    assert done.out.count("'transformer.h'") == 2


def test_several_model_types(wrong: str, nnpatch: Command) -> None:
    found = check_json(nnpatch, f"{wrong}:Two", *only("model_type", "components"))
    assert list(found["models"]) == ["mistral", "llama"]
    for results in found["models"].values():
        assert statuses(results) == dict.fromkeys(
            ["check_model_type", "check_components"], "passed"
        )
    done = nnpatch("check", f"{wrong}:Two", *only("model_type"))
    assert done.code == 0
    assert [line for line in done.lines if "adapter" in line] == [
        "adapter Two on mistral",
        "adapter Two on llama",
    ]


def test_one_model_type_fails_of_several(wrong: str, nnpatch: Command) -> None:
    found = check_json(nnpatch, f"{wrong}:GPT2", *only("layers"), code=1)
    assert [results[0]["status"] for results in found["models"].values()] == ["passed", "failed"]


def test_model_of_another_type(nnpatch: Command) -> None:
    found = check_json(nnpatch, "Llama3", "mistral", *only("model_type"), code=1)
    assert "'mistral'" in found["models"]["mistral"][0]["reason"]


def test_model_folder(tmp_path: Path, nnpatch: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder)
    checks = [f"check_{name}" for name in ("layers", "components", "sweep")]
    arguments = only("layers", "components", "sweep")
    # transformers may show on the standard error how far it has come.
    done = nnpatch("check", "Llama3", folder, *arguments, "--json")
    assert done.code == 0
    assert statuses(done.json["models"][str(folder)]) == dict.fromkeys(checks, "passed")
    done = nnpatch("check", "Llama3", folder / "config.json", *arguments)
    assert done.code == 0
    assert f"adapter Llama3 on {folder / 'config.json'}" in done.lines
    monkeypatch.chdir(folder)
    assert nnpatch("check", "Llama3", "config.json", *only("layers"), "--layers", "1").code == 0


def test_weights_of_the_folder_are_those_that_are_checked(tmp_path: Path, nnpatch: Command) -> None:
    """One whose last layer's MLP gives nothing fails."""
    model = tiny_model("llama")
    torch.nn.init.zeros_(model.model.layers[2].mlp.down_proj.weight)
    model.save_pretrained(tmp_path)
    done = nnpatch("check", "Llama3", tmp_path, *only("patch_reaches_logits"), "--json")
    assert done.code == 1
    ((result,),) = done.json["models"].values()
    assert "mlp L2" in result["reason"]


def test_folder_without_weights(model_folder: ModelFolder, refused: Refused) -> None:
    folder = model_folder(SMALL)
    refused("check", "Llama3", folder, parts=[str(folder), "cannot be loaded as a model"])


def test_checks_run_are_those_named_in_that_order(nnpatch: Command) -> None:
    found = check_json(nnpatch, "Llama3", *only("causal", "model_type"))
    assert list(statuses(found["models"]["llama"])) == ["check_causal", "check_model_type"]


def test_skipped_check(nnpatch: Command, module: Module) -> None:
    code = """
        from nnpatch_core import Component, DecoderAPI

        Block = DecoderAPI("Block", ("llama",), {"mlp": Component("mlp")})
    """
    name = module(code)
    found = check_json(nnpatch, f"{name}:Block", *only("value_heads", "model_type"))
    assert found["models"]["llama"] == [
        {"check": "check_value_heads", "status": "skipped", "reason": "the adapter has no v"},
        {"check": "check_model_type", "status": "passed", "reason": ""},
    ]
    done = nnpatch("check", f"{name}:Block", *only("value_heads", "model_type"))
    assert done.lines[-1].strip() == "1 skipped, 1 passed"


def test_only_some_layers_are_looked_at(wrong: str, nnpatch: Command) -> None:
    """Layer 1 is said to have as many keys as queries."""
    arguments = [f"{wrong}:Own", *only("components", "key_heads")]
    for layers, code in (("0", 0), ("0,2", 0), ("2,0", 0), ("1", 1), ("0,1", 1)):
        check_json(nnpatch, *arguments, "--layers", layers, code=code)
    check_json(nnpatch, *arguments, code=1)


@pytest.mark.parametrize("layers", ["3", "0,99", "-1"])
def test_layers_out_of_range(refused: Refused, layers: str) -> None:
    refused("check", "Llama3", "--layers", layers, parts=["out of range", "layers 0 to 2"])


@pytest.mark.parametrize("layers", ["x", "", "0,", "0-2", "1.0"])
def test_layers_that_are_no_numbers(misused: Misused, layers: str) -> None:
    misused("check", "Llama3", "--layers", layers, parts=[f"{layers!r} is not numbers"])


def known(*names: str) -> list[str]:
    return [part for name in names for part in ("--known-failure", f"check_{name}")]


def test_known_failures(wrong: str, nnpatch: Command) -> None:
    arguments = [f"{wrong}:Swapped", *only("value_heads", "key_heads", "layers")]
    check_json(nnpatch, *arguments, *known("value_heads"), code=1)
    found = check_json(nnpatch, *arguments, *known("value_heads", "key_heads"))
    results = found["models"]["llama"]
    assert list(statuses(results).values()) == ["known failure", "known failure", "passed"]
    assert "does not turn" in results[0]["reason"]


def test_known_failure_that_is_none(nnpatch: Command) -> None:
    found = check_json(nnpatch, "Llama3", *only("layers", "model_type"), *known("layers"), code=1)
    assert list(statuses(found["models"]["llama"]).values()) == ["fixed", "passed"]
    done = nnpatch("check", "Llama3", *only("layers"), *known("layers"))
    assert done.code == 1
    assert done.lines[-1].strip() == "1 fixed"


@pytest.mark.parametrize("option", ["--only", "--known-failure"])
def test_unknown_check(refused: Refused, option: str) -> None:
    parts = ["unknown check 'check_everything'", "check_layers", "check_gradients"]
    refused("check", "Llama3", option, "check_everything", parts=parts)


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        ("Raises", "RuntimeError: cannot count"),
        ("Words", "Error: "),
        ("Zero", "Error: "),
        ("NoTable", "TypeError: "),
        ("Rows", "AttributeError: "),
        ("NoLayers", "Error: "),
    ],
)
def test_adapter_of_garbage_fails(
    wrong: str, nnpatch: Command, attribute: str, reason: str
) -> None:
    found = check_json(nnpatch, f"{wrong}:{attribute}", code=1)
    (results,) = found["models"].values()
    assert [each["check"] for each in results] == list(CHECKS)
    failed = [each for each in results if each["status"] == "failed"]
    assert any(reason in each["reason"] for each in failed)


@pytest.mark.parametrize(
    ("attribute", "parts"),
    [
        ("Nameless", ["'Own' names no model type", "name a model"]),
        ("Martian", ["'martian' is no model type of transformers"]),
        ("NoTypes", ["model type"]),
    ],
)
def test_adapter_of_which_nothing_can_be_checked(
    wrong: str, refused: Refused, attribute: str, parts: list[str]
) -> None:
    refused("check", f"{wrong}:{attribute}", parts=parts)


@pytest.mark.parametrize(
    ("attribute", "part"),
    [
        ("Raises", "RuntimeError: cannot count"),
        ("NoTable", "NoneType"),
        ("Rows", "Error: "),
        ("NoLayers", "no list of layers at None"),
    ],
)
def test_components_of_garbage(wrong: str, refused: Refused, attribute: str, part: str) -> None:
    refused("components", "llama", "--adapter", f"{wrong}:{attribute}", parts=[part])
