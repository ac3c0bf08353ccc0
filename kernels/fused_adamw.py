"""FusedAdamW: the launches of kernels/adamw.py as an optimizer with the state of torch.optim.AdamW.

Check: pytest tests -k adamw
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


class Copies(Protocol):
    """16-bit copies of parameters, which a step writes too (smollm2/working_copies.py)."""

    dtype: torch.dtype
    generation: int  # changes when a copy moves to another address

    def target(self, parameter: Tensor) -> Tensor | None:
        """The tensor that is to hold the copy of a parameter, or None."""

    def written(self, parameters: Iterable[Tensor]) -> None:
        """Called after the launch that writes these parameters and their copies."""


class FusedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW(fused=True) by the launches of kernels/adamw.py, which also clip and write copies.

    params: as torch's, all fp32, contiguous and on one device. lr becomes an fp32 tensor on the device, one a
    group. copies: written by every step. The state is torch's, entry by entry (`step` fp32 and 0-dimensional,
    `exp_avg`, `exp_avg_sq`), and so are the keys of the groups: a state_dict of either loads into the other.
    Nothing waits for the device. A step can be captured in a CUDA graph after an eager step, and must be
    captured again after load_state_dict, add_param_group or a move of the parameters. Raises ValueError for
    other parameters, for settings that torch's AdamW refuses, and for amsgrad or maximize in a loaded state.
    """

    # Not part of a pickle.
    copies: Copies | None = None
    found_inf: Tensor | None = None  # fp32 scalar on the device: 1 skips the step
    _bound: _Bound | None = None
    # What clip leaves for the next step: (stamps of the gradients, the gradients as the kernels read them,
    # what the table depends on, the table, [norm, factor])
    _clipped: tuple[list[tuple[int, int]], list[Tensor | None], Any, Tensor, Tensor] | None = None

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, copies: Copies | None = None,
    ) -> None:  # fmt: skip
        for name, value, holds in (
            ("lr", lr, isinstance(lr, Tensor) or lr >= 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)), ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
        ):  # fmt: skip
            if not holds:
                wanted = "numbers in [0, 1)" if name == "betas" else "at least 0"
                raise ValueError(f"FusedAdamW: {name}: expected {wanted}, got {value}")
        settings = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decoupled_weight_decay=True,
            amsgrad=False, maximize=False, foreach=None, capturable=True, differentiable=False, fused=True,
        )  # fmt: skip
        super().__init__(params, settings)
        self.copies = copies
        self._bind()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._bound = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # load_state_dict calls this too, with new groups and new states
        self._bound = self._clipped = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._clipped = None

    def _bind(self) -> _Bound:
        """What stays valid until parameters, groups or states are replaced."""
        self._bound = _Bound(self.param_groups, self.state)
        return self._bound

    def _begin(self, bound: _Bound, gradients: list[Tensor | None]) -> None:
        """Creates the state of each parameter that has a gradient for the first time."""
        for index, (parameter, gradient) in enumerate(zip(bound.parameters, gradients, strict=True)):
            if gradient is not None and not bound.entries[index]:
                average, square = torch.zeros_like(parameter), torch.zeros_like(parameter)
                entries = {"step": bound.counts[index].zero_(), "exp_avg": average, "exp_avg_sq": square}
                self.state[parameter] = bound.entries[index] = entries
                bound.moments[index] = average, square
                bound.known = len(self.state)

    def _settings(self, device: torch.device) -> list[tuple[int, float, float, float, float]]:
        found = []
        for group in self.param_groups:
            if group["amsgrad"] or group["maximize"]:
                raise ValueError(
                    "FusedAdamW: expected amsgrad=False and maximize=False; use torch.optim.AdamW"
                )
            lr, (beta1, beta2) = group["lr"], group["betas"]
            if not (isinstance(lr, Tensor) and lr.device == device and lr.dtype == torch.float32):
                group["lr"] = lr = torch.full((), float(lr), device=device)
            found.append((lr.data_ptr(), float(beta1), float(beta2), group["eps"], group["weight_decay"]))
        return found

    def _prepare(self) -> tuple[_Bound, list[tuple[int, int]], list[Tensor | None], Any]:
        """(what stays valid, stamps of the gradients, the gradients as the kernels read them, what the table
        depends on).
        """
        bound = self._bound
        if bound is None or not bound.holds(self.param_groups, self.state):
            bound = self._bind()
        given = [parameter.grad for parameter in bound.parameters]
        stamps = [(0, 0) if gradient is None else (id(gradient), gradient._version) for gradient in given]
        if self._clipped is not None and self._clipped[0] == stamps:
            gradients = self._clipped[1]  # clip has copied those that had to be
        else:
            gradients = [_dense(gradient) for gradient in given]
        self._begin(bound, gradients)
        # An empty tensor has no address, but it does have a gradient.
        addresses = [0 if gradient is None else gradient.data_ptr() or 16 for gradient in gradients]
        generation = None if self.copies is None else self.copies.generation
        return bound, stamps, gradients, (bound, addresses, generation, self._settings(bound.device))

    def _send(self, key: Any) -> Tensor:
        """The table in device memory."""
        from kernels.adamw import table_words

        bound, addresses, _, settings = key
        moments = [
            [one[name].data_ptr() if one else 0 for one in bound.entries]
            for name in ("exp_avg", "exp_avg_sq")
        ]
        copies = [0] * len(bound.parameters)
        if self.copies is not None:
            targets = map(self.copies.target, bound.parameters)
            copies = [0 if target is None else target.data_ptr() for target in targets]
        return bound.table.send(table_words((addresses, bound.addresses, *moments, copies), settings))

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """The norm of all gradients, an fp32 scalar on the device; not finite if any gradient is not.

        The gradients are not changed: the next step multiplies them by the factor that clips their norm to
        max_norm (by 1 if max_norm is 0).
        """
        from kernels.adamw import gradient_norm

        bound, stamps, gradients, key = self._prepare()
        table = self._send(key)
        found = gradient_norm(table, bound.plan, float(max_norm))
        self._clipped = stamps, gradients, key, table, found
        return found[0]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, which found_inf can skip. Takes no closure: the gradients must exist."""
        from kernels.adamw import adamw

        if closure is not None:
            raise ValueError("FusedAdamW: expected no closure")
        bound, stamps, gradients, key = self._prepare()
        clipped, self._clipped = self._clipped, None
        if clipped is not None and [which for which, _ in stamps] != [which for which, _ in clipped[0]]:
            clipped = None  # the factor belongs to other gradients
        table = clipped[3] if clipped is not None and clipped[2] == key else self._send(key)
        factor = bound.one if clipped is None else clipped[4][1]
        adamw(
            table, bound.plan, bound.steps, bound.zero if self.found_inf is None else self.found_inf, factor,
            None if self.copies is None else self.copies.dtype,
        )  # fmt: skip
        written = [bound.steps]
        for parameter, gradient, entries in zip(bound.parameters, gradients, bound.entries, strict=True):
            if gradient is not None:
                written += (parameter, entries["exp_avg"], entries["exp_avg_sq"])
        torch.autograd.graph.increment_version(written)
        if self.copies is not None:
            self.copies.written(bound.parameters)


class _Bound:
    """What the launches need for a set of parameters: plan, table, and the step counts in one tensor."""

    def __init__(self, groups: list[dict[str, Any]], state: dict[Any, dict[str, Any]]) -> None:
        from kernels.adamw import GROUP_WORDS, AddressTable, plan

        self.parameters: list[Tensor] = [parameter for group in groups for parameter in group["params"]]
        if not self.parameters:
            raise ValueError("FusedAdamW: expected at least one parameter, got none")
        self.device = self.parameters[0].device
        for parameter in self.parameters:
            dense = parameter.is_contiguous()
            if parameter.dtype != torch.float32 or parameter.device != self.device or not dense:
                form = f"{parameter.dtype} on {parameter.device}{'' if dense else ', not contiguous'}"
                raise ValueError(
                    f"FusedAdamW: expected contiguous fp32 parameters on {self.device}, got {form}"
                )
        self.addresses = [parameter.data_ptr() for parameter in self.parameters]
        numbers = [number for number, group in enumerate(groups) for _ in group["params"]]
        self.plan = plan([parameter.numel() for parameter in self.parameters], numbers, self.device)
        self.table = AddressTable(5 * len(self.parameters) + GROUP_WORDS * len(groups), self.device)
        self.zero, self.one = (torch.full((), value, device=self.device) for value in (0.0, 1.0))
        # One launch advances all counts. Each count is a view, which is the state's own entry.
        self.steps = torch.zeros(len(self.parameters), device=self.device)
        self.counts = list(self.steps.unbind())
        self._state, self.known = state, len(state)
        self._shapes = [parameter.shape for parameter in self.parameters]
        self.entries = [state.get(parameter, {}) for parameter in self.parameters]
        self.moments: list[tuple[Tensor, Tensor] | None] = [None] * len(self.parameters)
        for index, (parameter, entries) in enumerate(zip(self.parameters, self.entries, strict=True)):
            if entries:
                entries["step"] = self.counts[index].copy_(entries["step"])
                for name in ("exp_avg", "exp_avg_sq"):
                    if entries[name].shape != parameter.shape:
                        shapes = f"expected shape {list(parameter.shape)}, got {list(entries[name].shape)}"
                        raise ValueError(f"FusedAdamW: {name} of parameter {index}: {shapes}")
                    entries[name] = entries[name].to(self.device, torch.float32).contiguous()
                self.moments[index] = entries["exp_avg"], entries["exp_avg_sq"]

    def holds(self, groups: list[dict[str, Any]], state: dict[Any, dict[str, Any]]) -> bool:
        """Whether parameters and state are still the same tensors, at the same addresses."""
        if state is not self._state or len(state) != self.known:
            return False
        now = [parameter for group in groups for parameter in group["params"]]
        if len(now) != len(self.parameters) or any(map(operator.is_not, now, self.parameters)):
            return False
        for parameter, address, shape in zip(now, self.addresses, self._shapes, strict=True):
            if parameter.data_ptr() != address or parameter.shape != shape:
                return False
        for entries, count, moments in zip(self.entries, self.counts, self.moments, strict=True):
            found = tuple(entries.get(name) for name in ("step", "exp_avg", "exp_avg_sq"))
            if entries and (moments is None or any(map(operator.is_not, found, (count, *moments)))):
                return False
        return True


def _dense(gradient: Tensor | None) -> Tensor | None:
    """A gradient as the kernels read it, fp32 and contiguous; a copy only if it is not that already."""
    if gradient is not None and gradient.is_sparse:
        raise ValueError("FusedAdamW: expected dense gradients, got a sparse one; use torch.optim.SparseAdam")
    if gradient is None or (gradient.is_contiguous() and gradient.dtype == torch.float32):
        return gradient
    return gradient.to(torch.float32).contiguous()
