"""A choice of cells by their labels: the same outcome, of which other cells were not swept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnpatch_core import Outcome, PromptPairs, Sites, activation_patching
from nnpatch_core.errors import NotSweptError, OutcomeError
from nnpatch_core.results.selection import only
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer

SOURCE = ["The capital of France is", "The capital of Spain is"]
TARGET = ["The capital of Japan is", "The capital of Italy is"]
ANSWERS = [" Paris", " Madrid"], [" Tokyo", " Rome"]
TOKENIZER = tiny_tokenizer([*SOURCE, *TARGET, *ANSWERS[0], *ANSWERS[1]])
PAIRS = PromptPairs.from_texts(
    SOURCE,
    TARGET,
    *ANSWERS,
    TOKENIZER,
    extra={"kind": ["a", "b"]},
    spans={"verb": [" is", " is"], "country": [(" France", " Japan"), (" Spain", " Italy")]},
)


def sweep(sites: Any, **options: Any) -> Outcome:
    return activation_patching(tiny_model(), tiny_api(), sites, PAIRS, progress=False, **options)


OUT = sweep(Sites(["resid", "q", "k"], layers=[0, 2], seq_pos_type="each"))
SPANNED = sweep(Sites(["resid", "q"], seq_pos_type="spans", seq_pos=["verb", "country", "last"]))


def places(out: Outcome, name: str) -> set[tuple[int, ...]]:
    return {tuple(place) for place in out.swept(name).nonzero().tolist()}


@given(
    layer=st.none() | st.sampled_from([0, 2, -1, [0, 2], [2], range(3), range(1, 9)]),
    position=st.none() | st.sampled_from([3, -1, [0, -2], range(2, 5)]),
    head=st.none() | st.sampled_from([0, 1, 3, [0, 1]]),
    site=st.none() | st.sampled_from(["resid", ["q", "k"], "k"]),
)
@settings(deadline=None, max_examples=100)
def test_cells_are_those_of_a_loop_over_all(
    layer: Any, position: Any, head: Any, site: Any
) -> None:
    def wanted(value: Any, place: int, size: int) -> bool:
        if value is None:
            return True
        values = [value] if isinstance(value, int) else list(value)
        return any(each == place or each + size == place for each in values)

    names = OUT if site is None else [site] if isinstance(site, str) else site
    expected = {}
    for name in names:
        axes = [len(axis.labels) for axis in OUT.axes(name)]
        kept = {
            place
            for place in places(OUT, name)
            if wanted(layer, place[0], axes[0])
            and wanted(position, place[1], axes[1])
            and (head is None or (len(place) > 2 and wanted(head, place[2], 99)))
        }
        if kept:
            expected[name] = kept
    try:
        found = OUT.sel(site=site, layer=layer, position=position, head=head)
    except OutcomeError:
        # Of a list each head must be there.
        assert not expected or head is not None
        return
    assert {name: places(found, name) for name in found} == expected
    for name in found:
        assert found[name].shape == OUT[name].shape
        assert found.axes(name) == OUT.axes(name)
        swept = found.swept(name)
        assert torch.equal(found[name][swept], OUT[name][swept])
        assert torch.equal(found.per_prompt(name)[swept], OUT.per_prompt(name)[swept])
        assert bool((found[name][~swept] == 0).all())


@pytest.mark.parametrize(
    ("token", "position"),
    [(" is", 4), ("is", 4), (" France", 3), ("Italy", 3), (OUT.tokens[3], 3), ("The", 0)],
)
def test_a_token_is_named_by_each_of_its_texts(token: str, position: int) -> None:
    found = OUT.sel(token=token)
    for name in OUT:
        assert {place[1] for place in places(found, name)} == {position}
    assert places(OUT.sel(token=[token, "of"]), "q") == places(OUT.sel(position=[2, position]), "q")


def test_spans_by_name() -> None:
    found = SPANNED.sel(span="country", layer=-1)
    at = [str(label) for label in SPANNED.axes("q")[1].labels].index("country")
    assert {place[:2] for place in places(found, "q")} == {(2, at)}
    assert places(SPANNED.sel(span=["country", "last"]), "resid") < places(SPANNED, "resid")


def test_labels_of_a_list_of_sites() -> None:
    sites = Sites("mlp", seq_pos_type="last").get_sites_dict(tiny_model(), tiny_api(), PAIRS)
    listed = sweep(Sites.from_sites(sites["mlp"]))
    label = listed.axes("mlp")[0].labels[1]
    assert places(listed.sel(label=label), "mlp") == {(1,)}
    with pytest.raises(OutcomeError, match=r"no cell has layer=1: .* have the axes site alone"):
        listed.sel(layer=1)


def test_columns_of_positions() -> None:
    positions = torch.tensor([[3, 4], [3, 2]])
    out = sweep(Sites("q", seq_pos_type="custom", seq_pos=positions))
    assert {place[1] for place in places(out.sel(column=1), "q")} == {1}


def test_every_figure_is_of_what_is_left(tmp_path: Path) -> None:
    """Whatever an outcome does goes on, and a file keeps it."""
    found = OUT.sel(layer=2, site=["q", "resid"])
    assert [row["layer"] for row in found.strongest(100)] == [2] * 25
    assert {row["layer"] for row in found.top(100)} == {2}
    assert found.to_dataframe(level=None)["value"].notna().sum() == 25
    assert torch.equal(found.by_group("kind")["a"].swept("q"), found.swept("q"))
    assert torch.equal(found.standard_error("q")[2], OUT.standard_error("q")[2])
    assert found.plot() is not None
    found.save(tmp_path / "f")
    again = Outcome.load(tmp_path / "f")
    assert {name: places(again, name) for name in again} == {
        name: places(found, name) for name in found
    }
    assert torch.equal(again["q"], found["q"])


def test_means_alone_are_chosen_too(tmp_path: Path) -> None:
    means = sweep(Sites(["resid", "q"], seq_pos_type="each"), keep="means")
    found = means.sel(layer=1, token="is")
    swept = found.swept("q")
    assert torch.equal(found["q"][swept], means["q"][swept])
    assert torch.equal(found.standard_error("q")[swept], means.standard_error("q")[swept])
    found.save(tmp_path / "f")
    assert torch.equal(Outcome.load(tmp_path / "f")["q"], found["q"])


def test_a_bound_on_all_cells_goes() -> None:
    screened = sweep(Sites("resid", seq_pos_type="each"), screen="attribution", top_k=3)
    assert screened.screening is not None
    assert screened.sel(layer=range(3)).screening == screened.screening
    found = screened.sel(layer=1)
    assert found.screening is None
    assert torch.equal(found.exact("resid")[1], screened.exact("resid")[1])


def test_nothing_asked_is_all() -> None:
    found = OUT.sel()
    assert list(found) == list(OUT)
    assert all(torch.equal(found.swept(name), OUT.swept(name)) for name in OUT)


REFUSED = {
    "a layer that was not swept": ({"layer": 1}, "layer=1: of each layer there are 0, 2"),
    "one of a list": ({"layer": [0, 9]}, r"no cell has layer=9: of each layer there are 0, 2"),
    "no number of a range": ({"layer": range(5, 9)}, r"no cell has layer=\[5, 6, 7, 8\]"),
    "below the first": ({"position": -6}, r"no cell has position=-6: of each position .* 0-4"),
    "heads have no end to count from": ({"head": -1}, r"no cell has head=-1: of each head .* 0-3"),
    "a token": ({"token": "Frence"}, r"Frence' \(did you mean France\?\); there are .*'The'"),
    "a span where there is none": ({"span": "verb"}, r"span=.verb.: .* have the axes layer"),
    "not together": ({"site": "k", "head": 1, "layer": 0, "token": "x"}, r"no cell has token='x'"),
    "a truth": ({"layer": True}, "layer must be an integer"),
    "a fraction": ({"layer": 1.5}, "layer must be one label or a list of numbers, got 1.5"),
    "a slice": ({"layer": slice(1)}, "layer must be one label or a list of numbers"),
    "an empty list": ({"token": []}, "token is empty"),
    "no site name": ({"site": []}, "site is empty"),
    "a number as a text": ({"token": [5]}, "token is named by a text, got 5"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_matches_nothing_is_told(case: str) -> None:
    arguments, told = REFUSED[case]
    with pytest.raises(OutcomeError, match=told):
        OUT.sel(**arguments)


def test_labels_that_no_cell_has_together() -> None:
    index = OUT.cells["q"].index
    ends = only(OUT, {"q": torch.tensor([0, len(index) - 1])})
    assert places(ends, "q") == {(0, 0, 0), (2, 4, 3)}
    with pytest.raises(OutcomeError, match=r"no cell of \['q'\] has layer=0 and head=3 together"):
        ends.sel(layer=0, head=3)
    with pytest.raises(OutcomeError, match=r"no cell has head=0: .* have the axes layer, position"):
        OUT.sel(site="resid", head=0)


def test_a_span_that_is_misspelled() -> None:
    with pytest.raises(OutcomeError, match=r"\(did you mean country\?\); there are .*'verb'"):
        SPANNED.sel(span="contry")
    with pytest.raises(OutcomeError, match=r"have the axes layer, span"):
        SPANNED.sel(token="is")


def test_a_site_that_was_not_swept() -> None:
    with pytest.raises(NotSweptError, match="'mlp' was not swept"):
        OUT.sel(site="mlp")
    assert list(SPANNED.sel(site="resid_post")) == ["resid"]


def test_keys_are_completed() -> None:
    assert OUT._ipython_key_completions_() == ["resid", "q", "k"]
