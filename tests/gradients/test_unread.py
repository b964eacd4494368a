"""Elided cells put there what is there; unread cells are read by nothing: two masks, two oracles.

One compares the activations of plain forwards, bit by bit; the other changes an activation by a
plain hook and looks whether any logit of the last token moves.
"""

from typing import Any

import pytest
import torch

from nnpatch_core import MultiSite, Outcome, Site, Sites, activation_patching, attribution_patching
from nnpatch_core.testing import tiny_api, tiny_model

#: Prompts that begin alike, for two tokens and for three.
SOURCE = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 3, 4, 9]])
TARGET = torch.tensor([[5, 6, 2, 8, 9], [5, 6, 3, 7, 9]])
ANSWERS = torch.tensor([1, 2]), torch.tensor([4, 5])
MODEL = tiny_model("llama")
LAST = MODEL.config.num_hidden_layers - 1
POSITIONS = SOURCE.shape[1]
#: Component to its module in a layer, and whether it is what goes in.
MODULES = {
    "resid_pre": ("", True),
    "v": ("self_attn.v_proj", False),
    "o": ("self_attn.o_proj", True),
    "attn": ("self_attn.o_proj", False),
    "mlp": ("mlp", False),
    "resid": ("", False),
}


def estimate(sites: Any, source: Any = SOURCE, target: Any = TARGET, **options: Any) -> Any:
    return attribution_patching(
        MODEL, tiny_api(), sites, source, target, *ANSWERS, progress=False, **options
    )


def forward(tokens: Any, name: Any = None, layer: Any = None, change: Any = None) -> Any:
    """The logits of the last token; `change` is given an activation, and may work in place."""
    handles = []
    if name is not None:
        path, is_input = MODULES[name]
        module = MODEL.model.layers[layer].get_submodule(path)

        def before(_: Any, arguments: Any, keywords: Any) -> None:
            change(arguments[0] if arguments else keywords["hidden_states"])

        def after(_: Any, arguments: Any, output: Any) -> None:
            change(output[0] if isinstance(output, tuple) else output)

        handles = [
            module.register_forward_pre_hook(before, with_kwargs=True)
            if is_input
            else module.register_forward_hook(after)
        ]
    try:
        with torch.no_grad():
            return MODEL(tokens).logits[:, -1].clone()
    finally:
        for handle in handles:
            handle.remove()


def activation(tokens: Any, name: Any, layer: Any) -> Any:
    kept = []
    forward(tokens, name, layer, lambda value: kept.append(value.clone()))
    return kept[0]


@pytest.fixture(scope="module")
def out() -> Any:
    return estimate(Sites(list(MODULES), seq_pos_type="each"))


@pytest.mark.parametrize("name", MODULES)
def test_elided_is_what_is_there_bit_by_bit(out: Any, name: Any) -> None:
    cells = out.cells[name]
    elided = cells.place(cells.elided, False)
    heads = out[name].shape[2:]
    for layer in range(LAST + 1):
        source, target = (activation(tokens, name, layer) for tokens in (SOURCE, TARGET))
        same = (source == target).unflatten(-1, (*heads, -1)).all(-1)
        assert torch.equal(elided[layer], same.movedim(0, -1)), layer
        assert torch.equal(out.elided(name)[layer], same.all(0)), layer


@pytest.mark.parametrize("name", MODULES)
def test_unread_is_what_no_logit_depends_on(out: Any, name: Any) -> None:
    cells = out.cells[name]
    unread = cells.place(cells.unread, False)
    expected = forward(TARGET)
    for layer in range(LAST + 1):
        for position in range(POSITIONS):

            def change(value: Any, position: Any = position) -> None:
                value[:, position] += 100.0

            moved = (forward(TARGET, name, layer, change) != expected).any(-1)
            marked = unread[layer, position]
            assert torch.equal(marked, (~moved).expand_as(marked)), (layer, position)
            assert out.unread(name)[layer, position].eq(not moved.any()).all()


def test_the_last_layer_has_cells_of_all_kinds(out: Any) -> None:
    assert out.elided("attn")[LAST].tolist() == [True, True, False, False, False]
    assert out.unread("attn")[LAST].tolist() == [True, True, True, True, False]
    assert out.exact("attn")[LAST].tolist() == [True, True, True, True, False]
    assert not out["attn"][LAST, :-1].any()
    # The second prompt puts at position 2 what is there, and the first does not.
    cells = out.cells["attn"]
    assert cells.place(cells.elided, False)[LAST, 2].tolist() == [False, True]
    assert cells.place(cells.unread, False)[LAST, 2].tolist() == [True, True]


@pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")
def test_what_has_no_token_is_elided_and_not_unread() -> None:
    mask = torch.ones_like(SOURCE)
    mask[1, 0] = 0
    options = {"source_attention_mask": mask, "target_attention_mask": mask}
    out = estimate(Sites("mlp", seq_pos_type="each"), **options)
    cells = out.cells["mlp"]
    assert cells.place(cells.elided, False)[LAST, 0].tolist() == [True, True]
    assert cells.place(cells.unread, False)[LAST, 0].tolist() == [True, False]
    assert out.unread("mlp")[LAST].tolist() == [True, True, True, True, False]
    assert torch.equal(cells.place(cells.known, False).all(-1), out.exact("mlp"))


def test_cells_of_several_positions_and_sites() -> Any:
    """Some of a cell may be read and unchanged, while the rest changes and is unread."""

    def at(name: Any, layer: Any, *positions: Any) -> Any:
        return Site.get_site(tiny_api(), name, layer, seq_pos=list(positions))

    target = SOURCE.clone()
    target[:, 2] += 1
    sites = {
        "elided": [at("mlp", 0, 0), at("mlp", LAST, 1)],
        "unread": [at("mlp", LAST, 1, 2)],
        "both": [at("mlp", LAST, 0, 1)],
        "part": [at("attn", 0, 1), at("mlp", LAST, 2)],
        "neither": [at("mlp", LAST, 2, -1)],
    }
    cells = [MultiSite(each, name=name) for name, each in sites.items()]
    out = estimate(Sites.from_sites(cells), target=target)
    marks = {name: (bool(out.elided(name)), bool(out.unread(name))) for name in out}
    assert marks == {
        "elided": (True, False),
        "unread": (False, True),
        "both": (True, True),
        "part": (False, True),
        "neither": (False, False),
    }
    for name, known in marks.items():
        assert bool(out.exact(name)) == any(known)
        assert bool(out[name]) == (not any(known))


def test_a_measured_sweep_marks_none_and_a_screened_one_those_of_its_estimate(out: Any) -> None:
    sites = Sites(list(MODULES), seq_pos_type="each")
    arguments = (MODEL, tiny_api(), sites, SOURCE, TARGET, *ANSWERS)
    measured = activation_patching(*arguments, progress=False)
    screened = activation_patching(*arguments, progress=False, screen="attribution", top_k=3)
    for name in out:
        assert not measured.unread(name).any()
        assert torch.equal(measured.elided(name), out.elided(name))
        assert torch.equal(screened.unread(name), out.unread(name))
        assert torch.equal(screened.elided(name), out.elided(name))
        assert screened.cells[name].exact[out.cells[name].known.all(-1)].all()


def test_both_masks_are_saved(out: Any, tmp_path: Any) -> None:
    out.save(tmp_path / "f")
    again = Outcome.load(tmp_path / "f")
    for name in out:
        assert torch.equal(again.cells[name].elided, out.cells[name].elided)
        assert torch.equal(again.cells[name].unread, out.cells[name].unread)
