"""Matrix products in fp32 on the CPU: by oneDNN where that is faster than MKL, which torch's own products in fp32 go to.

On AMD processors MKL leaves its AVX-512 kernels out. GFLOP/s on two cores of an EPYC 9004 (Zen 4), torch 2.13, where 237 are the limit:

    [rows, 576] @ [576, N]      rows 1024: N = 3072    N = 49152       rows 16: N = 3072    N = 49152
    MKL                                         183          145                      97           47
    oneDNN                                      211          172                     115           96

and in a training step, where caches are cold, more than that. At one row MKL's matrix-vector product is the faster one; gradients of
weights, g.T @ x, are as fast in MKL. In 16 bits torch takes oneDNN by itself.

oneDNN is reached through the operator that Inductor uses. A 1x1 convolution over channels_last is the public way to the same library,
but brings it another algorithm, which is no faster than MKL below 512 rows.

Which library it is follows from the processor, never from a clock: two processes on one machine give the same bits, which an exact
resume needs. `torch.backends.mkldnn.flags(enabled=False)` turns it off.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 2  # of the left factor, from which oneDNN is the faster one


def _vendor() -> str:
    """The processor's maker as it names itself, "AuthenticAMD" or "GenuineIntel"; "" where that cannot be found out."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor().rpartition(", ")[2]  # on Windows "AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this build of torch has both libraries, on a processor on which oneDNN was measured to be the faster one."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not both or torch.backends.cpu.get_cpu_capability() != "AVX512" or _vendor() != "AuthenticAMD":
        return False
    one = torch.ones(2, 2)
    try:  # the operator is private: another torch may have another one
        return torch.equal(_onednn(one, one), one + one)
    except (AttributeError, RuntimeError):
        return False


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N], each of any strides -> [M, N], contiguous."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return product


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether x [..., K] times a matrix is for oneDNN. Not in a trace, where Inductor chooses, nor where autocast changes dtypes."""
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
    """`torch.mm`: a [M, K] @ b [K, N] -> [M, N], without a gradient. Any device and dtype. Into `out` oneDNN's product is copied."""
    if not serves(a, b):
        return torch.mm(a, b, out=out)
    return _onednn(a, b) if out is None else out.copy_(_onednn(a, b))


class _Linear(torch.autograd.Function):
    """x @ weight.T by oneDNN, and the gradient of x likewise; that of the weight by torch, where MKL is as fast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            # With create_graph=True this is differentiated itself, which the operator is not.
            dx = (torch.mm if torch.is_grad_enabled() else mm)(rows, weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight = rows.t() @ x.flatten(0, -2)
        return dx, dweight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` without a bias: x [..., K] @ weight [N, K].T -> [..., N], and its gradients. Any device and dtype.

    Raises what F.linear raises.
    """
    if not serves(x, weight) or x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return F.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        result: Tensor = _Linear.apply(x, weight)
        return result
    return _onednn(x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])
