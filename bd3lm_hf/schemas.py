"""What the rows of a data set hold: text, a prompt and its completion, or the messages of a conversation."""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from datasets import Features, Value


class Schema:
    """How a row becomes columns of strings, which `features` names.

    `columns` chooses the source's columns once for a data set, `read` takes a row of it.
    """

    names: ClassVar[tuple[str, ...]]

    @property
    def features(self) -> Features:
        """The columns that `read` gives, all of strings."""
        return Features({name: Value("string") for name in self.names})

    def resolved(self, found: Mapping[str, str], origin: str) -> "Schema":
        """This schema, checked against the columns of a data set.

        Args:
            found: the source's columns and what each holds ("string", "int64", ...).
            origin: name of the data set, for messages.

        Raises:
            ValueError: a column is missing or holds something else; the message lists the columns.
        """
        missing = [name for name in self.names if name not in found]
        if missing:
            raise ValueError(
                f"The data set {origin!r} has no column {missing[0]!r}; its columns are: {_listed(found)}."
            )
        return self

    def read(self, row: Mapping[str, Any]) -> dict[str, str]:
        """The row's strings.

        Raises:
            ValueError: it holds something else; the message is a predicate, such as "has no text (null)".
        """
        return {name: _string(row, name) for name in self.names}


class Text(Schema):
    """Documents.

    Args:
        column: where the text is; None looks for "text", then for the only column of strings.
    """

    names = ("text",)

    def __init__(self, column: str | None = None) -> None:
        self.column = column

    def resolved(self, found: Mapping[str, str], origin: str) -> "Text":
        strings = [name for name, kind in found.items() if kind in ("string", "large_string")]
        column = self.column
        if column is None:
            column = "text" if "text" in found else strings[0] if len(strings) == 1 else None
        if column is None:
            raise ValueError(
                f"Which column of {origin!r} holds the text? Set text_column; its columns are: {_listed(found)}."
            )
        if column not in found:
            raise ValueError(
                f"The data set {origin!r} has no column {column!r}; its columns are: {_listed(found)}. Set "
                "text_column."
            )
        if column not in strings and found[column] != "null":
            raise ValueError(
                f"The column {column!r} of {origin!r} holds {found[column]}, not text; its columns are: "
                f"{_listed(found)}."
            )
        return Text(column)

    def read(self, row: Mapping[str, Any]) -> dict[str, str]:
        return {"text": _string(row, self.column or "text")}


class PromptCompletion(Schema):
    """A prompt, which is given, and its completion, which is learned."""

    names = ("prompt", "completion")


class Messages(Schema):
    """A conversation: `messages` is a list of objects with `role` and `content`, kept as JSON."""

    names = ("messages",)

    def read(self, row: Mapping[str, Any]) -> dict[str, str]:
        given = row.get("messages")
        messages = given if isinstance(given, list) else []
        # A column of structs fills fields that a message lacks with null.
        whole = [
            {name: value for name, value in message.items() if value is not None}
            for message in messages
            if isinstance(message, dict)
        ]
        if not whole or len(whole) != len(messages) or not all("role" in m and "content" in m for m in whole):
            raise ValueError("has no list of messages with role and content in the column 'messages'")
        if not any(message["role"] == "assistant" for message in whole):
            raise ValueError("has no message of the role 'assistant', so nothing to learn")
        return {"messages": json.dumps(whole, ensure_ascii=False)}


#: Every schema by the name that users choose it by.
SCHEMAS: dict[str, type[Schema]] = {"text": Text, "prompt_completion": PromptCompletion, "messages": Messages}


def detect_schema(found: Mapping[str, str], origin: str) -> Schema:
    """The schema of a data set that has these columns: text, unless it has the columns of another one.

    Raises:
        ValueError: it has the columns of several.
    """
    fitting = [name for name, schema in SCHEMAS.items() if set(schema.names) <= set(found)]
    if len(fitting) > 1:
        raise ValueError(
            f"The columns of {origin!r} fit several formats ({', '.join(fitting)}); choose one with data_format. Its "
            f"columns are: {_listed(found)}."
        )
    return SCHEMAS[fitting[0]]() if fitting else Text()


def _string(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if isinstance(value, str):
        return value
    if value is None:
        raise ValueError("has no text (null)" if column == "text" else f"has no text (null) in the column {column!r}")
    raise ValueError(f"holds {type(value).__name__} in the column {column!r}, not text")


def _listed(found: Mapping[str, str]) -> str:
    return ", ".join(found) or "none at all"


__all__ = ["SCHEMAS", "Messages", "PromptCompletion", "Schema", "Text", "detect_schema"]
