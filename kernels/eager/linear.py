"""Matrix products: fp32 on a CPU by oneDNN where that is faster than MKL, and 16-bit activations with fp32
master weights.

torch's own fp32 products use MKL, which does not use its AVX-512 kernels on AMD processors. GFLOP/s on two
cores of an EPYC 9004 (Zen 4), torch 2.13, where the limit is 237:

    [rows, 576] @ [576, N]      rows 1024: N = 3072    N = 49152       rows 16: N = 3072    N = 49152
    MKL                                         183          145                      97           47
    oneDNN                                      211          172                     115           96

In a training step, where caches are cold, the difference is larger. At one row MKL's matrix-vector product is
faster; gradients of weights, g.T @ x, are as fast in MKL. In 16 bits torch uses oneDNN by itself, where the
processor has instructions for them; elsewhere (kernels/products.py) these products are fp32 ones, rounded.

oneDNN is called through the operator that Inductor uses. A 1x1 convolution over channels_last is the public
way to the same library, but selects another algorithm, which is no faster than MKL below 512 rows.

The processor decides the library, never a timing: two processes on one machine give the same bits, which an
exact resume needs. `torch.backends.mkldnn.flags(enabled=False)` turns oneDNN off.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import checks
from kernels.eager import pointwise
from kernels.products import faster_in_fp32, processor_vendor, weight_gradient
from kernels.types import SwiGLU

ROWS = 2  # rows of the left factor from which oneDNN is faster


@functools.cache
def onednn_is_faster() -> bool:
    """Whether torch has both libraries here, on a processor where oneDNN was measured to be faster."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    is_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (both and is_avx512 and processor_vendor() == "AuthenticAMD"):
        return False
    one = torch.ones(2, 2)
    try:  # the operator is private and may differ in another version of torch
        return torch.equal(_onednn(one, one), one + one)
    except (AttributeError, RuntimeError):
        return False


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N], each of any strides -> [M, N], contiguous."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return product


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies x [..., K] by this matrix. It does not in a trace, where Inductor chooses, or
    under autocast, which changes dtypes.
    """
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() >= ROWS * x.shape[-1] > 0
        and weight.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and onednn_is_faster()
        and bool(torch.backends.mkldnn.enabled)
    )


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`torch.mm`: a [M, K] @ b [K, N] -> [M, N], without a gradient. Any device and dtype. A product by
    oneDNN or in fp32 is copied into `out`.
    """
    if faster_in_fp32(a, a.shape[0]):
        product = torch.mm(a.float(), b.float())
    elif supports(a, b):
        product = _onednn(a, b)
    else:
        return torch.mm(a, b, out=out)
    return product.to(a.dtype) if out is None else out.copy_(product)


class _Linear(torch.autograd.Function):
    """x @ weight.T and the gradient of x by `mm`; the weight's gradient by torch, where MKL is as fast as
    oneDNN.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return mm(x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            # With create_graph=True this product is differentiated, but the operator has no derivative.
            dx = (torch.mm if torch.is_grad_enabled() else mm)(rows, weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight = weight_gradient(rows, x.flatten(0, -2), weight.dtype)
        return dx, dweight


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` and its gradients for two tensors of one dtype, on any device. Raises what it raises."""
    fits = x.dim() > 1 and weight.dim() == 2 and x.shape[-1] == weight.shape[1] and x.dtype == weight.dtype
    if not (fits and (supports(x, weight) or faster_in_fp32(x, x.shape[:-1].numel()))):
        return F.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        result: Tensor = _Linear.apply(x, weight)
        return result
    return mm(x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])


class _MasterLinear(torch.autograd.Function):
    """x @ copy.T, where copy is the weight in x's dtype. The weight's gradient has the weight's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.save_for_backward(x, copy)
        ctx.dtype = weight.dtype
        return _linear(x, copy)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        checks.first_derivative("linear")
        x, copy = ctx.saved_tensors
        rows, inputs = (each.reshape(-1, each.shape[-1]) for each in (dy, x))
        dweight = weight_gradient(rows, inputs, ctx.dtype) if ctx.needs_input_grad[1] else None
        dx = mm(rows, copy).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, dweight, None


def linear(x: Tensor, weight: Tensor, copy: Tensor | None = None) -> Tensor:
    """x [..., K] @ weight [N, K].T -> [..., N] in the dtype of x, to which the weight is cast. Any device.

    copy: the weight in the dtype of x, if it exists already; it is multiplied, and the gradient goes to the
    weight. A trace of a training step casts the weight instead. Raises what F.linear raises, and RuntimeError
    for create_graph=True where a copy is used or made.
    """
    if not torch.is_grad_enabled():
        return _linear(x, weight.to(x.dtype) if copy is None else copy)
    wide_gradient = weight.dtype != x.dtype and (x.is_cuda or faster_in_fp32(x, x.shape[:-1].numel()))
    if not torch.compiler.is_compiling() and (copy is not None or wide_gradient):
        result: Tensor = _MasterLinear.apply(x, weight, weight.detach().to(x.dtype) if copy is None else copy)
        return result
    return _linear(x, weight.to(x.dtype))


def mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, *,
    copies: tuple[Tensor | None, Tensor | None] | None = None, swiglu: SwiGLU = pointwise.swiglu,
) -> Tensor:  # fmt: skip
    """`kernels.reference.mlp`: x [..., E], gate_up [2F, E], down [E, F] -> [..., E]. It calls `swiglu`."""
    checks.mlp(x, gate_up, down, copies)
    gate_up_copy, down_copy = copies or (None, None)
    return linear(swiglu(linear(x, gate_up, gate_up_copy)), down, down_copy)
