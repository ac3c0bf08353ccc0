"""What a run reports, to metrics.jsonl, to trackers and on the terminal.

metrics.jsonl is the record: one JSON object a line, each with its `step`.

    loss, lr, gradient_norm      of that step: nats per token, the rate used, the global norm before clipping
    tokens_per_second, mfu       of training alone since the line before; absent in the first steps, and mfu
                                 where the peak is not known
    wait_ms                      milliseconds that a step waited for its batch, mean since the line before
    memory_gb, memory_peak_gb    in 1e9 bytes, see `memory`
    tokens, epochs, documents, unique_examples, invalid_documents, skipped_steps     since the run began
    share/NAME, epochs/NAME, unique_examples/NAME    of each source of a mixture; share: of all tokens
    padded_share, truncated_conversations    with format=chat: part of all tokens that is padding, and how
                                 many conversations were longer than a row; since the run began
    eta_seconds                  to the last step at the pace so far, evaluations and checkpoints included
    held_out_loss, held_out_bits_per_byte, unigram_entropy    lines of evaluations
    resumed, ...                 lines of events, `Reporter.note`

MFU is tokens/s x FLOPs per token / (peak x devices): 6 FLOPs per weight and token, causal attention counted
half, and the vendors' dense bf16 peak for every dtype of a run.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smollm2.config import SmolLM2Config
from smollm2.lora import LoraConfig, adapter_parameters
from smollm2.pretrained.tokenizer import Tokenizer
from train.checkpoint import Progress
from train.config import RunConfig
from train.display import Display
from train.journal import Journal
from train.tracking import Guarded, open_trackers

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.txt"

# Dense bf16 TFLOP/s that the vendors state, by a part of the device's name; the first match counts.
PEAK_TFLOPS = (
    ("B200", 2250), ("GB200", 2250), ("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989), ("H200", 989),
    ("GH200", 989), ("A100", 312), ("A800", 312), ("L40S", 362), ("L4", 121), ("A10G", 70), ("A10", 125),
    ("RTX 4090", 165), ("RTX 5090", 209), ("MI300X", 1307), ("MI250X", 383),
)  # fmt: skip


def flops_per_token(config: SmolLM2Config, length: int, lora: LoraConfig | None = None) -> float:
    """Floating-point operations to train on one token of rows of that length, forward and backward.

    6 for each weight that multiplies (the tied matrix once: the embedding is a look-up; norms are left out),
    and 6 x layers x heads x head_dim x length for attention: causal, so half of the square is counted. With
    adapters the weights are frozen, which saves the 2 of their gradient, and the adapters' own multiply.
    """
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    weights = config.num_parameters() - norms
    if lora is not None:
        return 4 * weights + 6 * adapter_parameters(config, lora) + attention
    return 6 * weights + attention


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of a device; None if the table lacks it: a wrong MFU is worse than none."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOPS if part in name), None)


def unigram_entropy(ids: Tensor) -> float:
    """Entropy of the token frequencies in nats: the loss of the best predictor that ignores context."""
    counts = torch.bincount(ids.flatten())
    probabilities = counts[counts > 0].double() / ids.numel()
    return float(-(probabilities * probabilities.log()).sum())


def bytes_per_token(ids: Tensor, tokenizer: Tokenizer) -> float:
    """Mean number of bytes of text that a token stands for; special tokens stand for none."""
    tokens, counts = ids.unique(return_counts=True)
    found = zip(tokens.tolist(), counts.tolist(), strict=True)
    plain = [(token, count) for token, count in found if token not in tokenizer.special_ids]
    return sum(count * len(tokenizer.token_bytes(token)) for token, count in plain) / ids.numel()


def too_good(loss: float, tokens: int, epochs: float, held_out: float | None) -> str | None:
    """Why a training loss from scratch is not to be believed, or None.

    tokens: trained on so far. The floor is a third of what the data term of the Chinchilla fit expects of an
    endlessly large model, 1.69 + 410.7 / tokens^0.28 (Hoffmann et al. 2022, arXiv 2203.15556). It does not
    hold for text seen twice, which may be memorised. A model that sees its targets is far below it. So is a
    training loss that lies far below the held-out loss suspicious.
    """
    expected = 1.69 + 410.7 / max(tokens, 1) ** 0.28
    floor = min(expected / 3, 3.0)
    if epochs < 2 and loss < floor:
        healthy = f"(healthy: above {floor:.2f})"
        return f"a training loss of {loss:.2f} after {tokens:,} tokens is implausibly low {healthy}"
    if held_out is not None and loss < held_out - 1.0:
        cause = f"{epochs:.1f} epochs: it is memorising" if epochs >= 2 else "less than two epochs"
        return f"the training loss {loss:.2f} is {held_out - loss:.2f} below the held-out loss ({cause})"
    return None


def memory(device: torch.device) -> tuple[float | None, float | None]:
    """Memory in use and its peak, in GB of 1e9 bytes; None where unknown. Does not wait for the device.

    CUDA: both are the peak of what tensors took since the process began, the figure that decides whether a
    run fits. MPS: what tensors take now. CPU: the resident set of this process and its peak; the data workers
    are not in it.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e9
        return peak, peak
    if device.type == "mps":
        return torch.mps.current_allocated_memory() / 1e9, None
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        status = dict(line.split(":", 1) for line in lines if ":" in line)
        # in kB of 1024 bytes
        now, peak = (int(status[name].split()[0]) * 1024 / 1e9 for name in ("VmRSS", "VmHWM"))
        return now, peak
    except (OSError, KeyError, ValueError):
        pass  # not Linux
    try:
        from resource import RUSAGE_SELF, getrusage
    except ModuleNotFoundError:
        return None, None
    peak = getrusage(RUSAGE_SELF).ru_maxrss / 1e9  # macOS gives bytes
    return peak, peak


