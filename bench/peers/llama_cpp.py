"""llama.cpp on a GGUF file that is written from our weights: its generation, and its own server."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Mapping
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
from smollm2.pretrained.load import stored_tensors
from smollm2.pretrained.tokenizer import Tokenizer

N_BATCH = 512  # tokens that llama.cpp takes in one call
# Hugging Face's names outside the layers and inside (after "model.layers.N."), to GGUF's: the inverse of
# smollm2/pretrained/gguf.py.
_OUTER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


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
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
            write_gguf(Path(folder) / path.name, model.config, weights, kind, tokenizer)
            os.replace(Path(folder) / path.name, path)
    return path


def write_gguf(
    path: Path,
    config: SmolLM2Config,
    weights: Mapping[str, Tensor],
    kind: str,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes weights under Hugging Face's names as a GGUF file of the llama architecture.

    kind: type of the matrices, as `gguf.GGMLQuantizationType` names it; vectors stay F32. The head is the
    embedding, and is not stored.
    """
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    for field, value in {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "block_count": config.num_hidden_layers,
        "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads,
        "key_length": config.head_dim, "value_length": config.head_dim,
        "rope_dimension_count": config.head_dim, "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": config.rope_theta, "vocab_size": config.vocab_size,
        **({"tokenizer_model": "no_vocab"} if tokenizer is None else vocabulary(config, tokenizer)),
    }.items():  # fmt: skip
        getattr(writer, f"add_{field}")(value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    quantisation = gguf.GGMLQuantizationType[kind]
    for name, weight in weights.items():
        values = weight.float().cpu()
        projection = name.removesuffix(".weight").rpartition(".")[2]
        if projection in heads:
            values = interleave_rows(values, heads[projection])
        if values.dim() == 1:
            writer.add_tensor(gguf_name(name), values.numpy())
        else:
            packed = gguf.quants.quantize(values.numpy(), quantisation)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=quantisation)
    for part in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{part}_to_file")()
    writer.close()


def vocabulary(config: SmolLM2Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a GGUF file says of a tokenizer that cuts texts as SmolLM2's, by the names of GGUFWriter's
    methods.
    """
    import gguf

    parts, kinds = json.loads(tokenizer.to_json()), gguf.TokenType
    tokens = [f"[unused {token_id}]" for token_id in range(config.vocab_size)]
    types = [kinds.UNUSED] * config.vocab_size
    known = [(token, token_id, kinds.NORMAL) for token, token_id in parts["model"]["vocab"].items()]
    for token in parts["added_tokens"]:
        kind = kinds.CONTROL if token["special"] else kinds.USER_DEFINED
        known.append((token["content"], token["id"], kind))
    for token, token_id, kind in known:
        tokens[token_id], types[token_id] = token, kind
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in parts["model"]["merges"]]
    found = {
        "tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "token_list": tokens, "token_types": types,
        "token_merges": [" ".join(pair) for pair in pairs], "add_bos_token": False,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "chat_template": tokenizer.chat_template,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def gguf_name(name: str) -> str:
    """model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight"""
    stem = name.removesuffix(".weight")
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.weight"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[inner]}.weight"


def interleave_rows(weight: Tensor, heads: int) -> Tensor:
    """Rows i and i + D/2 of each head become rows 2i and 2i + 1, the pairs that llama.cpp rotates. weight
    [heads D, hidden].
    """
    halves = weight.unflatten(0, (heads, 2, -1))  # [heads, first or second of the pair, pair, hidden]
    return halves.transpose(1, 2).reshape(weight.shape)


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
