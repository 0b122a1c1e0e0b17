"""Schemas convert a record of a source to columns of strings: text, prompt and completion, or messages.

A record is a mapping of column names to values, whichever file or repository it comes from.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any


#: Speakers of ShareGPT conversations (`from` and `value`) -> roles of chat templates.
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "assistant", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation"), "tool"),
}

_MESSAGE_COLUMNS = ("messages", "conversations")

#: Kind of a column of lists of objects, such as messages.
OBJECTS = "list of objects"

#: Prefixes of the kinds of columns with lists or objects.
_NESTED = ("dict", "list", "struct", "large_list", "fixed_size_list", "map")

#: Columns that mark a JSON object as a record, not as a document with records inside.
RECORD_COLUMNS = frozenset({"text", "prompt", "completion", *_MESSAGE_COLUMNS})


class Schema:
    """Convert records to columns of strings.

    `resolved` chooses the source's columns once for a dataset, `read` converts one record.

    Attributes:
        names: columns that `read` returns.
        columns: columns of the source that `read` looks at.
    """

    names: tuple[str, ...]
    columns: tuple[str, ...]

    @classmethod
    def fits(cls, found: Mapping[str, str]) -> bool:
        """Return whether a dataset with these columns has this schema."""
        return all(found.get(name) in ("string", "null") for name in cls.names)

    def resolved(self, found: Mapping[str, str], origin: str) -> "Schema":
        """Return this schema with its columns chosen among those of a dataset.

        Args:
            found: the source's columns and the kind of each ("string", `OBJECTS`, "int64", ...).
            origin: name of the dataset, for messages.

        Raises:
            ValueError: if a column is missing or has values of another kind.
        """
        raise NotImplementedError

    def read(self, record: Mapping[str, Any]) -> dict[str, str]:
        """Return the record's strings.

        Raises:
            ValueError: if the record does not follow the schema; the message is a predicate ("has no text (null)").
        """
        raise NotImplementedError


class TextRow(Schema):
    """Documents.

    Args:
        column: column of the text; None looks for "text", then for the only column of strings.
    """

    names = ("text",)

    def __init__(self, column: str | None = None) -> None:
        self.column = column
        self.columns = (column or "text",)

    def resolved(self, found: Mapping[str, str], origin: str) -> "TextRow":
        strings = [name for name, kind in found.items() if kind == "string"]
        column = self.column
        if column is None and "text" in found:
            column = "text"
        # If there are lists or objects, they may contain the text: the only string is then often an id.
        if column is None and len(strings) == 1 and not any(kind.startswith(_NESTED) for kind in found.values()):
            column = strings[0]
        if column is None:
            raise ValueError(
                f"Which column of {origin!r} is the text? Set text_column. To fine-tune, name the columns 'prompt' "
                f"and 'completion', or 'messages'. Its columns are: {_listed(found)}."
            )
        if column not in found:
            raise ValueError(
                f"The dataset {origin!r} has no column {column!r}; its columns are: {_listed(found)}. Set text_column."
            )
        if column not in strings and found[column] != "null":
            raise ValueError(
                f"The column {column!r} of {origin!r} has {found[column]}, not text; its columns are: "
                f"{_listed(found)}."
            )
        return TextRow(column)

    def read(self, record: Mapping[str, Any]) -> dict[str, str]:
        return {"text": _string(record, self.columns[0])}


class PromptCompletion(Schema):
    """A prompt, which is given, and its completion, which is learned."""

    names = columns = ("prompt", "completion")

    def resolved(self, found: Mapping[str, str], origin: str) -> "PromptCompletion":
        for name in self.names:
            if name not in found:
                raise ValueError(
                    f"The dataset {origin!r} has no column {name!r}; its columns are: {_listed(found)}. Expected are "
                    "'prompt' and 'completion'."
                )
            if found[name] == OBJECTS:
                raise ValueError(
                    f"The column {name!r} of {origin!r} has messages, not text: read it with data_format='messages'."
                )
        _check_label(found, origin)
        if "system" in found:
            raise ValueError(
                f"The dataset {origin!r} has a column 'system', which would be ignored: write it into the prompts, or "
                f"use the column 'messages'."
            )
        return self

    def read(self, record: Mapping[str, Any]) -> dict[str, str]:
        return {name: _string(record, name) for name in self.names}


class Messages(Schema):
    """Conversations: lists of objects with `role` and `content`, kept as JSON in the column `messages`.

    They are read from `messages`, from `conversations` (also with ShareGPT's `from` and `value`), or from `prompt` and
    `completion` as TRL writes them. Assistant turns in such a prompt get `weight` 0, OpenAI's mark for turns that are
    not learned. Tools, from a column `tools` or `functions` (OpenAI's older name), are kept in the column `tools`. The
    text of a column `system` becomes the first message.
    """

    names: tuple[str, ...] = ("messages",)

    def __init__(self, columns: Sequence[str] = ("messages",), *, others: Sequence[str] = ()) -> None:
        self.source = tuple(columns)
        self.names = ("messages", "tools") if {"tools", "functions"} & {*others} else ("messages",)
        self.columns = (*columns, *others)

    @classmethod
    def fits(cls, found: Mapping[str, str]) -> bool:
        return _message_source(found) is not None

    def resolved(self, found: Mapping[str, str], origin: str) -> "Messages":
        source = _message_source(found)
        if source is None:
            raise ValueError(
                f"The dataset {origin!r} has no column 'messages'; its columns are: {_listed(found)}. Expected are "
                "'messages' with role and content, 'conversations' with from and value, or lists of messages in "
                "'prompt' and 'completion'."
            )
        _check_label(found, origin)
        return Messages(source, others=[name for name in ("system", "tools", "functions") if name in found])

    def read(self, record: Mapping[str, Any]) -> dict[str, str]:
        messages: list[dict[str, Any]] = []
        for column in self.source:
            turns = _messages(record.get(column), column)
            messages += [{**turn, "weight": 0} if column == "prompt" and is_learned(turn) else turn for turn in turns]
        if not any(map(is_learned, messages)):
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise ValueError(f"has no message of the role 'assistant' to learn; its roles are: {roles}")
        if "system" in self.columns and record.get("system"):
            system = {"role": "system", "content": _string(record, "system")}
            if messages[0]["role"] != "system":
                messages.insert(0, system)
            elif messages[0]["content"] != system["content"]:
                raise ValueError("has two system messages, in the column 'system' and in the conversation")
        strings = {"messages": json.dumps(messages, ensure_ascii=False, default=str)}
        if "tools" in self.names:
            strings["tools"] = _tools(record)
        return {name: _encodable(value, name) for name, value in strings.items()}


#: All schemas, by the names that users choose them by.
SCHEMAS: dict[str, type[Schema]] = {"text": TextRow, "prompt_completion": PromptCompletion, "messages": Messages}


def detect_schema(found: Mapping[str, str], origin: str) -> Schema:
    """Return the schema of a dataset with these columns: text, unless another one fits.

    Raises:
        ValueError: if several schemas fit.
    """
    # A dataset may have the columns of several formats.
    fitting = [name for name, schema in SCHEMAS.items() if schema.fits(found)]
    if len(fitting) > 1:
        raise ValueError(
            f"The columns of {origin!r} fit several formats ({', '.join(fitting)}); choose one with data_format. Its "
            f"columns are: {_listed(found)}."
        )
    return SCHEMAS[fitting[0]]() if fitting else TextRow()


def is_learned(message: Mapping[str, Any]) -> bool:
    """Return whether a message is an assistant turn that is learned."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _check_label(found: Mapping[str, str], origin: str) -> None:
    """Refuse KTO data, in which false marks a completion that must not be learned."""
    if found.get("label") == "bool":
        raise ValueError(
            f"The dataset {origin!r} has a boolean column 'label', like preference data: keep only the rows to learn "
            f"from, and remove the column."
        )


# Read messages


def _message_source(found: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the columns with the messages, or None if there are none."""
    for column in _MESSAGE_COLUMNS:
        if column in found:
            return (column,)
    if all(found.get(column) == OBJECTS for column in ("prompt", "completion")):
        return ("prompt", "completion")
    return None


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"has no list of messages with role and content in the column {column!r}")
    return [_message(_without_nulls(message), column) for message in value]


def _message(message: dict[str, Any], column: str) -> dict[str, Any]:
    """Convert one message to the form that chat templates expect."""
    if "from" in message:
        speaker = message.pop("from")
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            raise ValueError(
                f"has a message from {speaker!r} in the column {column!r}; known names: {', '.join(_SHAREGPT_ROLES)}"
            )
        called = "function_call" if speaker == "function_call" else "content"
        message = {"role": _SHAREGPT_ROLES[speaker], called: message.pop("value", None), **message}
    if not isinstance(message.get("role"), str):
        raise ValueError(f"has a message without a role in the column {column!r}")
    if message["role"] == "function":
        message["role"] = "tool"
    if "function_call" in message:  # OpenAI's predecessor of tool_calls
        function = message.pop("function_call")
        with contextlib.suppress(TypeError, ValueError, RecursionError):
            function = json.loads(function)
        message["tool_calls"] = [{"type": "function", "function": function}]
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list):
        raise ValueError(f"has a message with tool_calls {calls!r}, not a list, in the column {column!r}")
    for call in calls:
        _parse_arguments(call)
    content = message.get("content")
    if isinstance(content, list):
        content = _joined_parts(content, column)
    # A message that calls a tool can have no content. Templates render an empty string as nothing, but null as "None".
    if content is None and "tool_calls" in message:
        content = ""
    if not isinstance(content, str):
        raise ValueError(
            f"has a message of the role {message['role']!r} with neither text in content nor tool_calls in the column "
            f"{column!r}"
        )
    return {**message, "content": content}


def _joined_parts(parts: list[Any], column: str) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"has a message with a part of type {kind!r}, not text, in the column {column!r}")
    return "".join(part["text"] for part in parts)


def _parse_arguments(call: Any) -> None:
    """Convert the arguments of a tool call, which OpenAI writes as a JSON string, to the object templates expect."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise ValueError(f"has a tool call that is not an object: {call!r}")
    if isinstance(function.get("arguments"), str):
        # Arguments that are not JSON are learned as they are.
        with contextlib.suppress(ValueError, RecursionError):
            function["arguments"] = json.loads(function["arguments"])


def _tools(record: Mapping[str, Any]) -> str:
    """Return the tools of a conversation as JSON, or an empty string if there are none."""
    column = "tools" if record.get("tools") else "functions"
    value = record.get(column)
    try:
        tools = json.loads(value) if isinstance(value, str) and value else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has a column {column!r} that is not JSON: {error}") from None
    if not tools:
        return ""
    if not isinstance(tools, list):
        raise ValueError(f"has {type(tools).__name__} in the column {column!r}, not a list")
    if column == "functions":
        tools = [{"type": "function", "function": function} for function in tools]
    return json.dumps(_without_nulls(tools), ensure_ascii=False, default=str)


def _without_nulls(value: Any) -> Any:
    """Drop nulls: a column of structs has them for fields that an object lacks."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _string(record: Mapping[str, Any], column: str) -> str:
    value = record.get(column)
    if isinstance(value, str):
        return _encodable(value, column)
    if value is None:
        raise ValueError("has no text (null)" if column == "text" else f"has no text (null) in the column {column!r}")
    raise ValueError(f"has {type(value).__name__} in the column {column!r}, not text")


def _encodable(value: str, column: str) -> str:
    """Return the text; refuse lone surrogates, which JSON can contain, and bytes that are not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = value[error.start]
        reason = "a byte that is not UTF-8" if "\udc80" <= found <= "\udcff" else f"the lone surrogate {found!a}"
        raise ValueError(f"has {reason} in the column {column!r}, at character {error.start}") from None
    return value


def _listed(found: Mapping[str, str]) -> str:
    return ", ".join(found) or "none at all"
