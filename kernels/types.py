"""What every backend provides: the operations of a SmolLM2 block and of a decode step, and their signatures;
the weights of a block, and the state of a generation.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D head dim, E hidden width,
F ffn width, N tokens, V vocabulary. kernels/reference.py says what each operation computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Matrix = TypeVar("Matrix")  # a Tensor, or another form of a matrix that the caller can multiply by
# In the place of a token: the row's scores are NaN or infinite. Not -1, which some files give for the pad.
NOT_FINITE = -(1 << 31)


class LayerWeights(NamedTuple, Generic[Matrix]):
    """The weights of one block, packed for inference: q, k and v as one matrix, gate and up as another."""

    input_norm: Tensor  # [E]
    qkv: Matrix  # [(H + 2K) * D, E]
    o: Matrix  # [E, H * D]
    post_norm: Tensor  # [E]
    gate_up: Matrix  # [2F, E]
    down: Matrix  # [E, F]


class TokenState(NamedTuple):
    """What a generation knows of its B rows between two decode steps, in buffers that stay where they are."""

    tokens: Tensor  # [B, 1] int64: the next to be fed
    finished: Tensor  # [B] bool
    output: Tensor  # [C, B] int64: the tokens put out, NOT_FINITE among them
    slot: Tensor  # [B] int64: where in `output` the row's next token goes


class RMSNorm(Protocol):
    """(x [..., E], weight [E]) -> [..., E]."""

    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...


class AddRMSNorm(Protocol):
    """(x, residual [..., E], weight [E]) -> (normed, sum) [..., E]."""

    def __call__(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...


class Rope(Protocol):
    """(q [B, T, H, D], k [B, T, K, D], cos and sin [T, D/2] or [B, T, D/2]) -> (q, k)."""

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]: ...


class RopeQKV(Protocol):
    """(qkv [B, T, H + 2K, D], cos and sin as in Rope) -> (q [B, T, H, D], k and v [B, T, K, D])."""

    def __call__(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, key_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class RopeCache(Protocol):
    """(qkv [B, T, H + 2K, D], cos and sin as in Rope, caches [B, S, K, D], lengths [B]) -> q [B, T, H, D].
    Writes caches.
    """

    def __call__(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor
    ) -> Tensor: ...


class Attention(Protocol):
    """(q [B, T, H, D], k and v [B, S, K, D], doc_start [B, T]) -> [B, T, H, D]."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None = None, *, dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor: ...  # fmt: skip


class DecodeAttention(Protocol):
    """(q [B, T, H, D], caches [B, S, K, D], lengths [B]) -> [B, T, H, D]."""

    def __call__(self, q: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor) -> Tensor: ...


class SwiGLU(Protocol):
    """(gate and up [..., F]), or (both in one buffer [..., 2F]) -> [..., F]."""

    def __call__(self, gate: Tensor, up: Tensor | None = None) -> Tensor: ...


class MLP(Protocol):
    """(x [..., E], gate_up [2F, E], down [E, F]) -> [..., E]."""

    def __call__(
        self, x: Tensor, gate_up: Tensor, down: Tensor, *,
        copies: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> Tensor: ...  # fmt: skip


class TiedEmbedding(Protocol):
    """(input_ids [...], weight [V, E]) -> (x [..., E] in dtype, head [V, E])."""

    def __call__(
        self, input_ids: Tensor, weight: Tensor, dtype: torch.dtype, weight_copy: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


class LinearCrossEntropy(Protocol):
    """(hidden [N, E], weight [V, E], targets [N]) -> fp32 loss, a scalar or [N]."""

    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100,
        reduction: str = "mean", z_loss: float = 0.0, label_smoothing: float = 0.0,
        scale: Tensor | None = None, weight_copy: Tensor | None = None, chunk_tokens: int | None = None,
    ) -> Tensor: ...  # fmt: skip


class DecodeLayer(Protocol):
    """(x [B, T, E], caches [B, S, K, D], lengths [B], cos, sin [B, T, D/2]) -> [B, T, E]. Writes caches."""

    def __call__(
        self, x: Tensor, weights: LayerWeights[Tensor], key_cache: Tensor, value_cache: Tensor,
        lengths: Tensor, cos: Tensor, sin: Tensor, *, eps: float, ops: Backend, dependent: bool = False,
    ) -> Tensor: ...  # fmt: skip


class DecodeLayers(Protocol):
    """decode_layer of all layers, one after the other, each with its weights and its caches."""

    def __call__(
        self, x: Tensor, layers: Sequence[LayerWeights[Tensor]], key_caches: Sequence[Tensor],
        value_caches: Sequence[Tensor], lengths: Tensor, cos: Tensor, sin: Tensor, *, eps: float,
        ops: Backend, dependent: bool = False,
    ) -> Tensor: ...  # fmt: skip


class DecodeHead(Protocol):
    """(x [..., E], norm_weight [E], head_weight [V, E]) -> fp32 logits [..., V]."""

    def __call__(
        self, x: Tensor, norm_weight: Tensor, head_weight: Tensor, eps: float, *, dependent: bool = False
    ) -> Tensor: ...  # fmt: skip


class DecodeBest(Protocol):
    """(x [R, E], norm_weight [E], head_weight [V, E], suppressed [V]) -> (scores [R, P], ids [R, P])."""

    def __call__(
        self, x: Tensor, norm_weight: Tensor, head_weight: Tensor, eps: float,
        suppressed: Tensor | None = None, *, dependent: bool = False,
    ) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip


class DecodeInputs(Protocol):
    """(tokens [B, T], embedding [V, E], lengths [B], tables [P, D/2]) -> (x [B, T, E], cos and sin
    [B, T, D/2]). Advances lengths.
    """

    def __call__(
        self, tokens: Tensor, embedding: Tensor, lengths: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class NextToken(Protocol):
    """(scores [B, P], ids [B, P], ends [N]) -> nothing. Writes state."""

    def __call__(
        self, scores: Tensor | None, ids: Tensor | None, state: TokenState, ends: Tensor, pad: int
    ) -> None: ...


@dataclass(frozen=True)
class Backend:
    """The operations of a SmolLM2 model, from the embedding to the loss and the next token, with the same
    signatures, shapes and semantics in every backend.
    """

    name: str
    rms_norm: RMSNorm
    add_rms_norm: AddRMSNorm
    rope: Rope
    rope_qkv: RopeQKV
    rope_cache: RopeCache
    attention: Attention
    decode_attention: DecodeAttention
    swiglu: SwiGLU
    tied_embedding: TiedEmbedding
    mlp: MLP
    linear_cross_entropy: LinearCrossEntropy
    decode_inputs: DecodeInputs
    decode_layer: DecodeLayer
    decode_layers: DecodeLayers
    decode_head: DecodeHead
    decode_best: DecodeBest
    next_token: NextToken
    why: str = "asked for"  # the reason for the choice, printed when a run starts
    replaced: frozenset[str] = frozenset()  # the operations that with_ops took from another backend


OPS = tuple(name for name in Backend.__annotations__ if name not in ("name", "why", "replaced"))
