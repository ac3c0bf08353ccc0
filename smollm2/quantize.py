"""The command `python -m smollm2.quantize`, which lives in smollm2/engine/quantized.py."""

import sys

from smollm2.cli import run_command
from smollm2.engine.quantized import main

if __name__ == "__main__":
    sys.exit(run_command(main))
