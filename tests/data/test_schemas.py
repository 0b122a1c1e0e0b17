import json

import pytest

from bd3lm_hf.data.schemas import OBJECTS, SCHEMAS, Messages, PromptCompletion, TextRow, detect_schema


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": null, "days": 2}'}}


def read(**record) -> list[dict]:
    """The messages of a record, with its columns chosen first."""
    kinds = {name: OBJECTS if isinstance(value, list) else "string" for name, value in record.items()}
    return json.loads(Messages().resolved(kinds, "set").read(record)["messages"])


@pytest.mark.parametrize(
    ("columns", "schema"),
    [
        ({"text": "string"}, TextRow),
        ({"title": "string", "body": "string"}, TextRow),
        ({"prompt": "string", "completion": "string", "source": "string"}, PromptCompletion),
        ({"messages": OBJECTS, "id": "string"}, Messages),
        ({"conversations": OBJECTS}, Messages),
        ({"prompt": OBJECTS, "completion": OBJECTS}, Messages),
        ({"prompt": "string"}, TextRow),
    ],
)
def test_the_columns_decide_the_schema(columns: dict, schema: type) -> None:
    assert type(detect_schema(columns, "set")) is schema


def test_columns_of_several_formats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'set' .*\(text, messages\).*data_format"):
        detect_schema({"text": "string", "messages": OBJECTS}, "set")


