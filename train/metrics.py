"""What a run reports: throughput, MFU, entropy and bits per byte, to metrics.jsonl, to TensorBoard, and to the terminal.

metrics.jsonl has one JSON object a line. Lines with `loss` come every log_every steps and describe that one step; lines with
`held_out_loss` are evaluations. Losses are in nats per token.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smollm2.cli import UsageError
from smollm2.config import SmolLM2Config
from smollm2.tokenizer import Tokenizer
from train.checkpoint import Progress
from train.config import RunConfig

METRICS_FILE = "metrics.jsonl"

# Dense bf16 tensor-core TFLOP/s as stated by the vendors, by a part of the device's name; the first match counts.
PEAK_TFLOPS = (
    ("B200", 2250), ("GB200", 2250), ("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989), ("H200", 989), ("GH200", 989),
    ("A100", 312), ("A800", 312), ("L40S", 362), ("L4", 121), ("A10G", 70), ("A10", 125), ("RTX 4090", 165), ("RTX 5090", 209),
    ("MI300X", 1307), ("MI250X", 383),
)  # fmt: skip


def flops_per_token(config: SmolLM2Config, length: int) -> float:
    """Floating-point operations to train on one token of rows of that length, forward and backward.

    6 for each weight that multiplies (the tied matrix once: the embedding is a look-up; norms are left out), and
    6 x layers x heads x head_dim x length for attention: causal, so half of the square is counted.
    """
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    return 6 * (config.num_parameters() - norms) + attention


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of a device, or None when the table does not have it: a wrong MFU is worse than none."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOPS if part in name), None)


def unigram_entropy(ids: Tensor) -> float:
    """Entropy, in nats, of the token frequencies: what the best predictor that ignores context loses on these tokens."""
    counts = torch.bincount(ids.flatten())
    probabilities = counts[counts > 0].double() / ids.numel()
    return float(-(probabilities * probabilities.log()).sum())


def bytes_per_token(ids: Tensor, tokenizer: Tokenizer) -> float:
    """Mean number of text bytes that a token stands for; special tokens stand for none."""
    counts = torch.bincount(ids.flatten())
    present = counts.nonzero().flatten().tolist()
    total = sum(int(counts[token]) * len(tokenizer.token_bytes(token)) for token in present if token not in tokenizer.special_ids)
    return total / ids.numel()


def too_good(loss: float, tokens: int, epochs: float, held_out: float | None) -> str | None:
    """Why a training loss from scratch is not to be believed, or None.

    tokens: trained on so far. The floor is a third of what the data term of the Chinchilla fit expects of an endlessly large
    model, 1.69 + 410.7 / tokens^0.28 (Hoffmann et al. 2022, arXiv 2203.15556); text seen twice is exempt from it, since it may be
    memorised. A model that sees its targets is far below; so is one whose held-out documents tell another story.
    """
    expected = 1.69 + 410.7 / max(tokens, 1) ** 0.28
    floor = min(expected / 3, 3.0)
    if epochs < 2 and loss < floor:
        return f"a training loss of {loss:.2f} after {tokens:,} tokens is implausibly low (healthy: above {floor:.2f})"
    if held_out is not None and loss < held_out - 1.0:
        cause = f"{epochs:.1f} epochs: it is memorising" if epochs >= 2 else "less than two epochs"
        return f"the training loss {loss:.2f} is {held_out - loss:.2f} below the held-out loss ({cause})"
    return None


class Throughput:
    """Tokens per second of training alone: evaluations, samples and checkpoints are excluded, and so are the first steps,
    in which memory is allocated and kernels are compiled."""

    def __init__(self, device: torch.device, ignored_steps: int = 2) -> None:
        self._device = device
        self._ignored = ignored_steps
        self._tokens = 0
        self._began = time.perf_counter()

    def add(self, tokens: int) -> None:
        """Counts one step."""
        if self._ignored > 0:
            self._ignored -= 1
            if self._ignored == 0:
                self._restart()
        else:
            self._tokens += tokens

    def rate(self) -> float | None:
        """Tokens per second since the last call; None while there is nothing to measure. Waits for the device."""
        if not self._tokens:
            return None
        self._wait()
        rate = self._tokens / max(time.perf_counter() - self._began, 1e-9)
        self._restart()
        return rate

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Time spent inside does not count."""
        self._wait()
        began = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self._began += time.perf_counter() - began

    def _restart(self) -> None:
        self._wait()
        self._tokens, self._began = 0, time.perf_counter()

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize()


