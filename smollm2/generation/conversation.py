"""A conversation with a model: its messages, what of them fits the context, and the next answer.

    talk = Conversation(engine, tokenizer, params)
    for piece in talk.ask("What is the capital of France?"):
        ...

Keys and values are kept from turn to turn: an answer costs the tokens that are new since the one before. When
the context is full, the oldest turns go (a question and its answer together), until half of it is free: what
stays is read once more, and then not again for as long as that half lasts.
"""

from __future__ import annotations

import bisect
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from smollm2.engine.eager import Engine
from smollm2.errors import LoadError, UsageError
from smollm2.generation.loop import TextStream, stream_text
from smollm2.generation.prompt_cache import PromptCache
from smollm2.generation.speculative import Draft, DraftModel, Stats
from smollm2.pretrained.files import json_writer, read_json, write_files
from smollm2.pretrained.tokenizer import Tokenizer
from smollm2.sampling import SamplingParams

ROOM = 512  # tokens that must be free for an answer; a quarter of the context where that is less
ROLES = ("system", "user", "assistant")

Message = dict[str, str]


class Conversation:
    """Messages, and the kept keys and values of the text that they become.

    messages: [{"role": ..., "content": ...}, ...]; after a question that nothing was said to, the last is the
    user's. Of the latest answer: dropped, the turns that went for it; prompt_tokens, how long its prompt was;
    stream, None before the first.
    Raises UsageError when the tokenizer has no chat template, or the template refuses a system prompt.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        system: str | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        draft: Draft | None = None,
    ) -> None:
        """max_new_tokens: None lets answers run to their end, or to that of the context."""
        self.engine, self.tokenizer, self.params = engine, tokenizer, params
        self.max_new_tokens, self.seed, self.stop, self.draft = max_new_tokens, seed, stop, draft
        self.stats = Stats()
        self.stream: TextStream | None = None
        self.dropped = self.prompt_tokens = 0
        models = [engine.model, *([draft.engine.model] if isinstance(draft, DraftModel) else [])]
        self.limit = min(model.config.max_position_embeddings for model in models)
        self.messages: list[Message] = []
        self.prompt_cache = PromptCache(engine)
        self.set_system(system)

    @property
    def system(self) -> str | None:
        """The system prompt, "" for none at all; None leaves it to the chat template."""
        first = self.messages[:1]
        return first[0]["content"] if first and first[0]["role"] == "system" else None

    def set_system(self, text: str | None) -> None:
        """Another system prompt, for what was said too. Raises UsageError if the template refuses it.

        An empty one is passed to the template as such: without any, SmolLM2's writes a prompt of its own.
        """
        system = [{"role": "system", "content": text}] if text is not None else []
        self.encode([*system, {"role": "user", "content": "Hello"}])
        self.messages = [*system, *self._turns(self.messages)]

    def clear(self) -> None:
        """Forgets everything but the system prompt."""
        del self.messages[len(self.messages) - len(self._turns(self.messages)) :]

    def ask(self, text: str) -> Generator[str, None, None]:
        """The pieces of the answer, one per token; what was said when they end, or are closed, is kept.

        Raises UsageError, before anything is changed, for a message that does not fit the context.
        """
        unanswered = self.messages[-1:] and self.messages[-1]["role"] == "user"
        before = self.messages[:-1] if unanswered else self.messages
        return self._answer([*before, {"role": "user", "content": text}])

    def retry(self) -> Generator[str, None, None]:
        """Another answer to the latest question, drawn with the next seed. Raises UsageError without one."""
        asked = len(self.messages)
        while asked and self.messages[asked - 1]["role"] != "user":
            asked -= 1
        if not asked:
            raise UsageError("retry: expected a question before it, got none yet")
        self.seed += 1
        return self._answer(self.messages[:asked])

    @property
    def read(self) -> int:
        """How many tokens of the latest prompt were read, because they were not kept."""
        return self.prompt_tokens - self.prompt_cache.found

    def why_stopped(self) -> str:
        """Which limit ended the latest answer; "" if the model did."""
        if self.stream is None or self.stream.finish != "length":
            return ""
        if self.max_new_tokens is not None and len(self.stream.tokens) == self.max_new_tokens:
            return f"the answer was cut at {self.max_new_tokens} tokens (--max-new-tokens)"
        return f"the answer was cut: the context of {self.limit} tokens is full"

    def save(self, path: Path) -> None:
        """Writes {"messages": [...]}. Raises LoadError, also rather than replace what is no conversation."""
        if not path.parent.is_dir():
            raise LoadError(f"{path}: the folder {path.parent} does not exist; make it, or choose another")
        if path.exists():
            read_messages(path)
        write_files(path.parent, {path.name: json_writer({"messages": self.messages})})

    def load(self, path: Path) -> None:
        """Goes on with a saved conversation. Raises LoadError, and changes nothing, if it cannot."""
        messages = read_messages(path)
        try:
            if messages:
                self.encode(messages)
        except UsageError as error:
            raise LoadError(f"{path}: not a conversation for this model ({error})") from None
        self.messages = messages

    def _answer(self, messages: list[Message]) -> Generator[str, None, None]:
        messages, prompt, self.dropped = self._fitted(messages)
        self.prompt_tokens, room = len(prompt), self.limit - len(prompt)
        self.stream = stream_text(
            self.engine.model, self.tokenizer, prompt, max_new_tokens=min(self.max_new_tokens or room, room),
            params=self.params, seed=self.seed, stop=self.stop, engine=self.engine, draft=self.draft,
            stats=self.stats, prompt_cache=self.prompt_cache,
        )  # fmt: skip
        self.messages = messages
        return self._pieces(self.stream)

    def _pieces(self, stream: TextStream) -> Generator[str, None, None]:
        said = ""
        try:
            for piece in stream:
                said += piece
                yield piece
        finally:  # also when the user has heard enough
            stream.close()
            if said:
                self.messages.append({"role": "assistant", "content": said})

    def _fitted(self, messages: list[Message]) -> tuple[list[Message], list[int], int]:
        """The messages that fit, their ids, and how many turns went. The last message always stays."""
        room = min(self.max_new_tokens or ROOM, self.limit // 4)
        ids, gone = self.encode(messages), 0
        if len(ids) + room > self.limit:
            turns = self._turns(messages)
            system = messages[: len(messages) - len(turns)]
            starts = [index for index, message in enumerate(turns) if message["role"] == "user"]

            def is_short(start: int) -> bool:
                return len(self.encode([*system, *turns[start:]])) <= self.limit // 2

            gone = min(bisect.bisect_left(starts, True, key=is_short), len(starts) - 1)
            messages = [*system, *turns[starts[gone] :]]
            ids = self.encode(messages)
        if len(ids) >= self.limit:
            system_too = " with the system prompt" if self.system else ""
            expected = f"expected less than {self.limit} tokens{system_too}, the context of this model"
            raise UsageError(f"message: {expected}, got {len(ids)}; shorten it")
        return messages, ids, gone

    def encode(self, messages: list[Message]) -> list[int]:
        """The ids of the prompt that asks for an answer to these messages."""
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(messages))

    @staticmethod
    def _turns(messages: list[Message]) -> list[Message]:
        """All but the system prompt."""
        return messages[1:] if messages and messages[0]["role"] == "system" else messages


def read_messages(path: Path) -> list[Message]:
    """The messages of a file that Conversation.save wrote, or that looks like one. Raises LoadError."""
    found: Any = read_json(path).get("messages")
    expected = f'{path}: expected {{"messages": [{{"role": ..., "content": ...}}, ...]}}'
    if not isinstance(found, list):
        raise LoadError(f"{expected}, got no list of messages")
    for index, message in enumerate(found):
        if not (
            isinstance(message, dict)
            and message.get("role") in ROLES
            and isinstance(message.get("content"), str)
            and (index == 0 or message["role"] != "system")
        ):
            roles = "a role of user or assistant (the first may be system) and a text as content"
            raise LoadError(f"{expected}, message {index + 1} has not {roles}")
    return [{"role": message["role"], "content": message["content"]} for message in found]
