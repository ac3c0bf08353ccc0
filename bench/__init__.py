"""Measurements. `python -m bench.kernels` times the kernels; `python -m bench.gpu --out DIR` measures
everything in one command.
"""

import os
import signal
import sys

# torch's profiler, which counts memory and launches here, announces every start and end on stderr. Read when
# torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_own = any(part.removeprefix("-m").startswith(f"{__name__}.") for part in sys.orig_argv)
if _own and sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during imports: see smollm2/__init__.py

import smollm2  # noqa: E402, F401 - before anything imports torch: it says how idle threads wait
