"""One decode step on the CPU in few operations: what `backend=torch` runs when nothing is compiled.

    weights = plain_weights(model)                     # or packed_weights(model), or quantised matrices
    logits  = decode_step(model, weights, tokens, cache)

It computes what `reference.decode_layer` composes, and rounds where that rounds. For a few tokens a block has
some ten microseconds of arithmetic between its products, and the composition spends more than that on calling
torch. Here

    - positions, rotation and mask are formed once a step, not in every layer, and there is no mask where
      every key is seen;
    - the rotation is one roll and one multiply-add over queries and keys together, rows of one length are
      written to the cache as a slice, and the sums with the residual stream go into the products' results;
    - the products are oneDNN's, called directly. In fp32 torch takes another library, which reads one row's
      weights half as fast. In bf16 oneDNN reads weights in its own blocked order twice as fast as row by row,
      so a copy in that order is made at the first step.

The copy takes as much memory as the model's matrices (270 MB for 135M in bf16) and a tenth of a second, which
pays off after some fifteen tokens. All engines of a model share it. It is made anew when the weights have
changed, which a digest of their values shows (about the time of two tokens, once per text), and left out
where memory is short.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import TORCH, Backend, LayerWeights
from kernels.eager import linear as eager_linear
from kernels.eager.linear import onednn_is_faster
from kernels.products import multiplies_bf16
from smollm2.engine.cache import KVCache, free_memory
from smollm2.engine.digest import digest
from smollm2.model import SmolLM2ForCausalLM

# The operations of the backend that the step replaces: it may do so only while they are torch's own.
REPLACES = (
    "rms_norm", "add_rms_norm", "rope_qkv", "rope_cache", "decode_attention", "swiglu", "decode_inputs",
    "decode_layer", "decode_layers", "decode_head",
)  # fmt: skip
MATRICES = "qkv", "o", "gate_up", "down"
MEMORY_SHARE = 2  # a packed copy may take one part in this many of the free memory


# (x [..., K], matrix [N, K]) -> [..., N], for every form of a matrix that it knows
Linear = Callable[[Tensor, Any], Tensor]


class Weights(NamedTuple):
    """The matrices of a step, in a form that `linear` multiplies by."""

    layers: list[LayerWeights[Any]]
    head: Any
    linear: Linear

    def matrices(self) -> Iterable[Any]:
        """The head and those of every block."""
        return [self.head, *(getattr(layer, name) for layer in self.layers for name in MATRICES)]

    def changed(self, change: Callable[[Any], Any]) -> Weights:
        """The same with every matrix in another form."""
        return Weights([changed(layer, change) for layer in self.layers], change(self.head), self.linear)


def changed(layer: LayerWeights[Any], change: Callable[[Any], Any]) -> LayerWeights[Any]:
    """The weights of a block with its matrices in another form."""
    return layer._replace(**{name: change(getattr(layer, name)) for name in MATRICES})


def supports(model: SmolLM2ForCausalLM, cache: KVCache) -> bool:
    """Whether `decode_step` may run this model over this cache: on the CPU, with torch's own operations.

    Not over a fixed cache, which belongs to a captured loop: its lengths the host must not read.
    """
    return (
        cache.keys.device.type == "cpu"
        and not cache.fixed
        and not torch.compiler.is_compiling()
        and only_torch(model.backend)
    )


def only_torch(backend: Backend) -> bool:
    """Whether the operations that a step replaces are torch's own."""
    return all(getattr(backend, op) is getattr(TORCH, op) for op in REPLACES)


def plain_weights(model: SmolLM2ForCausalLM) -> Weights:
    """The model's own matrices, where they lie."""
    return Weights(model.pack(), model.lm_head.weight.detach(), linear)


_packed: weakref.WeakKeyDictionary[SmolLM2ForCausalLM, tuple[bytes, Weights]]
_packed = weakref.WeakKeyDictionary()


@torch.inference_mode()
def packed_weights(model: SmolLM2ForCausalLM) -> Weights:
    """A copy of the matrices in oneDNN's order where that is faster (bf16) and fits; else `plain_weights`.

    Made once per model and used until the value of a weight changes.
    """
    plain, known = plain_weights(model), _packed.get(model)
    useful = plain.head.dtype == torch.bfloat16 and onednn(torch.bfloat16)
    values = digest(model) if useful else b""
    if known is not None and known[0] == values:
        return known[1]
    _packed.pop(model, None)  # before the new copy is made: never two at a time
    if not useful or not fits(sum(matrix.nbytes for matrix in plain.matrices())):
        return plain
    weights = plain.changed(pack)
    _packed[model] = values, weights
    return weights


def fits(size: int) -> bool:
    """Whether a copy of that many bytes leaves most of the free memory to others."""
    free = free_memory(torch.device("cpu"))
    return free is None or MEMORY_SHARE * size <= free


