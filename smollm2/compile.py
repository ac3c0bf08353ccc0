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
        description="Compiles the CPU's decode step for this processor, for every model and dtype.",
    )
    parser.add_argument("--fresh", action="store_true", help="compile even if there is one")
    parser.add("--debug")
    args = parser.parse_args(argv)
    library = find_library()
    if library is None or args.fresh:
        build_library()
    else:
        print(f"{library} already exists; --fresh rebuilds it", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
