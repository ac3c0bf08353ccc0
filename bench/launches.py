"""How many kernels a piece of work launches: the figure that decides at this model's size, where a launch
costs as much as a kernel runs.

On a GPU the profiler counts what the device ran. Elsewhere launches of Triton kernels are counted as they
happen, and every other operation of torch that computes something (no view, no allocation) counts as one:
what a GPU would launch, within a few.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

NO_KERNEL = (
    "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided",
    "detach", "_unsafe_view", "_local_scalar_dense", "promote_types",
)  # fmt: skip


def count(call: Callable[[], object], device: torch.device) -> Counter[str]:
    """Name -> launches during one call, which should not be the first of its kind. Triton kernels carry their
    own names.
    """
    if device.type == "cuda":
        return Counter(name for name, _, _ in trace(call))
    found: Counter[str] = Counter()
    with _triton_launches(found), _Operations(found):
        call()
    return found


def trace(call: Callable[[], object]) -> list[tuple[str, float, float]]:
    """(name, begin, duration) of every kernel that a call runs on the GPU, in order, in microseconds after
    the first.
    """
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    # the optimizer marks its step as a span on the GPU too
    events = [
        one for one in profiler.events() or [] if one.device_type == cuda and not one.is_user_annotation
    ]
    spans = sorted((event.time_range.start, event.time_range.elapsed_us(), event.name) for event in events)
    return [(name, begin - spans[0][0], duration) for begin, duration, name in spans]


def kernel_of(func: Any) -> str | None:
    """The name of an operation of torch that computes; None of one that launches nothing."""
    if isinstance(func, HigherOrderOperator):
        return str(func.name())  # FlexAttention is one: a kernel, where it is compiled
    space, _, name = func._schema.name.partition("::")
    return name if space == "aten" and not func.is_view and name not in NO_KERNEL else None


class _Operations(TorchDispatchMode):
    """Counts operations that compute."""

    supports_higher_order_operators = True

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if name := kernel_of(func):
            self._found[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _triton_launches(found: Counter[str]) -> Iterator[None]:
    """Counts Triton's launches in the interpreter, and hides from the modes above what the interpreter itself
    does with tensors.
    """
    from triton.runtime.interpreter import InterpretedFunction

    original = InterpretedFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        found[self.fn.__name__] += 1
        with _disable_current_modes():
            return original(self, *args, **kwargs)

    InterpretedFunction.run = run
    try:
        yield
    finally:
        InterpretedFunction.run = original


def triton_part(found: Counter[str]) -> int:
    """How many of the launches are kernels of this project (torch.compile's own begin with triton_)."""
    return sum(times for name, times in found.items() if name.startswith("_") and name.endswith("_kernel"))
