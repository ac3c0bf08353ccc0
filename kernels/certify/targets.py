"""The GPUs that kernels are certified for, and their limits.

NVIDIA: "Technical Specifications per Compute Capability" of the CUDA C++ programming guide, and CCCL's
cuda/__device/arch_traits.h. AMD: the ISA guides of CDNA3 and RDNA3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from triton.backends.compiler import GPUTarget

KB = 1024


@dataclass(frozen=True)
class Target:
    """One architecture. A multiprocessor is NVIDIA's SM, AMD's CU (gfx942) or WGP (gfx1100)."""

    name: str
    gpu: GPUTarget
    matrix: str  # its own matrix instruction: the beginning of its name in the assembly
    shared_limit_kb: int  # shared memory that one program may have
    shared_kb: int  # shared memory of a multiprocessor
    warps: int  # that a multiprocessor can hold
    blocks: int = 32  # programs that a multiprocessor can hold
    reserved: int = 0  # bytes of shared memory that the driver uses for each program
    every_dtype: bool = False  # fp16 and fp32 are certified too

    @property
    def shared_limit(self) -> int:
        return self.shared_limit_kb * KB

    @property
    def shared(self) -> int:
        return self.shared_kb * KB

    @property
    def nvidia(self) -> bool:
        return self.gpu.backend == "cuda"


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", GPUTarget("cuda", 80, 32), "mma.sync", 163, 164, 64, reserved=KB, every_dtype=True),
        Target("sm_90", GPUTarget("cuda", 90, 32), "wgmma", 227, 228, 64, reserved=KB, every_dtype=True),
        Target("sm_100", GPUTarget("cuda", 100, 32), "tcgen05", 227, 228, 64, reserved=KB),
        Target("sm_120", GPUTarget("cuda", 120, 32), "mma.sync", 99, 100, 48, blocks=24, reserved=KB),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), "v_mfma", 64, 64, 32),
        Target("gfx1100", GPUTarget("hip", "gfx1100", 32), "v_wmma", 64, 128, 64),
    )
}

OTHERS = ("sm_86", "sm_87", "sm_89", "sm_103", "sm_121")  # both versions of Triton can compile for these


def target_for(name: str) -> Target:
    """The target of that name. One of OTHERS has the launches and limits of the newest target that is not
    newer, as in launch_config.py. Raises ValueError for any other name.
    """
    if name in TARGETS:
        return TARGETS[name]
    if name not in OTHERS:
        raise ValueError(f"expected one of {', '.join([*TARGETS, *OTHERS])}, got {name!r}")
    capability = int(name.removeprefix("sm_"))
    older = [target for target in TARGETS.values() if target.nvidia and target.gpu.arch < capability]
    return replace(older[-1], gpu=GPUTarget("cuda", capability, 32))
