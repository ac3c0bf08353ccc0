"""`python -m bench.train_run`: a short real training run with the Triton kernels, on the Python files of this installation.

The recipe of train/configs/smollm2_135m.yaml: AdamW at 3e-4 after 100 warm-up steps, 32 x 512 tokens, clipping at 1; packed documents, to
which attention and targets are confined. What is reported can be doubted in the usual ways: the held-out loss beside the training loss, the
epochs, the entropy of the token frequencies (what a model knows that has only counted), and a greedy sample.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import text, work
from bench.part import Part, parser
from bench.train_step import TrainingStep, build
from smollm2.cli import run_command
from smollm2.generate import generate
from smollm2.model import SmolLM2ForCausalLM
from smollm2.tokenizer import Tokenizer

PEAK_LR, RESERVE = 3e-4, 6.0  # seconds kept for the last evaluation and the sample
PROMPT = "def "


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy in nats of the token frequencies."""
    share = np.bincount(tokens)[np.unique(tokens)] / len(tokens)
    return float(-(share * np.log(share)).sum())


@torch.no_grad()
def evaluate(model: SmolLM2ForCausalLM, batches: text.Batches, count: int) -> float:
    """Mean loss over the first batches."""
    losses = [model(ids, ids, starts).loss for ids, starts in (batches(index) for index in range(count))]
    return float(torch.stack(losses).mean())


def sample(model: SmolLM2ForCausalLM, tokenizer: Tokenizer, tokens: int) -> str:
    """A greedy continuation of the prompt."""
    prompt = torch.tensor([tokenizer.encode(PROMPT)], device=model.lm_head.weight.device)
    padding = range(tokenizer.vocab_size, model.config.vocab_size)  # rows of the embedding that stand for no token
    ids = generate(model.eval(), prompt, max_new_tokens=tokens, eos_token_id=[], suppress_tokens=padding)
    return tokenizer.decode(ids[0].tolist())


def train(part: Part, step: TrainingStep, batches: text.Batches, held_out: text.Batches, most_steps: int, warmup: int) -> None:
    """Trains until the time is over, and saves the curve as it grows."""
    log_every, evaluate_every, evaluated = (1, 2, 1) if part.tiny else (10, 200, 8)
    points: list[dict[str, Any]] = []
    held: list[dict[str, Any]] = []
    pending: list[Tensor] = []
    seconds, tokens, done = 0.0, batches(0)[0].numel(), 0

    def evaluation() -> None:
        held.append({"step": done, "loss": round(evaluate(step.model, held_out, min(evaluated, held_out.per_epoch)), 4)})
        part.save(points=points, held_out=held)
        print(f"step {done}: held-out loss {held[-1]['loss']:.3f}", flush=True)

    evaluation()
    while done < most_steps and part.left() > (0 if part.tiny else RESERVE):
        began = time.perf_counter()
        for _ in range(log_every):
            step.lr.fill_(PEAK_LR * min(1.0, (done + 1) / warmup))
            pending.append(step(*batches(done)))
            done += 1
        losses = torch.stack(pending).tolist()  # waits for the device
        pending.clear()
        elapsed = time.perf_counter() - began
        seconds += elapsed
        points.append(
            {
                "step": done, "tokens": done * tokens, "loss": round(losses[-1], 4), "mean_loss": round(sum(losses) / len(losses), 4),
                "seconds": round(seconds, 2), "tokens_per_second": round(log_every * tokens / elapsed, 1),
            }
        )  # fmt: skip
        if done % evaluate_every == 0:
            evaluation()
    if held[-1]["step"] != done:
        evaluation()


def main(argv: Sequence[str]) -> int:
    arguments = parser("train_run", "A short real training run on the Python files of this installation.")
    arguments.add_argument("--model", default="135M", help="preset")
    arguments.add_argument("--backend", default="triton", help="as on every command line")
    arguments.add_argument("--steps", type=int, default=5000, metavar="N", help="at most so many")
    options = arguments.parse_args(argv)
    part = Part("run", options)
    small = part.tiny
    began = time.perf_counter()
    documents = text.read_documents(2_000_000 if small else 64_000_000)
    tokenizer = text.learn_tokenizer(documents, 300 if small else 49152, 50_000 if small else 8_000_000)
    training, held_out = (text.tokenise(tokenizer, texts) for texts in (documents.training, documents.held_out))
    batch, length = (1, 16) if small else (32, 512)
    config = part.model(options.model, vocab_size=-(-tokenizer.vocab_size // 64) * 64)
    batches, held_batches = (text.Batches(tokens, batch, length, part.device) for tokens in (training, held_out))
    part.save(
        model=options.model, backend=options.backend, parameters=config.num_parameters(), vocabulary=tokenizer.vocab_size,
        batch=batch, length=length, lr=PEAK_LR,
        text_bytes=documents.bytes, documents=len(documents.training), held_out_documents=len(documents.held_out),
        training_tokens=len(training), held_out_tokens=len(held_out), unigram_entropy=round(unigram_entropy(held_out), 4),
        preparation_seconds=round(time.perf_counter() - began, 1),
    )  # fmt: skip
    print(
        f"{documents.bytes / 1e6:.1f} MB of Python, {len(training):,} tokens of {tokenizer.vocab_size:,} kinds to train on, "
        f"prepared in {part.data['preparation_seconds']} s",
        flush=True,
    )
    model = build(config, options.backend, part.device)
    train(part, TrainingStep(model), batches, held_batches, 4 if small else options.steps, warmup=2 if small else 100)

    points = part.data["points"]
    rates = sorted(point["tokens_per_second"] for point in points[1:] or points)
    rate, peak = (rates[len(rates) // 2] if rates else 0.0), work.peak_flops(part.device)
    part.save(
        tokens_per_second=rate, mfu=round(rate * work.flops_per_token(config, length) / peak, 4) if peak else None,
        epochs=round(points[-1]["step"] / batches.per_epoch, 3) if points else 0.0,
    )  # fmt: skip
    part.save(sample=sample(model, tokenizer, 4 if small else 64))
    if points:
        print(f"step {points[-1]['step']}: loss {points[-1]['mean_loss']:.3f}, {rate:,.0f} tok/s, {part.data['epochs']} epochs")
    print(f"sample: {part.data['sample']!r}")
    return part.finish()


if __name__ == "__main__":
    sys.exit(run_command(main))
