"""Bytes and floating-point operations that each operation cannot avoid, from its shapes: the floors that times are compared with.

Letters: N tokens = B rows x T, h hidden, F feed-forward, H query and K key heads of size D, V vocabulary, e bytes per element of an
activation. Every input is read once and every output written once; what a kernel saves for its backward pass counts when
it is not an output anyway. A matrix product of [N, i] by [i, o] is 2 N i o operations forward and twice that backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from smollm2.config import SmolLM2Config

# Dense bf16 tensor-core TFLOP/s as stated by the vendors, by a part of the device's name; the first match counts.
PEAK_TFLOPS = (
    ("B200", 2250), ("GB200", 2250), ("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989), ("H200", 989), ("GH200", 989),
    ("A100", 312), ("A800", 312), ("L40S", 362), ("L4", 121), ("A10G", 70), ("A10", 125), ("RTX 4090", 165), ("RTX 5090", 209),
    ("MI300X", 1307), ("MI250X", 383),
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What one pass must do."""

    bytes: int = 0
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: int) -> Work:
        return Work(self.bytes * times, self.flops * times)

    def floor(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Seconds that it takes at least, on a machine with these rates."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


@dataclass(frozen=True)
class Cost:
    """Forward and backward pass of an operation."""

    forward: Work
    backward: Work = Work()

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.forward * times, self.backward * times)


def rms_norm(tokens: int, hidden: int, size: int) -> Cost:
    """Forward 2 N h e (x, y) and 4 N (rstd); backward 3 N h e (dy, x, dx)."""
    return Cost(Work(2 * tokens * hidden * size + 4 * tokens), Work(3 * tokens * hidden * size + 4 * tokens))


def add_rms_norm(tokens: int, hidden: int, size: int) -> Cost:
    """Forward 4 N h e (x, residual, y, sum) and 4 N (rstd); backward 4 N h e (dy, dsum, sum, dx)."""
    return Cost(*[Work(4 * tokens * hidden * size + 4 * tokens)] * 2)


def rope_qkv(tokens: int, length: int, heads: int, key_heads: int, head_dim: int, size: int) -> Cost:
    """Forward 2 N (H + K) D e (the values stay where they are); backward 2 N (H + 2K) D e; 4 T D of tables each."""
    tables, head = 4 * length * head_dim, 2 * tokens * head_dim * size
    return Cost(Work(head * (heads + key_heads) + tables), Work(head * (heads + 2 * key_heads) + tables))


def attention(batch: int, length: int, heads: int, key_heads: int, head_dim: int, size: int) -> Cost:
    """Causal, half of the square: 2 B H T^2 D operations forward, 5 B H T^2 D backward.

    Forward N (2H + 2K) D e (q, k, v, out) and 4 N H (log-sum-exp); backward N (4H + 4K) D e (q, k, v, out, do, dq, dk, dv) and 4 N H.
    """
    tokens, square = batch * length, batch * heads * length * length * head_dim
    element = tokens * (heads + key_heads) * head_dim * size
    return Cost(Work(2 * element + 4 * tokens * heads, 2 * square), Work(4 * element + 4 * tokens * heads, 5 * square))


def decode_attention(batch: int, keys: int, heads: int, key_heads: int, head_dim: int, size: int) -> Cost:
    """One new query a row: 2 B S K D e of cache, and q and out; 4 B H S D operations. No backward pass."""
    return Cost(Work(2 * batch * (keys * key_heads + heads) * head_dim * size, 4 * batch * heads * keys * head_dim))


def swiglu(tokens: int, width: int, size: int) -> Cost:
    """Forward 3 N F e (gate, up, y); backward 5 N F e (dy, gate, up, dgate, dup)."""
    return Cost(Work(3 * tokens * width * size), Work(5 * tokens * width * size))


def linear_cross_entropy(tokens: int, vocabulary: int, hidden: int, size: int) -> Cost:
    """Forward 2 N V h operations, backward 4; N h e of hidden states and 4 V h of fp32 weights, then the same of gradients."""
    moved, product = tokens * hidden * size + 4 * vocabulary * hidden, 2 * tokens * vocabulary * hidden
    return Cost(Work(moved, product), Work(moved, 2 * product))


def linear(tokens: int, inputs: int, outputs: int, size: int) -> Cost:
    """Forward e (N i + i o + N o); backward e (N o + i o + N i) for the input's and e (N o + N i + i o) for the weight's gradient."""
    moved, product = size * (tokens * inputs + inputs * outputs + tokens * outputs), 2 * tokens * inputs * outputs
    return Cost(Work(moved, product), Work(2 * moved, 2 * product))


def layer(config: SmolLM2Config, batch: int, length: int, size: int) -> dict[str, Cost]:
    """The operations of one block, in order."""
    tokens, hidden, width = batch * length, config.hidden_size, config.intermediate_size
    heads, key_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return {
        "add_rms_norm (2)": add_rms_norm(tokens, hidden, size) * 2,
        "qkv projection": linear(tokens, hidden, (heads + 2 * key_heads) * head_dim, size),
        "rope_qkv": rope_qkv(tokens, length, heads, key_heads, head_dim, size),
        "attention": attention(batch, length, heads, key_heads, head_dim, size),
        "output projection": linear(tokens, heads * head_dim, hidden, size),
        "gate and up projection": linear(tokens, hidden, 2 * width, size),
        "swiglu": swiglu(tokens, width, size),
        "down projection": linear(tokens, width, hidden, size),
    }


def step(config: SmolLM2Config, batch: int, length: int, size: int) -> dict[str, Cost]:
    """A whole optimizer step, with P parameters in fp32.

    embedding: 4 N h read and N h e written, backward N h e read and 4 V h written. weights: cast to e bytes and back, (4 + e) P each way.
    optimizer (under backward): 12 P for the gradient norm and the clipping, 28 P for AdamW (p, g, m, v read; p, m, v written).
    """
    tokens, hidden, parameters = batch * length, config.hidden_size, config.num_parameters()
    layers = sum(layer(config, batch, length, size).values(), Cost(Work())) * config.num_hidden_layers
    return {
        "layers": layers,
        "embedding": Cost(Work(tokens * hidden * (4 + size)), Work(tokens * hidden * size + 4 * config.vocab_size * hidden)),
        "final norm": rms_norm(tokens, hidden, size),
        "loss": linear_cross_entropy(tokens, config.vocab_size, hidden, size),
        "weights": Cost(*[Work((4 + size) * parameters)] * 2),
        "optimizer": Cost(Work(), Work(40 * parameters)),
    }


def step_floor(config: SmolLM2Config, batch: int, length: int, size: int, bytes_per_second: float, flops_per_second: float) -> float:
    """Seconds of a step in which every operation runs at the roof, one after the other."""
    parts = step(config, batch, length, size)
    del parts["layers"]
    costs = [*layer(config, batch, length, size).values()] * config.num_hidden_layers + [*parts.values()]
    return sum(one.floor(bytes_per_second, flops_per_second) for cost in costs for one in (cost.forward, cost.backward))


def flops_per_token(config: SmolLM2Config, length: int) -> float:
    """Floating-point operations to train on one token of rows of that length, by the convention of MFU.

    6 for each weight that multiplies (the tied matrix once: the embedding is a look-up; norms are left out), and 6 x layers x H x D x T
    for attention: causal, so half of the square is counted.
    """
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    attended = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    return 6.0 * (config.num_parameters() - norms) + attended


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of a device, or None when the table does not have it: a wrong MFU is worse than none."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOPS if part in name), None)
