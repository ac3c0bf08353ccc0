"""SmolLM2 in PyTorch: configuration, model, weights, tokenizer and generation."""

from __future__ import annotations

import os
import warnings

# Idle OpenMP threads sleep. By default they spin, and one more busy program on the machine then slows a small model tenfold (measured:
# 235 against 2,400 tokens/s of training on two cores). OpenMP reads this once, when torch is imported: hence before the imports below.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from smollm2.config import SmolLM2Config  # noqa: E402
from smollm2.generate import generate  # noqa: E402
from smollm2.model import SmolLM2ForCausalLM  # noqa: E402
from smollm2.tokenizer import load_tokenizer  # noqa: E402

__all__ = ["SmolLM2Config", "SmolLM2ForCausalLM", "generate", "load_tokenizer"]

# `generate` is a function here and a module for `python -m smollm2.generate`; runpy warns that it finds it imported, which is harmless.
warnings.filterwarnings("ignore", message="'smollm2.generate' found in sys.modules", category=RuntimeWarning)
