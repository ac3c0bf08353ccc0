"""`python -m bench.roofline`: what this machine can do, measured: copy bandwidth and matrix-product rate.

Bandwidth counts bytes read and bytes written of a copy far larger than the L2. The product is 8192 x 8192 x 8192 of random numbers (zeros
run faster than data), through the library that torch uses.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from bench import timing
from bench.part import Part, parser
from smollm2.cli import run_command

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def copy_bandwidth(device: torch.device, tiny: bool) -> float:
    """Bytes per second, read plus written, of a device-to-device copy."""
    size = 1 << 20 if tiny else 1 << 30
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    replay = timing.replayable(lambda: lambda: target.copy_(source), device)
    return 2 * size / timing.alternate({"copy": replay}, device, rounds=2 if tiny else 20)["copy"].us * 1e6


def matmul_rate(dtype: torch.dtype, device: torch.device, tiny: bool) -> float:
    """Floating-point operations per second of a large square product."""
    size = 64 if tiny else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    replay = timing.replayable(lambda: lambda: a @ b, device)
    return 2 * size**3 / timing.alternate({"matmul": replay}, device, rounds=2 if tiny else 10)["matmul"].us * 1e6


def digits(value: float) -> float:
    """A rate to four digits, whatever its size."""
    return float(f"{value:.4g}")


def environment(device: torch.device) -> dict[str, Any]:
    """What the device says about itself."""
    if device.type != "cuda":
        return {"threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "capability": f"{properties.major}.{properties.minor}",
    }
    if shutil.which("nvidia-smi"):
        names = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,temperature.gpu"
        answer = subprocess.run(["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"], capture_output=True, text=True, timeout=30)
        if answer.returncode == 0:
            found.update(zip(names.split(","), (value.strip() for value in answer.stdout.splitlines()[0].split(",")), strict=True))
    return found


def main(argv: Sequence[str]) -> int:
    part = Part("roofline", parser("roofline", "Copy bandwidth and matmul rate of this machine.").parse_args(argv))
    part.save(environment=environment(part.device))
    bandwidth = copy_bandwidth(part.device, part.tiny)
    part.save(copy_gb_per_s=digits(bandwidth / 1e9))
    rates = {}
    for name, dtype in DTYPES.items():
        rates[name] = digits(matmul_rate(dtype, part.device, part.tiny) / 1e12)
        part.save(matmul_tflops=rates)
    print(f"copy {bandwidth / 1e9:,.4g} GB/s; matmul " + ", ".join(f"{name} {rate:,.4g}" for name, rate in rates.items()) + " TFLOP/s")
    return part.finish()


if __name__ == "__main__":
    sys.exit(run_command(main))
