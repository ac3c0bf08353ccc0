"""Writes a model as a GGUF file, which llama.cpp and what is built on it read.

    save_gguf(model, "model.gguf", "q8_0", tokenizer)

What smollm2/pretrained/gguf.py undoes is done here: GGUF's names, and the rows of q and k in the order in
which llama.cpp rotates them. Quantisation is that of the `gguf` package. As in files by llama.cpp's own
converter the norms stay in fp32, and the head, which is the embedding, is not stored. In q4_0 and q4_1 the
embedding is stored as q8_0: it is the head too, where 4 bits cost most. llama.cpp wants Q6_K there, which the
gguf package cannot write, and takes Q8_0 itself where a row is no multiple of 256, as in the 135M model.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smollm2.config import SmolLM2Config
from smollm2.errors import LoadError, UsageError
from smollm2.model import SmolLM2ForCausalLM
from smollm2.pretrained.files import EMBEDDING, Writer, abbreviate, write_files
from smollm2.pretrained.gguf import tensor_names
from smollm2.pretrained.load import stored_tensors
from smollm2.pretrained.tokenizer import PRE_TOKENIZERS, Tokenizer

TYPES = "f16", "bf16", "q8_0", "q4_0", "q4_1", "f32"
_ENDS = "eos", "eot", "eom"  # of a text, a turn, a message: all that a GGUF file can name


def save_gguf(
    model: SmolLM2ForCausalLM,
    path: str | Path,
    kind: str = "f16",
    tokenizer: Tokenizer | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model, and its tokenizer, as one GGUF file, whole or not at all; an earlier file is replaced.

    kind and about: as for `gguf_writer`. Raises UsageError for what GGUF cannot hold, and LoadError where the
    file cannot be written.
    """
    path = Path(path)
    write = gguf_writer(model.config, stored_tensors(model), kind, tokenizer, about)
    write_files(path.parent, {path.name: write})


