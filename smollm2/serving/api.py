"""OpenAI's requests, answers and errors: what a body may hold, and the JSON that goes back.

Fields are those of https://platform.openai.com/docs/api-reference. Beyond them the server takes `top_k`,
`min_p` and `repetition_penalty`. A field that would change the answer and is not implemented is refused,
unless it asks for nothing (NEUTRAL); any other unknown field is ignored.
"""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from smollm2.errors import UsageError
from smollm2.pretrained.tokenizer import Tokenizer
from smollm2.serving.scheduler import TokenLogprob

logger = logging.getLogger(__name__)

# What the fields that are not implemented may say: each value asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
UNLIKELY = -9999.0  # OpenAI's logprob of a token that cannot come: JSON has no infinity
NAMES_LOGGED = 100
_logged: set[str] = set()


class ApiError(Exception):
    """An answer that is an error. param: the field that is wrong; code: what programs look at."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        kind = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        kind = kind if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


def _as_parts(content: Any) -> Any:
    if not isinstance(content, str | list):  # OpenAI's clients send null beside tool_calls
        raise ValueError("expected a text or text parts (there are no tool calls here)")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(BaseModel):
    """A message as the chat template sees it: role and text; what else it holds is ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], Field(fail_fast=True), BeforeValidator(_as_parts)]

    def plain(self) -> dict[str, str]:
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "\n".join(part.text for part in self.content)}


StopText = Annotated[str, Field(min_length=1, max_length=500)]
Stops = Annotated[
    list[StopText], Field(max_length=4), BeforeValidator(lambda one: [one] if isinstance(one, str) else one)
]
Count = Annotated[int, Field(ge=1)]
Texts: TypeAlias = Annotated[list[str], Field(fail_fast=True)]
Ids: TypeAlias = Annotated[list[int], Field(fail_fast=True)]


