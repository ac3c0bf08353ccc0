"""Speculative decoding: several tokens from one step of the model, the same that it would give one by one.

    stats = Stats()
    for tokens in speculative_steps(model, input_ids, draft=PromptLookup(tokens=8), stats=stats):
        ...                                           # one token from the prompt, then 1 to 9 at a time

At batch 1 a step takes as long as reading the weights, about the same for ten tokens as for one. So a draft
guesses how the text goes on, and the model reads its last token and the guesses g1 .. gn in one step:

    reads             x   g1  g2  g3  g4
    chooses           c0  c1  c2  c3  c4          ci: what follows after x g1 .. gi
    c0 = g1, c1 = g2, c2 != g3: the text goes on with c0 c1 c2, and the cache is truncated to x g1 g2

Every token of the text is the model's own choice after the text before it, so a bad draft costs time and
never changes a token. That holds for sampling too: noise is keyed by (seed, position), so a position draws
the same token whether it was guessed or not. It requires that logits do not depend on how many tokens are
read at once. In fp32 they agree to rounding (tests compare the tokens with `generate`). In bf16 rounding
decides between near-equal tokens now and then, and both texts are the model's.

Two drafts: `PromptLookup` finds the last words earlier in the text and guesses what followed them there. It
is free, and good where an answer repeats its prompt (summaries, edits, code). `DraftModel` asks a smaller
model of the same vocabulary.

Where it pays depends on the engine. Against the eager step in bf16 nearly every accepted token is a gain. The
compiled step is so near the memory's speed for one token that eight take about 1.7 times as long (Zen 3), so
there only likely guesses pay. `PromptLookup.suited_to(engine)` chooses.

Sources: Leviathan et al. 2022 (arXiv 2211.17192), Chen et al. 2023 (arXiv 2302.01318); prompt look-up: Saxena
2023, github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smollm2.config import SmolLM2Config
from smollm2.engine.compiled import CompiledEngine
from smollm2.engine.eager import Engine
from smollm2.errors import UsageError
from smollm2.generation.batch import check_prompts
from smollm2.generation.prompt_cache import PromptCache
from smollm2.model import SmolLM2ForCausalLM, token_ids
from smollm2.sampling import SamplingParams, read_tokens, sample

MAX_ROWS = 16  # tokens read in one step: as many as the Triton decode layer takes
SURE_NGRAM = 8  # tokens that must have occurred before for a guess that has to pay for itself


@dataclass
class Stats:
    """What speculation achieved; counted up by `speculative_steps`, over several texts if they share it."""

    steps: int = 0  # of the model, after the prompt
    tokens: int = 0  # that those steps gave
    proposed: int = 0  # by the draft
    accepted: int = 0  # of the proposed: those that became text

    @property
    def acceptance(self) -> float:
        """Share of the proposed tokens that became text, 0 to 1; 0 where nothing was proposed."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def tokens_per_step(self) -> float:
        """1 is what decoding without a draft gives; 0 before the first step."""
        return self.tokens / self.steps if self.steps else 0.0

    def __str__(self) -> str:
        return (
            f"{self.accepted:,} of {self.proposed:,} proposed tokens accepted ({self.acceptance:.0%}), "
            f"{self.tokens_per_step:.2f} tokens per step"
        )


@dataclass(frozen=True)
class PromptLookup:
    """Guesses from the text itself: what followed the last time that its latest tokens occurred.

    tokens: guessed at once. ngram: the longest run of latest tokens that is looked for, down to `shortest` if
    it is new; longer runs guess less often and better.
    """

    tokens: int = 8
    ngram: int = 3
    shortest: int = 1

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)
        if not 1 <= self.shortest <= self.ngram:
            found = f"got shortest {self.shortest} and ngram {self.ngram}"
            raise UsageError(f"prompt look-up: expected 1 <= shortest <= ngram, {found}")

    @classmethod
    def suited_to(cls, engine: Engine, tokens: int = MAX_ROWS - 1) -> PromptLookup:
        """Guesses after short matches; for the compiled step, slower for many, after long ones only."""
        return cls(tokens, SURE_NGRAM, SURE_NGRAM) if isinstance(engine, CompiledEngine) else cls(tokens)

    def check(self, config: SmolLM2Config, capacity: int) -> None:
        """It can guess for every model."""

    def start(self, capacity: int, params: SamplingParams, seed: int) -> _Lookup:
        return _Lookup(range(self.shortest, self.ngram + 1))


