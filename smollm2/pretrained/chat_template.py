"""What a conversation becomes: the text that a model's chat template makes of it, as transformers renders it,
and which of that text the template wrote.

The text of a message must not be able to end its turn and to begin another: "<|im_end|>" in it is a word like
others. So a conversation is rendered twice: as it is, and with marks in place of the characters in messages
that could begin a special token. A mark is one character that occurs nowhere else, so that lengths, trimming
and comparisons give the same. Where the two texts agree but for the marks, they tell what came from where.
Where they do not, because the template looks for such a character, only whole special tokens are marked.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from smollm2.errors import UsageError

RENDERER = Path(__file__).with_name("chat_renderer.py")
REASONING = "reasoning_content", "thinking", "reasoning"  # names of the same field of a message


class ChatText(str):
    """The text of a conversation. `Tokenizer.encode` makes special tokens of what the template wrote alone.

    masked: the same text with marks; marks: the code of a mark -> the character that it stands for. Adding to
    a ChatText gives a plain str, in which every special token counts.
    """

    def __new__(cls, text: str, masked: str, marks: Mapping[int, str]) -> ChatText:
        self = super().__new__(cls, text)
        self.masked, self.marks = masked, marks
        return self

    masked: str
    marks: Mapping[int, str]

    def unmasked(self, start: int, stop: int | None = None) -> str:
        """A part of the masked text as the user wrote it."""
        return self.masked[start:stop].translate(self.marks)


def render_chat(
    template: str,
    special: Collection[str],
    messages: Sequence[Mapping[str, Any]],
    given: Mapping[str, Any],
    trusted: Mapping[str, Any],
) -> ChatText:
    """Renders a conversation.

    special: the special tokens. given: further values that are text of users, such as tools. trusted: values
    that may hold special tokens. Raises UsageError if the template refuses the values or takes too much.
    """
    if not all(isinstance(message, Mapping) for message in messages):
        expected = 'expected messages such as {"role": "user", "content": "hi"}'
        raise UsageError(f"chat: {expected}, got {messages!r:.80}")
    values = {"messages": [_message(message) for message in messages], **given}
    content = json.dumps(values, default=lambda value: f"<{type(value).__name__}>")
    values = json.loads(content)
    whole = template + json.dumps(values, ensure_ascii=False)
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in whole)  # for private use
    marks = {token[0]: next(free) for token in sorted(special)}
    patterns = (
        "|".join(map(re.escape, marks)),
        "|".join(map(re.escape, sorted(special, key=len, reverse=True))),
    )
    variants = [values]
    for pattern in patterns if marks else ():
        variant = _marked(values, re.compile(pattern), marks)
        if variant != variants[-1]:
            variants.append(variant)
    plain, *others = _render(template, "".join(marks.values()), [{**trusted, **one} for one in variants])
    if "error" in plain:
        raise UsageError(f"chat template: {' '.join(plain['error'].split())}")
    text, meaning = plain["text"], {ord(mark): character for character, mark in marks.items()}
    masked = [one["text"] for one in others if "text" in one]
    if others and not masked:
        raise UsageError("chat template: fails where a message holds text that looks like a special token")
    same = [one for one in masked if one.translate(meaning) == text]
    return ChatText(text, next(iter([*same, *masked[::-1], text])), meaning)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers shows it to a template: without None, its reasoning under both names."""
    known = {key: value for key, value in message.items() if value is not None}
    reasoning = next((known[name] for name in REASONING if name in known), None)
    return known if reasoning is None else {"thinking": reasoning, **known, "reasoning_content": reasoning}


def _marked(value: Any, pattern: re.Pattern[str], marks: Mapping[str, str]) -> Any:
    """A value of JSON with marks in place of the first character of every match."""
    if isinstance(value, str):
        return pattern.sub(lambda match: marks[match[0][0]] + match[0][1:], value)
    if isinstance(value, list):
        return [_marked(item, pattern, marks) for item in value]
    if isinstance(value, dict):
        items = ((_marked(key, pattern, marks), _marked(item, pattern, marks)) for key, item in value.items())
        return dict(items)
    return value


_lock = threading.Lock()
_processes: dict[int, subprocess.Popen[str]] = {}  # of this process: a fork must not share its parent's


def _render(template: str, marks: str, variants: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What the renderer answers: a "text" or an "error" for each variant."""
    with _lock:
        process = _processes.get(os.getpid())
        if process is None or process.poll() is not None:
            command = [sys.executable, "-I", str(RENDERER), *sys.path]
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                    text=True, encoding="ascii",
                )  # fmt: skip
            except OSError as error:
                raise UsageError(f"chat template: its renderer cannot start ({error.strerror})") from None
            _processes[os.getpid()] = process
        assert process.stdin is not None and process.stdout is not None
        answer = ""
        try:
            process.stdin.write(json.dumps([template, marks, variants]) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:  # it has ended
            pass
        finally:
            if not answer.endswith("\n"):  # cut off in the middle, if anything came
                process.kill()
                process.communicate()
    if answer.endswith("\n"):
        answers: list[dict[str, str]] = json.loads(answer)
        return answers
    slow = hasattr(signal, "SIGXCPU") and process.returncode == -signal.SIGXCPU  # not on Windows
    reason = "takes too much time" if slow else f"its renderer ended with code {process.returncode}"
    raise UsageError(f"chat template: {reason}; it is damaged, or made to do harm")
