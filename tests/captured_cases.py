"""What the tests of decode loops share: a model whose tokens vary, ragged prompts, and the eager loop as the
oracle.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import select_backend
from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.engine.captured import DecodeLoops, captured_steps
from smollm2.engine.eager import Engine
from smollm2.generation.loop import generate_steps
from smollm2.sampling import SamplingParams

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.9, top_k=20, top_p=0.95, min_p=0.01)
EVERYTHING = SamplingParams((3, 17, 200), repetition_penalty=1.3, temperature=1.1, top_k=0, top_p=0.9)


def tiny_model(backend: str = "torch", device: str = "cpu") -> SmolLM2ForCausalLM:
    """Random weights, large enough that greedy decoding does not settle on one token. fp32."""
    torch.manual_seed(0)
    config = SmolLM2Config.preset("tiny", initializer_range=0.3)
    return SmolLM2ForCausalLM(config, select_backend(backend, device)).to(device).eval()


def prompts(lengths: tuple[int, ...], seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random ids [B, longest], and a mask [B, longest] that keeps the first lengths[b] of each row."""
    ids = torch.randint(0, 512, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    return ids, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def eager(
    model: SmolLM2ForCausalLM, ids: Tensor, mask: Tensor, seeds: list[int], **options: Any
) -> list[list[int]]:
    """The tokens of `generate_steps`, step by step."""
    return [
        tokens.tolist()
        for tokens in generate_steps(model, ids, mask, seed=seeds, engine=Engine(model), **options)
    ]


def looped(
    loops: DecodeLoops, ids: Tensor, mask: Tensor, seeds: list[int], **options: Any
) -> list[list[int]]:
    """The tokens of `captured_steps`, step by step."""
    return [tokens.tolist() for tokens in captured_steps(loops, ids, mask.sum(1), seeds=seeds, **options)]
