"""Weights in 8 or 4 bits for the CPU; the activations stay as they are.

    layers, head = quantized_layers(model, "int8")     # quantised once, then memory-mapped from the cache
    y = linear(x, layers[0].qkv)                       # x [..., K] -> [..., N]

A token of generation reads every weight once, so its time is the weights' bytes: int8 halves those of bf16,
int4 quarters them. `python -m smollm2.perplexity --compare int8,int4` prints what that costs in quality.

    int8: symmetric per output row.         w ~ value * scale,                value in -127 .. 127
                                            scale = max|w| / 127
    int4: affine per 32 weights of a row.   w ~ (value - 8) * scale + zero,   value in 0 .. 15
                                            scale = (max - min) / 15

Scales are rounded to their dtype first, and the values chosen with the rounded ones, so that this rounding
adds no error of its own. The products are torch's CPU kernels `_weight_int8pack_mm` and
`_weight_int4pack_mm_for_cpu`. Norms stay in the model's dtype, and so does the embedding, of which a token
reads one row. As the output head, a fifth of all weights, the same matrix is int8 in both kinds: in int4 it
alone would cost 0.05 nats per token, the rest 0.002 (the packaged weights, which were stored in 4 bits to
begin with).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import LayerWeights, reference
from smollm2.engine import eager_step
from smollm2.engine.cache import KVCache
from smollm2.engine.digest import digest
from smollm2.engine.eager import Engine
from smollm2.engine.eager_step import MATRICES, Weights
from smollm2.errors import UsageError
from smollm2.model import SmolLM2ForCausalLM
from smollm2.pretrained.cache import cached
from smollm2.pretrained.files import WEIGHTS, read_safetensors, weight_files, weights_writer
from smollm2.pretrained.load import origin

KINDS = ("int8", "int4")
# Beyond this many rows an ordinary product of unpacked weights is faster (AVX-512: equal at 16 to 24).
INT8_KERNEL_ROWS = 16
# From here on values in bf16 in oneDNN's order are faster, although twice as many bytes.
INT8_PACKED_ROWS = 5
INT4_GROUP = 32


class Int8Weight(NamedTuple):
    """A matrix [N, K] as value * scale of the row."""

    values: Tensor  # [N, K] int8
    scales: Tensor  # [N], the dtype of the activations


class Int4Weight(NamedTuple):
    """A matrix [N, K] as (value - 8) * scale + zero, with both for every group of G weights of a row."""

    packed: Tensor  # [N, K / 2] uint8, in the order that the kernel of this CPU's instruction set reads
    scales_and_zeros: Tensor  # [K / G, N, 2], the dtype of the activations


class WideInt8Weight(NamedTuple):
    """An int8 matrix [N, K] for batches: its values in bfloat16 (exact), packed by `eager_step.pack`."""

    values: Tensor
    scales: Tensor  # [N]


QuantizedWeight = Int8Weight | Int4Weight


def quantize_rows(weight: Tensor) -> Int8Weight:
    """int8 of a matrix [N, K], scales in its dtype; a weight is off by at most half its row's scale.

    Raises UsageError for NaN and inf.
    """
    _check_matrix(weight)
    # a row of zeros stays zero
    scales = (weight.abs().amax(1).float() / 127).to(weight.dtype).clamp(min=torch.finfo(weight.dtype).tiny)
    values = (weight.float() / scales.float()[:, None]).round_().clamp_(-127, 127)
    return Int8Weight(values.to(torch.int8), scales)


def quantize_groups(weight: Tensor, group: int = INT4_GROUP) -> Int4Weight:
    """int4 of a matrix [N, K], scales and zeros in its dtype. group: weights that share a scale, 32 to 256.

    Each weight is off by at most half its scale, and by the rounding of zero (half a unit in its last place)
    where that moves the ends of the range. Raises UsageError for NaN, inf, and shapes the kernel cannot take.
    """
    _check_matrix(weight)
    rows, width = weight.shape
    if group not in (32, 64, 128, 256) or width % group or rows % 16:
        raise UsageError(
            f"int4: expected rows in multiples of 16 and columns in multiples of the group ({group}), "
            f"got [{rows}, {width}]; use int8"
        )
    grouped = weight.float().view(rows, width // group, group)
    low, high = grouped.amin(2), grouped.amax(2)
    scales = ((high - low) / 15).to(weight.dtype).clamp(min=torch.finfo(weight.dtype).tiny)
    zeros = (low + 8 * scales.float()).to(weight.dtype)
    values = ((grouped - zeros.float()[..., None]) / scales.float()[..., None]).round_().add_(8).clamp_(0, 15)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.view(rows, width).int(), 1)
    return Int4Weight(packed, torch.stack([scales, zeros], 2).transpose(0, 1).contiguous())


def dequantize(weight: QuantizedWeight) -> Tensor:
    """The matrix [N, K] that a quantised one stands for, in the dtype of its scales."""
    if isinstance(weight, Int8Weight):
        return (weight.values.float() * weight.scales.float()[:, None]).to(weight.scales.dtype)
    # By the kernel, which alone knows its order: a row of the identity picks one column, with nothing to add.
    identity = torch.eye(2 * weight.packed.shape[1], dtype=weight.scales_and_zeros.dtype)
    return linear_int4(identity, weight).t().contiguous()


def linear(x: Tensor, weight: Tensor | QuantizedWeight | WideInt8Weight) -> Tensor:
    """x [..., K] @ weight.T -> [..., N] in the dtype of x, for a plain or a quantised weight [N, K]."""
    if isinstance(weight, Int8Weight):
        return linear_int8(x, weight)
    if isinstance(weight, WideInt8Weight):
        return eager_step.linear(x, weight.values).mul_(weight.scales)
    return linear_int4(x, weight) if isinstance(weight, Int4Weight) else F.linear(x, weight)


def linear_int8(x: Tensor, weight: Int8Weight) -> Tensor:
    """x [..., K] @ weight.T -> [..., N], in the dtype of x.

    By torch's int8 kernel where it is right and fast: on the CPU, for bfloat16 and a few rows. It reads rows
    in steps of 16 and, in bfloat16, past their end where K is no multiple of that (torch 2.13: wrong results,
    or a crash). In float32 it is not vectorised. Elsewhere an ordinary product multiplies by the values,
    which every floating-point dtype holds exactly, and then come the scales.
    """
    scales = weight.scales.to(x.dtype)
    width = x.shape[-1]
    few = x.numel() <= INT8_KERNEL_ROWS * width
    if few and x.dtype == torch.bfloat16 and width % 16 == 0 and x.device.type == "cpu":
        rows = x.reshape(-1, width).contiguous()
        return torch._weight_int8pack_mm(rows, weight.values, scales).view(*x.shape[:-1], len(scales))
    return F.linear(x, weight.values.to(x.dtype)) * scales


def linear_int4(x: Tensor, weight: Int4Weight) -> Tensor:
    """x [..., K] @ weight.T -> [..., N], in the dtype of x, by the CPU kernel; fast in bfloat16."""
    width, groups = x.shape[-1], weight.scales_and_zeros.shape[0]
    rows = x.reshape(-1, width).contiguous()
    scales_and_zeros = weight.scales_and_zeros.to(x.dtype)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu(
        rows, weight.packed, width // groups, scales_and_zeros
    )
    return product.view(*x.shape[:-1], len(weight.packed))


@torch.inference_mode()
def batch_weights(few: Weights) -> Weights:
    """The weights of a decode step of INT8_PACKED_ROWS or more rows: int8 matrices as WideInt8Weight.

    That takes two bytes a weight. Where it is not faster (another processor, another dtype than bfloat16) or
    does not fit the memory, the matrices stay as they are.
    """
    size = sum(2 * matrix.values.numel() for matrix in few.matrices() if isinstance(matrix, Int8Weight))
    is_bf16 = few.head.scales.dtype == torch.bfloat16
    if not is_bf16 or not eager_step.onednn(torch.bfloat16) or not eager_step.fits(size):
        return few

    def wide(matrix: QuantizedWeight) -> QuantizedWeight | WideInt8Weight:
        if not isinstance(matrix, Int8Weight):
            return matrix
        return WideInt8Weight(eager_step.pack(matrix.values.bfloat16()), matrix.scales)

    return few.changed(wide)


class QuantizedEngine(Engine):
    """Decode steps with int8 or int4 weights, quantised anew when the model's have changed.

    Prompts use the model's own: many tokens are bound by arithmetic, of which fewer bits save none.
    """

    def __init__(self, model: SmolLM2ForCausalLM, kind: str, why: str = "") -> None:
        super().__init__(model, why)
        self.name = kind
        self._quantise()

    def renew(self) -> None:
        super().renew()
        readable = self.plain and self.model.device.type == "cpu"  # else quantising says what is wrong
        if not readable or digest(self.model) != self._digest:
            self._quantise()

    def _quantise(self) -> None:
        self.layers, self.head = quantized_layers(self.model, self.name)
        self._digest = digest(self.model)
        self.few = Weights(self.layers, self.head, linear)
        self.many: Weights | None = None  # for batches; made at the first one

    def _weights(self, rows: int) -> Weights:
        if rows < INT8_PACKED_ROWS:
            return self.few
        self.many = self.many or batch_weights(self.few)
        return self.many

    def _packed_layers(self) -> list[LayerWeights[QuantizedWeight]]:
        return self.layers

    def _blocks(
        self, layers: list[LayerWeights[Any]], x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache
    ) -> Tensor:
        backend, eps = self.model.backend, self.model.config.rms_norm_eps
        layer = partial(reference.decode_layer, eps=eps, ops=backend, linear=linear)
        for index, weights in enumerate(layers):
            x = layer(x, weights, *cache.layer(index), cache.lengths, cos, sin)
        return x

    def _logits(self, x: Tensor) -> Tensor:
        norm, eps = self.model.model.norm.weight, self.model.config.rms_norm_eps
        return linear(self.model.backend.rms_norm(x, norm, eps), self.head).float()

    def _best(self, x: Tensor, suppressed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        logits = self._logits(x)
        return logits if suppressed is None else logits.masked_fill(suppressed, -torch.inf), None


def quantized_layers(
    model: SmolLM2ForCausalLM, kind: str = "int8"
) -> tuple[list[LayerWeights[QuantizedWeight]], QuantizedWeight]:
    """The blocks of a model with their matrices quantised, and the output head.

    kind: "int8" or "int4". Scales have the dtype of the model, which should be bfloat16: that is what the
    kernels are fast in. Quantised once per source and then memory-mapped from the cache; a model that was not
    loaded, or was changed since, is quantised in memory. Raises UsageError for an unknown kind, a device
    other than the CPU, layers that are not the model's own, and widths that int4 cannot take.
    """
    if kind not in KINDS:
        raise UsageError(f"quantize: expected one of none, {', '.join(KINDS)}, got {kind!r}")
    if model.device.type != "cpu":
        raise UsageError(
            f"quantize={kind} runs on the CPU only, the model is on {model.device}; "
            "use quantize=none there, or device=cpu"
        )
    if not model.is_plain():
        raise UsageError(
            f"quantize={kind} reads the weights of the model's own layers, and some were replaced or hooked; "
            "merge or remove what was added, or use quantize=none"
        )
    layers, head = model.pack(), model.lm_head.weight.detach()

    def prepare() -> Callable[[Path], None]:
        return weights_writer(quantize_all(layers, head, kind))

    entry = None
    if source := origin(model):
        name = f"{kind}-{str(head.dtype).removeprefix('torch.')}"
        if kind == "int4":  # packed in the order of the instruction set, which torch may change
            name += f"-{torch.backends.cpu.get_cpu_capability()}-torch{torch.__version__}".lower()
        entry = cached(weight_files(source), name, prepare)
    if entry is None:
        tensors = quantize_all(layers, head, kind)
    else:
        tensors = read_safetensors(entry / WEIGHTS, head.device)
    found = []
    for index, layer in enumerate(layers):
        qkv, o, gate_up, down = (_weight(tensors, f"layers.{index}.{matrix}") for matrix in MATRICES)
        found.append(LayerWeights(layer.input_norm, qkv, o, layer.post_norm, gate_up, down))
    return found, _weight(tensors, "head")


@torch.no_grad()
def quantize_all(layers: Sequence[LayerWeights], head: Tensor, kind: str) -> dict[str, Tensor]:
    """The matrices of a model, quantised, by name: layers.0.qkv.values, layers.0.qkv.scales, ..."""
    quantize = quantize_rows if kind == "int8" else quantize_groups
    quantised: dict[str, QuantizedWeight] = {"head": quantize_rows(head)}
    for index, layer in enumerate(layers):
        quantised |= {f"layers.{index}.{matrix}": quantize(getattr(layer, matrix)) for matrix in MATRICES}
    return {
        f"{name}.{field}": tensor
        for name, weight in quantised.items()
        for field, tensor in weight._asdict().items()
    }


def _weight(tensors: dict[str, Tensor], name: str) -> QuantizedWeight:
    kind = Int8Weight if f"{name}.values" in tensors else Int4Weight
    # The int8 kernel reads whole vectors, from four rows on only at addresses that are multiples of 16 (else
    # torch 2.13 crashes). In a mapped file a tensor lies wherever those before it end.
    parts = (tensors[f"{name}.{field}"] for field in kind._fields)
    return kind(*(part.clone() if part.data_ptr() % 64 else part for part in parts))


def _check_matrix(weight: Tensor) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        found = f"{weight.dtype} {list(weight.shape)}"
        raise UsageError(f"quantize: expected a matrix of floating-point weights [N, K], got {found}")
    if not bool(weight.isfinite().all()):
        hint = "the model is damaged or its training diverged"
        raise UsageError(f"quantize: expected finite weights, got NaN or inf; {hint}")
