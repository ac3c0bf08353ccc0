"""SmolLM2 in PyTorch: configuration, model, weights, tokenizer and generation."""

from __future__ import annotations

import os
import warnings

# Whether idle OpenMP threads spin or sleep is read once, when torch is imported: hence before the imports below. On an idle machine
# spinning, torch's default, makes a compiled decode step a fifth faster; beside one more busy program it makes it four times slower. So
# they sleep where the load says that processors are wanted. OMP_WAIT_POLICY in the environment decides otherwise.
if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from smollm2.config import SmolLM2Config  # noqa: E402
from smollm2.generate import generate  # noqa: E402
from smollm2.model import SmolLM2ForCausalLM  # noqa: E402
from smollm2.tokenizer import load_tokenizer  # noqa: E402

__all__ = ["SmolLM2Config", "SmolLM2ForCausalLM", "generate", "load_tokenizer"]

# `generate` is a function here and a module for `python -m smollm2.generate`; runpy warns that it finds it imported, which is harmless.
warnings.filterwarnings("ignore", message="'smollm2.generate' found in sys.modules", category=RuntimeWarning)
