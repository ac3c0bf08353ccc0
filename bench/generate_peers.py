"""What else would run SmolLM2, for `python -m bench.generate`: transformers, litgpt and llama.cpp, from the
same weights, greedy.

    transformers ...          LlamaForCausalLM from a folder that `save_pretrained` wrote, with its DynamicCache. Forward calls in a loop:
                              what its `generate` does, without the bookkeeping around them
    transformers+static ...   the same with its StaticCache
    transformers+compile ...  StaticCache, the decode step under torch.compile, the prefill eager, as its `generate` has it
    litgpt ...                its GPT and KVCache in a process of its own (bench/litgpt_peer.py)
    llama.cpp F16, Q8_0       llama-cpp-python's C interface: one llama_decode per step for all rows, logits of the last tokens only,
                              argmax by numpy. Its defaults (flash attention as it chooses, F16 cache), at
                              most 512 tokens a call

GGUF files are written once, into the cache folder, from the weights at hand: quantised by the `gguf` package,
norms in F32. They have no tokenizer, since only ids pass.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.peers import require, standing
from smollm2.cli import parse_dtype
from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError
from smollm2.model import SmolLM2ForCausalLM
from smollm2.pretrained.cache import cache_folder
from smollm2.pretrained.load import stored_tensors

# The library behind a variant, by the first word of its name up to a "+".
LIBRARY = {
    "transformers": "transformers",
    "litgpt": "litgpt",
    "llama.cpp": "llama-cpp-python",
    "torch.compile": "torch.compile",
}
GGUF_KINDS = ("F16", "Q8_0")
N_BATCH = 512  # tokens that llama.cpp takes in one call
# Hugging Face's names outside the layers and inside (after "model.layers.N."), to GGUF's: the inverse of
# smollm2/pretrained/gguf.py.
_OUTER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


class Turns(Protocol):
    """A batch of prompts and the cache that grows behind them, greedy."""

    def prefill(self) -> Tensor:
        """Begins anew, from the prompts -> the first new token of every row [B, 1]."""
        ...

    def decode(self, tokens: Tensor, steps: int) -> Tensor:
        """Appends tokens [B, 1] and, one by one, what follows -> the tokens of those steps [B, steps]."""
        ...


@dataclass(frozen=True)
class Variant:
    """One way to generate: what it is and how much it has to read."""

    dtype: str
    weight_bytes: int  # read once for a decode step
    cache_bytes: int  # keys and values of one position of one row, all layers
    begin: Callable[[Tensor, int], Turns]  # prompts [B, T], number of new tokens


def cache_bytes(config: SmolLM2Config, element: int) -> int:
    """Bytes of one position's keys and values in all layers. element: bytes per number."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * element


def library_variant(name: str, weights: SmolLM2ForCausalLM, folder: Path, device: torch.device) -> Variant:
    """The variant of that name, of transformers, litgpt or llama.cpp. folder: the weights, saved.

    Raises UsageError, with the version and the reason, for one that cannot be had here.
    """
    kind, what = name.split()
    if kind == "llama.cpp":
        known = require("llama-cpp-python")
        if device.type != "cpu":
            raise UsageError(f"llama-cpp-python {known}: measured on the CPU; add --device cpu")
        return llama_cpp_variant(gguf_file(weights, what), weights.config, what, torch.get_num_threads())
    dtype = parse_dtype(what)
    assert dtype is not None
    if kind == "litgpt":
        from bench.litgpt_peer import litgpt_variant  # which imports this module

        return litgpt_variant(weights, dtype, device)
    extra = kind.partition("+")[2]
    return transformers_variant(folder, dtype, device, compiled=extra == "compile", static=extra == "static")


