"""Operations of the Llama family for SmolLM2's shapes, in plain PyTorch and as Triton kernels, behind one
switch.

`kernels` is also the name of a Hugging Face distribution that transformers looks for. The version number
below keeps transformers from mistaking this package for that one.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

from kernels.waiting import choose_waiting

choose_waiting(os.environ)  # before torch is imported

from kernels.backend import TORCH, select_backend, with_ops  # noqa: E402
from kernels.types import Backend, LayerWeights  # noqa: E402

__version__ = "0.1.0"
__all__ = ["TORCH", "Backend", "LayerWeights", "check_name_clash", "select_backend", "with_ops"]


def check_name_clash() -> str | None:
    """One line with the remedy if Hugging Face's distribution `kernels` is installed too, else None.

    transformers reads that distribution's version, then imports `kernels` and, started from this project's
    root, gets this package instead: with some versions of both its import then fails, far from the cause. In
    a wheel this package is smollm2.kernels, which nobody imports by mistake.
    """
    if __name__ != "kernels":
        return None
    try:
        other = version("kernels")
    except PackageNotFoundError:
        return None
    return (
        f"the package 'kernels' {other} from Hugging Face is installed and has the import name of this "
        "project's kernels/: transformers may fail to import from here. Remedy: pip uninstall kernels"
    )
