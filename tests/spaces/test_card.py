"""The model card: all that is known stands there, nothing else, and nothing of it is markup."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

import nnpatch_core
from nnpatch_core.errors import SubspaceError
from nnpatch_core.spaces.files.card import model_card
from nnpatch_core.spaces.files.content import Content
from nnpatch_core.subspace import SiteRecord, Subspace
from nnpatch_core.testing import tiny_model, tiny_tokenizer

FULL = {
    "model": "HuggingFaceTB/SmolLM2-135M",
    "model_type": "llama",
    "method": "learned",
    "data": {"pairs": 120, "table": "capitals.csv"},
    "training": {"steps": 300, "rate": 0.003, "kl": False},
    "metrics": {"accuracy": {"value": 0.91234, "low": 0.85, "high": 0.95, "pairs": 60}, "kl": 0.5},
    "controls": {"random subspace": {"value": 0.02, "low": 0, "high": 0.0625}},
    "nnpatch-core": "0.1.0",
    "paper": "arXiv 2411.07404",
}
SITE = {"component": "resid", "layer": 7, "head": None, "seq_pos": (-1,), "where": None}


def card(info: Any = None, site: Any = None, rank: int = 1, mean: bool = False) -> str:
    basis = torch.eye(8)[:, :rank]
    return model_card(Content(basis, torch.zeros(8) if mean else None, site, info or {}), ".")


def front_matter(text: str) -> Any:
    """As the hub's own library reads it."""
    assert text.startswith("---\n")
    return ModelCard(text).data.to_dict()


def section(text: str, name: str) -> str:
    return re.split(r"\n## ", text.split(f"\n## {name}\n")[1])[0].strip()


def test_all_that_is_known() -> None:
    text = card(FULL, SITE, mean=True)
    assert front_matter(text) == {
        "library_name": "nnpatch",
        "tags": ["nnpatch", "subspace", "interpretability", "activation-patching", "llama"],
        "base_model": "HuggingFaceTB/SmolLM2-135M",
    }
    for row in (
        "| model | HuggingFaceTB/SmolLM2-135M |",
        "| model type | llama |",
        "| component | resid |",
        "| layer | 7 |",
        "| head | the component as a whole |",
        r"| positions | \[-1\] |",
        "| width | 8 |",
        "| rank | 1 |",
        "| coordinates are 0 at | the mean |",
        "| how it was made | learned |",
        "| made by nnpatch-core | 0.1.0 |",
    ):
        assert row in text
    assert "| pairs | 120 |\n| table | capitals.csv |" in section(text, "Training data")
    assert "| steps | 300 |\n| rate | 0.003 |\n| kl | no |" in section(text, "Training")
    assert section(text, "Metrics").splitlines()[2:] == [
        "| accuracy | 0.9123 | 0.85 to 0.95 | pairs: 60 |",
        "| kl | 0.5 | not said |  |",
    ]
    assert "| random subspace | 0.02 | 0 to 0.0625 |  |" in section(text, "Controls")
    assert "| paper | arXiv 2411.07404 |" in section(text, "Further")
    assert f"Written by nnpatch-core {nnpatch_core.__version__}." in section(text, "Files")
    assert "not said" not in text.replace("| kl | 0.5 | not said |", "")


def test_nothing_is_made_up() -> None:
    text = card()
    assert set(front_matter(text)) == {"library_name", "tags"}
    for name in ("model", "model type", "component", "layer", "head", "positions"):
        assert f"| {name} | not said |" in text
    assert "| how it was made | not said |" in text
    for name in ("Training data", "Training", "Metrics", "Controls"):
        assert section(text, name) == "Not said."
    assert "AutoModel" not in text
    assert "Sites(" not in text
    assert "\n## Further" not in text


@pytest.mark.parametrize(
    ("site", "shown"),
    [
        ({**SITE, "seq_pos": None}, "all"),
        (
            {**SITE, "seq_pos": None, "where": "the subject's last token"},
            "the subject's last token",
        ),
        ({**SITE, "seq_pos": (-2, -1)}, r"\[-2, -1\]"),
    ],
)
def test_positions(site: Any, shown: str) -> None:
    assert f"| positions | {shown} |" in card(site=site)


def test_a_head() -> None:
    text = card(site={**SITE, "component": "o", "head": 3})
    assert "| head | 3 |" in text
    assert "heads=[3]" in text
    assert "with steer(model, subspace, Set(3.0)):" in text


