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

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import LayerWeights
from smollm2.config import SmolLM2Config


class Matrix(NamedTuple):
    """A weight [N, K]: in the compute dtype, or int8 with one scale a row."""

    values: Tensor  # [N, K]
    scales: Tensor | None = None  # [N]


class StepWeights(NamedTuple):
    """All that a step reads, beyond the token and the cache."""

    cos: Tensor  # [max positions, D/2], fp32
    sin: Tensor
    embedding: Tensor  # [V, hidden]
    norm: Tensor  # [hidden]
    head: Matrix  # [V, hidden]
    layers: list[LayerWeights[Matrix]]

    def flat(self) -> list[Tensor]:
        """The tensors in a fixed order: a package takes lists of tensors only."""
        norms = [norm for layer in self.layers for norm in (layer.input_norm, layer.post_norm)]
        matrices = [self.head]
        for layer in self.layers:
            matrices += layer.qkv, layer.o, layer.gate_up, layer.down
        return [*self[:4], *norms, *(part for matrix in matrices for part in matrix if part is not None)]

    @classmethod
    def from_flat(cls, tensors: list[Tensor], layers: int, quantized: bool) -> StepWeights:
        """The inverse of `flat`."""
        rest = iter(tensors)
        cos, sin, embedding, norm = (next(rest) for _ in range(4))
        norms = [(next(rest), next(rest)) for _ in range(layers)]

        def matrices() -> Iterator[Matrix]:
            for values in rest:
                yield Matrix(values, next(rest) if quantized else None)

        following = matrices()
        head = next(following)
        blocks = [
            LayerWeights(before, next(following), next(following), after, next(following), next(following))
            for before, after in norms
        ]
        return cls(cos, sin, embedding, norm, head, blocks)


def _stored(x: Tensor) -> Tensor:
    """x, computed once. Inductor would otherwise compute it again in every row of the product that reads
    it.
    """
    return torch.as_strided(x, x.shape, x.stride())


def _times(matrix: Matrix, x: Tensor) -> Tensor:
    """matrix [N, K] @ x [K] (fp32) -> [N], fp32"""
    y = (matrix.values.float() * x).sum(-1)
    return y if matrix.scales is None else y * matrix.scales.float()


class DecodeStep(torch.nn.Module):
    """The step for the sizes of one configuration.

    dtype: that of the activations, and of the weights that are not int8. quantized: whether the matrices are
    int8.
    """

    def __init__(self, config: SmolLM2Config, dtype: torch.dtype, quantized: bool) -> None:
        super().__init__()
        self.config, self.dtype, self.quantized = config, dtype, quantized

    def forward(
        self, token: Tensor, position: Tensor, tensors: list[Tensor], keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One more token of one row.

        token, position [1] int64; tensors: StepWeights.flat(); keys, values: per layer [n, K, D], those of
        the n tokens before -> logits [V] in fp32, and this token's keys and values [layers, 2, K, D], for the
        caller to store.
        """
        weights = StepWeights.from_flat(tensors, self.config.num_hidden_layers, self.quantized)
        cos, sin = self._rotation(weights.cos[position], weights.sin[position])
        x = weights.embedding[token][0].float()
        new = []
        for layer, old_keys, old_values in zip(weights.layers, keys, values, strict=True):
            heads = self._heads(self._normed(x, layer.input_norm, layer.qkv), cos, sin)
            new.append(heads)
            x = _stored(x + _times(layer.o, self._attention(heads, old_keys, old_values)))
            gate, up = self._normed(x, layer.post_norm, layer.gate_up).chunk(2)
            x = _stored(x + _times(layer.down, _stored(gate * torch.sigmoid(gate) * up)))
        logits = self._normed(x, weights.norm, weights.head)
        first = self.config.num_attention_heads
        keys_and_values = torch.stack(new)[:, first:].to(self.dtype).unflatten(1, (2, -1))
        return logits, keys_and_values

    def _normed(self, x: Tensor, weight: Tensor, matrix: Matrix) -> Tensor:
        """x [hidden] -> matrix @ rms_norm(x) [rows], fp32. The division by the norm comes after the product:
        one pass over x, not two.
        """
        product = _times(matrix, _stored(x * weight.float()))
        return product * torch.rsqrt(x.square().mean() + self.config.rms_norm_eps)

    def _rotation(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [1, D/2] -> [H + 2K, D/2] for all heads: queries turned and scaled for the softmax, keys
        turned, values as they are. One loop for all three instead of five.
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
