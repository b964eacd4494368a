"""Spans of prompts: from templates, texts, letters and columns to tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnpatch_core import PromptPairs, Spans
from nnpatch_core.errors import PositionError, PromptWarning, TokensError
from nnpatch_core.testing import tiny_tokenizer

WORDS = ["Then", ",", "Mary", "Sue", "Anne", "John", "and", "went", "to", "the", "shop", "bar"]
#: Each word with a space in front, and without one.
TOKENIZER = tiny_tokenizer([" " + " ".join(WORDS), *WORDS])
ANSWERS = ([" Mary"], [" Sue"])


def one(source: str, target: str, spans: Any, **options: Any) -> PromptPairs:
    return PromptPairs.from_texts([source], [target], *ANSWERS, TOKENIZER, spans=spans, **options)


def words(pairs: PromptPairs, name: str, side: str = "target", pair: int = 0) -> list[str]:
    """The words of a span, by the tokens that it has."""
    tokens = getattr(pairs, f"{side}_tokens")[pair]
    start, stop = getattr(pairs.spans[name], side)[pair].tolist()
    return [] if start < 0 else [TOKENIZER.decode([int(t)]).strip() for t in tokens[start:stop]]


@pytest.mark.parametrize(
    ("span", "source", "target"),
    [
        ("Mary", ["Mary"], ["Mary"]),
        (("Mary", "Sue"), ["Mary"], ["Sue"]),
        (("John", 0), ["John"], ["John"]),
        ((("John", -1), ("Sue", 0)), ["John"], ["Sue"]),
        ("went to the", ["went", "to", "the"], ["went", "to", "the"]),
        ((5, 9), ["Mary"], ["Mary"]),
        (((5, 9), (14, 17)), ["Mary"], ["Sue"]),
        ((None, "Sue"), [], ["Sue"]),
        (" Mary ", ["Mary"], ["Mary"]),
    ],
)
def test_every_form_finds_its_words(span: Any, source: list[str], target: list[str]) -> None:
    texts = ("Then Mary and John went to the John", "Then Mary and Sue and John went to the shop")
    pairs = one(*texts, {"here": [span]})
    assert words(pairs, "here", "source") == source
    assert words(pairs, "here", "target") == target


def test_one_text_does_for_all_pairs() -> None:
    texts = ["Mary went to the shop", "Then Mary went to the shop"]
    pairs = PromptPairs.from_texts(
        texts, texts, [" Mary"] * 2, [" Sue"] * 2, TOKENIZER, spans={"verb": "went"}
    )
    assert pairs.spans["verb"].source.tolist() == [[2, 3], [2, 3]]
    assert [words(pairs, "verb", pair=pair) for pair in range(2)] == [["went"], ["went"]]


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.sampled_from(WORDS), min_size=1, max_size=3)),
        min_size=1,
        max_size=4,
    )
)
@settings(deadline=None, max_examples=50)
def test_a_template_knows_where_it_put_each_filling(
    drawn: list[tuple[int, list[str]]],
) -> None:
    """Words in front move a span, and neither its words nor the last token change."""
    fills = [{"lead": " ".join(["Then", *["the"] * n]), "A": " ".join(w)} for n, w in drawn]
    pairs = PromptPairs.from_template(
        "{lead} , {A} and {A} went to",
        fills,
        fills,
        [" Mary"] * len(fills),
        [" Sue"] * len(fills),
        TOKENIZER,
    )
    width = pairs.target_tokens.shape[1]
    for pair, fill in enumerate(fills):
        for name in ("A[0]", "A[1]"):
            assert words(pairs, name, pair=pair) == fill["A"].split()
        assert words(pairs, "lead", pair=pair) == fill["lead"].split()
        assert pairs.spans["A[1]"].target[pair, 1] == width - 2
    cells = Spans(["A[0]", "last"], token="all").place(pairs.batch)
    assert [len(group) for group in cells[0].positions] == [len(w) for _, w in drawn]
    assert cells[1].positions == ((width - 1,),) * len(fills)


def test_templates_of_each_pair_are_a_column() -> None:
    templates = ["{A} and {B} went to", "Then , {B} went to the shop and {A} to"]
    fills = [{"A": "Mary", "B": "Sue"}] * 2
    pairs = PromptPairs.from_template(
        templates, fills, fills, [" Mary"] * 2, [" Sue"] * 2, TOKENIZER, extra={"kind": [1, 2]}
    )
    assert pairs.columns == {"template": tuple(templates), "kind": (1, 2)}
    assert pairs.spans["B"].target.tolist() == [[7, 8], [2, 3]]
    first, second = pairs.groups("template").values()
    # A group has its own width, and its spans go with it.
    assert first.spans["B"].target.tolist() == [[2, 3]]
    assert second.spans["B"].target.tolist() == [[2, 3]]
    assert words(first, "B") == words(second, "B") == ["Sue"]
    assert words(pairs[1], "A") == ["Mary"]


def test_braces_of_the_text_are_doubled() -> None:
    tokenizer = tiny_tokenizer(["{ } Mary Sue went"])
    fills = [{"A": "Mary"}]
    pairs = PromptPairs.from_template(
        "{{ {A} }} went", fills, fills, [" Mary"], [" Sue"], tokenizer
    )
    assert pairs.pairs[0].source == "{ Mary } went"
    assert pairs.spans["A"].source.tolist() == [[1, 2]]


def test_swapped_pairs_have_swapped_spans() -> None:
    pairs = one("Mary went to", "Then Sue went to", {"who": [("Mary", "Sue")]})
    swapped = pairs.swapped()
    assert words(swapped, "who", "source") == ["Sue"]
    assert words(swapped, "who", "target") == ["Mary"]


def test_a_cut_token_is_told_and_belongs_to_the_span() -> None:
    with pytest.warns(PromptWarning, match=r"span 'part' cuts the token ' Mary' in two, of which"):
        pairs = one("Then Mary went", "Then Mary went", {"part": ["ary"]})
    assert words(pairs, "part") == ["Mary"]


BAD: dict[str, tuple[Any, str]] = {
    "none": ("Bob", r"span here of pair 0, source prompt: 'Bob' does not stand in 'Mary and John"),
    "several": ("John", r"'John' stands 2 times in 'Mary .*\nchoose one of several places"),
    "beyond": (("John", 2), r"'John' stands 2 times in .*, and place 2 was chosen"),
    "letters": ((3, 99), r"letters 3 to 99 are not in a prompt of 25 letters"),
    "turned": ((9, 3), r"letters 9 to 3 are not in a prompt"),
    "spaces": ((4, 5), r"the span is empty"),
    "number": (3, r"a span must be a text, .*got 3"),
    "three": (["a", "b", "c"], r"a span must be a text"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_span_that_is_not_found_is_a_fault_of_its_pair(case: str) -> None:
    span, match = BAD[case]
    text = "Mary and John went to John"
    with pytest.raises(PositionError, match=match):
        one(text[:-1], text[:-1], {"here": [span]}) if case == "letters" else one(
            text, text, {"here": [span]}
        )


def test_faults_of_spans_are_told_with_all_others() -> None:
    texts = ["Mary went", "Sue went", "Anne went"]
    with pytest.raises(TokensError, match=r"2 of 3 pairs cannot be used") as caught:
        PromptPairs.from_texts(
            texts, ["Sue went", "", "John went"], [" Mary"] * 3, [" Sue"] * 3, TOKENIZER,
            spans={"who": [("Mary", "Sue"), None, ("Anne", "Bob")]},
        )  # fmt: skip
    assert "target of pair 1: must be a non-empty text" in str(caught.value)
    assert "span who of pair 2, target prompt: 'Bob' does not stand in 'John went'" in str(
        caught.value
    )
    with pytest.warns(PromptWarning, match="2 of 3 pairs were dropped"):
        pairs = PromptPairs.from_texts(
            texts, ["Sue went", "", "John went"], [" Mary"] * 3, [" Sue"] * 3, TOKENIZER,
            spans={"who": [("Mary", "Sue"), None, ("Anne", "Bob")]}, faulty="drop",
        )  # fmt: skip
    assert len(pairs) == 1
    assert words(pairs, "who") == ["Sue"]


@pytest.mark.parametrize(
    ("spans", "match"),
    [
        ({"last": "Mary"}, "not 'last', which is each prompt's last token"),
        ({"": "Mary"}, "named by a text"),
        ({3: "Mary"}, "named by a text"),
        ([("a", "Mary")], "spans must be a mapping"),
        ({"a": ["Mary", "Sue"]}, r"one text for all pairs, or a list .* of 1 pairs, got 2"),
        ({"a": 3}, r"got 3"),
    ],
)
def test_spans_that_are_none_are_refused(spans: Any, match: str) -> None:
    with pytest.raises(PositionError, match=match):
        one("Mary went", "Mary went", spans)


def test_columns_of_a_table_are_spans(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "source": ["Mary and John went to John"],
            "target": ["Sue and John went to John"],
            "source_answer": [" Mary"],
            "target_answer": [" Sue"],
            "who": ["Mary"],
            "other": ["Sue"],
            "twice": ["John"],
        }
    )
    spans = {"who": ("who", "other"), "first": ("twice", 0), "second": ("twice", -1)}
    path = tmp_path / "pairs.csv"
    frame.to_csv(path, index=False)
    for pairs in (
        PromptPairs.from_dataframe(frame, TOKENIZER, spans=spans),
        PromptPairs.from_csv(path, TOKENIZER, spans=spans),
    ):
        assert words(pairs, "who", "source") == ["Mary"]
        assert words(pairs, "who", "target") == ["Sue"]
        assert pairs.spans["first"].source.tolist() == [[2, 3]]
        assert pairs.spans["second"].source.tolist() == [[5, 6]]
    with pytest.raises(PositionError, match=r"column 'whose'; further columns .* who, other, twi"):
        PromptPairs.from_csv(path, TOKENIZER, spans={"who": "whose"})
    with pytest.raises(
        PositionError, match=r"line 2, column other \(span who\), source prompt: 'Sue' does not"
    ):
        PromptPairs.from_csv(path, TOKENIZER, spans={"who": "other"})
    with pytest.raises(PositionError, match=r"must be the name of a column"):
        PromptPairs.from_csv(path, TOKENIZER, spans={"who": 3})


def test_a_counterfact_subject_is_a_span(tmp_path: Path) -> None:
    facts = [
        {
            "case_id": number,
            "requested_rewrite": {
                "prompt": "Then {} went to the",
                "subject": subject,
                "target_true": {"str": f" {place}"},
                "target_new": {"str": "Sue"},
            },
        }
        for number, (subject, place) in enumerate([("Mary Anne", "shop"), ("the John", "bar")])
    ]
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(facts))
    pairs = PromptPairs.from_table(path, TOKENIZER, layout="counterfact", space=True)
    # "the" stands again behind it: the place is known, and not looked for.
    assert words(pairs, "subject", "source", 0) == ["Mary", "Anne"]
    assert words(pairs, "subject", "target", 0) == ["the", "John"]
    assert words(pairs, "subject", "source", 1) == ["the", "John"]


TEMPLATES: dict[str, tuple[dict[str, Any], str]] = {
    "no placeholder": ({"template": "Mary went"}, "has no placeholder"),
    "open": ({"template": "{A went"}, "is no template"),
    "format": ({"template": "{A:>3} went"}, "a placeholder is a name in braces"),
    "number": ({"template": "{0} went"}, "a placeholder is a name in braces"),
    "last": ({"template": "{last} went"}, "may not be called 'last'"),
    "two": ({"template": ["{A} went", "{A} went"]}, "one for each of 1 pairs, got 2"),
    "none": ({"template": 3}, "got 3"),
    "missing": ({"source_fills": [{"B": "Sue"}]}, "source_fills of pair 0 lacks 'A'.* are B"),
    "unused": ({"target_fills": [{"A": "Sue", "C": "x"}]}, "target_fills of pair 0 has 'C', and"),
    "empty": ({"source_fills": [{"A": " "}]}, "'A' in source_fills of pair 0 must be a text"),
    "lengths": ({"source_fills": [{"A": "Sue"}] * 2}, "equally long, got 2 and 1"),
    "mapping": ({"source_fills": ["Sue"]}, "source_fills of pair 0 must be a mapping"),
    "fills": ({"source_fills": 3}, "source_fills must be a list of mappings"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_bad_template_is_told(case: str) -> None:
    given, match = TEMPLATES[case]
    arguments = {
        "template": "{A} went",
        "source_fills": [{"A": "Mary"}],
        "target_fills": [{"A": "Sue"}],
        "source_answers": [" Mary"],
        "target_answers": [" Sue"],
        "tokenizer": TOKENIZER,
        **given,
    }
    with pytest.raises(TokensError, match=match):
        PromptPairs.from_template(**arguments)


def test_options_of_a_template_are_checked() -> None:
    fills = [{"A": "Mary"}]
    given = ("{A} went", fills, fills, [" Mary"], [" Sue"], TOKENIZER)
    with pytest.raises(TypeError, match="takes no spans=: its placeholders are the spans"):
        PromptPairs.from_template(*given, spans={})
    with pytest.raises(TypeError, match="did you mean 'faulty'"):
        PromptPairs.from_template(*given, fault="drop")


def test_a_tokenizer_without_letters_is_told() -> None:
    class Slow:
        """A tokenizer that tells no offsets."""

        def __getattr__(self, name: str) -> Any:
            return getattr(TOKENIZER, name)

        def __len__(self) -> int:
            return len(TOKENIZER)

        def __call__(self, text: str, **options: Any) -> Any:
            if options.get("return_offsets_mapping"):
                raise NotImplementedError("no offsets")
            return TOKENIZER(text, **options)

    with pytest.raises(PositionError, match=r"(?s)does not tell which letters .*fast tokenizer"):
        PromptPairs.from_texts(
            ["Mary went"], ["Mary went"], *ANSWERS, Slow(), spans={"who": "Mary"}
        )
