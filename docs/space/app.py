"""What a Space of the hub runs: the folders smollm2/ and kernels/ of the repository lie beside this file."""

from smollm2.cli import run_command
from smollm2.demo import main

if __name__ == "__main__":
    raise SystemExit(run_command(main, []))
