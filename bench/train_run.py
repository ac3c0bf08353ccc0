"""`python -m bench.train_run [key=value ...]`: the training program itself, for as long as there is time, on
what bench/text.py finds.

It is `python -m train.run` with the recipe of train/configs/smollm2_135m.yaml and the Triton kernels, in a
process of its own. What that writes is copied into the section while it runs. When the time is up it gets
SIGTERM, upon which it saves and leaves, and what it has reached is the result. It can be doubted in the usual
ways: the held-out loss beside the training loss, the documents and how many of them are different, the
epochs, the entropy of the token frequencies (what a model knows that has only counted), and a sample.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench import clocks, text
from bench.record import ROOT, Part, one_line, parser, python
from smollm2.cli import run_command

POLL = 1.0  # seconds between two looks at what the run has written
SAVING = 10.0  # seconds that it has to save and leave
# Kept of every line of metrics, and of the last one, whose counts are those of the whole run.
POINT = ("step", "tokens", "loss", "gradient_norm", "tokens_per_second", "wait_ms")
TOTALS = (
    "epochs", "documents", "unique_examples", "unique_examples_exact", "invalid_documents", "skipped_steps",
    "memory_peak_gb",
)  # fmt: skip
# The recipe takes four minutes of an H100. With these keys half a minute has something of everything too.
FULL = (
    "eval_every=100", "eval_batches=8", "sample_every=200", "sample_prompts=[def fibonacci(n):]",
    "checkpoint_every=0",
)  # fmt: skip
TINY = (
    "num_hidden_layers=1", "batch_size=1", "sequence_length=16", "steps=4", "eval_every=2", "sample_every=2",
    "sample_tokens=2",
)  # fmt: skip


def missing() -> str | None:
    """Why train.run cannot start here, or None. Its command line needs a package that nothing else here
    does.
    """
    try:
        import omegaconf  # noqa: F401
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    return None


def collect(folder: Path) -> dict[str, Any]:
    """What a run has written so far, as values of the section."""
    lines: list[dict[str, Any]] = []
    metrics, samples = (
        path.read_text(encoding="utf-8") if path.is_file() else ""
        for path in (folder / "metrics.jsonl", folder / "samples.txt")
    )
    for line in metrics.splitlines():
        with suppress(ValueError):  # half written
            lines.append(json.loads(line))
    trained = [line for line in lines if "loss" in line]
    found: dict[str, Any] = {
        "points": [{key: line[key] for key in POINT if key in line} for line in trained],
        "held_out": [line for line in lines if "held_out_loss" in line],
        **{key: line[key] for line in trained[-1:] for key in TOTALS if key in line},
    }
    for key in ("tokens_per_second", "mfu"):
        if values := [line[key] for line in trained if key in line]:
            found[key] = statistics.median(values)
    parts = re.split(r"^step (\d+) sample: ", samples, flags=re.MULTILINE)
    if len(parts) > 2:
        found["sample"] = {"step": int(parts[-2]), "text": parts[-1].rstrip("\n")}
    return found


def follow(part: Part, process: subprocess.Popen[bytes], folder: Path) -> bool:
    """Saves what the run writes, and the GPU's clock and power, until it ends or the time is up, and ends it
    then; returns whether it had to. No run is left behind.
    """
    readings: list[tuple[int, float]] = []
    try:
        while process.poll() is None and part.left() > 0:
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL)
            part.save(**collect(folder), gpu=readings)
            if part.device.type == "cuda" and "gpu_failed" not in part.data:
                try:
                    readings.append(clocks.reading(part.device))
                except Exception as failure:  # noqa: BLE001 - the run goes on
                    part.save(gpu_failed=one_line(failure))
    finally:
        stopped = process.poll() is None
        if stopped:
            process.terminate()
            try:
                process.wait(SAVING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        part.save(**collect(folder), exit_code=process.returncode)
    return stopped


def main(argv: Sequence[str]) -> int:
    what = "Runs train.run on the Python files of this installation, for as long as there is time."
    arguments = parser("train_run", what)
    add = arguments.add_argument
    keys_of_run = "keys of train.run, which replace those of the recipe"
    add("keys", nargs="*", metavar="key=value", help=keys_of_run)
    learned = "tokenizer.json, its folder, or what train.run takes; default: learn one"
    add("--tokenizer", default="train", help=learned)
    removed = "for tokens and checkpoints (default: a folder that is removed)"
    add("--scratch", type=Path, metavar="DIR", help=removed)
    options = arguments.parse_args(argv)
    part = Part("run", options)
    if reason := missing():
        print(f"skipped: {reason}")
        part.save(skipped=reason)
        return part.finish()
    with tempfile.TemporaryDirectory(prefix="bench-run-") as temporary:
        scratch = (options.scratch or Path(temporary)).resolve()
        keys = [
            *text.configuration(part.tiny, options.tokenizer, scratch / "tokens"),
            *(TINY if part.tiny else FULL), "backend=triton", f"device={part.device.type}",
            f"workers={max(1, min(8, (os.cpu_count() or 1) // 2))}", *options.keys,
        ]  # fmt: skip
        part.save(arguments=keys)
        command = python("train.run", *keys, f"output_dir={scratch / 'run'}")
        stopped = follow(part, subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL), scratch / "run")
    points, code = part.data["points"], part.data["exit_code"]
    if code and not (stopped and code in (128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL)):
        return 1  # the last line of the output, which the run wrote, says why
    if stopped and code:
        where = f"after step {points[-1]['step']}" if points else "before the first step"
        late = ", and saving took too long" if code == -signal.SIGKILL else ""
        part.save(end=f"the time was up {where}{late}")
    return part.finish()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the run is stopped, and what it wrote stays
    sys.exit(run_command(main))
