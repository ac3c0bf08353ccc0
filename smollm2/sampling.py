"""From logits to the next token: penalties, filters, and noise that the row's seed and position determine."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.types import NOT_FINITE
from smollm2.errors import UsageError

_MASK = (1 << 64) - 1
# The constants of SplitMix64: the increment, then (shift, factor) of its two multiplications.
_INCREMENT = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
# 1 in the fixed-point weights that `Sampler` adds up: 2^30 of them fit int64; the noise is coarser than 2^-32
_ONE = 1 << 32
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Filters apply in the order of the fields, as in transformers.

    suppress_tokens: ids that are never chosen (special tokens other than the stop tokens).
    repetition_penalty: logits of tokens already in the text are divided by it if positive, multiplied if
    negative (Keskar et al. 2019, arXiv 1909.05858); 1 switches it off. temperature: 0 is greedy. top_k: keep
    the k most likely tokens, 0 keeps all. top_p: keep the most likely tokens that together reach this
    probability (Holtzman et al. 2020, arXiv 1904.09751). min_p: drop tokens below this fraction of the most
    likely one's probability (arXiv 2407.01082).
    """

    suppress_tokens: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.0

    def validate(self, vocab_size: int) -> None:
        """Raises UsageError naming the first value that is out of range."""
        sizes = f"0 (off) or 1 to {vocab_size}, the size of the vocabulary"
        for name, good, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "a number >= 0 (0 is greedy)"),
            ("top_k", 0 <= self.top_k <= vocab_size, sizes),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "a number in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a number > 0 (1 is off)"),
        ):
            if not good:
                raise UsageError(f"{name}: expected {expected}, got {getattr(self, name)}")
        for token in self.suppress_tokens:
            if not 0 <= token < vocab_size:
                raise UsageError(f"suppress_tokens: expected ids in [0, {vocab_size}), got {token}")
        if len(set(self.suppress_tokens)) == vocab_size:
            expected = f"expected at least one of the {vocab_size} ids to be left"
            raise UsageError(f"suppress_tokens: {expected}, got all of them")


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a function of (seed, position): two rounds of the SplitMix64 finaliser.

    No generator is carried along, so a row draws the same number alone, in a batch, and after a resumption.
    Source: Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195.
    """
    state = seed & _MASK
    for word in (position, 0):
        state = (state + (word + 1) * _INCREMENT) & _MASK
        for shift, factor in _ROUNDS:
            state = ((state ^ (state >> shift)) * factor) & _MASK
        state ^= state >> 31
    return (state >> 40) / (1 << 24)  # 24 bits: exact in fp32


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """`uniform` of tensors, bit for bit, on the device where they are.

    seeds and positions: int64, shapes that broadcast -> fp32 in [0, 1) of the common shape. A seed is its
    lowest 64 bits: see `as_words`.
    """
    increment = _signed(_INCREMENT)
    # int64 wraps around, as the definition's uint64 does
    state = _finalise(seeds + (positions + 1) * increment)
    return _shift_right(_finalise(state + increment), 40).float() / (1 << 24)


def _finalise(state: Tensor) -> Tensor:
    for shift, factor in _ROUNDS:
        state = (state ^ _shift_right(state, shift)) * _signed(factor)
    return state ^ _shift_right(state, 31)


def _shift_right(state: Tensor, bits: int) -> Tensor:
    """The logical shift; int64 has the arithmetic one, which copies the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """The int64 that has the lowest 64 bits of an integer of any size or sign."""
    word &= _MASK
    return word - (1 << 64) if word >> 63 else word


