"""`python -m bench.memcheck`: every operation, forward and backward, under compute-sanitizer's memory checker.

Shapes are odd on purpose: rows that do not fill a tile, documents, strided slices of packed buffers. Each tensor has an allocation of its
own (no caching allocator), so that an access one element beyond it is seen. Skipped, and said so, where the tool is not installed.
`--op NAME` is the process that is checked: it runs one operation and prints nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from bench.part import ROOT, Part, parser
from kernels import Backend, LayerWeights, select_backend
from smollm2.cli import run_command

TOKENS, HEADS, KEY_HEADS, HEAD_DIM, WIDTH = 65, 9, 3, 64, 577
ERRORS_FOUND = 99


def operations(backend: Backend, device: torch.device) -> dict[str, Callable[[], object]]:
    """Operation -> one call on odd shapes, with gradients where it has any."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(dtype).requires_grad_()

    def both(function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> None:
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], [torch.randn_like(output) for output in outputs])

    def decode_layer() -> Tensor:
        """Two new tokens for each of three rows: the first of its row, some in between, and those that fill the cache to its end."""
        width, ffn, attended = 97, 131, HEADS * HEAD_DIM
        sizes = (width,), (attended + 2 * KEY_HEADS * HEAD_DIM, width), (width, attended), (width,), (2 * ffn, width), (width, ffn)
        lengths = torch.tensor([2, 33, TOKENS], device=device)
        x, key_cache, value_cache = (draw(3, *size).detach() for size in ((2, width), *[(TOKENS, KEY_HEADS, HEAD_DIM)] * 2))
        tables = (table[lengths[:, None] - 2 + torch.arange(2, device=device)] for _ in range(2))
        weights = LayerWeights(*(draw(*size).detach() for size in sizes))
        return backend.decode_layer(x, weights, key_cache, value_cache, lengths, *tables, eps=1e-5, ops=backend)

    table = torch.randn(TOKENS, HEAD_DIM // 2, device=device)
    starts = torch.arange(TOKENS, device=device, dtype=torch.int32)[None] // 20 * 20
    full = torch.full((2,), TOKENS, device=device)
    targets = torch.arange(TOKENS, device=device)
    heads = (TOKENS, HEADS, HEAD_DIM), (TOKENS, KEY_HEADS, HEAD_DIM), (TOKENS, KEY_HEADS, HEAD_DIM)
    return {
        "rms_norm": lambda: both(lambda x, w: backend.rms_norm(x, w, 1e-5), draw(TOKENS, WIDTH), draw(WIDTH)),
        "add_rms_norm": lambda: both(
            lambda x, r, w: backend.add_rms_norm(x, r, w, 1e-5), draw(TOKENS, WIDTH), draw(TOKENS, WIDTH), draw(WIDTH)
        ),
        "rope_qkv": lambda: both(lambda x: backend.rope_qkv(x, table, table, KEY_HEADS), draw(1, TOKENS, HEADS + 2 * KEY_HEADS, HEAD_DIM)),
        "rope": lambda: both(
            lambda x: backend.rope(x[..., :HEADS, :], x[..., HEADS:, :], table, table), draw(1, TOKENS, HEADS + KEY_HEADS, HEAD_DIM)
        ),
        "attention": lambda: both(backend.attention, *(draw(1, *size) for size in heads)),
        "attention with documents": lambda: both(lambda q, k, v: backend.attention(q, k, v, starts), *(draw(1, *size) for size in heads)),
        "decode_attention": lambda: backend.decode_attention(
            draw(2, 3, HEADS, HEAD_DIM).detach(), *(draw(2, 2 * TOKENS, KEY_HEADS, HEAD_DIM).detach() for _ in range(2)), full
        ),
        "decode_layer": decode_layer,
        "decode_head": lambda: backend.decode_head(*(draw(*size).detach() for size in ((3, WIDTH), (WIDTH,), (101, WIDTH))), 1e-5),
        "swiglu": lambda: both(backend.swiglu, draw(TOKENS, 2 * WIDTH)),
        "linear_cross_entropy": lambda: both(
            lambda x, w: backend.linear_cross_entropy(x, w, targets), draw(TOKENS, 96), draw(TOKENS + 36, 96)
        ),
    }  # fmt: skip


def find_tool() -> str | None:
    """compute-sanitizer on the path, or in the CUDA toolkit where toolkits are."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.path.join(home, "bin"))


def check(tool: str, op: str, part: Part) -> dict[str, Any]:
    """Runs one operation under the tool."""
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(ERRORS_FOUND), sys.executable, "-m", "bench.memcheck", "--op", op]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    limit = max(1.0, part.left())
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", timeout=limit)
    except subprocess.TimeoutExpired:
        return {"result": "no result: out of time"}
    report = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode == 0:
        return {"result": "clean"}
    return {"result": "errors" if done.returncode == ERRORS_FOUND else f"no result: exit code {done.returncode}", "report": report[-40:]}


def main(argv: Sequence[str]) -> int:
    arguments = parser("memcheck", "Runs every operation under compute-sanitizer.")
    arguments.add_argument("--op", help="run this operation once and leave")
    options = arguments.parse_args(argv)
    if options.op is not None:
        device = torch.device("cuda")
        operations(select_backend("triton", device), device)[options.op]()
        torch.cuda.synchronize()
        return 0
    part = Part("memcheck", options)
    calls = operations(select_backend("triton", part.device), part.device)
    tool = find_tool() if part.device.type == "cuda" else None
    for call in calls.values():  # compiles the kernels into Triton's cache, where the slow processes below find them
        call()
    if tool is None:
        part.save(skipped="compute-sanitizer is not installed" if part.device.type == "cuda" else "no GPU")
        print(f"skipped: {part.data['skipped']}")
        return part.finish()
    results: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(max_workers=4) as pool:
        futures = {op: pool.submit(check, tool, op, part) for op in calls}
        for op, future in futures.items():
            results[op] = future.result()
            print(f"{op}: {results[op]['result']}", *results[op].get("report", []), sep="\n  ", flush=True)
            part.save(results=results)
    return part.finish()


if __name__ == "__main__":
    sys.exit(run_command(main))
