"""16-bit copies of a model's fp32 weights, which the forward pass reads instead of casting them.

A copy is current while its parameter is as it was: no write since, the same memory, the same shape.
Otherwise it is not handed out, and the caller casts as it would without copies. What shows a write is
torch's own counter (every in-place operation, under no_grad and inference_mode too), another address
(`p.data = other`, `model.to(...)`), another parameter in the module (`load_state_dict(assign=True)`), or the
hook that torch calls after the step of any optimizer, whose fused ones do not count their writes.

What escapes: writes through an alias that `p.data` made (`p.data.copy_(x)`, `p.data.mul_(2)`), kernels that
write to a bare address, and a replayed CUDA graph, during which no Python runs. Call `invalidate()` after
these, or the model's `train()` or `eval()`, which make all copies anew. (A graph that holds a step of
FusedAdamW writes the copies itself.)
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class _Copy:
    """One parameter, where the model has it, and its copy."""

    __slots__ = ("address", "copy", "holder", "name", "parameter", "shape", "source", "stride", "version")

    def __init__(self, holder: dict[str, Any], name: str, copy: Tensor) -> None:
        self.holder, self.name, self.copy = holder, name, copy
        self.parameter: nn.Parameter = holder[name]
        self.source: Tensor | None = None  # keeps the memory that was copied: nothing else gets its address

    def mark(self) -> None:
        """Says that the copy was made of the parameter as it is now."""
        parameter = self.parameter
        self.source, self.version, self.address = parameter.detach(), parameter._version, parameter.data_ptr()
        self.shape, self.stride = parameter.shape, parameter.stride()

    def current(self) -> bool:
        parameter = self.parameter
        return (
            self.source is not None
            and parameter._version == self.version
            and parameter.data_ptr() == self.address
            and parameter.shape == self.shape
            and parameter.stride() == self.stride
        )

    def fits(self) -> bool:
        """Whether the model still has this parameter, and the copy could hold it."""
        parameter = self.parameter
        return (
            self.holder.get(self.name) is parameter
            and parameter.shape == self.copy.shape
            and parameter.device == self.copy.device
            and parameter.dtype == torch.float32
        )


class WorkingCopies:
    """Copies of all fp32 matrices of a model in `dtype`, torch.bfloat16 or torch.float16; vectors have none.

    The copies of a module's `projections()` lie side by side in one buffer [sum of rows, in]; any other
    matrix has a buffer of its own, a tied one a single one. Nothing is copied before the first `refresh`. The
    copies belong to this model: neither a deep copy nor a pickle of it has any (the attribute is None there).
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"working copies: expected torch.bfloat16 or torch.float16, got {dtype}")
        self.model, self.dtype = model, dtype
        self.generation = 0  # of the buffers: as long as it is the same, so are they
        self._copies: dict[int, _Copy] = {}  # by id of the parameter, which a _Copy keeps alive
        self._groups: dict[int, tuple[Tensor, list[_Copy]]] = {}  # by id of the first parameter
        self._buffers: list[Tensor] = []
        self._places: list[tuple[dict[str, Any], str, nn.Parameter]] = []  # of matrices; a tied one has two
        self._build()
        stepped = weakref.WeakMethod(self._stepped)
        handle = register_optimizer_step_post_hook(lambda optimizer, *_: (stepped() or _nothing)(optimizer))
        weakref.finalize(self, handle.remove)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """After any optimizer's step: what it has written is outdated, unless it writes these copies too."""
        if getattr(optimizer, "copies", None) is not self:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if one := self._copies.get(id(parameter)):
                        one.source = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def _build(self) -> None:
        """Buffers for the parameters that the model has now. Takes no values."""
        self.generation += 1
        self._copies, self._groups, self._buffers, self._places = {}, {}, [], []
        with torch.inference_mode(False), torch.no_grad():  # the buffers must be writable after a generation
            for module in self.model.modules():
                if projections := getattr(module, "projections", None):
                    holders = [projection._parameters for projection in projections()]
                    # not where a weight is computed from other parameters
                    if all(holder.get("weight") is not None for holder in holders):
                        self._add(holders, "weight")
            for module in self.model.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None and parameter.dim() >= 2:
                        self._places.append((module._parameters, name, parameter))
                        self._add([module._parameters], name)

    def _add(self, holders: Sequence[dict[str, Any]], name: str) -> None:
        """One buffer for the parameters of that name, unless one has a copy or they differ in kind."""
        parameters = [holder[name] for holder in holders]
        first = parameters[0]
        kinds = {(parameter.shape[1:], parameter.device, parameter.dtype) for parameter in parameters}
        distinct = {id(parameter) for parameter in parameters}
        if distinct & self._copies.keys() or len(distinct) < len(parameters) or len(kinds) > 1:
            return
        rows = [parameter.shape[0] for parameter in parameters]
        buffer = torch.empty((sum(rows), *first.shape[1:]), dtype=self.dtype, device=first.device)
        self._buffers.append(buffer)
        parts = zip(holders, buffer.split(rows), strict=True)
        members = [_Copy(holder, name, part) for holder, part in parts]
        self._copies.update({id(member.parameter): member for member in members})
        self._groups[id(first)] = buffer, members

    def refresh(self) -> None:
        """Copies every parameter that was written since its copy was made, all in one call.

        Where a module got another parameter, or one of another shape or device, all buffers are made anew. (A
        module that took the place of another is not noticed: its parameters have no copies.)
        """
        if not all(holder.get(name) is parameter for holder, name, parameter in self._places):
            self._build()
        stale = self._stale()
        if not all(one.fits() for one in stale):
            self._build()
            stale = self._stale()
        if not stale:
            return
        with torch.no_grad():
            torch._foreach_copy_([one.copy for one in stale], [one.parameter.detach() for one in stale])
        for one in stale:
            one.mark()

    def _stale(self) -> list[_Copy]:
        outdated = (one for one in self._copies.values() if not one.current())
        return [one for one in outdated if one.parameter.dtype == torch.float32]

    def invalidate(self) -> None:
        """No copy is current any more, until the next `refresh`. The buffers stay where they are."""
        for one in self._copies.values():
            one.source = None

    def of(self, parameter: Tensor) -> Tensor | None:
        """The copy of a parameter, of its shape, or None if there is none that is current."""
        one = self._copies.get(id(parameter))
        return one.copy if one is not None and one.current() else None

    def of_group(self, parameters: Sequence[Tensor]) -> Tensor | None:
        """The buffer [sum of rows, in] of the copies of these parameters, if all are current; else None."""
        buffer, members = self._groups.get(id(parameters[0]), (None, []))
        if len(members) != len(parameters):
            return None
        for one, parameter in zip(members, parameters):  # noqa: B905 - strict costs time, in every layer
            if one.parameter is not parameter or not one.current():
                return None
        return buffer

    def target(self, parameter: Tensor) -> Tensor | None:
        """Where an optimizer may write the copy of a parameter, current or not; None where none fits."""
        one = self._copies.get(id(parameter))
        return one.copy if one is not None and one.fits() else None

    def written(self, parameters: Iterable[Tensor]) -> None:
        """Marks the copies current that an optimizer has just written, as `target`s, with the parameters.

        Counts the write for autograd, so that a backward pass which still needs the old copies raises an
        error.
        """
        torch.autograd.graph.increment_version(self._buffers)
        for parameter in parameters:
            one = self._copies.get(id(parameter))
            if one is None:
                continue
            if not one.fits():
                one.source = None
            elif one.source is not None and parameter.data_ptr() == one.address:
                one.version = parameter._version
            else:
                one.mark()


def _nothing(optimizer: torch.optim.Optimizer) -> None:
    """In place of the copies, when those are gone and the hook is not yet."""