class Asked(BaseModel):
    """What both endpoints take. Ranges of the sampling parameters are checked by SamplingParams."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    kind: ClassVar[str]  # of the answer, as its "object" says
    chunk: ClassVar[str]  # of a piece of a streamed answer
    prefix: ClassVar[str]  # of its id
    source: ClassVar[str]  # the field with the text

    model: str | None = None
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that were given."""
        names = "temperature", "top_p", "top_k", "min_p", "repetition_penalty"
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class ChatRequest(Asked):
    """POST /v1/chat/completions."""

    kind, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"
    source = "messages"

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def size(self) -> int:
        """Bytes of the longest prompt, as far as they were given as text."""
        return sum(len(message.plain()["content"].encode()) for message in self.messages)

    def count(self) -> int:
        """How many prompts there are."""
        return 1

    def prompts(self, tokenizer: Tokenizer) -> Iterator[list[int]]:
        """The token ids of each prompt, which is tokenised when it is asked for. Raises UsageError for what
        the template or the tokenizer refuses.
        """
        text = tokenizer.apply_chat_template([message.plain() for message in self.messages])
        yield tokenizer.encode(text)

    def budget(self, room: int, usual: int) -> int:
        """How many new tokens, if a prompt leaves room for so many; usual: where none are named, 0: all."""
        return self.max_completion_tokens or self.max_tokens or min(room, usual or room)

    def likely(self) -> int | None:
        """How many of the most likely tokens are reported with each; None: no logprobs at all."""
        if self.top_logprobs and not self.logprobs:
            raise UsageError("top_logprobs: expected logprobs to be true beside it; set it")
        return self.top_logprobs or 0 if self.logprobs else None

    def choice(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        """An answer, whole."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def part(self, index: int, text: str | None, logprobs: Any, finish: str | None) -> dict[str, Any]:
        """A piece of an answer; None as text begins it."""
        delta = {"role": "assistant", "content": ""} if text is None else {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def logprobs_of(self, tokens: Sequence[TokenLogprob], tokenizer: Tokenizer, offset: int) -> Any:
        """What the API calls logprobs. offset: characters of the tokens before."""

        def one(token: int, logprob: float) -> dict[str, Any]:
            content = list(tokenizer.token_bytes(token))
            return {
                "token": token_text(tokenizer, token), "logprob": max(logprob, UNLIKELY), "bytes": content
            }  # fmt: skip

        content = [
            {**one(token.token, token.logprob), "top_logprobs": [one(*other) for other in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


class CompletionRequest(Asked):
    """POST /v1/completions."""

    kind = chunk = "text_completion"
    prefix, source = "cmpl-", "prompt"

    prompt: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def given(self) -> Sequence[str | list[int]]:
        """Each prompt, as a text or as token ids."""
        one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return cast(Sequence[str | list[int]], [self.prompt] if one else self.prompt)

    def size(self) -> int:
        return max((len(one.encode()) for one in self.given() if isinstance(one, str)), default=0)

    def count(self) -> int:
        return len(self.given())

    def prompts(self, tokenizer: Tokenizer) -> Iterator[list[int]]:
        if not self.given():
            raise UsageError("prompt: expected a text, texts or token ids, got an empty list; give it one")
        for one in self.given():
            yield tokenizer.encode(one, special=False) if isinstance(one, str) else one

    def budget(self, room: int, usual: int) -> int:
        return self.max_tokens or min(room, usual or 16, 16)  # OpenAI's default

    def likely(self) -> int | None:
        return self.logprobs

    def choice(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def part(self, index: int, text: str | None, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return self.choice(index, text or "", logprobs, finish)

    def logprobs_of(self, tokens: Sequence[TokenLogprob], tokenizer: Tokenizer, offset: int) -> Any:
        names = [token_text(tokenizer, token.token) for token in tokens]
        offsets = [offset]
        for name in names:
            offsets.append(offsets[-1] + len(name))
        likely = [
            {
                token_text(tokenizer, one): max(logprob, UNLIKELY)
                for one, logprob in (*token.top, (token.token, token.logprob))
            }
            for token in tokens
        ]
        return {
            "tokens": names,
            "token_logprobs": [max(token.logprob, UNLIKELY) for token in tokens],
            "top_logprobs": likely if self.logprobs else None,
            "text_offset": offsets[:-1],
        }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as a text of its own: U+FFFD for what is no whole character."""
    return tokenizer.token_bytes(token).decode(errors="replace")


Kind = TypeVar("Kind", bound=Asked)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """The request in a body. Raises ApiError for what it may not hold."""
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        raise _problem(error) from None
    for name, value in (asked.model_extra or {}).items():
        if name not in NEUTRAL:
            _log_once(name)
        elif value is not None and value not in NEUTRAL[name]:
            allowed = " or ".join(json.dumps(one) for one in NEUTRAL[name])
            message = f"{name}: not supported here; leave it out" + (allowed and f", or give {allowed}")
            raise ApiError(400, message, param=name, code="unsupported_parameter")
    return asked


def _problem(error: ValidationError) -> ApiError:
    """What pydantic found wrong, as OpenAI would name it: messages[0].role."""
    problems = error.errors(include_url=False, include_context=False)
    problem = max(
        problems, key=lambda one: len(one["loc"])
    )  # of a field's alternatives the one that went furthest
    if problem["type"] == "json_invalid":
        return ApiError(400, f"body: expected JSON in UTF-8: {problem['msg']}", code="invalid_json")
    place = ""
    for part in problem["loc"]:
        # the alternatives of a field are named by their types, which are no part of its place
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if part.isidentifier() else ""
    place = place.lstrip(".").removesuffix(".str")
    if problem["type"] == "missing":
        return ApiError(400, f"{place}: expected this field, got none", param=place, code="missing_parameter")
    if problem["loc"][:1] == ("prompt",):
        place, problem["msg"] = "prompt", "expected a text, texts, token ids or lists of token ids"
    got = "null" if problem["input"] is None else reprlib.repr(problem["input"])
    message = f"{place or 'body'}: {problem['msg'].removeprefix('Value error, ')}, got {got}"
    return ApiError(400, message, param=place or None)


def _log_once(name: str) -> None:
    if name not in _logged and len(_logged) < NAMES_LOGGED:
        _logged.add(name)
        logger.warning("the field %.80r of a request is not known here and ignored", name)
