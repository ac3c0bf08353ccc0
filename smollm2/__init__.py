"""SmolLM2 in PyTorch: configuration, model, weights, tokenizer and generation."""

from __future__ import annotations

import os
import signal
import sys
import types

# `python -m smollm2.generate` takes seconds to import torch. Ctrl-C meanwhile ends it without a traceback;
# then run_command (smollm2/cli.py) takes over. Python leaves -m in sys.argv[0] until the module is found.
# Programs of others that import this package keep Python's own way.
_own = any(part.removeprefix("-m").startswith(f"{__name__}.") for part in sys.orig_argv)
if _own and sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import kernels  # noqa: E402 - before anything imports torch: it says how idle threads wait

if not hasattr(kernels, "select_backend"):
    raise ImportError(
        f"`import kernels` finds {getattr(kernels, '__file__', kernels)}, not the kernels/ of this project: "
        "start from its root, or install it as a wheel (pip install .), or pip uninstall kernels"
    )

from smollm2.config import SmolLM2Config  # noqa: E402
from smollm2.engine.select import select_engine  # noqa: E402
from smollm2.generation.batch import generate_many  # noqa: E402
from smollm2.generation.loop import generate, stream_text  # noqa: E402
from smollm2.model import SmolLM2ForCausalLM  # noqa: E402
from smollm2.pretrained.hub import push_model  # noqa: E402
from smollm2.pretrained.load import load_model, load_tokenizer, save_model  # noqa: E402
from smollm2.sampling import SamplingParams  # noqa: E402

__all__ = [
    "SamplingParams",
    "SmolLM2Config",
    "SmolLM2ForCausalLM",
    "generate",
    "generate_many",
    "load_tokenizer",
    "select_engine",
    "stream_text",
]

# The model knows no loader: the loader imports the model.
SmolLM2ForCausalLM._load, SmolLM2ForCausalLM._save = staticmethod(load_model), staticmethod(save_model)
SmolLM2ForCausalLM._push = staticmethod(push_model)


class _Package(types.ModuleType):
    """Keeps `smollm2.generate` the function: importing the command of that name would replace it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "generate" and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
