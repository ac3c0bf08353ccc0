"""Records what would be launched on a GPU that is not present, by a stand-in for Triton's driver.

Triton's own launch path runs up to the point where it would compile. The stand-in names the target. Triton's
hook for caches of compiled kernels receives the signature, the constants, the specialisation (alignment,
divisibility by 16, arguments equal to 1) and the options of every launch, and declines to compile.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITCallable

import kernels
from kernels import launch_config
from kernels.certify.targets import Target

KERNEL_MODULES = (
    "adamw", "attention", "decode_attention", "decode_head", "decode_layer", "decode_layers",
    "decode_product", "decode_step", "embedding", "linear_cross_entropy", "mlp", "rms_norm", "rope", "swiglu",
)  # fmt: skip

# The options that a launcher may set; the others follow from the target and the version of Triton.
OPTIONS = (
    "num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "waves_per_eu",
    "matrix_instr_nonkdim", "kpack",
)  # fmt: skip
DEPENDENT = "launch_pdl"  # of the few launches that set it


@dataclass(frozen=True)
class RecordedLaunch:
    """The compilation that a launch needs, as plain data, so that another process can do it."""

    target: str
    dtype: str
    case: str
    phase: str  # "forward" or "backward"
    op: str  # name of the module in kernels/
    kernel: str
    source: str  # Triton's hash of the kernel's source and of everything it calls
    signature: dict[str, str]
    constants: dict[str, Any]  # compile-time constants, and arguments that are specialised because they are 1
    attributes: dict[int, Any]  # argument -> [["tt.divisibility", 16], ...]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Equal keys mean equal machine code with the same Triton."""
        parts = (self.source, self.signature, self.constants, self.attributes, self.options, self.target)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass
class StandIn:
    """Stands in for the driver of a GPU that need not be present."""

    target: Target

    def get_current_target(self) -> Any:
        return self.target.gpu

    def get_current_device(self) -> str:
        return self.target.name  # Triton keeps its compiled kernels by device

    def get_current_stream(self, device: object) -> int:
        return 0

    def hook(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Called by Triton before it compiles. True: neither compile nor launch."""
        return True


@contextmanager
def standing_in(device: StandIn) -> Iterator[None]:
    """In this context Triton kernels, configured for its target, go to the stand-in and are not launched."""
    before = driver._active, knobs.runtime.jit_cache_hook, launch_config.architecture
    driver.set_active(device)
    knobs.runtime.jit_cache_hook = device.hook
    launch_config.architecture = lambda _: device.target.name  # type: ignore[assignment]
    launch_config.launch_config.cache_clear()
    try:
        yield
    finally:
        driver._active, knobs.runtime.jit_cache_hook, launch_config.architecture = before
        launch_config.launch_config.cache_clear()


@dataclass
class Recorder(StandIn):
    """Keeps the launches in order, with the case that they belong to."""

    dtype: torch.dtype = torch.bfloat16
    case: str = ""
    phase: str = "forward"
    launches: list[RecordedLaunch] = field(default_factory=list)

    def hook(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        function, data = fn.jit_function, json.loads(compile["specialization_data"])
        self.launches.append(
            RecordedLaunch(
                target=self.target.name,
                dtype=str(self.dtype).removeprefix("torch."),
                case=self.case,
                phase=self.phase,
                op=function.module.rpartition(".")[2],
                kernel=function.__name__,
                source=function.cache_key,
                signature=dict(compile["signature"]),
                constants={
                    function.arg_names[path[0]]: value for path, value in compile["constants"].items()
                },
                attributes={path[0]: value for path, value in compile["configs"][0].items() if value},
                options={
                    name: value
                    for name, value in data["options"].items()
                    if name in OPTIONS and value is not None or name == DEPENDENT and value
                },
            )
        )
        return True

    def backward(self, *outputs: Tensor) -> None:
        """Runs the backward pass with a dense gradient for each output."""
        self.phase = "backward"
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
        self.phase = "forward"


def forget_lines() -> None:
    """Takes a kernel's line number out of its hash, because text above a kernel does not change its code."""
    for name in KERNEL_MODULES:
        for value in vars(import_module(f"{kernels.__name__}.{name}")).values():
            if isinstance(value, JITCallable) and value.hash is None:
                value.starting_line_number = 0


@contextmanager
def recording(target: Target) -> Iterator[Recorder]:
    """In this context Triton kernels are recorded for that target instead of being launched."""
    forget_lines()
    recorder = Recorder(target)
    with standing_in(recorder):
        yield recorder


def tensor(*shape: int, dtype: torch.dtype, grad: bool = True) -> Tensor:
    """A tensor without memory. Its address counts as aligned; that of a slice depends on its offset."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)
