"""Conversations to token ids, of which those that are learned can be told from the others.

What is learned are the assistant's answers and what the chat template writes behind them, the end of the turn
among it: as trl's SFTTrainer has it, token by token. What is not learned has the highest bit set beside its
id. So a conversation is an array of numbers like any other document, for the token cache, the workers and
the packing, until a batch is made of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from smollm2.errors import UsageError
from smollm2.pretrained.chat_template import Spans, encode_chat, render_chat, without_special
from train.data.tokenise import Select, TokenBlock, as_text, digest, is_held_out

if TYPE_CHECKING:
    from smollm2.pretrained.tokenizer import Tokenizer

DTYPE = "uint32"
NOT_LEARNED = np.uint32(1 << 31)  # beside an id
_TALK = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "a reply of 5 words"}]


@dataclass(frozen=True)
class ChatFormat:
    """How conversations become tokens: everything that decides an id or what is learned, but the tokenizer.

    special: the tokens that a message must not be able to forge, by their ids. trusted: values that the
    template may use. tail: what the template writes behind an answer. end: the id behind a completion that is
    a plain text.
    """

    train_on: str
    template: str
    special: dict[int, str]
    trusted: dict[str, str]
    tail: str
    end: int | None

    @classmethod
    def of(cls, tokenizer: Tokenizer, train_on: str) -> ChatFormat:
        """Raises UsageError when the tokenizer has no chat template, or one whose answers cannot be found."""
        if tokenizer.chat_template is None:
            hint = "continue from an instruct model, or name the tokenizer of one with tokenizer="
            raise UsageError(f"format=chat: expected a tokenizer with a chat template, got none; {hint}")
        special, trusted = tokenizer.control_tokens, tokenizer.template_tokens
        given = {"add_generation_prompt": False}
        text = render_chat(tokenizer.chat_template, [*special.values()], _TALK, given, trusted, [1])
        tail = "" if text.contents is None else text[text.contents[0][1] :]
        if train_on == "assistant" and text.contents is None and text.generated is None:
            found = "which of its text are answers cannot be told"
            remedy = "mark them in it with {% generation %}, or learn everything with train_on=all"
            raise UsageError(f"chat template: {found}; {remedy}")
        return cls(train_on, tokenizer.chat_template, special, trusted, tail, tokenizer.eos_token_id)

    @property
    def key(self) -> str:
        """A digest of what decides the tokens, for the token cache."""
        return hashlib.sha256(json.dumps(dataclasses.astuple(self)).encode()).hexdigest()[:16]


class ChatEncoder:
    """Conversations -> TokenBlock, of dtype uint32. The conversations are those of train/data/rows.py."""

    dtype = DTYPE

    def __init__(self, tokenizer_json: str, chat: ChatFormat) -> None:
        self._chat, self._backend = chat, tokenizers.Tokenizer.from_str(tokenizer_json)
        self._plain = without_special(tokenizer_json, chat.special)
        for backend in (self._backend, self._plain):
            backend.no_truncation()
            backend.no_padding()

    def __call__(self, documents: Iterable[Any], select: Select | None = None) -> TokenBlock:
        """select: which conversations are tokenised; all usable ones if None. One that the template refuses,
        or of which nothing would be learned, is unusable.
        """
        arrays = [np.empty(0, DTYPE)]
        lengths: list[int] = []
        digests: list[int] = []
        for document in documents:
            text = as_text(document)
            key, tokens = 0 if text is None else digest(text), arrays[0]
            if text is not None and (select is None or is_held_out(key, select[0]) == select[1]):
                tokens = self.tokens(json.loads(text))
                key = key if len(tokens) else 0
            arrays.append(tokens)
            lengths.append(len(tokens))
            digests.append(key)
        return TokenBlock(np.concatenate(arrays), np.array(lengths, np.int64), np.array(digests, np.uint64))

    def tokens(self, row: dict[str, Any]) -> np.ndarray:
        """[n] uint32: the ids of a conversation, with NOT_LEARNED beside those that are not; n is 0 if it
        cannot be trained on.
        """
        if isinstance(row.get("prompt"), str):
            ids, learned = self._completion(row["prompt"], row["completion"])
        else:
            ids, learned = self._conversation(row)
        if not learned.any():
            return np.empty(0, DTYPE)
        return np.where(learned, ids, ids | NOT_LEARNED)

    def _completion(self, prompt: str, completion: str) -> tuple[np.ndarray, np.ndarray]:
        """Of two texts, without a template. Special tokens written out in them are no text to learn from, and
        no turns either.
        """
        chat = self._chat
        if chat.end is None or any(token in prompt + completion for token in chat.special.values()):
            return np.empty(0, DTYPE), np.empty(0, bool)
        whole, before = (
            self._plain.encode(text, add_special_tokens=False).ids for text in (prompt + completion, prompt)
        )
        pairs = zip(before, whole, strict=False)
        shared = next((index for index, (one, other) in enumerate(pairs) if one != other), len(before))
        ids = np.array([*whole, chat.end], DTYPE)
        return ids, np.arange(len(ids)) >= (0 if chat.train_on == "all" else shared)

    def _conversation(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        chat, prompt = self._chat, row.get("prompt", [])
        messages = row["messages"] if "messages" in row else prompt + row["completion"]
        answers = [
            index
            for index, message in enumerate(messages)
            if message["role"] == "assistant" and index >= len(prompt)
        ]
        find = answers if chat.train_on == "assistant" else []
        given = {"add_generation_prompt": False}
        try:
            text = render_chat(chat.template, [*chat.special.values()], messages, given, chat.trusted, find)
        except UsageError:
            return np.empty(0, DTYPE), np.empty(0, bool)
        ids, offsets = encode_chat(text, self._backend, self._plain, chat.special)
        if chat.train_on == "all":
            return np.array(ids, DTYPE), np.ones(len(ids), bool)
        begins, ends = np.array(offsets, np.int64).reshape(-1, 2).T
        learned = np.zeros(len(ids), bool)
        for begin, end in self._learned(text, text.contents, text.generated, bool(prompt)):
            # A token that the answer shares with what lies before it is learned, as by trl.
            learned |= (ends > begin) & (begins < end)
        return np.array(ids, DTYPE), learned

    def _learned(self, text: str, contents: Spans | None, generated: Spans | None, prompted: bool) -> Spans:
        """Which characters are learned. prompted: all from the first answer on."""
        if generated is not None and not prompted:
            return generated
        if not contents:
            return []
        if prompted:
            return [(contents[0][0], len(text))]
        return [(begin, end + self._tail(text[end : end + len(self._chat.tail)])) for begin, end in contents]

    def _tail(self, behind: str) -> int:
        """How many characters of what lies behind an answer belong to it: what the template writes behind the
        last one, or else that up to its last special token.
        """
        tail = self._chat.tail
        same = next((at for at, pair in enumerate(zip(tail, behind, strict=False)) if len({*pair}) > 1), None)
        if same is None and len(behind) == len(tail):
            return len(tail)
        shared = behind[:same]
        ends = (shared.rfind(token) + len(token) for token in self._chat.special.values() if token in shared)
        return max(ends, default=0)