class _Lookup:
    """The text and an index of its n-grams, which grows with it: neither a token nor a guess costs a scan."""

    def __init__(self, sizes: range) -> None:
        self.sizes = sizes
        self.text: list[int] = []
        # n-gram -> where the token stands that followed its newest occurrence
        self.follower: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Takes the next tokens of the text, guessed or not; at the first call the prompt."""
        # An n-gram is entered when its follower arrives, so that the text's own end never finds itself.
        for token in tokens:
            for size in self.sizes:
                if size <= len(self.text):
                    self.follower[tuple(self.text[-size:])] = len(self.text)
            self.text.append(token)

    def propose(self, limit: int) -> list[int]:
        """At most `limit` tokens that may follow the text; none where there is nothing to go by."""
        text = self.text
        matches = (self.follower.get(tuple(text[-size:])) for size in reversed(self.sizes))
        start = next((match for match in matches if match is not None), None)
        guesses: list[int] = []
        if start is not None:
            # Where what followed runs into the end of the text, the text repeats itself: so do the guesses.
            for index in range(start, start + limit):
                guesses.append(text[index] if index < len(text) else guesses[index - len(text)])
        return guesses


@dataclass(frozen=True, eq=False)
class DraftModel:
    """Guesses by a smaller model, which draws with the noise of the model that it drafts for.

    Where the two agree on the probabilities, they draw the same token, at any temperature.
    """

    engine: Engine
    tokens: int = 4

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)

    def check(self, config: SmolLM2Config, capacity: int) -> None:
        own = self.engine.model.config
        if own.vocab_size != config.vocab_size:
            raise UsageError(
                f"draft model: expected the vocabulary of the model, {config.vocab_size} tokens, got "
                f"{own.vocab_size}; choose a draft with the same tokenizer, or prompt look-up"
            )
        if capacity > own.max_position_embeddings:
            raise UsageError(
                f"draft model: expected at most {own.max_position_embeddings} tokens, prompt and new ones "
                f"together, got {capacity}; shorten the prompt, lower max_new_tokens, or use prompt look-up"
            )

    def start(self, capacity: int, params: SamplingParams, seed: int) -> _Drafting:
        return _Drafting(self.engine, capacity, params, seed)


class _Drafting:
    """The text, and a cache of the draft model that runs ahead of it by the guesses of the last step."""

    def __init__(self, engine: Engine, capacity: int, params: SamplingParams, seed: int) -> None:
        self.engine, self.params, self.seed = engine, params, seed
        self.cache = engine.allocate(1, capacity)
        self.text: list[int] = []
        self.cached: list[int] = []  # the tokens in the cache

    def extend(self, tokens: Sequence[int]) -> None:
        kept = min(len(self.text), len(self.cached))
        self.text += tokens
        # Guesses that came true stay; the last token never does, because its logits are needed next.
        while kept < min(len(self.cached), len(self.text) - 1) and self.cached[kept] == self.text[kept]:
            kept += 1
        del self.cached[kept:]
        self.cache.truncate(kept)

    def propose(self, limit: int) -> list[int]:
        guesses: list[int] = []
        pending = self.text[len(self.cached) :]
        while len(guesses) < limit:
            logits = self._read(pending)
            guesses += _choose(logits, self.params, self.seed, [*self.text, *guesses])
            pending = guesses[-1:]
        return guesses

    def _read(self, tokens: list[int]) -> Tensor:
        """Logits [1, V] after these tokens, which enter the cache."""
        input_ids = torch.tensor([tokens], device=self.cache.lengths.device)
        if self.cached:
            # One token, or two when all guesses came true.
            logits = self.engine.decode(input_ids, self.cache)[:, -1]
        else:
            lengths = torch.tensor([len(tokens)], device=input_ids.device)
            logits = self.engine.prefill(input_ids, lengths, self.cache)
        self.cached += tokens
        return logits


# Both guess up to `tokens` at once, 1 to MAX_ROWS - 1, for any number of texts. `check` raises UsageError if
# they cannot guess for a model of these sizes or a text of that capacity; `start` begins a text.
Draft = PromptLookup | DraftModel


def speculative_steps(
    model: SmolLM2ForCausalLM,
    input_ids: Tensor | Sequence[Sequence[int]],
    *,
    draft: Draft,
    max_new_tokens: int = 64,
    params: SamplingParams | None = None,
    seed: int = 0,
    eos_token_ids: Collection[int] = (),
    engine: Engine | None = None,
    stats: Stats | None = None,
    prompt_cache: PromptCache | None = None,
) -> Iterator[list[int]]:
    """Continues one prompt and yields its next tokens, one to draft.tokens + 1 at a time.

    input_ids [1, T] int64. The tokens are those of `generate` with the same params and seed, up to an end
    token, which is included, or max_new_tokens. engine: None runs the model eagerly; a captured engine runs
    uncaptured here. stats is counted up before each yield. prompt_cache: as in `generate_steps`.

    Raises UsageError, before any work, for a batch, an empty prompt, ids or arguments out of range, more
    tokens than the positions of the model or of the draft, and a draft of another vocabulary.
    """
    config, params = model.config, params or SamplingParams()
    if not isinstance(input_ids, Tensor):
        input_ids = token_ids("input_ids", input_ids)
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.is_floating_point():
        raise UsageError(
            "speculative decoding: expected integer ids of one prompt, shape [1, T], got "
            f"{input_ids.dtype} {list(input_ids.shape)}; continue several prompts with generate_many"
        )
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens: expected a number >= 0, got {max_new_tokens}")
    params.validate(config.vocab_size)
    prompt: list[int] = input_ids[0].tolist()
    check_prompts(config, [prompt], [max(1, max_new_tokens)], lambda _: "prompt")
    draft.check(config, len(prompt) + max_new_tokens)
    if max_new_tokens == 0:
        return iter(())
    stats = Stats() if stats is None else stats
    engine, ends = engine or Engine(model), frozenset(eos_token_ids)
    return _steps(engine, prompt, draft, max_new_tokens, params, seed, ends, stats, prompt_cache)


@torch.inference_mode()
def _steps(
    engine: Engine,
    text: list[int],
    draft: Draft,
    left: int,
    params: SamplingParams,
    seed: int,
    ends: frozenset[int],
    stats: Stats,
    prompt_cache: PromptCache | None,
) -> Iterator[list[int]]:
    """`speculative_steps` after its checks. Between steps the cache holds the text without its last token."""
    device, capacity = engine.model.device, len(text) + left
    proposer = draft.start(capacity, params, seed)
    proposer.extend(text)
    cache, held = (engine.allocate(1, capacity), 0) if prompt_cache is None else prompt_cache.open(text, left)
    input_ids = torch.tensor([text[held:]], device=device)
    logits = engine.prefill(input_ids, torch.tensor([len(text) - held], device=device), cache)
    if prompt_cache is not None:
        prompt_cache.tokens += text[held:]
    tokens = _choose(logits, params, seed, text)
    while True:
        text += tokens
        left -= len(tokens)
        ended = left == 0 or tokens[-1] in ends
        yield tokens
        if ended:
            return
        proposer.extend(text[-len(tokens) :])
        # A step gives one token more than was guessed, so that the last token is never worth a guess.
        limit = min(draft.tokens, left - 1)
        guesses = proposer.propose(limit) if limit else []
        logits = engine.decode(torch.tensor([[text[-1], *guesses]], device=device), cache)[0]
        chosen = _choose(logits, params, seed, text, guesses)
        wrong = (index for index, guess in enumerate(guesses) if guess != chosen[index])
        accepted = next(wrong, len(guesses))
        cache.truncate(len(text) + accepted)
        if prompt_cache is not None:
            prompt_cache.tokens += [text[-1], *chosen[:accepted]]
        tokens = chosen[: accepted + 1]
        end = next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))
        tokens = tokens[:end]
        stats.steps += 1
        stats.tokens += len(tokens)
        stats.proposed += len(guesses)
        stats.accepted += min(accepted, len(tokens))


def _choose(
    logits: Tensor, params: SamplingParams, seed: int, text: Sequence[int], guesses: Sequence[int] = ()
) -> list[int]:
    """What `generate` draws from logits [n + 1, V], row i after the text and the first i of n guesses."""
    rows, seen = len(logits), None
    if params.repetition_penalty != 1.0:
        seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        seen[:, torch.tensor(text, device=logits.device)] = True
        for row, guess in enumerate(guesses, start=1):
            seen[row:, guess] = True
    positions = range(len(text), len(text) + rows)
    tokens: list[int] = read_tokens(sample(logits, params, [seed] * rows, positions, seen)).tolist()
    return tokens


def _check_tokens(tokens: int) -> None:
    if not 1 <= tokens < MAX_ROWS:
        expected = f"expected 1 to {MAX_ROWS - 1} tokens at a time ({MAX_ROWS} are read in one step)"
        raise UsageError(f"draft: {expected}, got {tokens}")