class Throughput:
    """Tokens per second of training alone: evaluations, samples and checkpoints are excluded, and so are the
    first two steps, in which memory is allocated, kernels are compiled and graphs are captured.

    Counting a step does not wait for the device. The clock is read where the host waits for the device
    anyway: at a log line, and around what is excluded. With a GPU it therefore starts at the first such place
    after the first steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ignored = 2
        self._tokens = 0
        self._began: float | None = None  # None: not measuring yet

    def add(self, tokens: int) -> None:
        """Counts one step. Never waits for the device."""
        if self._ignored > 0:
            self._ignored -= 1
            if self._ignored == 0 and self._device.type == "cpu":  # whose steps are done when they return
                self._began = time.perf_counter()
        elif self._began is not None:
            self._tokens += tokens

    def rate(self) -> float | None:
        """Tokens per second since the last call; None while there is nothing to measure. Waits for the
        device.
        """
        self._wait()
        now, began, tokens = time.perf_counter(), self._began, self._tokens
        self._tokens, self._began = 0, now if self._ignored == 0 else None
        return tokens / max(now - began, 1e-9) if began is not None and tokens else None

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Time spent inside does not count. Waits for the device before and after."""
        self._wait()
        entered = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            now = time.perf_counter()
            if self._began is not None:
                self._began += now - entered
            elif self._ignored == 0:
                self._began = now

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


class MetricsLog:
    """Appends to metrics.jsonl, and to what `trackers` keep."""

    def __init__(self, run: Path, trackers: Sequence[Guarded] = ()) -> None:
        self.file = Journal(run / METRICS_FILE)
        self._trackers = trackers

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line. None is left out; a number that is not finite is written as text, since JSON has none."""
        line: dict[str, Any] = {"step": step}
        for name, value in values.items():
            if value is not None:
                line[name] = str(value) if isinstance(value, float) and not math.isfinite(value) else value
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        for tracker in self._trackers:
            tracker.log(step, values)

    def flush(self) -> None:
        """Asks the trackers to keep what they were given so far."""
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        self.file.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without those that a crash has cut short."""
    path = run / METRICS_FILE
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def forget_after(run: Path, step: int) -> None:
    """Removes the lines of later steps, which the run is about to do again."""
    kept = [line for line in read_metrics(run) if line["step"] <= step]
    temporary = run / f".{METRICS_FILE}.tmp"
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, run / METRICS_FILE)


