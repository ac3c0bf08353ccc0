"""Measurements. `python -m bench.kernels` times the kernels; `python -m bench.gpu --out DIR` measures
everything in one command.
"""

import os

# torch's profiler, which counts memory and launches here, announces every start and end on stderr. Read when
# torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
