"""`python -m smollm2.compile` compiles the decode step of the CPU for this machine, once.

An installation that finds a C++ compiler has done so already. It takes some ten seconds, and serves every
model (smollm2/engine/compiled.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from smollm2.cli import Parser, run_command
from smollm2.engine.native import build_library, find_library


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m smollm2.compile",
        description="Compiles the decode step of the CPU for this processor, for every model and dtype. "
        "smollm2.generate uses it from then on.",
    )
    parser.add_argument("--fresh", action="store_true", help="compile again even if it is there")
    parser.add("--debug")
    args = parser.parse_args(argv)
    library = find_library()
    if library is None or args.fresh:
        build_library()
    else:
        print(f"{library} is there already; --fresh makes it anew", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
