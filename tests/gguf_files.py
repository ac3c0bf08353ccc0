"""Small GGUF files for tests, by gguf's own writer, and what a reader must find in them.

The permutation and the dequantisation here are loops over single rows and elements, from llama.cpp's
definitions; they share no code with smollm2/pretrained/gguf.py or with the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from smollm2 import SmolLM2Config

# Rows of a k-quant are multiples of 256.
CONFIG = SmolLM2Config(
    vocab_size=300, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=128, rope_theta=100000.0,
    initializer_range=1 / 16, bos_token_id=1, eos_token_id=2, pad_token_id=2,
)  # fmt: skip

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm",
}  # fmt: skip


def random_weights(config: SmolLM2Config = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    """Weights under Hugging Face's names, fp32, norms near one."""
    generator = torch.Generator().manual_seed(seed)
    heads, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = {
        "input_layernorm": (hidden,), "self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, heads),
        "post_attention_layernorm": (hidden,), "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    shapes = {"model.embed_tokens": (config.vocab_size, hidden), "model.norm": (hidden,)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) * 0.1 + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def gguf_name(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    if parts[1] == "layers":
        return f"blk.{parts[2]}.{NAMES['.'.join(parts[3:])]}.weight"
    return f"{NAMES['.'.join(parts)]}.weight"


def interleave_rows(weight: Tensor, heads: int) -> Tensor:
    """What llama.cpp's converter does to q and k: rows i and i + D/2 of a head become rows 2i and 2i + 1."""
    head_dim = weight.shape[0] // heads
    result = torch.empty_like(weight)
    for head in range(0, len(weight), head_dim):
        for pair in range(head_dim // 2):
            for half in range(2):
                result[head + 2 * pair + half] = weight[head + half * (head_dim // 2) + pair]
    return result


def metadata_of(config: SmolLM2Config) -> dict[str, Any]:
    return {
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_dim,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        "tokenizer.ggml.padding_token_id": config.pad_token_id,
    }


def write_gguf(
    path: Path,
    weights: Mapping[str, Tensor] | None = None,
    kind: str = "F32",
    *,
    config: SmolLM2Config = CONFIG,
    architecture: str = "llama",
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    drop: Iterable[str] = (),
) -> dict[str, np.ndarray]:
    """Writes a model; returns the raw bytes of each matrix, as rows of blocks, under GGUF's names.

    kind: type of the matrices (vectors stay F32). metadata: added to or put in place of the model's own, None
    removes a key. extra: further tensors, under GGUF's names. drop: GGUF names left out.
    """
    weights = random_weights(config) if weights is None else weights
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in {**metadata_of(config), **(metadata or {})}.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif value is not None:
            writer.add_array(key, value)
    quantisation = gguf.GGMLQuantizationType[kind]
    raw: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        target = gguf_name(name)
        if target in drop:
            continue
        if heads := {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            name.split(".")[-2]
        ):
            weight = interleave_rows(weight, heads)
        if weight.dim() == 1:
            writer.add_tensor(target, weight.numpy())
        else:
            raw[target] = encode(weight.numpy(), kind)
            writer.add_tensor(target, raw[target], raw_dtype=quantisation)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return raw


def encode(weight: np.ndarray, kind: str) -> np.ndarray:
    """Rows of a matrix in a GGUF type. k-quants, which gguf cannot write, are random with sensible scales."""
    if kind not in ("Q4_K", "Q6_K"):
        return gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
    rows, columns = weight.shape
    size, scales = (144, (0, 2)) if kind == "Q4_K" else (210, (208,))
    generator = np.random.default_rng(rows * columns)
    blocks = generator.integers(0, 256, (rows, columns // 256, size), dtype=np.uint8)
    for offset in scales:  # the fp16 scales: any bit pattern would include NaN
        scale = generator.uniform(1e-4, 1e-3, (rows, columns // 256)).astype(np.float16)
        blocks[:, :, offset : offset + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def _half(block: bytes, offset: int) -> float:
    return float(np.frombuffer(block, np.float16, 1, offset)[0])


def _decode_q8_0(block: bytes) -> list[float]:
    return [_half(block, 0) * value for value in np.frombuffer(block, np.int8, 32, 2).tolist()]


def _decode_q4_0(block: bytes) -> list[float]:
    nibbles = [byte & 15 for byte in block[2:18]] + [byte >> 4 for byte in block[2:18]]
    return [_half(block, 0) * (nibble - 8) for nibble in nibbles]


def _decode_q4_1(block: bytes) -> list[float]:
    nibbles = [byte & 15 for byte in block[4:20]] + [byte >> 4 for byte in block[4:20]]
    return [_half(block, 0) * nibble + _half(block, 2) for nibble in nibbles]


def _decode_q4_k(block: bytes) -> list[float]:
    """ggml's dequantize_row_q4_K: 8 groups of 32, their 6-bit scales and minima packed into 12 bytes."""
    scale, minimum, packed, nibbles = _half(block, 0), _half(block, 2), block[4:16], block[16:]
    values = []
    for group in range(8):
        if group < 4:
            group_scale, group_minimum = packed[group] & 63, packed[group + 4] & 63
        else:
            group_scale = (packed[group + 4] & 15) | ((packed[group - 4] >> 6) << 4)
            group_minimum = (packed[group + 4] >> 4) | ((packed[group] >> 6) << 4)
        for byte in nibbles[32 * (group // 2) : 32 * (group // 2) + 32]:
            nibble = byte >> 4 if group % 2 else byte & 15
            values.append(scale * group_scale * nibble - minimum * group_minimum)
    return values


def _decode_q6_k(block: bytes) -> list[float]:
    """ggml's dequantize_row_q6_K: 4 low bits in ql, 2 high bits in qh, 16 signed scales."""
    low, high, scale = block[:128], block[128:192], _half(block, 208)
    scales = np.frombuffer(block, np.int8, 16, 192).tolist()
    values = [0.0] * 256
    for half in range(2):
        for lane in range(32):
            bits = high[32 * half + lane]
            for quarter in range(4):
                byte = low[64 * half + lane + 32 * (quarter % 2)]
                nibble = byte & 15 if quarter < 2 else byte >> 4
                quant = (nibble | (((bits >> (2 * quarter)) & 3) << 4)) - 32
                group = scales[8 * half + 2 * quarter + lane // 16]
                values[128 * half + 32 * quarter + lane] = scale * group * quant
    return values


# bytes of a block, its decoder
_BLOCKS = dict(
    Q8_0=(34, _decode_q8_0), Q4_0=(18, _decode_q4_0), Q4_1=(20, _decode_q4_1), Q4_K=(144, _decode_q4_k),
    Q6_K=(210, _decode_q6_k),
)  # fmt: skip


def decode(raw: np.ndarray, kind: str) -> Tensor:
    """The values of a matrix from its raw rows, computed in double precision element by element."""
    if kind == "BF16":
        return torch.from_numpy(raw.copy()).view(torch.bfloat16).double()
    if kind in ("F32", "F16"):
        return torch.from_numpy(raw.copy()).double()
    size, decoder = _BLOCKS[kind]
    rows = [decoder(bytes(block)) for row in raw for block in row.reshape(-1, size)]
    return torch.tensor(rows, dtype=torch.float64).view(len(raw), -1)
