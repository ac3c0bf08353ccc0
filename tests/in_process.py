"""A command of this project called in this process: a process of its own would import torch again."""

import contextlib
import io
from collections.abc import Callable, Sequence


def printed(main: Callable[[Sequence[str]], int], *arguments: object, code: int = 0) -> str:
    """What `main` writes to stdout; its exit code must be `code`."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        assert main([str(one) for one in arguments]) == code, stream.getvalue()
    return stream.getvalue()