def test_positions_that_only_its_maker_knew() -> None:
    site = {**SITE, "component": "o", "head": 3, "seq_pos": None, "where": "the subject"}
    line = 'Site.get_site(infer_adapter(model), "o", 7, head=3, seq_pos=[-1], subspace=subspace)'
    assert line in card(site=site)
    last = card(site={**site, "where": repr("last")})
    assert "with steer(model, subspace, Set(3.0)):" in last
    assert 'seq_pos_type="last"' in last


@pytest.mark.parametrize(
    ("model", "is_one"),
    [
        ("meta-llama/Meta-Llama-3-8B", True),
        ("gpt2", False),
        ("/data/models/mine", False),
        ("./models/mine", False),
        ("a/b/c", False),
        ("a--b/c", False),
        ('x/y"\nlicense: mit', False),
        (3, False),
    ],
)
def test_base_models(model: Any, is_one: bool) -> None:
    matter = front_matter(card({"model": model}))
    assert matter.get("base_model") == (model if is_one else None)
    assert "license" not in matter


def test_a_local_path_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front_matter(card({"model": "models/mine"}))


def test_long_texts_and_lists_say_what_is_left_out() -> None:
    text = card({"data": list(range(20)), "training": "x" * 1000})
    assert "0, 1, 2, 3, 4, 5, 6, 7, and 12 more in config.json" in text
    assert f"{'x' * 400}… (all of it in config.json)" in text
    assert "x" * 401 not in text


MARKUP = "\\`*_[]<>|~$&#^{}"
#: Without it, lines of a card that hold text of others are these characters and escaped ones.
evil = st.text(
    alphabet=st.sampled_from(
        [*MARKUP, "a", "-", "\n", "\r", "\t", ":", '"', "'", "!", "\x1b", "é"]
    ),
    max_size=8,
) | st.sampled_from(
    ["---\nlicense: mit\n---", "\n# Title", "<script>", "| a | b |", "```\n", "![x](y)", "-->"]
)
values = st.recursive(
    evil | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.none(),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(evil, each, max_size=3),
    max_leaves=4,
)


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(FULL)), values, max_size=4),
    st.dictionaries(evil, values, max_size=2),
    evil,
)
def test_text_of_others_is_never_markup(known: Any, more: Any, where: str) -> None:
    try:
        text = card({**known, **more}, {**SITE, "seq_pos": None, "where": where})
    except SubspaceError as error:  # a number of more than 64 bits
        assert "64 bits" in str(error)  # noqa: PT017
        return
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    matter = front_matter(text)
    assert set(matter) <= {"library_name", "tags", "base_model"}
    plain = card(dict.fromkeys({**known, **more}), SITE)
    # The same headings, fences and rows as a card of nothing has, apart from those of tables.
    for kind in (r"^#+ ", r"^```", r"^---$", r"^<!--"):

        def count(found: str, kind: str = kind) -> int:
            return len(re.findall(kind, found, re.MULTILINE))

        assert count(text) == count(plain)
    body = text.split("---\n", 2)[2].replace("<!-- nnpatch", "").replace("-->", "", 1)
    body = re.sub(r"```python\n.*?```", "", body, flags=re.DOTALL)
    body = re.sub(r"\\[\\`*_\[\]<>|~$&#^{}]", "", body)
    for line in body.splitlines():
        if not line.startswith(("#", "A linear", "`model")):
            assert not re.search(r"[`*\[\]<>~$^{}]", line), line
            assert line.count("|") in (0, 3, 5), line


@pytest.mark.parametrize("where", [None, "the subject"])
def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str | None
) -> None:
    """As it stands, in the folder of the card."""
    model = tiny_model("llama")
    width = model.config.hidden_size
    record = SiteRecord("resid", 1, None, None if where else (-1,), where)
    Subspace.random(width, 2, site=record).save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    tokenizer = tiny_tokenizer([" a b c d"])
    names: dict[str, Any] = {
        "model": model, "activations": torch.zeros(3, width), "tokenizer": tokenizer,
        "source": ["a b"], "target": ["a d"], "source_answers": [" c"], "target_answers": [" d"],
        "prompts": ["a b", "a c"],
    }  # fmt: skip
    seen: list[torch.Tensor] = []
    for number, block in enumerate(blocks):
        if number == 2:
            model.generation_config.pad_token_id = 0
            model.model.layers[2].register_forward_pre_hook(
                lambda _, inputs: seen.append(inputs[0])
            )
        exec(block, names)
    assert names["coordinates"].shape == (3, 2)
    assert "rank 2" in str(names["out"].info)
    steered = names["subspace"].project(seen[-1][:, -1])
    assert torch.allclose(steered, torch.tensor(3.0), atol=1e-4)
