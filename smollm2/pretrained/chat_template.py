"""What a conversation becomes: the text that a model's chat template makes of it, as transformers renders it,
and which of that text the template wrote.

The text of a message must not be able to end its turn and to begin another: "<|im_end|>" in it is a word like
others. So a conversation is rendered twice: as it is, and with marks in place of the characters in messages
that could begin a special token. A mark is one character that occurs nowhere else, so that lengths, trimming
and comparisons give the same. Where the two texts agree but for the marks, they tell what came from where.
Where they do not, because the template looks for such a character, only whole special tokens are marked.

Training wants to know which of the text are answers. A template that marks them with `{% generation %}` says
so; of any other, the conversation is rendered once more with a mark in place of each answer.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from smollm2.errors import UsageError

RENDERER = Path(__file__).with_name("chat_renderer.py")
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
REASONING = "reasoning_content", "thinking", "reasoning"  # names of the same field of a message


Spans = list[tuple[int, int]]


class ChatText(str):
    """The text of a conversation. `Tokenizer.encode` makes special tokens of what the template wrote alone.

    masked: the same text with marks; marks: the code of a mark -> the character that it stands for. Adding to
    a ChatText gives a plain str, in which every special token counts. contents: where the messages that were
    asked for lie, as pairs of places; None where the template does not write them as they are. generated:
    what the template marks as generated, likewise; None where it marks nothing.
    """

    def __new__(cls, text: str, masked: str, marks: Mapping[int, str]) -> ChatText:
        self = super().__new__(cls, text)
        self.masked, self.marks, self.contents, self.generated = masked, marks, None, None
        return self

    masked: str
    marks: Mapping[int, str]
    contents: Spans | None
    generated: Spans | None

    def unmasked(self, start: int, stop: int | None = None) -> str:
        """A part of the masked text as the user wrote it."""
        return self.masked[start:stop].translate(self.marks)


def render_chat(
    template: str,
    special: Collection[str],
    messages: Sequence[Mapping[str, Any]],
    given: Mapping[str, Any],
    trusted: Mapping[str, Any],
    find: Sequence[int] = (),
) -> ChatText:
    """Renders a conversation.

    special: the special tokens. given: further values that are text of users, such as tools. trusted: values
    that may hold special tokens. find: the messages whose contents, which are texts, are to be found. Raises
    UsageError if the template refuses the values or takes too much.
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
    begin, end = next(free), next(free)
    patterns = (
        "|".join(map(re.escape, marks)),
        "|".join(map(re.escape, sorted(special, key=len, reverse=True))),
    )
    variants = [values]
    for pattern in patterns if marks else ():
        variant = _marked(values, re.compile(pattern), marks)
        if variant != variants[-1]:
            variants.append(variant)
    finders = [_without_contents(values, find, begin)] if find else []
    if find and GENERATION.search(template):
        finders.append({**values, "generation_begins": begin, "generation_ends": end})
    rendered = [{**trusted, **one} for one in (*variants, *finders)]
    answers = _render(template, "".join(marks.values()), rendered)
    plain, *others = answers[: len(variants)]
    if "error" in plain:
        raise UsageError(f"chat template: {' '.join(plain['error'].split())}")
    text, meaning = plain["text"], {ord(mark): character for character, mark in marks.items()}
    masked = [one["text"] for one in others if "text" in one]
    if others and not masked:
        raise UsageError("chat template: fails where a message holds text that looks like a special token")
    same = [one for one in masked if one.translate(meaning) == text]
    found = ChatText(text, next(iter([*same, *masked[::-1], text])), meaning)
    without, marked = (one.get("text", "") for one in (*answers[len(variants) :], {}, {})[:2])
    contents = [values["messages"][index]["content"] for index in find]
    found.contents = _find_contents(text, without.split(begin), contents) if find else None
    if len(finders) == 2 and marked.replace(begin, "").replace(end, "") == text:
        found.generated = list(_find_marked(marked, begin, end))
    return found


def _without_contents(values: Mapping[str, Any], find: Sequence[int], mark: str) -> dict[str, Any]:
    """The values with a mark for the contents of some messages."""
    messages = list(values["messages"])
    for index in find:
        messages[index] = {**messages[index], "content": mark}
    return {**values, "messages": messages}


def _find_contents(text: str, around: Sequence[str], contents: Sequence[str]) -> Spans | None:
    """Where the contents lie between the pieces around them. A template may trim them."""
    if len(around) != len(contents) + 1 or not text.startswith(around[0]):
        return None
    found, place = [], len(around[0])
    for content, behind in zip(contents, around[1:], strict=True):
        forms = (form for form in (content, content.strip()) if text.startswith(form + behind, place))
        if (form := next(forms, None)) is None:
            return None
        found.append((place, place + len(form)))
        place += len(form) + len(behind)
    return found if place == len(text) else None


def _find_marked(marked: str, begin: str, end: str) -> Iterator[tuple[int, int]]:
    """What lies between the marks, as places in the text without them."""
    before, *parts = marked.split(begin)
    place = len(before)
    for part in parts:
        inside, _, behind = part.partition(end)
        yield place, place + len(inside)
        place += len(inside) + len(behind)


def without_special(content: str, control: Collection[int]) -> tokenizers.Tokenizer:
    """A tokenizer that reads special tokens in a text as ordinary words.

    content: of tokenizer.json. control: the ids of all that a text must not be able to forge.
    """
    parts = json.loads(content)
    for token in parts["added_tokens"]:
        token["special"] = token["id"] in control
    backend = tokenizers.Tokenizer.from_str(json.dumps(parts))
    backend.encode_special_tokens = True
    return backend


def encode_chat(
    text: ChatText, backend: tokenizers.Tokenizer, plain: tokenizers.Tokenizer, control: Collection[int]
) -> tuple[list[int], Spans]:
    """The ids of a conversation, and the characters that each of them stands for.

    backend, plain: the tokenizer, and the same without_special. control: ids that no message may forge.
    """
    encoding = backend.encode(text, add_special_tokens=False)
    if text.masked == text:
        return encoding.ids, encoding.offsets
    masked = backend.encode(text.masked, add_special_tokens=False)
    written, found = ([i for i in some.ids if i in control] for some in (masked, encoding))
    if written == found:
        return encoding.ids, encoding.offsets
    ids: list[int] = []
    offsets: Spans = []
    ends = [(i, span) for i, span in zip(masked.ids, masked.offsets, strict=True) if i in control]
    begin = 0
    for token_id, (start, stop) in (*ends, (None, (len(text), len(text)))):
        part = plain.encode(text.unmasked(begin, start), add_special_tokens=False)
        ids += part.ids
        offsets += [(begin + first, begin + last) for first, last in part.offsets]
        if token_id is not None:
            ids.append(token_id)
            offsets.append((start, stop))
        begin = stop
    return ids, offsets


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
