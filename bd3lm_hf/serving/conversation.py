"""Checks of the messages of a chat, and of what its template gets."""

import json
from typing import Any

from fastapi import HTTPException


_TEXT_PARTS = ("text", "input_text", "output_text")
# Arguments of `apply_chat_template` that the server sets, and a template of the client's own.
_NOT_FOR_TEMPLATE = (
    *("conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "load_audio_from_video"),
)


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Return the messages of a request without the fields that say nothing, which clients send back as null.

    Raises:
        HTTPException: 400 if they are not a conversation of texts.
    """
    if not isinstance(messages, list) or not messages:
        raise HTTPException(400, "messages: expected a list of objects with a role and a content.")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise HTTPException(400, f"messages[{index}]: expected an object with a role and a content.")
        if not _is_text(message.get("content")):
            raise HTTPException(400, f"messages[{index}].content: expected a text or a list of text parts.")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(map(_is_tool_call, calls)):
            raise HTTPException(
                400,
                f"messages[{index}].tool_calls: expected a list of objects with a function, which has a name and "
                f"arguments, a JSON object.",
            )
    # transformers takes a message with `tool_calls`, even with none, for one without content.
    return [{name: value for name, value in message.items() if value not in (None, [])} for message in messages]


def check_template_fields(body: dict[str, Any]) -> None:
    """Refuse tools and template arguments that the chat template cannot get.

    Raises:
        HTTPException: 400 if they are not of the expected type, or arguments that the server sets.
    """
    tools, fields = body.get("tools", []), body.get("chat_template_kwargs", {})
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise HTTPException(400, f"tools={tools!r}: expected a list of objects.")
    if not isinstance(fields, dict):
        raise HTTPException(400, f"chat_template_kwargs={fields!r}: expected an object.")
    reserved = sorted(set(fields) & set(_NOT_FOR_TEMPLATE))
    if reserved:
        raise HTTPException(400, f"chat_template_kwargs: {', '.join(reserved)} cannot be set by a request.")


def _is_text(content: Any) -> bool:
    if isinstance(content, list):
        return all(
            isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str)
            for part in content
        )
    return isinstance(content, str | None)


def _is_tool_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return False
    return isinstance(arguments, dict)