def gguf_writer(
    config: SmolLM2Config,
    weights: Mapping[str, Tensor],
    kind: str,
    tokenizer: Tokenizer | None = None,
    about: Mapping[str, Any] | None = None,
) -> Writer:
    """A writer for `write_files` of weights under Hugging Face's names.

    kind: of TYPES, the type of the matrices. tokenizer: without it only programs that work on ids can use the
    file. about: name, license and the like, by the names of GGUFWriter's add_ methods. Raises UsageError for
    an unknown kind, numbers beyond fp16 and tokenizers that GGUF has no name for, LoadError without `gguf`.
    """
    if kind not in TYPES:
        raise UsageError(f"type: expected one of {', '.join(TYPES)}, got {kind!r}")
    try:
        import gguf
    except ImportError:
        hint = "install it with: pip install gguf"
        raise LoadError(f"writing GGUF needs the package gguf; {hint}") from None
    if _shapes(weights) != config.parameter_shapes():
        wrong = sorted(weights.keys() ^ config.parameter_shapes().keys()) or ["other shapes"]
        hint = "merge or remove what was added to the model"
        raise UsageError(f"GGUF: expected the tensors of a plain model, got {abbreviate(wrong)}; {hint}")
    if kind not in ("f32", "bf16"):  # the others hold fp16, if only as the scale of a block
        for name, weight in weights.items():
            largest = weight.abs().max().item()
            if largest > torch.finfo(torch.float16).max:
                raise UsageError(
                    f"type {kind}: expected weights within fp16, got {largest:.3g} in {name}; take bf16"
                )
    fields = {
        "name": "model", "type": "model", **(about or {}),
        "size_label": gguf.size_label(config.num_parameters(), config.num_parameters(), 0, 0),
        "file_type": gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"],
        "quantization_version": gguf.GGML_QUANT_VERSION,
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "block_count": config.num_hidden_layers,
        "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads,
        "key_length": config.head_dim, "value_length": config.head_dim,
        "rope_dimension_count": config.head_dim, "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": config.rope_theta, "vocab_size": config.vocab_size,
        **({"tokenizer_model": "no_vocab"} if tokenizer is None else _vocabulary(config, tokenizer)),
        **_special_ids(config, tokenizer),
    }  # fmt: skip

    def write(path: Path) -> None:
        names = {hf_name: name for name, hf_name in tensor_names(config.num_hidden_layers).items()}
        writer = gguf.GGUFWriter(path, "llama")
        for field, value in fields.items():
            getattr(writer, f"add_{field}")(value)
        types = {name: _stored_as(name, weight, kind) for name, weight in weights.items()}
        for name, weight in weights.items():
            size = math.prod(gguf.quant_shape_to_byte_shape(weight.shape, types[name]))
            writer.add_tensor_info(names[name], weight.shape, np.dtype(np.float32), size, types[name])
        for part in ("header", "kv_data", "ti_data"):
            getattr(writer, f"write_{part}_to_file")()
        with contextlib.closing(writer):
            stream = (writer.fout or [])[0]
            writer.write_padding(stream, stream.tell())
            for name, weight in weights.items():
                packed = gguf.quants.quantize(_rows(name, weight, config).numpy(), types[name])
                stream.write(packed.data)  # GGUFWriter's way, tofile, does not say why it fails
                writer.write_padding(stream, packed.nbytes)

    return write


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def _stored_as(name: str, weight: Tensor, kind: str) -> Any:
    """The type of one tensor in a file of that kind, a `gguf.GGMLQuantizationType`."""
    import gguf

    types = gguf.GGMLQuantizationType
    if weight.dim() == 1:
        return types.F32
    chosen = types.Q8_0 if name == EMBEDDING and kind in ("q4_0", "q4_1") else types[kind.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[chosen]
    return types.F16 if weight.shape[1] % block else chosen  # as llama.cpp does where blocks do not fit


def _rows(name: str, weight: Tensor, config: SmolLM2Config) -> Tensor:
    """A tensor in fp32 on the CPU, its rows in llama.cpp's order: rows i and i + D/2 of each head of q and k
    become rows 2i and 2i + 1, the pairs that it rotates.
    """
    weight = weight.detach().float().cpu().contiguous()
    projection = name.removesuffix(".weight").rpartition(".")[2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(projection)
    if heads is None:
        return weight
    halves = weight.unflatten(0, (heads, 2, -1))  # [heads, first or second of the pair, pair, hidden]
    return halves.transpose(1, 2).reshape(weight.shape)


def _vocabulary(config: SmolLM2Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a GGUF file says of a tokenizer, by the names of GGUFWriter's add_ methods."""
    import gguf

    parts, kinds = json.loads(tokenizer.to_json()), gguf.TokenType
    cut = _pre_tokenizer(parts)
    if cut is None:
        expected = "a byte-level BPE that cuts texts as SmolLM2's or GPT-2's, which GGUF has names for"
        raise UsageError(f"GGUF: expected a tokenizer that is {expected}; got another: use a folder instead")
    if len(tokenizer) > config.vocab_size:
        expected = f"at most {config.vocab_size} tokens, the rows of the embedding"
        raise UsageError(f"GGUF: expected a tokenizer of {expected}, got {len(tokenizer)}")
    # The names that llama.cpp's converter gives to ids without a token.
    tokens = [f"[PAD{token_id}]" for token_id in range(config.vocab_size)]
    types = [kinds.UNUSED] * config.vocab_size
    known = [(token, token_id, kinds.NORMAL) for token, token_id in parts["model"]["vocab"].items()]
    for token in parts["added_tokens"]:
        kind = kinds.CONTROL if token["special"] else kinds.USER_DEFINED
        known.append((token["content"], token["id"], kind))
    for token, token_id, kind in known:
        tokens[token_id], types[token_id] = token, kind
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in parts["model"]["merges"]]
    found = {
        "tokenizer_model": "gpt2", "tokenizer_pre": cut, "token_list": tokens, "token_types": types,
        "token_merges": [" ".join(pair) for pair in pairs], "add_bos_token": False,
        "add_space_prefix": False, "chat_template": tokenizer.chat_templates,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def _pre_tokenizer(parts: Mapping[str, Any]) -> str | None:
    """GGUF's name of the way in which a tokenizer.json with these parts cuts a text; None for any other."""

    def steps(part: Any) -> Any:
        """Without trim_offsets, which changes no token."""
        if not isinstance(part, dict):
            return part
        inner = [steps(one) for one in part.get("pretokenizers", ())]
        return {**part, "trim_offsets": None, "pretokenizers": inner}

    if parts["model"]["type"] != "BPE" or parts["normalizer"] is not None:
        return None
    made = {name: json.loads(make().__getstate__()) for name, make in PRE_TOKENIZERS.items()}
    return next((name for name, known in made.items() if steps(known) == steps(parts["pre_tokenizer"])), None)


def _special_ids(config: SmolLM2Config, tokenizer: Tokenizer | None) -> dict[str, int]:
    """The ids of special tokens: the tokenizer's, else the configuration's. Every id that ends a text has one
    of the roles at which llama.cpp ends, as far as there are roles.
    """
    ids = {"bos": config.bos_token_id, "pad": config.pad_token_id}
    if tokenizer is not None:
        found = {role: tokenizer.role_id(f"{role}_token") for role in ("bos", "pad", "unk", *_ENDS)}
        ids |= {role: token_id for role, token_id in found.items() if token_id is not None}
    ends = [end for end in config.eos_token_ids if end not in (ids.get(role) for role in _ENDS)]
    ids |= zip((role for role in _ENDS if role not in ids), ends, strict=False)
    return {f"{role}_token_id": token for role, token in ids.items() if token is not None and token >= 0}
