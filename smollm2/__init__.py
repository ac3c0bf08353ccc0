"""SmolLM2 in PyTorch: configuration, model, weights, tokenizer and generation."""

from __future__ import annotations

import os
import sys
import types

# Whether idle OpenMP threads spin or sleep is read once, when torch is imported: hence before the imports
# below. On an idle machine spinning, torch's default, makes a compiled decode step a fifth faster; beside one
# more busy program it makes it four times slower. So they sleep where the load says that processors are
# wanted. OMP_WAIT_POLICY in the environment decides otherwise.
if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import kernels  # noqa: E402

if not hasattr(kernels, "select_backend"):
    raise ImportError(
        f"`import kernels` finds {getattr(kernels, '__file__', kernels)}, not the kernels/ of this project: start from "
        "its root, or install it as a wheel (pip install .), or pip uninstall kernels"
    )

from smollm2.config import SmolLM2Config  # noqa: E402
from smollm2.generation.loop import generate  # noqa: E402
from smollm2.model import SmolLM2ForCausalLM  # noqa: E402
from smollm2.pretrained.tokenizer import load_tokenizer  # noqa: E402

__all__ = ["SmolLM2Config", "SmolLM2ForCausalLM", "generate", "load_tokenizer"]


class _Package(types.ModuleType):
    """`smollm2.generate` is the function, whichever came first: importing the command of that name would set
    it to the module.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "generate" and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