class Reporter:
    """Writes metrics.jsonl and samples.txt, prints, and warns of losses that are too good to be true.

    With several processes the first one reports: tokens and losses are those of the global batch.
    """

    def __init__(
        self, folder: Path, config: RunConfig, progress: Progress, model: SmolLM2Config, device: torch.device,
        *, devices: int = 1,
    ) -> None:  # fmt: skip
        """devices: how many train together; MFU is relative to the sum of their peaks."""
        self.held_out_loss: float | None = None
        self._folder, self._config, self._progress, self._device = folder, config, progress, device
        self.throughput = Throughput(device)
        self._display = Display(config.steps, progress.step)
        trackers = open_trackers(folder, config, self._display.line, progress.step)
        self._log, self._samples = MetricsLog(folder, trackers), Journal(folder / SAMPLES_FILE)
        self._waited, self._steps = 0.0, 0  # seconds and steps since the last line
        # step and time of the first line: the pace counts from there
        self._first: tuple[int, float] | None = None
        self._recent: deque[float] = deque(maxlen=10)
        self._warned = self._disk_warned = False
        peak = peak_flops(device)
        self._flops = flops_per_token(model, config.sequence_length, config.lora)
        self._peak = peak * devices if peak else None

    def advance(self, tokens: int, wait_seconds: float = 0.0) -> None:
        """Counts one step, and the seconds that it waited for its batch. Does not wait for the device."""
        self._display.advance()
        self.throughput.add(tokens)
        self._waited += wait_seconds
        self._steps += 1

    def excluded(self) -> AbstractContextManager[None]:
        """Evaluations, samples and checkpoints belong inside; see Throughput.excluded."""
        return self.throughput.excluded()

    def log(self, loss: float, gradient_norm: float, lr: float) -> None:
        """The metrics of the step just done. loss: nats per target of this step; gradient_norm: before
        clipping.
        """
        progress, data = self._progress, self._progress.data
        rate = self.throughput.rate()
        in_use, peak = memory(self._device)
        values = {
            "loss": loss, "lr": lr, "gradient_norm": gradient_norm, "tokens": progress.tokens,
            "epochs": round(data.epochs, 4), "unique_examples": data.unique.count,
            "unique_examples_exact": data.unique.exact, "documents": data.documents,
            "invalid_documents": data.invalid, "skipped_steps": progress.skipped_steps,
            "tokens_per_second": rate,
            "mfu": rate * self._flops / self._peak if rate and self._peak else None,
            "wait_ms": round(1e3 * self._waited / self._steps, 3) if self._steps else None,
            "memory_gb": in_use, "memory_peak_gb": peak, "eta_seconds": self._seconds_left(),
            **data.by_source(),
        }  # fmt: skip
        if self._config.format == "chat":
            values["padded_share"] = round(data.padding / max(1, progress.tokens), 4)
            values["truncated_conversations"] = data.truncated
        self._waited, self._steps = 0.0, 0
        self._write(values)
        self._display.metrics(progress.step, values)
        self._recent.append(loss)
        self._doubt()

    def _seconds_left(self) -> float | None:
        """From the pace since the first line, everything included; None at the first line itself."""
        step, now = self._progress.step, time.perf_counter()
        self._first = self._first or (step, now)
        first, began = self._first
        left = self._config.steps - step
        return round((now - began) / (step - first) * left, 1) if step > first else None

    def _write(self, values: dict[str, Any]) -> None:
        self._log.write(self._progress.step, values)
        self._doubt_disk(METRICS_FILE, self._log.file.error)

    def _doubt_disk(self, name: str, error: OSError | None) -> None:
        """Says, once, that a file cannot be written."""
        if error is not None and not self._disk_warned:
            self._disk_warned = True
            warning = f"warning: {name} cannot be written ({error})"
            self._display.line(f"{warning}; training goes on; free some space")

    def _doubt(self) -> None:
        """Warns, once, of a training loss from scratch that is too good to be true."""
        if self._warned or not self._config.from_scratch or len(self._recent) < 3:
            return
        mean = sum(self._recent) / len(self._recent)
        reason = too_good(mean, self._progress.tokens, self._progress.data.epochs, self.held_out_loss)
        if reason is not None:
            self._warned = True
            command = f"python -m smollm2.doctor --model {self._folder / 'checkpoints' / 'step-N'}"
            self._display.line(f"warning: {reason}; check a checkpoint with: {command}")

    def evaluation(self, loss: float, entropy: float | None, bytes_a_token: float) -> None:
        """A held-out loss in nats per target, and the unigram entropy of the same tokens."""
        self.held_out_loss = loss
        bits = loss / math.log(2) / bytes_a_token
        step, epochs = self._progress.step, self._progress.data.epochs
        figures = {"held_out_loss": loss, "held_out_bits_per_byte": bits, "unigram_entropy": entropy}
        self._write({**figures, "epochs": round(epochs, 4)})
        found = f"held-out loss {loss:.3f}, {bits:.2f} bits per byte, {epochs:.2f} epochs"
        self._display.line(f"step {step}: {found}")

    def samples(self, texts: list[str]) -> None:
        """Generated texts: to samples.txt and the terminal."""
        shown = "\n".join(f"step {self._progress.step} sample: {text}" for text in texts)
        self._samples.write(shown + "\n\n")
        self._display.line(shown)
        self._doubt_disk(SAMPLES_FILE, self._samples.error)

    def files(self) -> dict[str, Any]:
        """What metrics.jsonl and samples.txt hold by now: what a checkpoint of this step counts on."""
        self._log.flush()
        return {METRICS_FILE: self._log.file.mark(), SAMPLES_FILE: self._samples.mark()}

    def note(self, **values: Any) -> None:
        """An event at the present step, a line of its own in metrics.jsonl: note(resumed=True)."""
        self._write(values)

    def line(self, text: str) -> None:
        """A line of text on the terminal, above the bar where there is one."""
        self._display.line(text)

    def close(self) -> None:
        self._display.close()
        self._log.close()
        self._samples.close()
