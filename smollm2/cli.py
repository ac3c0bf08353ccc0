"""What every command line of the project shares: exit codes, one-line errors, no traceback unless asked.

Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted (Ctrl-C).
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from smollm2.errors import LoadError, UsageError

if TYPE_CHECKING:
    import torch

    from kernels import Backend

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UsageErrors: one line like any other, without the whole usage text."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from "fp32", "bf16", "fp16" or their long names; None for None and "auto" (as stored)."""
    import torch

    if dtype is None or isinstance(dtype, torch.dtype) or dtype == "auto":
        return None if isinstance(dtype, str) else dtype
    known = [name for pair in DTYPES.items() for name in pair]
    if dtype not in known:
        raise UsageError(f"dtype: expected one of auto, {', '.join(known)}, got {dtype!r}")
    found: torch.dtype = getattr(torch, DTYPES.get(dtype, dtype))
    return found


def resolve_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "mps" -> a device that is present. Raises UsageError for one that is not."""
    import torch

    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if present[kind]))
    if not present.get(name.partition(":")[0], False):
        raise UsageError(
            f"device {name!r} is not available here; present: {', '.join(kind for kind, here in present.items() if here)}"
        )
    return torch.device(name)


def resolve_backend(name: str, device: torch.device) -> Backend:
    """`select_backend` for a command line: what it refuses is wrong usage."""
    from kernels import select_backend

    try:
        return select_backend(name, device)
    except ValueError as error:
        raise UsageError(str(error)) from None


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "fp32", "bf16", "fp16", or "auto": bf16 on CUDA and on processors with instructions for it, else fp32."""
    import torch

    if name == "auto":
        return (
            torch.bfloat16
            if device.type == "cuda" or (device.type == "cpu" and _processor_has_bf16())
            else torch.float32
        )
    found = parse_dtype(name)
    assert found is not None, "auto is above"
    return found


def _processor_has_bf16() -> bool:
    """Whether products in bf16 are faster than in fp32, rather than imitated."""
    import torch

    if torch.backends.cpu.get_cpu_capability().startswith(("AVX", "DEFAULT")):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def run_command(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Runs `main(argv)` and turns exceptions into one line on stderr and an exit code.

    UsageError becomes 2, any other exception 1, Ctrl-C 130. With `--debug` among the arguments the traceback
    is shown as well. A reader that went away (`| head`) is not an error.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return main(argv)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes stdout at exit: point it somewhere that accepts the flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - the last line of defence of a command
        if "--debug" in argv:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        prefix = "" if isinstance(error, (UsageError, LoadError)) else f"{type(error).__name__}: "
        print(f"error: {prefix}{message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
