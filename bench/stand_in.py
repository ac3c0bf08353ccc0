"""A GPU that is not there, as far as a program can be fooled: its tensors are a CPU's (or have no memory),
and its kernels never run.

Whoever asks torch for "cuda" gets the other device, streams, events and graphs do nothing, and Triton hands
its launches to a recorder (kernels/certify/recorder.py). Results are what memory happened to hold: this shows
what would be launched, and that the way there has no error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

# before anything is replaced: it makes a table of torch's functions, in which each must be another object
import torch._dynamo
from torch.overrides import TorchFunctionMode

from kernels import backend
from kernels.certify.recorder import StandIn, standing_in
from kernels.certify.targets import Target

GB = 1 << 30


class _Redirected(TorchFunctionMode):
    """Sends what is meant for CUDA to another device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.device:
            return function(
                *args, **(kwargs or {})
            )  # a device keeps its name; only its tensors lie elsewhere
        args = [self._elsewhere(value) for value in args]
        kwargs = {name: self._elsewhere(value) for name, value in (kwargs or {}).items()}
        if function is torch.Tensor.cuda:
            return args[0].to(self._device)
        kwargs.pop("pin_memory", None)
        if kwargs.get("device") == torch.device("meta"):
            kwargs.pop("generator", None)  # there is none for tensors without memory, and nothing to draw
        return function(*args, **kwargs)

    def _elsewhere(self, value: Any) -> Any:
        meant = (isinstance(value, torch.device) and value.type == "cuda") or (
            isinstance(value, str) and value.split(":")[0] == "cuda"
        )
        return self._device if meant else value


class _Inert:
    """A stream, an event or a graph."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    def __enter__(self) -> _Inert:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def elapsed_time(self, _: object) -> float:
        return 1.0


class _Generator(torch.Generator):
    """One of the CPU, whatever device it is asked for."""

    def __new__(cls, device: object = "cpu") -> _Generator:
        return super().__new__(cls)


def _returning(value: Any) -> Any:
    return lambda *_, **__: value


SILENT = (
    "empty_cache", "init", "manual_seed_all", "reset_peak_memory_stats", "set_rng_state", "set_stream",
    "set_sync_debug_mode", "synchronize",
)  # fmt: skip


def _of_cuda(target: Target) -> dict[str, Any]:
    """What takes the place of names in torch.cuda."""
    # torch calls AMD's GPUs cuda too
    capability = divmod(int(target.gpu.arch), 10) if target.nvidia else (9, 4)
    properties = SimpleNamespace(
        name=target.name, major=capability[0], minor=capability[1], multi_processor_count=132,
        total_memory=80 * GB, L2_cache_size=GB // 20,
    )  # fmt: skip
    answers = {
        "is_available": True, "is_initialized": False, "is_current_stream_capturing": False,
        "device_count": 1, "current_device": 0, "get_device_name": target.name,
        "get_device_capability": capability, "get_device_properties": properties,
        "mem_get_info": (79 * GB, 80 * GB), "memory_allocated": 0, "max_memory_allocated": 0,
        "memory_reserved": 0, "get_sync_debug_mode": 0, "graph_pool_handle": (0, 0),
        "current_stream": _Inert(), "default_stream": _Inert(), "stream": nullcontext(),
        "graph": nullcontext(),
    }  # fmt: skip
    return {
        **{name: _returning(value) for name, value in answers.items()},
        **{name: _returning(None) for name in SILENT},
        **dict.fromkeys(("Stream", "Event", "CUDAGraph"), _Inert),
        "get_rng_state": lambda *_: torch.get_rng_state(),
    }  # fmt: skip


@contextmanager
def standing_in_for_cuda(recorder: StandIn, device: str = "cpu") -> Iterator[None]:
    """While this is open, there seems to be one GPU of the recorder's target, whose tensors lie on `device`
    ("cpu" or "meta").
    """
    with ExitStack() as stack:
        for name, value in _of_cuda(recorder.target).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for owner, name, value in (
            (torch.accelerator, "synchronize", _returning(None)), (torch, "Generator", _Generator),
            (backend, "_triton_obstacle", _returning(None)),
            (torch.Tensor, "pin_memory", lambda tensor: tensor),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(standing_in(recorder))
        stack.enter_context(_Redirected(torch.device(device)))
        yield
