"""SmolLM2 in PyTorch: configuration, model, weights, tokenizer and generation."""

from __future__ import annotations

import warnings

from smollm2.config import SmolLM2Config
from smollm2.generate import generate
from smollm2.model import SmolLM2ForCausalLM
from smollm2.tokenizer import load_tokenizer

__all__ = ["SmolLM2Config", "SmolLM2ForCausalLM", "generate", "load_tokenizer"]

# `generate` is a function here and a module for `python -m smollm2.generate`; runpy warns that it finds it imported, which is harmless.
warnings.filterwarnings("ignore", message="'smollm2.generate' found in sys.modules", category=RuntimeWarning)
