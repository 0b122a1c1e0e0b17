import json

import pytest

from bd3lm_hf.data.files import SCHEMAS, Messages, PromptCompletion, TextRow, detect_schema


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    ("columns", "schema"),
    [
        (["text"], TextRow),
        (["title", "body"], TextRow),
        (["prompt", "completion", "source"], PromptCompletion),
        (["messages"], Messages),
        (["prompt"], TextRow),
    ],
)
def test_columns_tell_what_rows_hold(columns: list[str], schema: type) -> None:
    assert type(detect_schema(dict.fromkeys(columns, "string"), "set")) is schema


def test_columns_of_several_formats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"columns of 'set' fit several formats \(text, messages\); .*data_form"):
        detect_schema({"text": "string", "messages": "list"}, "set")


@pytest.mark.parametrize("name", ["prompt_completion", "messages"])
def test_a_missing_column_lists_the_columns(name: str) -> None:
    schema = SCHEMAS[name]()
    with pytest.raises(ValueError, match=rf"'set' has no column '{schema.names[0]}'; its columns are: a, b"):
        schema.resolved({"a": "string", "b": "int64"}, "set")
    assert schema.resolved(dict.fromkeys(schema.names, "string"), "set") is schema


def test_prompts_and_completions_are_strings() -> None:
    schema = PromptCompletion()
    assert schema.read({"prompt": "a", "completion": "b", "id": 1}) == {"prompt": "a", "completion": "b"}
    with pytest.raises(ValueError, match=r"has no text \(null\) in the column 'completion'"):
        schema.read({"prompt": "a", "completion": None})
    with pytest.raises(ValueError, match="holds list in the column 'prompt', not text"):
        schema.read({"prompt": CHAT, "completion": "b"})


def test_messages_become_json_without_the_fields_that_a_column_of_structs_adds() -> None:
    padded = [{**message, "tool_calls": None} for message in CHAT]
    assert json.loads(Messages().read({"messages": padded})["messages"]) == CHAT


@pytest.mark.parametrize("messages", [None, [], "hi", [1], [{"role": "user"}], [CHAT[0], {"content": "x"}]])
def test_what_is_no_conversation_is_refused(messages: object) -> None:
    with pytest.raises(ValueError, match="has no list of messages with role and content in the column 'messages'"):
        Messages().read({"messages": messages})


def test_a_conversation_without_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="has no message of the role 'assistant'"):
        Messages().read({"messages": CHAT[:1]})
