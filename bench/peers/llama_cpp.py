"""llama.cpp on a GGUF file that is written from our weights: its generation, and its own server."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.peers.status import NotInstalled, require
from bench.variant import Variant
from smollm2.config import SmolLM2Config
from smollm2.engine.cache import cache_bytes
from smollm2.errors import UsageError
from smollm2.model import SmolLM2ForCausalLM
from smollm2.pretrained.cache import cache_folder
from smollm2.pretrained.gguf_writer import save_gguf
from smollm2.pretrained.load import stored_tensors
from smollm2.pretrained.tokenizer import Tokenizer

N_BATCH = 512  # tokens that llama.cpp takes in one call


def gguf_file(model: SmolLM2ForCausalLM, kind: str, tokenizer: Tokenizer | None = None) -> Path:
    """The model as a GGUF file in the cache folder, written now if it is not there. kind: F16 or Q8_0.

    tokenizer: what a server needs beside the weights.
    """
    require("gguf")
    weights = stored_tensors(model)
    digest = hashlib.sha256(repr(model.config).encode())
    if tokenizer is not None:
        digest.update(f"{tokenizer.fingerprint()} {tokenizer.chat_template}".encode())
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.float().cpu().numpy().data)
    path = cache_folder() / "bench" / f"{digest.hexdigest()[:16]}.{kind}.gguf"
    if not path.is_file():
        save_gguf(model, path, kind.lower(), tokenizer)
    return path


SERVER = "llama-server"


def find_server(path: Path | None) -> tuple[str, str]:
    """(the path of llama.cpp's own server, its version). path: None looks on PATH. Raises UsageError,
    NotInstalled where there is none.
    """
    found = shutil.which(SERVER if path is None else path)
    if found is None:
        if path is None:
            raise NotInstalled(SERVER)
        raise UsageError(f"--llama-server {path}: expected a program, found none")
    said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60)
    lines = (said.stdout + said.stderr).strip().splitlines()
    line = next((line for line in lines if line.startswith("version")), "version: unknown")
    return found, line.partition(":")[2].strip()


def llama_cpp_variant(path: Path, config: SmolLM2Config, kind: str, threads: int) -> Variant:
    """llama.cpp on a GGUF file. Raises UsageError where llama-cpp-python is not installed or refuses the
    file.
    """
    require("llama-cpp-python")
    import llama_cpp

    _silence(llama_cpp)
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    if model is None:
        known = require("llama-cpp-python")
        raise UsageError(f"llama.cpp {known} does not load {path}; remove it, and it is written again")
    begin = partial(LlamaCppTurns, llama_cpp, model, config.vocab_size, threads)
    return Variant(kind, llama_cpp.llama_model_size(model), cache_bytes(config, 1, 1, torch.float16), begin)


class LlamaCppTurns:
    """One llama.cpp context with a sequence per row."""

    def __init__(
        self, library: Any, model: Any, vocabulary: int, threads: int, prompts: Tensor, new_tokens: int
    ) -> None:
        self._library, self._vocabulary = library, vocabulary
        self._prompts: list[list[int]] = prompts.tolist()
        self._position = 0
        capacity = -(-(prompts.shape[1] + new_tokens) // 256) * 256  # llama.cpp pads a sequence to that
        parameters = library.llama_context_default_params()
        parameters.n_ctx = capacity * len(self._prompts)
        parameters.n_seq_max = len(self._prompts)
        parameters.n_batch = parameters.n_ubatch = N_BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = library.llama_init_from_model(model, parameters)
        if self._context is None:
            raise UsageError(f"llama.cpp: no context of {len(self._prompts)} x {capacity} tokens")
        self._batch = library.llama_batch_init(N_BATCH, 0, 1)
        weakref.finalize(self, _free, library, self._context, self._batch)

    def prefill(self) -> Tensor:
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), False)
        length = len(self._prompts[0])
        pending: list[tuple[int, int, int, bool]] = []  # token, position, row, whether its logits are wanted
        chosen: list[int] = []
        # whole rows together where they fit, else one row in pieces
        for row, prompt in enumerate(self._prompts):
            if pending and len(pending) + length > N_BATCH:
                chosen += self._decode(pending)
                pending = []
            for position, token in enumerate(prompt):
                if len(pending) == N_BATCH:
                    chosen += self._decode(pending)
                    pending = []
                pending.append((token, position, row, position == length - 1))
        chosen += self._decode(pending)
        self._position = length
        return torch.tensor(chosen)[:, None]

    def decode(self, tokens: Tensor, steps: int) -> Tensor:
        found = [tokens[:, 0].tolist()]
        for _ in range(steps):
            last = enumerate(found[-1])
            found.append(self._decode([(token, self._position, row, True) for row, token in last]))
            self._position += 1
        return torch.tensor(found[1:]).T

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """One llama_decode -> the most likely token behind each token whose logits are wanted."""
        import numpy as np

        batch, wanted = self._batch, []
        batch.n_tokens = len(tokens)
        for index, (token, position, row, logits) in enumerate(tokens):
            batch.token[index], batch.pos[index], batch.logits[index] = token, position, logits
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
            if logits:
                wanted.append(index)
        status = self._library.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        logits_of = [self._library.llama_get_logits_ith(self._context, index) for index in wanted]
        return [int(np.ctypeslib.as_array(pointer, (self._vocabulary,)).argmax()) for pointer in logits_of]


def _free(library: Any, context: Any, batch: Any) -> None:
    library.llama_batch_free(batch)
    library.llama_free(context)


_KEPT: list[Any] = []  # C holds a pointer to the callback for as long as the process lives


def _silence(library: Any) -> None:
    """Without this llama.cpp writes a hundred lines on stderr for every context."""
    if not _KEPT:
        _KEPT.append(library.llama_log_callback(lambda level, text, data: None))
        library.llama_log_set(_KEPT[0], ctypes.c_void_p(0))
