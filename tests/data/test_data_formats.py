"""A row's columns become a dialogue or a text, or an error that names the key to set."""

from __future__ import annotations

import pytest

from cgfedllm.config import DataConfig
from cgfedllm.data.formats import Dialogue, Message, PlainText, parse_row
from cgfedllm.errors import DataError


def said(row: dict[str, object], **config: object) -> object:
    content = parse_row(row, DataConfig(**config))
    if isinstance(content, Dialogue):
        return [(message.role, message.content) for message in content.messages]
    return content


ASKED = [("user", "Why?"), ("assistant", "So.")]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Why?", "answer": "So."},
        {"prompt": " Why?\n", "completion": "\nSo. "},
        {"prompt": "Why?", "response": "So."},
        {"instruction": "Why?", "input": "", "output": "So."},
        {"instruction": "Why?", "output": "So."},
        {"instruction": "Why?", "context": None, "response": "So.", "category": "x"},
        {
            "messages": [
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "So."},
            ]
        },
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {
            "messages": [
                {"role": "system", "content": ""},
                {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
                {"role": "assistant", "content": "So."},
            ]
        },
    ],
)
def test_auto_finds_the_format(row):
    assert said(row) == ASKED


def test_alpaca_puts_the_input_below_the_instruction():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert said(row) == [("user", "Add.\n\n1 2"), ("assistant", "3")]


def test_text_is_kept_as_it_is():
    assert said({"text": "  a\n"}) == PlainText("  a\n")


def test_numbers_are_text_too():
    assert said({"question": 3, "answer": 0.5}) == [("user", "3"), ("assistant", "0.5")]


def test_columns_name_the_fields():
    row = {"query": "Why?", "reply": "So.", "text": "other"}
    columns = {"question": "query", "answer": "reply"}
    assert said(row, columns=columns) == ASKED
    assert said(row, format="qa", columns=columns) == ASKED
    assert said(row, columns={"prompt": "query", "completion": "reply"}) == ASKED


def test_a_dialogue_of_several_turns_keeps_them():
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    assert said(row) == turns
    assert parse_row(row, DataConfig()) == Dialogue(tuple(Message(*turn) for turn in turns))


@pytest.mark.parametrize(
    "row",
    [
        {"question": "", "answer": "So."},
        {"question": "Why?", "answer": None},
        {"question": "Why?", "answer": " \n"},
        {"instruction": " ", "input": "1", "output": "3"},
        {"text": "\t"},
        {"messages": None},
        {"messages": []},
        {"messages": [{"role": "user", "content": "Why?"}]},
        {
            "messages": [
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": None},
            ]
        },
    ],
)
def test_a_row_with_nothing_to_learn_is_none(row):
    assert said(row) is None


@pytest.mark.parametrize(
    ("row", "config", "message"),
    [
        (
            {"question": "a", "anwser": "b"},
            {"format": "qa"},
            r"no column 'answer' for the field 'answer' of format 'qa'; the columns are question, "
            r"anwser\. Did you mean 'anwser'\? Set data\.columns\.answer",
        ),
        (
            {"query": "a", "answer": "b"},
            {"columns": {"question": "qurey"}},
            r"no column 'qurey' .* Did you mean 'query'\? Set data\.columns\.question",
        ),
        (
            {"instruction": "a", "output": "b"},
            {"columns": {"input": "context"}},
            r"no column 'context' for the field 'input'",
        ),
        (
            {"a": "a"},
            {"columns": {"a": "a"}},
            r"data\.columns maps a, which no format has together",
        ),
        (
            {"question": "a", "answer": "b"},
            {"format": "qa", "columns": {"anser": "answer"}},
            r"data\.columns\.anser: format 'qa' has no such field.*Did you mean 'answer'",
        ),
        ({"a": 1, "b": 2}, {}, r"cannot be told from the columns a, b\. .*data\.format = \"qa\""),
        ({"question": ["a"], "answer": "b"}, {}, r"'question' holds a list where text"),
        ({"messages": "hello"}, {}, r"'messages' holds a str where a list of messages"),
        ({"messages": ["hello"]}, {}, r"message 1: expected"),
        ({"messages": [{"role": "robot", "content": "x"}]}, {}, r"unknown role 'robot'; known"),
        ({"messages": [{"role": "user", "content": 3}]}, {}, r"content is a int"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            {},
            r"only text can be learned",
        ),
    ],
)
def test_what_does_not_fit_names_the_column_and_the_key(row, config, message):
    with pytest.raises(DataError, match=message):
        said(row, **config)
