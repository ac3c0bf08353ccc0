"""Training: `python -m train.run` trains, `python -m train.plot` draws what was logged."""

import ctypes
import os
import signal
import sys

_own = any(part.removeprefix("-m").startswith(f"{__name__}.") for part in sys.orig_argv)
if _own and sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during imports: see smollm2/__init__.py

import smollm2  # noqa: E402, F401 - before anything imports torch: it says how idle threads wait


def keep_freed_memory() -> None:
    """Makes the C library of Linux keep the memory that is freed, for the next training step.

    By default glibc returns large blocks to the system at once, and the next step gets them back page by
    page: 130,000 page faults a step of the 135M model on a CPU, a twentieth of its time. Does nothing on
    other systems, and where MALLOC_MMAP_MAX_ or MALLOC_TRIM_THRESHOLD_ is in the environment.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is handed back