def generation_standing(outcomes: Iterable[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """`bench.peers.standing` of (variant, "" or why it was not measured); variants of this project are passed
    over.
    """
    from bench.litgpt_peer import litgpt_version

    found: dict[str, list[str]] = {library: [] for library in LIBRARY.values()}
    for name, failed in outcomes:
        library = LIBRARY.get(name.split()[0].partition("+")[0])
        if library is not None:
            found[library].append(failed)
    return standing(found, {"litgpt": litgpt_version()})


# transformers


def transformers_variant(
    folder: Path, dtype: torch.dtype, device: torch.device, *, compiled: bool, static: bool = False
) -> Variant:
    """LlamaForCausalLM with the weights in `folder`. static: with StaticCache, which a compiled step has
    anyway. Raises NotInstalled.
    """
    require("transformers")
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    llama: Any = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    llama = llama.to(device).eval()
    step = torch.compile(llama.forward, dynamic=False) if compiled else llama
    # the head is the embedding
    weights = {parameter.data_ptr(): parameter.nbytes for parameter in llama.parameters()}
    config = SmolLM2Config.from_file(folder / "config.json")
    return Variant(
        str(dtype).removeprefix("torch."), sum(weights.values()), cache_bytes(config, dtype.itemsize),
        lambda prompts, new_tokens: TransformersTurns(llama, step, static or compiled, prompts, new_tokens),
    )  # fmt: skip


class TransformersTurns:
    """Forward calls with a growing cache, or a static one. step: the model as it decodes."""

    def __init__(
        self, llama: Any, step: Callable[..., Any], static: bool, prompts: Tensor, new_tokens: int
    ) -> None:
        from transformers import StaticCache

        self._llama, self._step, self._prompts = llama, step, prompts
        self._static = (
            StaticCache(llama.config, max_cache_len=prompts.shape[1] + new_tokens) if static else None
        )
        self._cache: Any = self._static
        # of the next token, in every row
        self._position = torch.zeros(1, 1, dtype=torch.int64, device=prompts.device)

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        from transformers import DynamicCache

        if self._static is not None:
            self._static.reset()
        else:
            self._cache = DynamicCache()
        self._position.fill_(self._prompts.shape[1])
        return self._most_likely(
            self._llama(self._prompts, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        )

    @torch.inference_mode()
    def decode(self, tokens: Tensor, steps: int) -> Tensor:
        found = [tokens]
        for _ in range(steps):
            place = {} if self._static is None else {"position_ids": self._position}
            found.append(
                self._most_likely(self._step(found[-1], past_key_values=self._cache, use_cache=True, **place))
            )
            self._position += 1
        return torch.cat(found[1:], 1)

    @staticmethod
    def _most_likely(result: Any) -> Tensor:
        tokens: Tensor = result.logits[:, -1].argmax(-1, keepdim=True)
        return tokens


# llama.cpp


def gguf_file(model: SmolLM2ForCausalLM, kind: str) -> Path:
    """The model as a GGUF file in the cache folder, written now if it is not there. kind: F16 or Q8_0."""
    require("gguf")
    weights = stored_tensors(model)
    digest = hashlib.sha256(repr(model.config).encode())
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.float().cpu().numpy().data)
    path = cache_folder() / "bench" / f"{digest.hexdigest()[:16]}.{kind}.gguf"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
            write_gguf(Path(folder) / path.name, model.config, weights, kind)
            os.replace(Path(folder) / path.name, path)
    return path


def write_gguf(path: Path, config: SmolLM2Config, weights: Mapping[str, Tensor], kind: str) -> None:
    """Writes weights under Hugging Face's names as a GGUF file of the llama architecture, without a
    tokenizer.

    kind: type of the matrices, as `gguf.GGMLQuantizationType` names it; vectors stay F32. The head is the
    embedding, and is not stored.
    """
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
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
            writer.add_tensor(
                gguf_name(name), gguf.quants.quantize(values.numpy(), quantisation), raw_dtype=quantisation
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
        raise UsageError(
            f"llama.cpp {require('llama-cpp-python')} does not load {path}; remove it, and it is written again"
        )
    return Variant(
        kind, llama_cpp.llama_model_size(model), cache_bytes(config, 2), lambda prompts,
        new_tokens: LlamaCppTurns(llama_cpp, model, config.vocab_size, prompts, new_tokens, threads),
    )  # fmt: skip


class LlamaCppTurns:
    """One llama.cpp context with a sequence per row."""

    def __init__(
        self, library: Any, model: Any, vocabulary: int, prompts: Tensor, new_tokens: int, threads: int
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
            found.append(
                self._decode([(token, self._position, row, True) for row, token in enumerate(found[-1])])
            )
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
