"""One decode step of one row as a function of tensors alone, which smollm2/engine/compiled.py compiles.

    token, position, weights, keys and values so far  ->  logits, new keys and values

At batch 1 every product is a matrix times a vector: each weight is read once and used once, so that only the
memory's speed counts. PyTorch's own bf16 products reach a third of it at this shape. Written as multiply and
sum, a product becomes a loop that Inductor turns into vector instructions, with the norm, the rotation and
the SwiGLU around it.

The weights are arguments, not constants: a package fits every model of these sizes, and the weights stay
where they are (memory-mapped). Everything between the weights and the cache is fp32; the eager step rounds to
16 bits on the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import LayerWeights
from smollm2.config import SmolLM2Config

Matrix = Tensor | tuple[Tensor, Tensor]  # [N, K] in the compute dtype; or int8, and [N] scales of its rows


def _stored(x: Tensor) -> Tensor:
    """x, computed once: Inductor would compute it again in every row of the product that reads it."""
    return torch.as_strided(x, x.shape, x.stride())


def _times(matrix: Matrix, x: Tensor) -> Tensor:
    """matrix [N, K] @ x [K] (fp32) -> [N], fp32"""
    if isinstance(matrix, Tensor):
        return (matrix.float() * x).sum(-1)
    values, scales = matrix
    return (values.float() * x).sum(-1) * scales.float()


class DecodeStep(torch.nn.Module):
    """The step for the sizes of one configuration; dtype: that of the activations."""

    def __init__(self, config: SmolLM2Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype

    def forward(
        self, token: Tensor, position: Tensor, tensors: Any, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One more token of one row.

        token, position [1] int64; tensors: the tables cos and sin [max positions, D/2] in fp32, the embedding
        [V, hidden], the last norm [hidden], the head (a Matrix) and the LayerWeights of every block, in plain
        tuples, which torch can write into a package; keys, values: per layer [n, K, D], those of the n tokens
        before -> logits [V] in fp32, and this token's keys and values [layers, 2, K, D], for the caller to
        store.
        """
        cos, sin, embedding, norm, head, layers = tensors
        cos, sin = self._rotation(cos[position], sin[position])
        x = embedding[token][0].float()
        new = []
        for weights, old_keys, old_values in zip(layers, keys, values, strict=True):
            layer: LayerWeights[Matrix] = LayerWeights(*weights)
            heads = self._heads(self._normed(x, layer.input_norm, layer.qkv), cos, sin)
            new.append(heads)
            x = _stored(x + _times(layer.o, self._attention(heads, old_keys, old_values)))
            gate, up = self._normed(x, layer.post_norm, layer.gate_up).chunk(2)
            x = _stored(x + _times(layer.down, _stored(gate * torch.sigmoid(gate) * up)))
        logits = self._normed(x, norm, head)
        first = self.config.num_attention_heads
        keys_and_values = torch.stack(new)[:, first:].to(self.dtype).unflatten(1, (2, -1))
        return logits, keys_and_values

    def _normed(self, x: Tensor, weight: Tensor, matrix: Matrix) -> Tensor:
        """x [hidden] -> matrix @ rms_norm(x) [rows], fp32.

        The division by the norm comes after the product: one pass over x, not two.
        """
        product = _times(matrix, _stored(x * weight.float()))
        return product * torch.rsqrt(x.square().mean() + self.config.rms_norm_eps)

    def _rotation(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [1, D/2] -> [H + 2K, D/2] for all heads, in one loop instead of five.

        Queries are turned and scaled for the softmax, keys are turned, values stay as they are.
        """
        config = self.config
        queries, keys = config.num_attention_heads, config.num_key_value_heads
        scale = torch.ones(queries + 2 * keys, 1)
        scale[:queries] = config.head_dim**-0.5
        turns = torch.ones(queries + 2 * keys, 1)
        turns[queries + keys :] = 0.0
        return _stored(scale * (1 + turns * (cos - 1))), _stored(scale * turns * sin)

    def _heads(self, projected: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """projected [(H + 2K) * D] -> queries, keys, values [H + 2K, D]"""
        first, second = projected.view(-1, self.config.head_dim).chunk(2, dim=-1)
        return _stored(torch.stack((first * cos - second * sin, second * cos + first * sin), 1).flatten(1))

    def _attention(self, heads: Tensor, old_keys: Tensor, old_values: Tensor) -> Tensor:
        """heads [H + 2K, D]; keys and values of the tokens before [n, K, D] -> [H * D], fp32."""
        config = self.config
        queries, key_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        q = heads[:queries].view(key_heads, -1, 1, dim)  # [K, G, 1, D]
        # [K, 1, 1, D], [K, 1, D]
        k, v = heads[queries : queries + key_heads, None, None], heads[queries + key_heads :, None]
        # [K, 1, n, D]
        old_keys, old_values = (old.float().transpose(0, 1)[:, None] for old in (old_keys, old_values))
        scores = _stored(torch.cat(((old_keys * q).sum(-1), (k * q).sum(-1)), -1))  # [K, G, n + 1]
        weights = _stored(torch.exp(scores - scores.amax(-1, keepdim=True)))
        mixed = (weights[..., :-1, None] * old_values).sum(2) + weights[..., -1:] * v  # [K, G, D]
        return _stored(mixed / weights.sum(-1, keepdim=True)).flatten()
