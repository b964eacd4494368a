"""Prompts that are messages: few-shot, system, prefill, and options of the chat template."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from nnpatch_core import PromptPairs
from nnpatch_core.errors import AnswerWarning, PromptWarning, TokensError
from nnpatch_core.testing import tiny_tokenizer

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>{% endif %}{% endif %}"
)
TURNS = ["<user>", "<assistant>", "<system>", "<end>", "<think>"]
ASKED = ["Capital of France?", "Capital of Japan?"]
WORDS = [*ASKED, "Capital of Italy?", "Be brief.", "It is", "Rome Paris Tokyo", "Paris", "Tokyo"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer(WORDS, chat_template=TEMPLATE, additional_special_tokens=TURNS)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def make(
    tokenizer: Any,
    prompts: list[Any],
    answers: tuple[str, str] = ("Paris", "Tokyo"),
    **options: Any,
) -> PromptPairs:
    return PromptPairs.from_texts(
        [prompts[0]], [prompts[1]], [answers[0]], [answers[1]], tokenizer, **options
    )


def run(pairs: PromptPairs, tokenizer: Any) -> str:
    tokens = pairs.source_tokens[0][pairs.source_attention_mask[0].bool()]
    return "".join(tokenizer.convert_ids_to_tokens(tokens.tolist()))


def answer(pairs: PromptPairs, tokenizer: Any) -> str:
    return tokenizer.convert_ids_to_tokens(pairs.source_answer_index.tolist())[0]


def test_messages_are_what_a_plain_text_in_a_chat_stands_for(tokenizer: Any) -> None:
    plain = make(tokenizer, ASKED, chat=True, system="Be brief.")
    opening = {"role": "system", "content": "Be brief."}
    listed = make(tokenizer, [[opening, user(text)] for text in ASKED])
    assert listed.source_tokens.equal(plain.source_tokens)
    assert listed.target_tokens.equal(plain.target_tokens)
    assert listed.source_answer_index.equal(plain.source_answer_index)
    # The answer opens the turn: it is taken as it is, without a word.
    assert answer(listed, tokenizer) == "Paris"


def test_few_shot(tokenizer: Any) -> None:
    shots = [user("Capital of Italy?"), assistant("Rome")]
    pairs = make(tokenizer, [[*shots, user(text)] for text in ASKED])
    assert run(pairs, tokenizer) == (
        "<user>Capital of Italy?<end><assistant>Rome<end><user>Capital of France?<end><assistant>"
    )


def test_prefill_goes_on_with_the_last_message(tokenizer: Any) -> None:
    prompts = [[user(text), assistant("It is")] for text in ASKED]
    pairs = make(tokenizer, prompts, (" Paris", " Tokyo"))
    assert run(pairs, tokenizer) == "<user>Capital of France?<end><assistant>It is"
    assert answer(pairs, tokenizer) == " Paris"
    # It is a text like another, to which an answer is joined by a space.
    with pytest.warns(AnswerWarning, match="It is' as ' Paris'"):
        assert answer(make(tokenizer, prompts), tokenizer) == " Paris"


def test_options_of_the_template(tokenizer: Any) -> None:
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    for prompts, chat in ((ASKED, True), ([[user(text)] for text in ASKED], False)):
        pairs = make(tokenizer, prompts, chat=chat, **options)
        assert run(pairs, tokenizer) == "<user>Capital of France?<end><assistant><think>"
        assert answer(pairs, tokenizer) == "Paris"


def test_another_template_for_a_tokenizer_without_one() -> None:
    tokenizer = tiny_tokenizer(WORDS, additional_special_tokens=TURNS)
    options = {"chat_template": TEMPLATE}
    pairs = make(tokenizer, ASKED, chat=True, chat_template_kwargs=options)
    assert run(pairs, tokenizer) == "<user>Capital of France?<end><assistant>"


def test_messages_and_texts_in_one_call(tokenizer: Any) -> None:
    pairs = PromptPairs.from_texts(
        ["It is", [user(ASKED[0])]],
        ["Be brief.", [user(ASKED[1])]],
        [" Paris", "Paris"],
        [" Tokyo", "Tokyo"],
        tokenizer,
    )
    assert tokenizer.convert_ids_to_tokens(pairs.source_answer_index) == [" Paris", "Paris"]


def test_the_pair_keeps_the_messages_and_not_the_users_list(tokenizer: Any) -> None:
    prompts = [[user(text)] for text in ASKED]
    pairs = make(tokenizer, prompts)
    prompts[0][0]["content"] = "changed"
    assert pairs.pairs[0].source == (user(ASKED[0]),)
    assert pairs.swapped().pairs[0].target == (user(ASKED[0]),)


def test_an_option_that_the_template_does_not_read_is_said(tokenizer: Any) -> None:
    with pytest.warns(PromptWarning, match="mentions no 'enable_thinkng'") as caught:
        make(tokenizer, ASKED, chat=True, chat_template_kwargs={"enable_thinkng": False})
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "must be a non-empty text, or a list of messages"),
        ([user("Capital"), "of"], "must be a non-empty text, or a list of messages"),
        ([{"role": "user"}], "a message needs a 'role' and a 'content'"),
        ([{"content": "Capital"}], "a message needs a 'role' and a 'content'"),
        ([{"role": 5, "content": "Capital"}], "a message needs a 'role' and a 'content'"),
        ([user("Capital"), assistant("")], "the assistant's message, which is to go on, is empty"),
        ([user("Capital"), assistant(" ")], "the assistant's message, which is to go on, is empty"),
        ([{"role": "tool", "content": "x"}], "the chat template refuses it: no tools here"),
        (user("Capital"), "must be a non-empty text, or a list of messages"),
    ],
)
def test_messages_that_are_none(tokenizer: Any, messages: list[Any], says: str) -> None:
    with pytest.raises(TokensError) as caught:
        make(tokenizer, [messages, ASKED[1]])
    assert f"source of pair 0: {says}" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, "mean nothing without chat=True"),
        ({"chat": True, "chat_template_kwargs": {"tokenize": True}}, "may not have 'tokenize'"),
        (
            {"chat": True, "chat_template_kwargs": {"add_generation_prompt": False}},
            "may not have 'add_generation_prompt'",
        ),
        ({"chat": True, "chat_template_kwargs": "fast"}, "must be a mapping, got 'fast'"),
        ({"chat": True, "system": 5}, "system must be a text, got 5"),
        ({"system": "Be brief."}, "system= means nothing without chat=True"),
    ],
)
def test_options_that_do_not_go_together(tokenizer: Any, options: Any, says: str) -> None:
    with pytest.raises(TokensError, match=says):
        make(tokenizer, ASKED, **options)


def test_messages_for_a_tokenizer_without_a_template() -> None:
    with pytest.raises(TokensError, match="messages need a tokenizer with a chat template"):
        make(tiny_tokenizer(WORDS), [[user(text)] for text in ASKED])


def test_a_text_that_the_user_rendered_is_the_same_prompt(tokenizer: Any) -> None:
    """Rendered with `tokenize=False`, or by us: the same tokens and the same answer."""
    rendered = [
        tokenizer.apply_chat_template([user(text)], tokenize=False, add_generation_prompt=True)
        for text in ASKED
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = make(tokenizer, rendered)
    chat = make(tokenizer, ASKED, chat=True)
    assert pairs.source_tokens.equal(chat.source_tokens)
    assert pairs.source_answer_index.equal(chat.source_answer_index)


def test_a_system_message_is_not_dropped_from_messages(tokenizer: Any) -> None:
    """It was: messages got none, without a word."""
    prompts = [[user(text)] for text in ASKED]
    with pytest.raises(TokensError) as caught:
        make(tokenizer, prompts, chat=True, system="Be brief.")
    assert str(caught.value) == (
        "system= is for prompts that are texts; messages have a system message of their own: put "
        "it into them (source of pair 0 and target of pair 0)"
    )
    with pytest.raises(TokensError, match=r"own: put it into them \(target of pair 0\)"):
        make(tokenizer, [ASKED[0], prompts[1]], chat=True, system="Be brief.")
    make(tokenizer, [ASKED[0], prompts[1]], chat=True)


def rendered(tokenizer: Any, text: str, **options: Any) -> str:
    return tokenizer.apply_chat_template([user(text)], tokenize=False, **options)


def test_a_rendered_text_in_a_chat_is_said_once(tokenizer: Any) -> None:
    texts = [rendered(tokenizer, text, add_generation_prompt=True) for text in ASKED]
    with pytest.warns(PromptWarning) as caught:
        pairs = PromptPairs.from_texts(
            [texts[0], ASKED[0], texts[0]],
            [texts[1], ASKED[1], ASKED[1]],
            ["Paris"] * 3,
            ["Tokyo"] * 3,
            tokenizer,
            chat=True,
        )
    assert len(pairs) == 3
    (warning,) = caught
    for part in (
        "2 of 3 pairs hold '<user>', which the chat template writes itself",
        "(source of pairs 0, 2 and target of pair 0)",
        "Leave out chat=True",
    ):
        assert part in str(warning.message)
    assert warning.filename == __file__
    make(tokenizer, texts)


@pytest.mark.parametrize("space", ["", "\n"])
def test_a_rendered_text_that_opens_no_turn_is_said_once(tokenizer: Any, space: str) -> None:
    texts = [rendered(tokenizer, text) + space for text in ASKED]
    with pytest.warns(PromptWarning) as caught:
        make(tokenizer, texts, ("Paris", "Tokyo"))
    (warning,) = caught
    for part in (
        "a prompt that ends with '<end>' ends a turn and opens none",
        "(source of pair 0 and target of pair 0)",
        "render with add_generation_prompt=True",
    ):
        assert part in str(warning.message)


def test_where_the_message_is_the_opening_nothing_is_said() -> None:
    """As in Mistral's template, after whose `[/INST]` the answer begins; and in plain prompts."""
    template = "{% for message in messages %}<user>{{ message['content'] }}<end>{% endfor %}"
    for given in (template, "{{ raise_exception('none') }}", TEMPLATE.replace("<end>", "\n")):
        tokenizer = tiny_tokenizer(
            [*WORDS, "\n"], chat_template=given, additional_special_tokens=TURNS
        )
        make(tokenizer, [f"<user>{text}<end>" for text in ASKED])
        make(tokenizer, [f"{text}\n" for text in ASKED])
        make(tokenizer, ASKED, (" Paris", " Tokyo"))


