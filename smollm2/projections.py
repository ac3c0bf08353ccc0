"""Projections of one input, multiplied as one matrix: q, k and v of the attention, gate and up of the MLP.

Parameters stay separate under Hugging Face's names. They become views of one buffer, so that neither a
training step nor a decode step has to concatenate them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from kernels.eager.linear import linear
from smollm2.lora import LoraLinear
from smollm2.working_copies import WorkingCopies


def is_plain(layer: nn.Module, kinds: Collection[type[nn.Module]] = (nn.Linear,)) -> bool:
    """Whether a layer computes what its weight alone says, so that reading the weight may replace the call.

    Not so with a type that is none of `kinds` itself (an adapter, a parametrization), a hook, a bias, or a
    forward that was assigned to the layer.
    """
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    return (
        type(layer) in kinds
        and not (hooks or layer._backward_pre_hooks or "forward" in layer.__dict__ or _has_any_global_hook())
        and layer._parameters.get("bias") is None
        and layer.__dict__.get("max_norm") is None  # an embedding with it rescales its rows
    )


def apply(layer: nn.Module, x: Tensor, copy: Tensor | None = None) -> Tensor:
    """x [..., K] -> [..., N] in the dtype of x: the product with a plain layer's weight, cast or as `copy`,
    which an adapter of ours takes too; any other layer is called, in the dtype of its own parameters.
    """
    if is_plain(layer):
        return linear(x, layer.weight, copy)  # type: ignore[arg-type]
    if type(layer) is LoraLinear:
        adapted: Tensor = layer(x, copy)
        return adapted
    dtypes = (parameter.dtype for parameter in layer.parameters() if parameter.is_floating_point())
    result: Tensor = layer(x.to(next(dtypes, x.dtype)))
    return result.to(x.dtype)


class _Packed(torch.autograd.Function):
    """`torch.cat` of weights that are views of one buffer, without the copy; splits the gradient."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, *weights: Tensor) -> Tensor:
        ctx.rows = [weight.shape[0] for weight in weights]
        return packed.detach()

    @staticmethod
    def backward(ctx: Any, dpacked: Tensor) -> tuple[Tensor | None, ...]:
        return None, *dpacked.split(ctx.rows)


class FusedProjections(nn.Module):
    """A layer whose first projections read one input: weights in one buffer are multiplied as one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.packed: Tensor | None = None  # [sum of rows, hidden], of which the weights become views
        self.copies: WorkingCopies | None = None

    def projections(self) -> tuple[nn.Linear, ...]:
        """Those that read the same input, in the order of their rows."""
        raise NotImplementedError

    def pack(self) -> Tensor:
        """Moves the weights into one buffer, of which they become views, unless they are there already."""
        if self.packed is None or not self._current(self.packed):
            projections = self.projections()
            # the parameters must stay trainable after a generation
            with torch.inference_mode(False), torch.no_grad():
                self.packed = torch.cat([projection.weight for projection in projections])
                views = self.packed.split([projection.out_features for projection in projections])
                for projection, view in zip(projections, views, strict=True):
                    projection.weight.data = view
        return self.packed

    def fused_weight(self) -> Tensor:
        """The weights as one matrix [sum of rows, hidden], through which their gradients reach them."""
        weights, packed = [projection.weight for projection in self.projections()], self.packed
        # A trace knows no addresses, and fuses the concatenation with the cast.
        if packed is None or (
            torch.is_grad_enabled() if torch.compiler.is_compiling() else not self._current(packed)
        ):
            return torch.cat(weights)
        return _Packed.apply(packed, *weights) if torch.is_grad_enabled() else packed

    def project(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> the outputs of the projections side by side [..., sum of rows]."""
        projections = self.projections()
        if all(map(is_plain, projections)):
            return linear(x, self.fused_weight(), self.copy_of(x.dtype, *projections))
        return torch.cat([self.apply_one(projection, x) for projection in projections], -1)

    def apply_one(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """`apply` with the working copy, if one is current."""
        known = is_plain(layer, (nn.Linear, LoraLinear))
        return apply(layer, x, self.copy_of(x.dtype, layer) if known else None)

    def copy_of(self, dtype: torch.dtype, *projections: nn.Linear) -> Tensor | None:
        """The working copy of those weights in that dtype, as one matrix; None unless one is current."""
        if self.copies is None or self.copies.dtype != dtype or torch.compiler.is_compiling():
            return None
        weights = [projection.weight for projection in projections]
        return self.copies.of(weights[0]) if len(weights) == 1 else self.copies.of_group(weights)

    def _current(self, packed: Tensor) -> bool:
        """Whether the weights are still views of the buffer: assigning other tensors would end that."""
        address = packed.data_ptr()
        for projection in self.projections():
            weight = projection.weight
            if weight.data_ptr() != address or (weight.dtype, weight.device) != (packed.dtype, packed.device):
                return False
            if not weight.is_contiguous():  # `p.data = p.data.t()` keeps the address
                return False
            address += weight.nbytes
        return True

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the layer has weights of its own, in tensors of their own
        return {**self.__dict__, "packed": None, "copies": None}