def as_words(values: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Integers of any size or sign -> int64 [len(values)] on the device, each cut to its lowest 64 bits."""
    if isinstance(values, Tensor):
        return values.to(device, torch.int64)
    return torch.tensor([_signed(value) for value in values], dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=8)
def _on_device(tokens: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [len(tokens)], copied once, so that no step copies a list to the device."""
    with torch.inference_mode(False):  # made while generating, it is also used where gradients are recorded
        return torch.tensor(tokens, dtype=torch.int64, device=device)


def highest(logits: Tensor) -> Tensor:
    """The token of the highest logit, or of the first NaN: [B, V] -> [B] int64."""
    if logits.device.type == "cpu":  # numpy's is seven times as fast, and wakes no threads
        return torch.from_numpy(logits.detach().numpy().argmax(-1))
    return logits.argmax(-1)


class Sampler:
    """`sample` prepared for one set of parameters on one device.

    A call reads nothing from the host and makes no tensor there, and its shapes do not depend on data: it can
    be captured in a CUDA graph. A row's token does not depend on the other rows. Weights are added up in
    fixed point, where the order of a sum, which differs between devices and batch sizes, cannot matter.
    """

    def __init__(self, params: SamplingParams, device: torch.device) -> None:
        self.params = params
        self._suppressed = _on_device(params.suppress_tokens, device) if params.suppress_tokens else None

    @property
    def needs_noise(self) -> bool:
        """False for greedy decoding."""
        return self.params.temperature > 0.0

    @property
    def needs_seen(self) -> bool:
        """True with a repetition penalty."""
        return self.params.repetition_penalty != 1.0

    def __call__(self, logits: Tensor, noise: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """logits [B, V] -> tokens [B] int64, NOT_FINITE in a row whose highest logit is NaN or infinite.

        noise [B]: fp32 in [0, 1), unless greedy; seen: see `sample`.
        """
        params, logits = self.params, logits.float()
        if self._suppressed is not None:
            logits = logits.index_fill(1, self._suppressed, -math.inf)
        if self.needs_seen and seen is not None:
            penalty = min(max(params.repetition_penalty, _SMALLEST), _LARGEST)
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            # what is finite stays so, NaN and infinities stay what they are
            logits = torch.where(seen & logits.isfinite(), penalised.clamp(-_LARGEST, _LARGEST), logits)
        if not self.needs_noise:
            best = highest(logits)
            return best.where(logits.gather(1, best[:, None]).squeeze(1).abs() < math.inf, NOT_FINITE)
        assert noise is not None, "a temperature above 0 needs noise"

        # Sorted from the most likely down, whose weight is 1; every filter then keeps a prefix.
        scores, tokens = logits.topk(params.top_k or logits.shape[1], dim=-1)
        # below the smallest fp32 number a temperature would be 0, and 0 / 0 no weight
        weights = ((scores - scores[:, :1]) / max(params.temperature, _SMALLEST)).exp()
        fixed = (weights * _ONE).long()
        if params.top_p < 1.0:
            reached = fixed.cumsum(-1)
            # at least 1, the smallest weight: the first token stays with the smallest top_p too
            enough = (params.top_p * reached[:, -1:].float()).clamp(min=1.0)
            fixed = fixed.masked_fill((reached - fixed).float() >= enough, 0)
        if params.min_p > 0.0:
            fixed = fixed.masked_fill(weights < params.min_p, 0)
        cumulative = fixed.cumsum(-1).float()
        # Inverse transform: the first token whose cumulative weight exceeds the noise's share of the total.
        # There is one, because noise is at most 1 - 2^-24, and that share of an fp32 number is below it even
        # when rounded. It has a weight, because a token without one repeats the sum before it.
        rank = (cumulative <= noise[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
        # the weights of a row that is not finite mean nothing
        chosen = tokens.gather(1, rank.clamp(max=scores.shape[1] - 1)).squeeze(1)
        return chosen.where(scores[:, 0].abs() < math.inf, NOT_FINITE)


def read_tokens(tokens: Tensor) -> Tensor:
    """Tokens of a Sampler, on the host. Raises UsageError where logits were not finite."""
    tokens = tokens.cpu()
    if (tokens == NOT_FINITE).any():
        hint = "the weights are damaged or training diverged, or the dtype is too narrow for the model"
        raise UsageError(f"logits: expected finite numbers, got NaN or infinity; {hint}")
    return tokens


def sample(
    logits: Tensor,
    params: SamplingParams,
    seeds: Sequence[int] | Tensor,
    positions: Sequence[int] | Tensor,
    seen: Tensor | None = None,
) -> Tensor:
    """logits [B, V] -> next tokens [B] int64. Raises UsageError for logits that are not finite; on a GPU the
    caller's `read_tokens` does, so that nothing waits here.

    seeds and positions [B]: the seed of each row, and the index in its own text of the token that is drawn;
    lists, or int64 tensors, with which nothing comes from the host. seen [B, V] bool: tokens that already
    occur in the row (needed for the repetition penalty only). Tokens of exactly equal score at the edge of
    top_k are taken as torch.topk orders them.
    """
    tokens = draw(logits, params, seeds, positions, seen)
    return read_tokens(tokens) if tokens.device.type == "cpu" else tokens


def draw(
    logits: Tensor,
    params: SamplingParams,
    seeds: Sequence[int] | Tensor,
    positions: Sequence[int] | Tensor,
    seen: Tensor | None = None,
) -> Tensor:
    """`sample` with NOT_FINITE in rows whose logits are not finite, instead of an error."""
    sampler = Sampler(params, logits.device)
    noise = None
    if sampler.needs_noise:
        if isinstance(seeds, Tensor) or isinstance(positions, Tensor):
            noise = uniforms(as_words(seeds, logits.device), as_words(positions, logits.device))
        else:  # Python hashes a few integers sooner than torch starts thirty small operations
            pairs = zip(seeds, positions, strict=True)
            drawn = [uniform(*pair) for pair in pairs]
            noise = torch.tensor(drawn, dtype=torch.float32, device=logits.device)
    return sampler(logits, noise, seen)
