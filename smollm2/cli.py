"""What every command line of the project shares: exit codes, one-line errors, no traceback unless asked.

Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted (Ctrl-C).
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn


class UsageError(ValueError):
    """The request cannot be met as asked: the message says what was expected, what came and what to do."""


class LoadError(RuntimeError):
    """A file or a model could not be read: the message names the file, what is wrong with it and what to do."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UsageErrors: one line like any other, without the whole usage text."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


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
