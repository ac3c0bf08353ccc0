"""What a worker process runs first, in the place of the program's main module (train/data/worker_pool.py).

A worker needs only numpy and tokenizers; torch would cost it seconds of start and hundreds of megabytes. The
program's main module imports torch, and so does the package smollm2, in which train lies in a wheel, and of
which a worker needs modules without torch. So it and the packages above this one are entered as empty ones;
the worker then imports its modules as usual.
"""

import sys
import types
from pathlib import Path

if __name__ == "__mp_main__":
    names = "train.data".split(".")
    root = Path(__file__).parents[len(names)]
    # one package above this, or two where a wheel has train under another name
    for parts in (["smollm2"], *(names[:depth] for depth in range(1, len(names)))):
        package = types.ModuleType(".".join(parts))
        package.__path__ = [str(root.joinpath(*parts))]
        sys.modules.setdefault(package.__name__, package)
