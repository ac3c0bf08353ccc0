"""What the rows of a dataset hold: texts, or conversations.

A conversation is kept as a text too: JSON that depends on its messages alone, not on how they were stored. So
what reads, splits, shuffles and counts documents need not know that they are conversations, and only the
tokenisers read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from smollm2.errors import LoadError

# Which columns make a conversation, the first that a dataset has.
CHAT_COLUMNS = (
    ("messages",),
    ("prompt", "completion"),
    ("conversations",),
    ("instruction", "output"),  # Alpaca's, and its optional input
)
ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}  # which names its fields from and value
EXAMPLE = (
    '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}, or '
    '{"prompt": ..., "completion": ...} with two texts or two such lists, or Alpaca\'s {"instruction": ..., '
    '"input": ..., "output": ...}'
)


def needed_columns(where: str, columns: Sequence[str], text_column: str, chat: bool) -> list[str]:
    """The columns that are read of a dataset. where: what to call it. Raises LoadError if it lacks them."""
    made = next((list(some) for some in CHAT_COLUMNS if set(some) <= set(columns)), [])
    wanted = made if chat else [text_column] if text_column in columns else []
    if wanted:
        return [*wanted, "input"] if "instruction" in wanted and "input" in columns else wanted
    got = ", ".join(columns) or "none"
    if chat:
        raise LoadError(f"{where}: expected columns of conversations, got {got}; a row is {EXAMPLE}")
    remedy = "add format=chat, for these are conversations" if made else "set text_column"
    raise LoadError(f"{where}: expected a column {text_column!r}, got {got}; {remedy}")


def is_chat(row: Any) -> bool:
    """Whether the columns of a row are those of a conversation."""
    return isinstance(row, dict) and any(set(some) <= row.keys() for some in CHAT_COLUMNS)


def as_conversation(row: Any) -> str | None:
    """The conversation of a row, as JSON; None if it has none that can be learned from.

    It is {"messages": [...]}, with an answer of the assistant, or {"prompt": ..., "completion": ...}: two
    texts, or two lists of messages of which the second begins with an answer. Alpaca's instruction, input and
    output are two such lists of a message each; where there is an input it follows a blank line.
    """
    if not isinstance(row, dict):
        return None
    messages = row.get("messages")
    prompt, completion = row.get("prompt"), row.get("completion")
    if messages is None and prompt is None and row.get("conversations") is None:
        prompt, completion = _alpaca(row)
    found: dict[str, Any] | None = None
    if messages is None and isinstance(prompt, str) and isinstance(completion, str):
        found = {"prompt": prompt, "completion": completion} if completion.strip() else None
    elif messages is None and prompt is not None:
        before, after = _messages(prompt), _messages(completion)
        if before and after and after[0]["role"] == "assistant":
            found = {"prompt": before, "completion": after}
    elif read := _messages(row.get("conversations") if messages is None else messages):
        found = {"messages": read} if any(one["role"] == "assistant" for one in read) else None
    try:
        return None if found is None else json.dumps(found, ensure_ascii=False, sort_keys=True)
    except (TypeError, ValueError, RecursionError):  # dates, bytes and the like in a message
        return None


def _alpaca(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """Prompt and completion of a row with an instruction and an output; (None, None) if it has none."""
    parts = [row.get("instruction"), row.get("input") or "", row.get("output")]
    *asked, output = [part for part in parts if isinstance(part, str)] or [""]
    question = "\n\n".join(text for text in asked if text.strip())
    if len(asked) < 2 or not question or not output.strip():
        return None, None
    return [{"role": "user", "content": question}], [{"role": "assistant", "content": output}]


def _messages(values: Any) -> list[dict[str, Any]] | None:
    """Messages with a known role and a text as content; None if one is anything else."""
    if not isinstance(values, list):
        return None
    found = []
    for value in values:
        if not isinstance(value, Mapping):
            return None
        message = {key: item for key, item in value.items() if item is not None}
        if "role" not in message and "from" in message:
            role, content = message.pop("from"), message.pop("value", None)
            message |= {"role": SHAREGPT_ROLES.get(str(role), role), "content": content}
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            return None
        found.append(message)
    return found
