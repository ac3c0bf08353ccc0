"""The loss over a large vocabulary in PyTorch, a chunk of tokens at a time, with both gradients computed on
the way: the logits of the whole batch never exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import checks
from kernels.eager import linear
from kernels.eager.pointwise import wider
from kernels.products import weight_gradient

# Tokens whose logits exist at a time: 1024 x 49152 fp32 logits are 201 MB.
CHUNK_TOKENS = 1024
# Rows of a chunk that become probabilities together, in fp32: few enough to stay in a cache between passes.
TILE_BYTES = 6 << 20


@dataclass(frozen=True)
class _Loss:
    """The options of linear_cross_entropy, and the gradients that are needed."""

    ignore_index: int
    reduction: str
    z_loss: float
    label_smoothing: float
    needs_hidden: bool
    needs_weight: bool
    chunk_tokens: int | None

    def rows(self, logits: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        """Losses [rows] of logits [rows, V], which are overwritten: with d (sum of losses * scale) / d logits
        if a gradient is needed. One exponential per logit serves the sum and the probability.
        """
        wide = logits.to(wider(logits.dtype))
        valid = targets != self.ignore_index
        safe = torch.where(valid, targets, 0).long()[:, None]
        picked = (1.0 - self.label_smoothing) * wide.gather(1, safe).squeeze(1)
        if self.label_smoothing:
            picked = picked + self.label_smoothing * wide.mean(-1)
        highest = wide.amax(-1, keepdim=True)
        total = (p := wide.sub_(highest).exp_()).sum(-1, keepdim=True)
        lse = total.log().add_(highest).squeeze(1)
        loss = lse - picked + self.z_loss * lse.square()
        if self.needs_hidden or self.needs_weight:
            # d loss / d logits = p (1 + 2 z lse) - (1 - eps) onehot - eps / V
            factor = torch.where(valid, scale, 0.0)[:, None]
            p.mul_((1.0 + 2.0 * self.z_loss * lse)[:, None] * factor / total)
            if self.label_smoothing:
                p.sub_(factor * (self.label_smoothing / logits.shape[1]))
            p.scatter_add_(1, safe, factor * (self.label_smoothing - 1.0))
            if p is not logits:
                logits.copy_(p)
        return torch.where(valid, loss, 0.0)

    def compute(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, weight_copy: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """(loss, its gradient with respect to hidden, and to weight, and a scalar by which both gradients are
        still to be multiplied, or None).
        """
        wide, tokens = wider(hidden.dtype), hidden.shape[0]
        head = weight.to(hidden.dtype) if weight_copy is None else weight_copy
        scale = torch.ones((), dtype=wide, device=hidden.device)
        if self.reduction == "mean":  # without a valid target the mean is 0, as the sum is
            scale = scale / (targets != self.ignore_index).sum().clamp(min=1).to(wide)
        early, late = scale, None
        if hidden.dtype == torch.float16:  # p / tokens would be 0, before a loss scale comes from upstream
            early, late = torch.ones_like(scale), scale
        dhidden = dweight = None
        if self.needs_hidden:
            dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        losses = torch.empty(tokens, dtype=wide, device=hidden.device)
        size = self.chunk_tokens or CHUNK_TOKENS
        buffer = None  # for the logits of all chunks; oneDNN allocates its results itself
        if not linear.supports(hidden, head):
            buffer = hidden.new_empty(min(tokens, size), weight.shape[0])
        whole = hidden.is_cuda or torch.compiler.is_compiling()
        tile = size if whole else max(1, TILE_BYTES // (wide.itemsize * weight.shape[0]))
        for start in range(0, tokens, size):
            chunk = hidden[start : start + size]
            logits = linear.mm(chunk, head.t(), out=buffer if buffer is None else buffer[: chunk.shape[0]])
            for first in range(0, chunk.shape[0], tile):
                rows = slice(start + first, start + min(first + tile, chunk.shape[0]))
                losses[rows] = self.rows(logits[first : first + tile], targets[rows], early)
            if dhidden is not None:
                linear.mm(logits, head, out=dhidden[start : start + size])
            if self.needs_weight:
                dweight = _accumulate(dweight, logits, chunk, wider(weight.dtype))
            del logits  # before those of the next chunk are allocated
        if self.needs_weight and dweight is None:
            dweight = torch.zeros_like(weight, dtype=wider(weight.dtype))
        loss = losses if self.reduction == "none" else losses.sum() * scale
        return loss, dhidden, dweight, late


def _upstream(dloss: Tensor, *factors: Tensor | None) -> Tensor:
    """The gradient of the loss times what the gradients have not been multiplied by yet."""
    for factor in factors:
        dloss = dloss if factor is None else dloss * factor
    return dloss


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Their product in the dtype of the gradient. A loss scale of 65,536 would be infinite in fp16 itself."""
    return (gradient.to(factor.dtype) * factor).to(gradient.dtype)


