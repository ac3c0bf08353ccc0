"""The tied head and its cross entropy in one operation: the logits of a chunk of tokens exist, those of the batch never do.

    z = h W^T                                            matrix product, in the dtype of h, for one chunk of tokens
    loss = lse - (1 - e) z_t - e mean(z) + c lse^2       lse = log sum exp z;  e label smoothing, c z-loss, t target
    dz = g (p (1 + 2 c lse) - (1 - e) onehot_t - e / V)  p = exp(z - lse);  g = 1 / valid tokens (mean) or 1 (sum)
    dh = dz W,  dW += dz^T h                             two matrix products; dW is accumulated in fp32

Both gradients are formed in the forward pass, while the chunk is there; the backward pass scales them by the upstream gradient.
dz overwrites the chunk of logits (a buffer of our own), so one chunk is all that is ever held.

One fused kernel, or library products around a softmax-gradient kernel? The products are 6 N V D FLOP = 2.78 TFLOP at 16,384 tokens
of the 135M model, 3.5 ms at 800 TFLOP/s. A fused kernel that never writes z must compute z twice (once for lse, once for dz), 4.6 ms of
products at the same rate, and adds up dh or dW across programs with atomics, which gives up reproducible gradients. The unfused
chunk writes and reads 2 V bytes a token four times in all: 6.4 GB, 2.1 ms at 3.0 TB/s, most of it inside products that are bound by
arithmetic. What the softmax-gradient kernel adds of its own is one read and one write, 3.2 GB, 1.1 ms. So: library products,
3.5 + 1.1 ms, with a reproducible sum.

That the memory sets this 1.1 ms takes care in two things. A row of 98 kB is read twice, and the second time should find it in L2: three
programs of 16 warps a multiprocessor keep 39 MB between their two readings on an H100 (of 50 MB), 32 MB on an A100 (of 40 MB), and the
second reading goes backwards, so that it begins with what was read last. And the arithmetic must stay below: 17 instructions a logit on
sm_90 (counted in the SASS), 2 1/8 of them exponentials; with a running maximum of each column they would be 37 and 3.

Peak extra memory at 16,384 tokens: 4096 x 49,152 logits in 16 bits, 403 MB, and dW in fp32, 113 MB; all logits in fp32 would be 3.2 GB.
No value is read back to the host: the number of valid tokens stays on the device.

Source: Wijmans et al. 2024 (arXiv 2411.09009) for the problem; z-loss: Chowdhery et al. 2022 (arXiv 2204.02311).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks
from kernels.launch_config import launch_config
from kernels.tracing import traceable

CHUNK_TOKENS = 4096
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["tokens"])
def _softmax_gradient_kernel(
    logits_ptr, target_ptr, scale_ptr, loss_ptr, tokens, vocabulary, logits_stride, ignore_index,
    Z_LOSS: tl.constexpr, SMOOTHING: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A program owns one token: its loss and, with GRADIENT, d loss / d logits in place of its logits. Grid: tokens.

    scale_ptr points to the one factor of all gradients. Two passes over the row: maximum and sum, then the gradient. VECTOR
    neighbouring logits are what a thread loads at once: their maximum needs no other thread, and their sum is rescaled once.
    """
    token = tl.program_id(0).to(tl.int64)
    row = logits_ptr + token * logits_stride
    target = tl.load(target_ptr + token)
    valid = target != ignore_index
    column = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]  # [BLOCK / VECTOR, VECTOR]
    # Read before the reductions below, whose barriers keep it ahead of the other warps' stores to the same row.
    # A target out of range reads nothing and gives NaN.
    picked = tl.load(row + target, mask=valid & (target >= 0) & (target < vocabulary), other=float("nan")).to(tl.float32)

    # Each thread keeps a maximum and a sum of its own columns; they meet once, after the loop.
    m = tl.full([BLOCK // VECTOR], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK // VECTOR], tl.float32)
    plain = tl.zeros([BLOCK // VECTOR], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + column < vocabulary
        logit = tl.load(row + start + column, mask=inside, other=float("-inf")).to(tl.float32)
        new_m = tl.maximum(m, tl.max(logit, 1))
        pivot = tl.where(new_m == float("-inf"), 0.0, new_m)
        total = total * tl.exp2((m - pivot) * LOG2_E) + tl.sum(tl.exp2((logit - pivot[:, None]) * LOG2_E), 1)
        m = new_m
        if SMOOTHING > 0:
            plain += tl.sum(tl.where(inside, logit, 0.0), 1)
    highest = tl.max(m, 0)
    lse = highest + tl.log(tl.sum(total * tl.exp2((m - highest) * LOG2_E), 0))
    loss = lse - (1.0 - SMOOTHING) * picked + Z_LOSS * lse * lse
    if SMOOTHING > 0:
        loss -= SMOOTHING * tl.sum(plain, 0) / vocabulary
    tl.store(loss_ptr + token, tl.where(valid, loss, 0.0))

    if GRADIENT:
        factor = tl.where(valid, tl.load(scale_ptr), 0.0)
        weight = factor * (1.0 + 2.0 * Z_LOSS * lse)
        blocks = tl.cdiv(vocabulary, BLOCK)
        for block in range(0, blocks):
            start = (blocks - 1 - block) * BLOCK  # backwards: what was read last is still near
            index = start + column
            logit = tl.load(row + index, mask=index < vocabulary, other=float("-inf")).to(tl.float32)
            grad = tl.exp2((logit - lse) * LOG2_E) * weight
            if SMOOTHING > 0:
                grad -= factor * SMOOTHING / vocabulary
            if (target >= start) & (target < start + BLOCK):  # one block of them all
                grad -= tl.where(index == target, factor * (1.0 - SMOOTHING), 0.0)
            tl.store(row + index, grad.to(logits_ptr.dtype.element_ty), mask=index < vocabulary)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total [V, D] in fp32 += a^T b for a [n, V], b [n, D]: 16-bit operands, fp32 accumulation. The first product is written, not added:
    what stood there is neither zeroed nor read.
    """
    beta = 0 if first else 1
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a.t(), b, beta=beta, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.t().float(), b.float(), beta=beta)


def _fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    z_loss: float,
    label_smoothing: float,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty(hidden.shape[0] if reduction == "none" else (), dtype=torch.float32)
    dweight = weight.new_empty(weight.shape if needs_weight else 0, dtype=torch.float32)
    return loss, hidden.new_empty(hidden.shape if needs_hidden else 0), dweight


@traceable(_fake)
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    z_loss: float,
    label_smoothing: float,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss, d loss / d hidden (empty if not needed), d loss / d weight in fp32 (likewise)."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    head = weight.to(hidden.dtype)
    losses = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    dhidden = torch.empty(hidden.shape if needs_hidden else 0, dtype=hidden.dtype, device=hidden.device)
    dweight = torch.empty(weight.shape if needs_weight else 0, dtype=torch.float32, device=weight.device)
    if tokens == 0:
        dweight.zero_()
    if reduction == "mean":
        # No valid target: the sum is 0, and so is the mean.
        scale = (targets != ignore_index).sum().clamp(min=1).to(torch.float32).reciprocal()
    else:
        scale = torch.ones((), dtype=torch.float32, device=hidden.device)
    config = launch_config("linear_cross_entropy", hidden.dtype, hidden.device, vocabulary)
    for start in range(0, tokens, CHUNK_TOKENS):
        rows = hidden[start : start + CHUNK_TOKENS]
        logits = rows @ head.t()  # [n, V]
        _softmax_gradient_kernel[(rows.shape[0],)](
            logits, targets[start:], scale, losses[start:], rows.shape[0], vocabulary, logits.stride(0), ignore_index,
            Z_LOSS=z_loss, SMOOTHING=label_smoothing, GRADIENT=needs_hidden or needs_weight, BLOCK=config.block_n,
            VECTOR=16 // logits.element_size(), num_warps=config.num_warps,
        )  # fmt: skip
        if needs_hidden:
            torch.mm(logits, head, out=dhidden[start : start + CHUNK_TOKENS])
        if needs_weight:
            _add_product(dweight, logits, rows, start == 0)
    return losses if reduction == "none" else losses.sum() * scale, dhidden, dweight


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        reduction: str,
        z_loss: float,
        label_smoothing: float,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> Tensor:
        ctx.needs = needs_hidden, needs_weight
        loss, dhidden, dweight = _linear_cross_entropy(
            hidden, weight, targets, ignore_index, reduction, z_loss, label_smoothing, needs_hidden, needs_weight
        )
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs
        return (
            dhidden * dloss.to(dhidden.dtype) if needs_hidden else None,
            (dweight * dloss).to(ctx.weight_dtype) if needs_weight else None,
            None, None, None, None, None, None, None,
        )  # fmt: skip


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of the logits hidden @ weight.T, without the logits.

    hidden [N, D] (float32, float16 or bfloat16), weight [V, D] (any floating dtype; it is cast to hidden's, its gradient keeps its own),
    targets [N] integer in [0, V) or ignore_index -> fp32 scalar in nats ("mean" over valid targets, 0 if there is none, or "sum"), or
    [N] losses ("none", no gradient). A target out of range gives a loss of NaN; nothing is read out of bounds.
    Raises ValueError naming what was expected. Same semantics as `kernels.reference.linear_cross_entropy`.
    """
    checks.linear_cross_entropy(hidden, weight, targets, reduction, z_loss, label_smoothing)
    checks.kernel_dtype("linear_cross_entropy", hidden)
    # Decided here: inside an autograd.Function, ctx.needs_input_grad is true under no_grad as well.
    trains = torch.is_grad_enabled() and reduction != "none"
    needs = trains and hidden.requires_grad, trains and weight.requires_grad
    with torch.set_grad_enabled(trains):
        return _LinearCrossEntropy.apply(hidden, weight, targets.contiguous(), ignore_index, reduction, z_loss, label_smoothing, *needs)