@pytest.mark.parametrize(
    ("schema", "found", "named"),
    [
        ("prompt_completion", {"a": "string", "b": "int64"}, "'prompt'; its columns are: a, b"),
        ("prompt_completion", {"prompt": OBJECTS, "completion": OBJECTS}, "'prompt' .*data_format='messages'"),
        ("messages", {"a": "string", "prompt": "string", "completion": "string"}, "'messages'; its columns are: a"),
        ("text", {"a": "string", "b": "string"}, "Set text_column.*'prompt' and 'completion', or 'messages'.*: a, b"),
        ("text", {"id": "string", "chats": OBJECTS}, "Set text_column.*: id, chats"),
        ("text", {"id": "string", "body": "dict"}, "Set text_column.*: id, body"),
        ("text", {"prompt": "string", "completions": "list<element: string>"}, "Set text_column.*: prompt, comp"),
    ],
)
def test_wrong_columns_are_listed_with_the_expected_ones(schema: str, found: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SCHEMAS[schema]().resolved(found, "set")


@pytest.mark.parametrize("columns", ["instruction input output", "question answer", "prompt chosen rejected"])
def test_instruction_columns_are_never_read_as_text(columns: str) -> None:
    found = dict.fromkeys(columns.split(), "string")
    with pytest.raises(ValueError, match="'prompt' and 'completion', or 'messages'"):
        detect_schema(found, "set").resolved(found, "set")


def test_prompts_and_completions_are_strings() -> None:
    schema = PromptCompletion()
    assert schema.read({"prompt": "a", "completion": "b", "id": 1}) == {"prompt": "a", "completion": "b"}
    with pytest.raises(ValueError, match=r"null.* 'completion'"):
        schema.read({"prompt": "a", "completion": None})
    with pytest.raises(ValueError, match="list in the column 'prompt'"):
        schema.read({"prompt": CHAT, "completion": "b"})


@pytest.mark.parametrize(("text", "named"), [("a\ud800", r"'\\ud800'.*character 1"), ("\udce9", "byte .*not UTF-8")])
def test_text_that_cannot_be_encoded_is_a_fault(text: str, named: str) -> None:
    for schema, record in (
        (TextRow(), {"text": text}),
        (Messages(), {"messages": [*CHAT, {"role": "user", "content": text}]}),
    ):
        with pytest.raises(ValueError, match=named if isinstance(schema, TextRow) else "surrogate|byte"):
            schema.read(record)


def test_fields_that_a_column_of_structs_adds_are_dropped() -> None:
    padded = [{**message, "tool_calls": None} for message in CHAT]
    assert read(messages=padded) == CHAT


def test_other_spellings_of_a_conversation_are_read() -> None:
    assert read(conversations=[{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]) == CHAT
    assert read(conversations=CHAT) == CHAT
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert read(messages=[{"role": "user", "content": parts}, CHAT[1]]) == CHAT


def test_older_spellings_of_a_tool_call_are_read() -> None:
    called = {"name": "weather", "arguments": {"days": 2}}
    wanted = ["user", "assistant", "tool", "assistant"]
    old = {"role": "assistant", "content": None, "function_call": {**called, "arguments": '{"days": 2}'}}
    share = [{"from": "function_call", "value": json.dumps(called)}, {"from": "observation", "value": "1"}]
    for messages in (
        read(messages=[CHAT[0], old, {"role": "function", "name": "weather", "content": "1"}, CHAT[1]]),
        read(conversations=[{"from": "human", "value": "hi"}, *share, {"from": "gpt", "value": "hello"}]),
    ):
        assert [message["role"] for message in messages] == wanted
        assert messages[1]["tool_calls"] == [{"type": "function", "function": called}]
    schema = Messages().resolved({"messages": OBJECTS, "functions": OBJECTS}, "set")
    found = json.loads(schema.read({"messages": CHAT, "functions": [{"name": "weather"}]})["tools"])
    assert found == [{"type": "function", "function": {"name": "weather"}}]


def test_a_column_of_system_messages_is_read_or_refused() -> None:
    assert read(conversations=CHAT, system="Be brief.") == [{"role": "system", "content": "Be brief."}, *CHAT]
    assert read(conversations=CHAT, system="") == CHAT
    with pytest.raises(ValueError, match="two system messages"):
        read(messages=[{"role": "system", "content": "Be nice."}, *CHAT], system="Be brief.")
    with pytest.raises(ValueError, match="column 'system'"):
        PromptCompletion().resolved(dict.fromkeys(("system", "prompt", "completion"), "string"), "rows")


def test_no_turn_of_a_prompt_is_learned() -> None:
    messages = read(prompt=[*CHAT, CHAT[0]], completion=CHAT[1:])
    assert [message.get("weight") for message in messages] == [None, 0, None, None]
    with pytest.raises(ValueError, match="'assistant'"):
        read(prompt=CHAT, completion=CHAT[:1])


def test_tool_calls_and_tools_are_kept_and_their_arguments_parsed() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "content": "sunny"}
    messages = read(messages=[CHAT[0], call, result, CHAT[1]])
    assert messages[1]["content"] == ""
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": None, "days": 2}
    deep = 100_000 * "["
    (message,) = read(messages=[{**call, "tool_calls": [{"function": {"name": "weather", "arguments": deep}}]}])
    assert message["tool_calls"][0]["function"]["arguments"] == deep
    schema = Messages().resolved({"messages": OBJECTS, "tools": OBJECTS}, "set")
    tools = [{"function": {"name": "weather"}}]
    for value in (tools, json.dumps(tools)):
        assert json.loads(schema.read({"messages": CHAT, "tools": value})["tools"]) == tools
    assert schema.read({"messages": CHAT, "tools": None})["tools"] == ""


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        *((value, "list of messages with role and content in the column") for value in (None, [], "hi", [1])),
        ([{"role": "user"}, CHAT[1]], "'user' with neither text"),
        ([CHAT[0], {"role": "assistant", "content": None}], "'assistant' with neither text .*tool_calls"),
        ([CHAT[0], {"content": "x"}], "without a role"),
        ([{"role": "user", "content": [{"type": "image"}]}, CHAT[1]], "'image'"),
        ([{"from": "alien", "value": "x"}, CHAT[1]], "'alien'.*human"),
        ([{"from": ["human"], "value": "x"}, CHAT[1]], r"\['human'\].*human"),
        ([CHAT[0], {**CHAT[1], "tool_calls": 3}], "tool_calls 3, not a list"),
        (CHAT[:1], "no message of the role 'assistant'.*: user"),
        ([{**CHAT[1], "weight": 0}], "no message of the role 'assistant'"),
    ],
)
def test_a_record_that_is_not_a_conversation_is_refused(messages: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Messages().read({"messages": messages})


def test_preference_data_is_refused():
    columns = {"prompt": "string", "completion": "string"}
    assert PromptCompletion().resolved({**columns, "label": "int64"}, "rows")
    for schema, found in ((PromptCompletion(), columns), (Messages(), {"messages": OBJECTS})):
        with pytest.raises(ValueError, match="'label'.*keep only the rows"):
            schema.resolved({**found, "label": "bool"}, "rows")
