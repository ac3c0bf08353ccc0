"""What the tests of generation share: a model whose tokens vary, prompts, a checkpoint with a tokenizer, and
`generate` as the oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import select_backend
from smollm2 import SmolLM2Config, SmolLM2ForCausalLM, generate
from smollm2.engine.captured import DecodeLoop
from smollm2.engine.eager import Engine
from smollm2.engine.loops import CapturedEngine, DecodeLoops, captured_steps
from smollm2.generation.loop import generate_steps
from smollm2.pretrained.tokenizer import Tokenizer, train_tokenizer
from smollm2.sampling import SamplingParams

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.9, top_k=20, top_p=0.95, min_p=0.01)
EVERYTHING = SamplingParams((3, 17, 200), repetition_penalty=1.3, temperature=1.1, top_k=0, top_p=0.9)


def tiny_model(
    backend: str = "torch", device: str = "cpu", seed: int = 0, **sizes: Any
) -> SmolLM2ForCausalLM:
    """Random weights, large enough that greedy decoding does not settle on one token. fp32."""
    torch.manual_seed(seed)
    config = SmolLM2Config.preset("tiny", **{"initializer_range": 0.3, **sizes})
    return SmolLM2ForCausalLM(config, select_backend(backend, device)).to(device).eval()


def let_it_say(model: SmolLM2ForCausalLM, token_id: int) -> None:
    """Weights by which that token follows whatever came before."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight[:] = 1e-3
        model.model.embed_tokens.weight[token_id] = 1.0


def tiny_tokenizer() -> Tokenizer:
    """300 tokens."""
    return train_tokenizer(["the quick brown fox jumps over the lazy dog"], vocab_size=300)


def write_checkpoint(folder: Path, **sizes: Any) -> Path:
    """A tiny model with its tokenizer, as training leaves them."""
    tokenizer = tiny_tokenizer()
    tiny_model(**{"vocab_size": tokenizer.vocab_size, **sizes}).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def random_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 512, (batch, length), generator=torch.Generator().manual_seed(seed))


def prompts(lengths: Sequence[int], seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random ids [B, longest], and a mask [B, longest] that keeps the first lengths[b] of each row."""
    ids = random_ids(len(lengths), max(lengths), seed)
    return ids, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def alone(
    model: SmolLM2ForCausalLM,
    prompt: list[int],
    params: SamplingParams = GREEDY,
    seed: int = 0,
    ends: Sequence[int] = (),
    new: int = 24,
) -> list[int]:
    """The new tokens of one prompt, its end token included, by `generate`."""
    out = generate(
        model, torch.tensor([prompt]), max_new_tokens=new, eos_token_id=list(ends), seed=seed,
        temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p,
        repetition_penalty=params.repetition_penalty, suppress_tokens=params.suppress_tokens,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def eager(
    model: SmolLM2ForCausalLM, ids: Tensor, mask: Tensor, seeds: list[int], **options: Any
) -> list[list[int]]:
    """The tokens of `generate_steps`, step by step."""
    steps = generate_steps(model, ids, mask, seed=seeds, engine=Engine(model), **options)
    return [tokens.tolist() for tokens in steps]


def looped(
    loops: DecodeLoops, ids: Tensor, mask: Tensor, seeds: list[int], **options: Any
) -> list[list[int]]:
    """The tokens of `captured_steps`, step by step."""
    return [tokens.tolist() for tokens in captured_steps(loops, ids, mask.sum(1), seeds=seeds, **options)]


def pretend_to_capture(monkeypatch: pytest.MonkeyPatch) -> list[DecodeLoop]:
    """The host's part of a captured loop without a GPU: what is replayed is the step itself, and tokens are
    read when the next have been computed. Returns the loops that captured a step, once per capture.
    """
    plain, captures = DecodeLoop.__init__, list[DecodeLoop]()

    def initialise(self: DecodeLoop, *args: Any) -> None:
        plain(self, *args)
        self.captures = True

    def capture(self: DecodeLoop, step: Any) -> None:
        captures.append(self)
        self._warm_up(step)
        step.graph = SimpleNamespace(replay=lambda: self._advance(step))

    def event() -> SimpleNamespace:
        return SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)

    monkeypatch.setattr(DecodeLoop, "__init__", initialise)
    monkeypatch.setattr(DecodeLoop, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return captures


def captured_engine(model: SmolLM2ForCausalLM, chunk: int = 16) -> CapturedEngine:
    """What `default_engine` gives on a GPU, after `pretend_to_capture` anywhere."""
    engine = CapturedEngine(model)
    engine.loops.chunk = chunk
    return engine
