"""From logits to the next token: penalties, filters, and a draw whose noise depends on the row's seed and position alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smollm2.cli import UsageError

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Filters apply in the order of the fields, as in transformers.

    suppress_tokens: ids that are never chosen (special tokens other than the stop tokens).
    repetition_penalty: logits of tokens already in the text are divided by it if positive, multiplied if negative
    (Keskar et al. 2019, arXiv 1909.05858); 1 switches it off. temperature: 0 is greedy. top_k: keep the k most likely tokens,
    0 keeps all. top_p: keep the most likely tokens that together reach this probability (Holtzman et al. 2020, arXiv 1904.09751).
    min_p: drop tokens below this fraction of the most likely one's probability (arXiv 2407.01082).
    """

    suppress_tokens: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.0

    def validate(self, vocab_size: int) -> None:
        """Raises UsageError naming the first value that is out of range."""
        for name, good, expected in (
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "a number >= 0 (0 is greedy)"),
            ("top_k", 0 <= self.top_k <= vocab_size, f"0 (off) or 1 to {vocab_size}, the size of the vocabulary"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "a number in [0, 1]"),
            ("repetition_penalty", math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0, "a number > 0 (1 is off)"),
        ):
            if not good:
                raise UsageError(f"{name}: expected {expected}, got {getattr(self, name)}")
        for token in self.suppress_tokens:
            if not 0 <= token < vocab_size:
                raise UsageError(f"suppress_tokens: expected ids in [0, {vocab_size}), got {token}")


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a function of (seed, position): two rounds of the SplitMix64 finaliser.

    No generator is carried along, so a row draws the same number alone, in a batch, and after a resumption.
    Source: Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195.
    """
    state = seed & _MASK
    for word in (position, 0):
        state = (state + (word + 1) * 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 40) / (1 << 24)  # 24 bits: exact in fp32


def sample(logits: Tensor, params: SamplingParams, seeds: Sequence[int], positions: Sequence[int], seen: Tensor | None = None) -> Tensor:
    """logits [B, V] -> next tokens [B] int64.

    seeds and positions [B]: the seed of each row, and the index in its own text of the token that is drawn. seen [B, V] bool: tokens
    that already occur in the row (needed for the repetition penalty only).
    """
    logits = logits.float()
    if params.suppress_tokens:
        logits = logits.index_fill(1, torch.tensor(params.suppress_tokens, device=logits.device), -math.inf)
    if params.repetition_penalty != 1.0 and seen is not None:
        penalised = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if params.temperature == 0.0:
        return logits.argmax(-1)

    # Sorted from the most likely down; every filter then keeps a prefix.
    scores, tokens = logits.topk(params.top_k or logits.shape[1], dim=-1)
    probabilities = torch.softmax(scores / params.temperature, dim=-1)
    if params.top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= params.top_p, 0.0)
    if params.min_p > 0.0:
        probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities[:, :1], 0.0)
    cumulative = probabilities.cumsum(-1)
    noise = torch.tensor([uniform(seed, position) for seed, position in zip(seeds, positions, strict=True)], device=logits.device)
    # Inverse transform: the first token whose cumulative probability exceeds the noise. Excluded tokens add nothing to the sum.
    rank = (cumulative <= noise[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1  # rounding may leave the noise on the total itself
    return tokens.gather(1, torch.minimum(rank, last)).squeeze(1)
