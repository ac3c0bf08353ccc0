"""`python -m bench.memcheck`: every operation, forward and backward, under compute-sanitizer's memory checker
(or `--tool racecheck`).

Shapes are odd on purpose: rows that do not fill a tile, documents, strided slices of packed buffers. Each
tensor has an allocation of its own (no caching allocator), so that an access one element beyond it is seen.
Skipped, and said so, where the tool is not installed. Three operations share a process, and four processes
run at a time: most of the time goes into starting torch under the tool. After an error CUDA is over for a
process, and what has not run yet gets another one. `--op NAME` is the process that is checked.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.record import ROOT, Part, parser, python
from kernels import TORCH, Backend, LayerWeights, select_backend
from kernels.launch_config import DEPENDENT_LAUNCH, architecture
from kernels.types import TokenState
from smollm2.cli import run_command
from smollm2.working_copies import WorkingCopies

TOKENS, HEADS, KEY_HEADS, HEAD_DIM, WIDTH, EPS = 65, 9, 3, 64, 577, 1e-5
ERRORS_FOUND = 99
GROUP, PROCESSES = 3, 4  # operations of a process, processes at a time
# What racecheck, which is slow, is run on: the operations whose threads share memory.
RACES = ("attention", "rms_norm", "linear_cross_entropy", "mlp")
ONE_OF = "in one of:"
OUT_OF_TIME = {"result": "no result: out of time"}


def operations(backend: Backend, device: torch.device) -> dict[str, Callable[[], object]]:
    """Operation -> one call on odd shapes, with gradients where it has any."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def draw(*size: int) -> Tensor:
        """Drawn on the CPU: the tool slows the kernels of torch too."""
        return torch.randn(size).to(dtype).to(device)

    def forward(function: Callable[..., object], *sizes: tuple[int, ...]) -> Callable[[], object]:
        return lambda: function(*(draw(*size) for size in sizes))

    def both(
        function: Callable[..., Tensor | tuple[Tensor, ...]], *sizes: tuple[int, ...]
    ) -> Callable[[], object]:
        def call() -> object:
            inputs = [draw(*size).requires_grad_() for size in sizes]
            outputs = function(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            upstream = [torch.randn(output.shape).to(output.dtype).to(device) for output in outputs]
            return torch.autograd.grad(outputs, inputs, upstream)

        return call

    def decode_layer(x: Tensor, key_cache: Tensor, value_cache: Tensor, *weights: Tensor) -> Tensor:
        caches = key_cache, value_cache, ends
        return backend.decode_layer(x, LayerWeights(*weights), *caches, pair, pair, eps=EPS, ops=backend)

    def decode_layers(x: Tensor, *rest: Tensor) -> Tensor:
        """Two layers: layer by layer, and on a GPU in one launch too."""
        weights, keys, values = (LayerWeights(*rest[:6]), LayerWeights(*rest[6:12])), rest[12:14], rest[14:]
        caches = keys, values, ends, pair, pair
        out = backend.decode_layers(x, weights, *caches, eps=EPS, ops=backend)
        if backend.name == "triton" and architecture(device) in DEPENDENT_LAUNCH:
            from kernels import decode_layers

            decode_layers.decode_layers(x, weights, *caches, eps=EPS)
        return out

    def decode_inputs(embedding: Tensor) -> None:
        """The first position, one in between, and the last of the tables."""
        lengths = torch.tensor([0, 33, TOKENS - 1]).to(device)
        backend.decode_inputs(torch.arange(3)[:, None].to(device), embedding, lengths, table, table)

    def next_token(scores: Tensor) -> None:
        """The last slot of three rows, one of which is not finite."""
        sizes = ((3, 1), torch.int64), ((3,), torch.bool), ((2, 3), torch.int64), ((3,), torch.int64)
        state = TokenState(*(torch.ones(size, dtype=dtype, device=device) for size, dtype in sizes))
        scores[1, 5] = torch.nan
        backend.next_token(scores, None, state, targets, 0)

    def mlp(*inputs: Tensor) -> Tensor:
        """The form with SwiGLU in its products, wherever the other is the default, which is products and
        swiglu.
        """
        op = backend.mlp
        if backend.name == "triton":
            from kernels.mlp import mlp as op
        return op(*inputs)

    def adamw() -> None:
        """Parameters of several chunks, of a part of one, and at an odd address; two of them have no copy."""
        from kernels.fused_adamw import FusedAdamW

        matrices = [torch.nn.Parameter(draw(*size).float()) for size in ((TOKENS, WIDTH), (3, 5))]
        vectors = [torch.nn.Parameter(draw(size).float()[1:]) for size in (WIDTH, 2)]
        for parameter in (*matrices, *vectors):
            parameter.grad = torch.ones_like(parameter)
        copies = WorkingCopies(torch.nn.ParameterList(matrices), torch.bfloat16)
        optimizer = FusedAdamW([*matrices, *vectors], copies=copies)
        optimizer.clip(1.0)
        optimizer.step()

    angles = torch.randn(TOKENS, HEAD_DIM // 2)
    table = angles.to(device)
    # Two new tokens for each of three rows: the first of its row, some in between, and those that fill the
    # cache to its end.
    ends = torch.tensor([2, 33, TOKENS]).to(device)
    pair = table[ends[:, None] - 2 + torch.arange(2, device=device)]
    starts = (torch.arange(TOKENS, dtype=torch.int32)[None] // 20 * 20).to(device)
    full = torch.full((2,), TOKENS).to(device)
    targets = torch.arange(TOKENS).to(device)
    count = torch.arange(5 * TOKENS)
    ids = (count // 7 * (count % 2)).to(device)  # half of them one, for which several programs add up
    rows, heads = (TOKENS, WIDTH), [(1, TOKENS, many, HEAD_DIM) for many in (HEADS, KEY_HEADS, KEY_HEADS)]
    cache, full_cache = (TOKENS, KEY_HEADS, HEAD_DIM), (2, 2 * TOKENS, KEY_HEADS, HEAD_DIM)
    width, ffn, attended = 97, 131, HEADS * HEAD_DIM
    qkv, gate_up = (attended + 2 * KEY_HEADS * HEAD_DIM, width), (2 * ffn, width)
    layer = [(width,), qkv, (width, attended), (width,), gate_up, (width, ffn)]
    return {
        "rms_norm": both(lambda x, w: backend.rms_norm(x, w, EPS), rows, (WIDTH,)),
        "add_rms_norm": both(lambda x, r, w: backend.add_rms_norm(x, r, w, EPS), rows, rows, (WIDTH,)),
        "rope_qkv": both(lambda x: backend.rope_qkv(x, table, table, KEY_HEADS),
            (1, TOKENS, HEADS + 2 * KEY_HEADS, HEAD_DIM)),
        "rope": both(lambda x: backend.rope(x[..., :HEADS, :], x[..., HEADS:, :], table, table),
            (1, TOKENS, HEADS + KEY_HEADS, HEAD_DIM)),
        "rope_cache": forward(lambda qkv, k, v: backend.rope_cache(qkv, pair, pair, k, v, ends),
            (3, 2, HEADS + 2 * KEY_HEADS, HEAD_DIM), (3, *cache), (3, *cache)),
        "attention": both(backend.attention, *heads),
        "attention with documents": both(lambda q, k, v: backend.attention(q, k, v, starts), *heads),
        "decode_attention": forward(lambda q, k, v: backend.decode_attention(q, k, v, full),
            (2, 3, HEADS, HEAD_DIM), full_cache, full_cache),
        "decode_layer": forward(decode_layer, (3, 2, width), (3, *cache), (3, *cache), *layer),
        "decode_layers": forward(decode_layers, (3, 2, width), *layer, *layer, *[(3, *cache)] * 4),
        "decode_head": forward(lambda x, norm, w: backend.decode_head(x, norm, w, EPS),
            (3, WIDTH), (WIDTH,), (101, WIDTH)),
        "decode_best": forward(lambda x, norm, w: backend.decode_best(x, norm, w, EPS),
            (3, WIDTH), (WIDTH,), (101, WIDTH)),
        "decode_inputs": forward(decode_inputs, (101, width)),
        "next_token": forward(next_token, (3, 101)),
        "swiglu": both(backend.swiglu, (TOKENS, 2 * WIDTH)),
        "mlp": both(mlp, (TOKENS, width), gate_up, (width, ffn)),
        # which want rows of whole 16 bytes
        "mlp with descriptors": both(mlp, (TOKENS, 104), (2 * 136, 104), (104, 136)),
        "tied_embedding": both(lambda weight: backend.tied_embedding(ids, weight, dtype), (101, WIDTH)),
        "adamw": adamw,
        "linear_cross_entropy": both(lambda x, w: backend.linear_cross_entropy(x, w, targets),
            (TOKENS, 96), (TOKENS + 36, 96)),
    }  # fmt: skip


def find_tool() -> str | None:
    """compute-sanitizer on the path, or in a CUDA toolkit where toolkits are."""
    toolkits = sorted(str(path) for path in Path("/usr/local").glob("cuda-*"))
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), *toolkits]
    folders = [os.environ.get("PATH", ""), *(os.path.join(home, "bin") for home in homes)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def run_operations(names: Sequence[str]) -> None:
    """What a checked process does: a line before and after each operation, so that the one that fails is
    known.
    """
    device = torch.device("cuda")
    calls = operations(select_backend("triton", device), device)
    for name in names:
        print(f"running {name}", flush=True)
        calls[name]()
        torch.cuda.synchronize()
        print(f"finished {name}", flush=True)


@dataclass
class Checked:
    """Some operations in one process under the tool."""

    ops: list[str]
    log: Path
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # the tool and what it runs
        self.process.wait()


def start(tool: str, kind: str, ops: list[str], log: Path) -> Checked:
    """Runs the operations without the tool first: that compiles the kernels into Triton's cache, where the
    slow run finds them.
    """
    plain = python("bench.memcheck", *(f"--op={op}" for op in ops))
    options = f"--tool {kind} --error-exitcode {ERRORS_FOUND} --target-processes application-only"
    checked = [tool, *options.split()]
    # a driver is asked for functions that it does not have
    checked += ["--report-api-errors", "no"] if kind == "memcheck" else []
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = f"{shlex.join(plain)} >/dev/null 2>&1; echo compiled; exec {shlex.join([*checked, *plain])}"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            ["sh", "-c", command], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stream,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    return Checked(ops, log, process)


def judge(kind: str, ops: Sequence[str], lines: list[str], code: int | None) -> dict[str, dict[str, Any]]:
    """What is known of the operations of a process. code: its exit code; None while it runs, or if it was
    stopped.

    memcheck ends a process's use of CUDA at the first error, so what has finished before is clean; of races
    one knows at the end only. A process that ends well without the tool's summary was not watched by it.
    """
    if code == 0 and not any("SUMMARY" in line for line in lines if line.startswith("=====")):
        return {op: {"result": "no result: the tool printed no summary", "report": lines[-40:]} for op in ops}
    finished = [op for op in ops if f"finished {op}" in lines]
    running = [op for op in ops if f"running {op}" in lines and op not in finished]
    known = kind == "memcheck" and (bool(running) or code != ERRORS_FOUND)
    found: dict[str, dict[str, Any]] = {op: {"result": "clean"} for op in finished if known or code == 0}
    unknown = [op for op in ops if op not in found]
    if code is None or not unknown:
        return found
    result = "errors" if code == ERRORS_FOUND else f"no result: exit code {code}"
    blamed, report = running, lines[-40:]
    if kind == "memcheck" and running:
        begin = lines.index(f"running {running[0]}")
        report = lines[begin : begin + 40]
    elif code == ERRORS_FOUND or not running:
        blamed = [op for op in unknown if op in finished or op in running] or unknown
        report = [line for line in lines if line.startswith("=====")][:40] or report
        report = [*([f"{ONE_OF} {', '.join(blamed)}"] if len(blamed) > 1 else []), *report]
    return found | {op: {"result": result, "report": report} for op in blamed}


def check(tool: str, kind: str, names: Sequence[str], part: Part, folder: Path) -> dict[str, dict[str, Any]]:
    """Runs the operations in groups; prints and saves what becomes known of each."""
    groups = len(names) if kind == "racecheck" else -(-len(names) // GROUP)
    waiting = [list(names[index::groups]) for index in range(groups)]
    running: list[Checked] = []
    results: dict[str, dict[str, Any]] = {}
    count = 0

    def learn(found: dict[str, dict[str, Any]]) -> None:
        news = {op: result for op, result in found.items() if results.get(op) != result}
        results.update(news)
        for op, result in news.items():
            print(f"{op}: {result['result']}", *result.get("report", []), sep="\n  ", flush=True)
        if news:
            part.save(results=results)

    try:
        while part.left() > 0 and (running or waiting):
            while waiting and len(running) < PROCESSES:
                running.append(start(tool, kind, waiting.pop(0), folder / f"{count}.log"))
                count += 1
            for process in list(running):
                code = process.process.poll()
                lines = process.log.read_text(encoding="utf-8", errors="replace").splitlines()
                found = judge(kind, process.ops, lines, code)
                learn(found)
                if code is not None:
                    running.remove(process)
                    rest = [op for op in process.ops if op not in found]
                    waiting += [rest] if rest else []
                    first = ["".join(result.get("report", [])[:1]) for result in found.values()]
                    if found and all(line.startswith(ONE_OF) for line in first):
                        waiting += [[op] for op in found]
            time.sleep(0.2)
    finally:
        for process in running:
            process.kill()
        learn({op: OUT_OF_TIME for op in names if op not in results})
    return results


def main(argv: Sequence[str]) -> int:
    arguments = parser("memcheck", "Runs every operation under compute-sanitizer.")
    add, kinds = arguments.add_argument, ("memcheck", "racecheck")
    add("--tool", choices=kinds, default=kinds[0], help="of compute-sanitizer (default memcheck)")
    add("--op", action="append", help="run this operation once and leave; may be repeated")
    options = arguments.parse_args(argv)
    if options.op is not None:
        run_operations(options.op)
        return 0
    part = Part(options.tool, options)
    tool = find_tool() if part.device.type == "cuda" else None
    if tool is None:
        for call in operations(select_backend("triton", part.device), part.device).values():
            call()
        part.save(skipped="compute-sanitizer is not installed" if part.device.type == "cuda" else "no GPU")
        print(f"skipped: {part.data['skipped']}")
        return part.finish()
    names = list(operations(TORCH, torch.device("cpu"))) if options.tool == "memcheck" else RACES
    with tempfile.TemporaryDirectory(prefix="memcheck-") as folder:
        check(tool, options.tool, names, part, Path(folder))
    return part.finish()


if __name__ == "__main__":
    # what runs is stopped, and what is finished stays
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run_command(main))
