"""The tied head and its cross entropy in one operation, a chunk of tokens at a time: the logits of the whole
batch never exist.

    z = h W^T                                            matrix product in the dtype of h, a chunk of tokens
    loss = lse - (1 - e) z_t - e mean(z) + c lse^2       lse = log sum exp z;  e smoothing, c z-loss, t target
    dz = g (p (1 + 2 c lse) - (1 - e) onehot_t - e / V)  p = exp(z - lse);  g = 1 / valid tokens, or 1 (sum)
    dh = dz W,  dW += dz^T h                             two matrix products; dW is accumulated in fp32

h [N, D], W [V, D], z [n, V] for a chunk of n tokens. If `scale` is given, g is multiplied by it.

Both gradients are computed in the forward pass, while the chunk's logits exist, and scaled by every factor
known then: a training step that passes 1 / targets as `scale` has an upstream gradient of 1. The backward
pass hands the gradients over. It multiplies them in place unless the upstream gradient is 1, which the kernel
checks on the device: that saves reading and writing 264 MB (118 us on an H100). dz overwrites the chunk's
logits, in one buffer that all chunks share.

Why library products around a softmax-gradient kernel, and not one fused kernel? The products are 6 N V D FLOP
= 2.78 TFLOP at 16,384 tokens of the 135M model, 3.5 ms at 800 TFLOP/s. A fused kernel that never writes z
must compute z twice (for lse and for dz), 4.6 ms of products at the same rate, and must add dh or dW across
programs with atomics, so gradients would not be reproducible. The unfused chunk writes and reads 2 V bytes a
token five times in all: 8.1 GB, 2.7 ms at 3.0 TB/s, most of it inside products that are bound by arithmetic.
The softmax-gradient kernel itself adds one read and one write, 3.2 GB, 1.1 ms. So library products take
3.5 + 1.1 ms, and their sums are reproducible.

Two conditions must hold for memory to be the limit of this 1.1 ms. A row of 98 kB is read twice, and the
second pass should find it in L2: three programs of 16 warps a multiprocessor hold 39 MB between the two
passes on an H100 (L2: 50 MB), 32 MB on an A100 (40 MB), and the second pass runs backwards, so that it begins
with what was read last. And the arithmetic must take less time than the memory: 17 instructions a logit on
sm_90 (counted in the SASS), 2 1/8 of them exponentials; with a running maximum for each column it would be 37
and 3.

The number of tokens in a chunk is `products.tokens_per_chunk`, 5,632 on an H100 at 576 columns. Every chunk
but the first reads dW as well as writing it, 22 of 336 us there. At 4,096 tokens cuBLAS fills the 132
multiprocessors by splitting the sums of dh in two (22 x 3 tiles of 192 x 192, twice), at 778 TFLOP/s, and
adds the halves in 8 us.

Measured on an H100 at 16,384 tokens in four chunks, with the gradients scaled afterwards: 5.58 ms, 1.38 times
the products alone (4.06 ms). The products of a chunk take 352 (z), 298 (dh) and 336 us (dW), the kernel 346
us (2.3 TB/s), the cast of the weight 59 us. Halving or doubling the kernel's warps or columns changes the
whole by 3 % at most, so L2 is not its limit. Predicted for three chunks without scaling: 5.58 - 0.118 - 0.030
= 5.43 ms, 1.34 times; with `weight_copy` 5.37 ms. For 1.28 times (5.19 ms) the kernel must reach 2.8 TB/s.
More loads in flight may help: with `num_stages` above one in the launch table, blocks are prefetched
(cp.async; on sm_90 49 registers with two stages of 8,192 logits, 32 with three of 4,096). Not measured, so it
is one.

Peak extra memory at 16,384 tokens: 5,632 x 49,152 logits in 16 bits, 554 MB; dW in fp32, 113 MB; dh, 19 MB;
without `weight_copy` the weight in 16 bits, 57 MB. All logits in fp32 would be 3.2 GB. The host reads no
value back: the number of valid tokens stays on the device.

Source: Wijmans et al. 2024 (arXiv 2411.09009) for the problem; z-loss: Chowdhery et al. 2022 (arXiv
2204.02311).
Check: pytest tests -k linear_cross_entropy
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks
from kernels.launch_config import launch_config, multiprocessors, programs
from kernels.products import add_weight_gradient, tokens_per_chunk
from kernels.tracing import traceable

CHUNK_TOKENS = 4096  # in the interpreter, which has no multiprocessors to fill
RESCALED = 1024  # elements that a program multiplies at a time
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["tokens"])
def _softmax_gradient_kernel(
    logits_ptr, target_ptr, scale_ptr, loss_ptr, tokens, vocabulary, logits_stride, ignore_index,
    Z_LOSS: tl.constexpr, SMOOTHING: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, STAGES: tl.constexpr = 1,
):  # fmt: skip
    """A program owns one token: its loss and, with GRADIENT, d loss / d logits, written over its logits.
    Grid: tokens.

    Two passes over the row: maximum and sum, then the gradient. A thread loads VECTOR neighbouring logits at
    a time, so their maximum needs no other thread and their sum is rescaled once. scale_ptr points to the
    factor of all gradients. STAGES: how many blocks are loaded ahead; no block is read after it was written.
    """
    token = tl.program_id(0).to(tl.int64)
    row = logits_ptr + token * logits_stride
    target = tl.load(target_ptr + token)
    valid = target != ignore_index
    columns = tl.where(valid, vocabulary, 0)  # of a row without a target nothing is read
    # [BLOCK / VECTOR, VECTOR]
    column = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    # Loaded here because the barriers of the reductions below keep this load ahead of the other warps' stores
    # to the same row. A target out of range reads nothing and gives NaN.
    picked = tl.load(row + target, mask=valid & (target >= 0) & (target < vocabulary), other=float("nan")).to(
        tl.float32
    )

    # Each thread keeps the maximum and the sum of its own columns; they are combined once, after the loop.
    m = tl.full([BLOCK // VECTOR], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK // VECTOR], tl.float32)
    plain = tl.zeros([BLOCK // VECTOR], tl.float32)
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        inside = start + column < vocabulary
        logit = tl.load(row + start + column, mask=inside, other=float("-inf")).to(tl.float32)
        new_m = tl.maximum(m, tl.max(logit, 1))
        pivot = tl.where(new_m == float("-inf"), 0.0, new_m)
        total = total * tl.exp2((m - pivot) * LOG2_E) + tl.sum(tl.exp2((logit - pivot[:, None]) * LOG2_E), 1)
        m = new_m
        if SMOOTHING > 0:
            plain += tl.sum(tl.where(inside, logit, 0.0), 1)
    highest = tl.where(valid, tl.max(m, 0), 0.0)
    lse = highest + tl.log(tl.where(valid, tl.sum(total * tl.exp2((m - highest) * LOG2_E), 0), 1.0))
    loss = lse - (1.0 - SMOOTHING) * picked + Z_LOSS * lse * lse
    if SMOOTHING > 0:
        loss -= SMOOTHING * tl.sum(plain, 0) / vocabulary
    tl.store(loss_ptr + token, tl.where(valid, loss, 0.0))

    if GRADIENT:
        factor = tl.where(valid, tl.load(scale_ptr), 0.0)
        weight = factor * (1.0 + 2.0 * Z_LOSS * lse)
        blocks = tl.cdiv(vocabulary, BLOCK)
        for block in tl.range(0, blocks, num_stages=STAGES):
            start = (blocks - 1 - block) * BLOCK  # backwards: what was read last is still in the cache
            index = start + column
            logit = tl.load(row + index, mask=index < columns, other=float("-inf")).to(tl.float32)
            grad = tl.exp2((logit - lse) * LOG2_E) * weight
            if SMOOTHING > 0:
                grad -= factor * SMOOTHING / vocabulary
            if (target >= start) & (target < start + BLOCK):  # true for one block only
                grad -= tl.where(index == target, factor * (1.0 - SMOOTHING), 0.0)
            tl.store(row + index, grad.to(logits_ptr.dtype.element_ty), mask=index < vocabulary)


@triton.jit
def _rescale_kernel(dhidden_ptr, dweight_ptr, upstream_ptr, hidden_size, weight_size, BLOCK: tl.constexpr):
    """Multiplies both gradients by the upstream gradient; if that is 1, reads and writes nothing. The sizes
    are in elements. A program owns every grid-th block of BLOCK elements. Any grid.
    """
    upstream = tl.load(upstream_ptr)
    if upstream != 1.0:
        first, step = tl.program_id(0).to(tl.int64) * BLOCK, tl.num_programs(0) * BLOCK
        for start in range(first, hidden_size, step):
            index = start + tl.arange(0, BLOCK)
            value = tl.load(dhidden_ptr + index, mask=index < hidden_size, other=0.0).to(tl.float32)
            value = (value * upstream).to(dhidden_ptr.dtype.element_ty)
            tl.store(dhidden_ptr + index, value, mask=index < hidden_size)
        for start in range(first, weight_size, step):
            index = start + tl.arange(0, BLOCK)
            value = tl.load(dweight_ptr + index, mask=index < weight_size, other=0.0)
            tl.store(dweight_ptr + index, value * upstream, mask=index < weight_size)


def _fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | None, weight_copy: Tensor | None,
    ignore_index: int, reduction: str, z_loss: float, label_smoothing: float, needs_hidden: bool,
    needs_weight: bool, chunk_tokens: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    loss = hidden.new_empty(hidden.shape[0] if reduction == "none" else (), dtype=torch.float32)
    dweight = weight.new_empty(weight.shape if needs_weight else 0, dtype=torch.float32)
    late = loss.new_empty(() if hidden.dtype == torch.float16 else 0)
    return loss, hidden.new_empty(hidden.shape if needs_hidden else 0), dweight, late


@traceable(_fake)
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | None, weight_copy: Tensor | None,
    ignore_index: int, reduction: str, z_loss: float, label_smoothing: float, needs_hidden: bool,
    needs_weight: bool, chunk_tokens: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> loss, d loss / d hidden, d loss / d weight in fp32, and what is left to multiply these gradients by,
    a scalar, or empty if that is nothing. A gradient that is not needed is empty.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    head = weight.to(hidden.dtype) if weight_copy is None else weight_copy
    losses = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    dhidden = torch.empty(hidden.shape if needs_hidden else 0, dtype=hidden.dtype, device=hidden.device)
    dweight = torch.empty(weight.shape if needs_weight else 0, dtype=torch.float32, device=weight.device)
    if tokens == 0:
        dweight.zero_()
    factor = torch.ones((), dtype=torch.float32, device=hidden.device) if scale is None else scale
    if reduction == "mean":
        # Without a valid target the mean is 0, as the sum is.
        factor = factor / (targets != ignore_index).sum().clamp(min=1).to(torch.float32)
    early, late = factor, factor.new_empty(0)
    if hidden.dtype == torch.float16:  # p / tokens would be 0 there, before a loss scale comes from upstream
        early, late = torch.ones_like(factor), factor.clone()
    config = launch_config("linear_cross_entropy", hidden.dtype, hidden.device, vocabulary)
    chunk = chunk_tokens or CHUNK_TOKENS
    if chunk_tokens is None and hidden.is_cuda:
        chunk = tokens_per_chunk(hidden.shape[1], vocabulary, multiprocessors(hidden.device))
    buffer = torch.empty((min(tokens, chunk), vocabulary), dtype=hidden.dtype, device=hidden.device)
    for start in range(0, tokens, chunk):
        rows = hidden[start : start + chunk]
        logits = torch.mm(rows, head.t(), out=buffer[: rows.shape[0]])  # [n, V]
        _softmax_gradient_kernel[(rows.shape[0],)](
            logits, targets[start:], early, losses[start:], rows.shape[0], vocabulary, logits.stride(0),
            ignore_index, Z_LOSS=z_loss, SMOOTHING=label_smoothing, GRADIENT=needs_hidden or needs_weight,
            BLOCK=config.block_n, VECTOR=16 // logits.element_size(), STAGES=config.num_stages,
            num_warps=config.num_warps,
        )  # fmt: skip
        if needs_hidden:
            torch.mm(logits, head, out=dhidden[start : start + chunk])
        if needs_weight:
            add_weight_gradient(dweight, logits, rows, start == 0)
    return (losses if reduction == "none" else losses.sum()) * factor, dhidden, dweight, late


class _LinearCrossEntropy(torch.autograd.Function):
    """The first backward pass scales both gradients in place and hands them over. A second one (retain_graph)
    computes them again. `what`: the other arguments of the launcher.
    """

    @staticmethod
    def forward(ctx: Any, *tensors_and_what: Any) -> Tensor:
        *tensors, ctx.what = tensors_and_what
        loss, *ctx.gradients = _linear_cross_entropy(*tensors, *ctx.what)
        ctx.save_for_backward(*tensors)
        ctx.weight_dtype = tensors[1].dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        checks.first_derivative("linear_cross_entropy")
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, *gradients = _linear_cross_entropy(*ctx.saved_tensors, *ctx.what)
        dhidden, dweight, late = gradients
        dloss = dloss * late if late.numel() else dloss
        _rescale_kernel[(programs(dhidden.device),)](
            dhidden, dweight, dloss, dhidden.numel(), dweight.numel(), BLOCK=RESCALED, num_warps=4
        )
        return (
            dhidden if ctx.needs_input_grad[0] else None,
            dweight.to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None,
            None, None, None, None,
        )  # fmt: skip


class _LinearCrossEntropyTraced(torch.autograd.Function):
    """The same for torch.compile, whose graphs have no state: the gradients are saved, and the backward pass
    scales copies.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | None,
        weight_copy: Tensor | None, ignore_index: int, reduction: str, z_loss: float, label_smoothing: float,
        needs_hidden: bool, needs_weight: bool, chunk_tokens: int | None,
    ) -> Tensor:  # fmt: skip
        ctx.needs = needs_hidden, needs_weight
        loss, dhidden, dweight, late = _linear_cross_entropy(
            hidden, weight, targets, scale, weight_copy, ignore_index, reduction, z_loss, label_smoothing,
            needs_hidden, needs_weight, chunk_tokens,
        )  # fmt: skip
        ctx.save_for_backward(dhidden, dweight, late)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight, late = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs
        dloss = dloss * late if late.numel() else dloss
        return (
            (dhidden.float() * dloss).to(dhidden.dtype) if needs_hidden else None,
            (dweight * dloss).to(ctx.weight_dtype) if needs_weight else None,
            None, None, None, None, None, None, None, None, None, None,
        )  # fmt: skip


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean",
    z_loss: float = 0.0, label_smoothing: float = 0.0, scale: Tensor | None = None,
    weight_copy: Tensor | None = None, chunk_tokens: int | None = None,
) -> Tensor:  # fmt: skip
    """Cross entropy of the logits hidden @ weight.T, without the logits of the whole batch.

    hidden [N, D] (float32, float16 or bfloat16), weight [V, D] (any floating dtype; it is cast to hidden's,
    its gradient keeps its own), targets [N] integer in [0, V) or ignore_index -> fp32 scalar in nats ("mean"
    over valid targets, 0 if there is none, or "sum"), or [N] losses ("none", without a gradient). A target
    out of range gives a loss of NaN; nothing is read out of bounds.
    scale: fp32 scalar on the device that multiplies the loss and all gradients. weight_copy: the weight in
    hidden's dtype, which saves the cast. Neither has a gradient. chunk_tokens: how many tokens' logits exist
    at a time; default `products.tokens_per_chunk`. Raises ValueError naming what was expected, and
    RuntimeError for create_graph=True. Same semantics as `kernels.reference.linear_cross_entropy`.
    """
    checks.linear_cross_entropy(
        hidden, weight, targets, reduction, z_loss, label_smoothing, scale, weight_copy, chunk_tokens
    )
    checks.kernel_dtype("linear_cross_entropy", hidden)
    # Decided here, because in an autograd.Function ctx.needs_input_grad is true under no_grad too.
    trains = torch.is_grad_enabled() and reduction != "none"
    needs = trains and hidden.requires_grad, trains and weight.requires_grad
    what = (ignore_index, reduction, z_loss, label_smoothing, *needs, chunk_tokens)
    tensors = hidden, weight, targets.contiguous(), scale, weight_copy
    with torch.set_grad_enabled(trains):
        if torch.compiler.is_compiling():
            return _LinearCrossEntropyTraced.apply(*tensors, *what)
        return _LinearCrossEntropy.apply(*tensors, what)