def pack(matrix: Tensor) -> Tensor:
    """A copy of a matrix [N, K] in the order that oneDNN multiplies fastest by; only `linear` can read it."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix, None)  # whatever the number of rows
    return packed


@functools.cache
def onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN has the faster product: fp32 as kernels/eager/linear.py decides, bf16 where AVX-512 has
    instructions for it.
    """
    if dtype == torch.float32:
        return onednn_is_faster()
    return bool(
        dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and multiplies_bf16()
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] @ weight.T -> [..., N] for a matrix [N, K], packed or not, of the dtype of x."""
    if weight.is_mkldnn or (weight.dtype == torch.float32 and x.numel() and onednn(torch.float32)):
        product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
        return product
    return eager_linear.linear(x, weight)


@torch.inference_mode()
def decode_step(model: SmolLM2ForCausalLM, weights: Weights, tokens: Tensor, cache: KVCache) -> Tensor:
    """Appends T tokens to every row: tokens [B, T] -> logits [B, T, V] in the dtype of the model."""
    config, length = model.config, tokens.shape[1]
    cache.advance(length)
    group = config.num_attention_heads // config.num_key_value_heads
    step = _Step(cache, length, model.model.rotary(tokens.device, cache.longest), group)
    keys, values = (whole[:, :, : cache.longest].unbind() for whole in (cache.keys, cache.values))
    x = F.embedding(tokens, model.model.embed_tokens.weight)
    for layer, layer_keys, layer_values in zip(weights.layers, keys, values, strict=True):
        x = step.layer(x, layer, layer_keys, layer_values, weights.linear, config.rms_norm_eps)
    return weights.linear(_normed(x, model.model.norm.weight, config.rms_norm_eps), weights.head)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm` bit for bit. Given the weight, torch's own would scale before it rounds."""
    return F.rms_norm(x, weight.shape, None, eps) * weight


class _Step:
    """What all layers of a step share."""

    def __init__(self, cache: KVCache, length: int, tables: tuple[Tensor, Tensor], group: int) -> None:
        lengths, longest, dtype = cache.lengths, cache.longest, cache.keys.dtype
        self.length, self.group = length, group
        self.rows: Tensor | None = None  # [B, 1], with `positions`: where to write when rows differ in length
        self.mask: Tensor | None = None  # [B or 1, 1, G * T, S], added to the scores
        if all(row == longest for row in lengths.tolist()):
            self.positions = torch.arange(longest - length, longest)[None]  # [1, T]
        else:
            self.positions = lengths[:, None] - length + torch.arange(length)  # [B, T]
            self.rows = torch.arange(len(lengths))[:, None]
        if length > 1 or self.rows is not None:
            hidden = torch.arange(longest) > self.positions[..., None]  # [B or 1, T, S]
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
            self.mask = mask.repeat(1, group, 1)[:, None]
        # rotate-half as x * [cos, cos] + roll(x) * [-sin, sin], one angle for all heads
        wide = torch.promote_types(dtype, torch.float32)
        cos, sin = (table[self.positions].to(wide) for table in tables)
        # [B or 1, T, 1, D]
        self.cos, self.sin = torch.cat((cos, cos), -1)[:, :, None], torch.cat((-sin, sin), -1)[:, :, None]

    def layer(
        self, x: Tensor, weights: LayerWeights[Any], keys: Tensor, values: Tensor, linear: Linear, eps: float
    ) -> Tensor:
        """x [B, T, hidden] -> [B, T, hidden]; keys and values [B, S, K, D] receive the new tokens'."""
        key_heads, head_dim = keys.shape[2:]
        qkv = linear(_normed(x, weights.input_norm, eps), weights.qkv).view(*x.shape[:2], -1, head_dim)
        turned = qkv[:, :, :-key_heads].to(self.cos.dtype)
        turned = torch.roll(turned, head_dim // 2, -1).mul_(self.sin).addcmul_(turned, self.cos)
        self._write(keys, turned[:, :, -key_heads:])
        self._write(values, qkv[:, :, -key_heads:])
        mixed = self._attention(turned[:, :, :-key_heads].to(x.dtype), keys, values)
        x = linear(mixed, weights.o).add_(x)
        gate, up = linear(_normed(x, weights.post_norm, eps), weights.gate_up).chunk(2, -1)
        return linear(F.silu(gate).mul_(up), weights.down).add_(x)

    def _write(self, cache: Tensor, new: Tensor) -> None:
        if self.rows is None:
            cache[:, -self.length :].copy_(new)
        else:
            cache[self.rows, self.positions] = new.to(cache.dtype)

    def _attention(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`reference.decode_attention`: q [B, T, H, D] -> [B, T, H * D]."""
        batch, length, _, head_dim = q.shape
        # The G query heads of a key head become G * T queries of one head, so that each key is read once.
        folded = q.view(batch, length, -1, self.group, head_dim).permute(0, 2, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            folded.reshape(batch, -1, self.group * length, head_dim),
            keys.transpose(1, 2), values.transpose(1, 2), attn_mask=self.mask,
        )  # fmt: skip
        out = out.view(batch, -1, self.group, length, head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(batch, length, -1)