def _accumulate(total: Tensor | None, dlogits: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """total + dlogits.T @ x in dtype, written into total; without a total (the first chunk) the product."""
    if total is not None and x.dtype == dtype:
        return total.addmm_(dlogits.t(), x)
    product = weight_gradient(dlogits, x, dtype)
    return product if total is None else total.add_(product)


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward pass computes both gradients, chunk by chunk, while the chunk's logits exist: three
    products in all, and no [N, V] tensor.

    The backward pass scales them in place by the upstream gradient and hands them over, because a copy of
    [V, D] would cost as much as a layer. A second backward pass (retain_graph) computes them again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | None,
        weight_copy: Tensor | None, what: _Loss,
    ) -> Tensor:  # fmt: skip
        loss, *gradients = what.compute(hidden, weight, targets, weight_copy)
        ctx.save_for_backward(hidden, weight, targets, scale, weight_copy)
        ctx.what, ctx.gradients = what, gradients
        return loss if scale is None else loss * scale

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        checks.first_derivative("linear_cross_entropy")
        hidden, weight, targets, scale, weight_copy = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, *gradients = ctx.what.compute(hidden, weight, targets, weight_copy)
        dhidden, dweight, late = gradients
        factor = _upstream(dloss, scale, late)
        # A pass over [V, D] that changes nothing is left out where looking costs no wait.
        if factor.device.type != "cpu" or float(factor) != 1.0:
            dhidden = None if dhidden is None else _scaled(dhidden, factor)
            dweight = None if dweight is None else dweight.mul_(factor)
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None, None, None


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
        what = _Loss(
            ignore_index, reduction, z_loss, label_smoothing, needs_hidden, needs_weight, chunk_tokens
        )
        loss, dhidden, dweight, late = what.compute(hidden, weight, targets, weight_copy)
        ctx.save_for_backward(dhidden, dweight, scale, late)
        ctx.weight_dtype = weight.dtype
        return loss if scale is None else loss * scale

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight, *factors = ctx.saved_tensors
        factor = _upstream(dloss, *factors)
        dhidden = None if dhidden is None else _scaled(dhidden, factor)
        dweight = None if dweight is None else (dweight * factor).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None, None, None, None, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean",
    z_loss: float = 0.0, label_smoothing: float = 0.0, scale: Tensor | None = None,
    weight_copy: Tensor | None = None, chunk_tokens: int | None = None,
) -> Tensor:  # fmt: skip
    """`reference.linear_cross_entropy`, 1024 tokens at a time unless chunk_tokens is given."""
    checks.linear_cross_entropy(
        hidden, weight, targets, reduction, z_loss, label_smoothing, scale, weight_copy, chunk_tokens
    )
    # Decided here, because in an autograd.Function ctx.needs_input_grad is true under no_grad too.
    trains = torch.is_grad_enabled() and reduction != "none"
    needs = trains and hidden.requires_grad, trains and weight.requires_grad
    what = (ignore_index, reduction, z_loss, label_smoothing, *needs, chunk_tokens)
    with torch.set_grad_enabled(trains):
        if torch.compiler.is_compiling():
            return _LinearCrossEntropyTraced.apply(hidden, weight, targets, scale, weight_copy, *what)
        return _LinearCrossEntropy.apply(hidden, weight, targets, scale, weight_copy, _Loss(*what))
