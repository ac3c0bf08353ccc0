"""`python -m smollm2 COMMAND` is `smollm2 COMMAND`."""

import sys

import smollm2_command

if __name__ == "__main__":
    sys.exit(smollm2_command.main("python -m smollm2"))