class MetricsLog:
    """Appends to metrics.jsonl, and to TensorBoard's event file when asked."""

    def __init__(self, run: Path, tensorboard: bool) -> None:
        self._stream = (run / METRICS_FILE).open("a", encoding="utf-8")
        self._writer = summary_writer()(str(run / "tensorboard")) if tensorboard else None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line; values that are None are left out, numbers that are not finite are written as text (JSON has none)."""
        line = {"step": step, **{name: value for name, value in values.items() if value is not None}}
        plain = {name: str(value) if isinstance(value, float) and not math.isfinite(value) else value for name, value in line.items()}
        self._stream.write(json.dumps(plain, allow_nan=False) + "\n")
        self._stream.flush()
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._stream.close()
        if self._writer is not None:
            self._writer.close()


def summary_writer() -> Any:
    """TensorBoard's SummaryWriter class. Raises UsageError when its package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise UsageError("tensorboard=true needs the package tensorboard; install it with: pip install tensorboard") from None
    return SummaryWriter


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line cut by a crash is left out."""
    path = run / METRICS_FILE
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def forget_after(run: Path, step: int) -> None:
    """Removes lines of later steps: the run goes on from `step`, and its file must tell one story."""
    kept = [line for line in read_metrics(run) if line["step"] <= step]
    temporary = run / f".{METRICS_FILE}.tmp"
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, run / METRICS_FILE)


class Display:
    """The terminal: a tqdm bar where stderr is one, plain lines elsewhere."""

    def __init__(self, steps: int, done: int) -> None:
        from tqdm import tqdm

        self._steps, self._first, self._began = steps, done, time.perf_counter()
        self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, smoothing=0.1) if sys.stderr.isatty() else None

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def metrics(self, step: int, loss: float, lr: float, rate: float | None) -> None:
        """The figures of one step: in the bar, or on a line with the time left."""
        text = f"loss {loss:.3f}  lr {lr:.2e}" + (f"  {rate:,.0f} tok/s" if rate else "")
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        left = (time.perf_counter() - self._began) / max(1, step - self._first) * (self._steps - step)
        print(f"step {step}/{self._steps}  {text}  ETA {int(left) // 60}:{int(left) % 60:02d}", flush=True)

    def line(self, text: str) -> None:
        """Text of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Reporter:
    """Tells metrics.jsonl, samples.txt and the terminal what happened, and doubts what is too good."""

    def __init__(self, folder: Path, config: RunConfig, progress: Progress, model: SmolLM2Config, device: torch.device) -> None:
        self.throughput = Throughput(device)
        self.held_out_loss: float | None = None
        self._folder, self._config, self._progress = folder, config, progress
        self._log = MetricsLog(folder, config.tensorboard)
        self._display = Display(config.steps, progress.step)
        self._recent: deque[float] = deque(maxlen=10)
        self._warned = False
        self._flops = flops_per_token(model, config.sequence_length)
        self._peak = peak_flops(device)

    def advance(self, tokens: int) -> None:
        """Counts one step."""
        self._display.advance()
        self.throughput.add(tokens)

    def log(self, loss: float, gradient_norm: float, lr: float) -> None:
        """The metrics of the step just done. loss: nats per target of this step; gradient_norm: before clipping."""
        progress, data = self._progress, self._progress.data
        rate = self.throughput.rate()
        values = {
            "loss": loss, "lr": lr, "gradient_norm": gradient_norm, "tokens": progress.tokens, "epochs": round(data.epochs, 4),
            "unique_examples": data.unique.count, "unique_examples_exact": data.unique.exact, "documents": data.documents,
            "invalid_documents": data.invalid, "skipped_steps": progress.skipped_steps,
            "tokens_per_second": rate, "mfu": rate * self._flops / self._peak if rate and self._peak else None,
        }  # fmt: skip
        self._log.write(progress.step, values)
        self._display.metrics(progress.step, loss, lr, rate)
        self._recent.append(loss)
        self._doubt()

    def _doubt(self) -> None:
        """Warns, once, of a training loss from scratch that is too good to be true."""
        if self._warned or not self._config.from_scratch or len(self._recent) < 3:
            return
        mean = sum(self._recent) / len(self._recent)
        reason = too_good(mean, self._progress.tokens, self._progress.data.epochs, self.held_out_loss)
        if reason is not None:
            self._warned = True
            model = self._folder / "checkpoints" / "step-N"
            self._display.line(f"warning: {reason}; check a checkpoint with: python -m smollm2.doctor --model {model}")

    def evaluation(self, loss: float, entropy: float | None, bytes_a_token: float) -> None:
        """A held-out loss in nats per target, beside the unigram entropy of the same tokens."""
        self.held_out_loss = loss
        bits = loss / math.log(2) / bytes_a_token
        step, epochs = self._progress.step, self._progress.data.epochs
        values = {"held_out_loss": loss, "held_out_bits_per_byte": bits, "unigram_entropy": entropy, "epochs": round(epochs, 4)}
        self._log.write(step, values)
        self._display.line(f"step {step}: held-out loss {loss:.3f}, {bits:.2f} bits per byte, {epochs:.2f} epochs")

    def samples(self, texts: list[str]) -> None:
        shown = "\n".join(f"step {self._progress.step} sample: {text}" for text in texts)
        with (self._folder / "samples.txt").open("a", encoding="utf-8") as stream:
            stream.write(shown + "\n\n")
        self._display.line(shown)

    def close(self) -> None:
        self._display.close()
        self._log.close()
