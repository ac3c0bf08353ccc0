"""What a worker process runs first, in the place of the program's main module (train/data/worker_pool.py).

A worker needs only numpy and tokenizers; torch would cost it seconds of start and hundreds of megabytes. The
program's main module imports torch, and so does the package smollm2, in which train lies in a wheel. So the
packages above this one are entered as empty ones; the worker then imports its modules as usual.
"""

import sys
import types
from pathlib import Path

if __name__ == "__mp_main__":
    names = "train.data".split(".")
    for depth in range(1, len(names)):  # one package, or two where a wheel has train under another name
        package = types.ModuleType(".".join(names[:depth]))
        package.__path__ = [str(Path(__file__).parents[len(names) - depth])]
        sys.modules.setdefault(package.__name__, package)