def test_the_end_of_an_assistants_turn_opens_none_either() -> None:
    """Where it is not that of a user's, as in DeepSeek's template."""
    template = TEMPLATE.replace("<end>", "{% if message['role'] == 'assistant' %}<end>{% endif %}")
    tokenizer = tiny_tokenizer(WORDS, chat_template=template, additional_special_tokens=TURNS)
    with pytest.warns(PromptWarning, match="'<end>' ends a turn and opens none"):
        make(tokenizer, [f"<user>{text}<assistant>It is<end>" for text in ASKED])
    make(tokenizer, [f"<user>{text}<assistant>" for text in ASKED])


def test_messages_in_a_table_are_json(tokenizer: Any, tmp_path: Path) -> None:
    prompts = [[user(text)] for text in ASKED]
    expected = make(tokenizer, prompts)
    frame = pd.DataFrame(
        {
            "source": [json.dumps(prompts[0], indent=1)],
            "target": [json.dumps(prompts[1])],
            "source_answer": ["Paris"],
            "target_answer": ["Tokyo"],
        }
    )
    frame.to_csv(tmp_path / "chats.csv", index=False)
    for pairs in (
        PromptPairs.from_dataframe(frame, tokenizer),
        PromptPairs.from_csv(tmp_path / "chats.csv", tokenizer),
    ):
        assert pairs.pairs == expected.pairs
        assert pairs.source_tokens.equal(expected.source_tokens)
    with pytest.raises(TokensError, match=r"messages have .* of their own.*row 0, column source"):
        PromptPairs.from_dataframe(frame, tokenizer, chat=True, system="Be brief.")


@pytest.mark.parametrize(
    "text",
    ['[{"a": 1}]', "[{x}] is", '[{"role": 5, "content": ""}]', '{"role": "user"}', "[{" * 9**5],
)
def test_what_is_no_json_of_messages_is_a_text(text: str) -> None:
    tokenizer = tiny_tokenizer([text, *WORDS], chat_template=TEMPLATE)
    columns = "source", "target", "source_answer", "target_answer"
    frame = pd.DataFrame([[text, ASKED[0], " Paris", " Tokyo"]], columns=columns)
    assert PromptPairs.from_dataframe(frame, tokenizer).pairs[0].source == text


def test_json_in_a_list_of_ones_own_is_a_text(tokenizer: Any) -> None:
    text = json.dumps([user(ASKED[0])])
    assert make(tokenizer, [text, ASKED[1]], (" Paris", " Tokyo")).pairs[0].source == text
