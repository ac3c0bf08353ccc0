"""Frozen launch configurations by (operation, dtype, architecture). Nothing is tuned at run time.

An autotuner looks like a hang at first use, recompiles for every new length, and may choose differently from
run to run, which changes the order of sums. Here every choice is a line of a table. It can be read, compiled
ahead of time for GPUs that are not present (`python -m kernels.certify`, which gates on spills), and changed
in a diff.

Provenance: the lines were chosen by registers, spills, shared memory and instructions of the compiled code,
at both versions of Triton in the certificate: on NVIDIA no line spills at either in 16 bits. The lines of
sm_90 were timed at the shapes of the 135M model, 32 x 512 tokens in bf16, on an H100 with Triton 3.6
(`python -m bench.tuning`, figures in bench/results/h100/tuning.json). Attention took the fastest of its
candidates; its kernels have changed since, and so has the line of dk/dv. The others kept their lines, which
were within 3 % of the best, except for decode_o and decode_head; decode_down has a new line that was as fast.
Decoding was timed at 16 rows only. The lines of mlp, embedding, adamw, rope and decode_head are newer than
these timings, and no other target was measured.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch

INTERPRETER = "interpreter"
# The targets that the certificate covers. Another NVIDIA GPU uses the newest of these that is not newer.
NVIDIA = (80, 90, 100, 120)
AMD = ("gfx942", "gfx1100")
WARPGROUP = ("sm_90", "sm_100")  # wgmma and tcgen05: four warps multiply together, out of shared memory
# TMA: whole tiles of a matrix are copied through a tensor descriptor.
DESCRIPTORS = ("sm_90", "sm_100", "sm_120")
# Programmatic dependent launch: a kernel prepares itself while the one before it ends.
DEPENDENT_LAUNCH = ("sm_90", "sm_100", "sm_120")
# Where backend "triton" computes SwiGLU inside its products (kernels/mlp.py) and not between the library's.
# On an H200 both took a step equally long (32.9 ms against 33.1), so none does.
FUSED_MLP: tuple[str, ...] = ()
# GPUs on which all layers of a decode step are one launch (decode_layers.py).
ONE_LAUNCH: tuple[str, ...] = ()


class LaunchConfig(NamedTuple):
    """Block sizes, whose meaning depends on the kernel, and the compiler's options of one launch."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1
    branch: bool = False  # attention: blocks that need no mask skip it


class Row(NamedTuple):
    """One line of the table: for sizes (a width or a head dim) up to `size`."""

    size: int
    launch: LaunchConfig
    itemsizes: tuple[int, ...] = (2, 4)
    architectures: tuple[str, ...] = ()  # all, if empty


# The interpreter takes milliseconds a program of any size. The decode layer has many small programs, so
# the interpreter gets larger ones. (tests/test_kernel_decode_layer.py runs the GPUs' lines too.)
# AMD's matrix instructions take 16 columns.
AMD_GROUPS = Row(1 << 14, LaunchConfig(2, 2, num_warps=8), architectures=AMD)
INTERPRETED_GROUPS = Row(1 << 14, LaunchConfig(2, 4, num_warps=4), architectures=(INTERPRETER,))

# The first line that fits is used.
TABLE: dict[str, tuple[Row, ...]] = {
    # block_m: rows at a time; up to a width of 1024 one warp works on a row
    "rms_norm_fwd": (
        Row(1024, LaunchConfig(2, 0, num_warps=1)),
        Row(4096, LaunchConfig(1, 0, num_warps=4)),
        Row(1 << 17, LaunchConfig(1, 0, num_warps=16)),
    ),
    # The backward pass also holds dw. Two rows of 960 columns spill on sm_80, and two rows of any width on
    # gfx1100. With four warps, fp32 weights and Triton 3.7, rows of 2,048 spill on sm_100 and sm_120.
    "rms_norm_bwd": (
        Row(1024, LaunchConfig(1, 0, num_warps=1), architectures=("gfx1100",)),
        Row(640, LaunchConfig(2, 0, num_warps=1)),
        Row(1024, LaunchConfig(1, 0, num_warps=2)),
        Row(4096, LaunchConfig(1, 0, num_warps=8), architectures=("sm_100", "sm_120")),
        Row(4096, LaunchConfig(1, 0, num_warps=4)),
        Row(1 << 17, LaunchConfig(1, 0, num_warps=16)),
    ),
    # block_m: partial sums added at a time, block_n: columns. A thread has four 16-byte loads in flight, so
    # the thousand shares of an H100 take two waits for memory; at 32 at a time it was 32 waits in a row.
    "rms_norm_dw": (
        Row(1 << 17, LaunchConfig(32, 32, num_warps=4), architectures=(INTERPRETER,)),
        Row(1 << 17, LaunchConfig(512, 8, num_warps=8)),
    ),
    # block_m: rows, block_n: columns of a tile
    "swiglu": (Row(1 << 20, LaunchConfig(4, 512, num_warps=4)),),
    # As swiglu, of the fused MLP; the size is the ffn width. Its products take 64 elements of k at a time, in
    # the forward pass for twice as many columns. sm_80's lines fit the 99 KB of shared memory of sm_86 and
    # sm_89. One program runs on a multiprocessor: it may use all registers, and does on sm_90 (backward) and
    # sm_100 (forward), without a spill. On sm_120 128 x 64 spills 16 bytes backward at Triton 3.6.
    "mlp_fwd": (
        Row(1 << 20, LaunchConfig(64, 128, num_warps=4), architectures=(INTERPRETER,)),
        Row(1 << 20, LaunchConfig(128, 128, num_warps=8, num_stages=3), (2,), WARPGROUP),
        Row(1 << 20, LaunchConfig(128, 64, num_warps=8, num_stages=3), (2,), ("sm_80", "sm_120")),
        Row(1 << 20, LaunchConfig(128, 64, num_warps=8, num_stages=2), (2,), ("gfx942",)),
        Row(1 << 20, LaunchConfig(64, 64, num_warps=8), (2,), ("gfx1100",)),
        Row(1 << 20, LaunchConfig(32, 32, num_warps=8), (4,)),
    ),
    "mlp_bwd": (
        Row(1 << 20, LaunchConfig(64, 128, num_warps=4), architectures=(INTERPRETER,)),
        Row(1 << 20, LaunchConfig(128, 128, num_warps=8, num_stages=4), (2,), WARPGROUP),
        Row(1 << 20, LaunchConfig(128, 64, num_warps=8, num_stages=3), (2,), ("sm_80",)),
        Row(1 << 20, LaunchConfig(64, 128, num_warps=8, num_stages=2), (2,), ("sm_120",)),
        Row(1 << 20, LaunchConfig(128, 64, num_warps=8, num_stages=2), (2,), ("gfx942",)),
        Row(1 << 20, LaunchConfig(64, 64, num_warps=8), (2,), ("gfx1100",)),
        Row(1 << 20, LaunchConfig(32, 32, num_warps=8), (4,)),
    ),
    # block_m: queries, block_n: keys of a tile; the size is the head dim. fp32 has no matrix instructions and
    # needs small tiles, or it spills. Measured on sm_90 at 512 tokens, on older versions of these kernels:
    # forward 44.8 us (two stages 46.9; 128 queries and eight warps 53.4); the whole backward pass 174 us with
    # this dq (174.6 with three stages, which fit three programs instead of four), and 161 with one stage of
    # this dk/dv instead of 186 with two. Two stages then spilled at Triton 3.6, drained at the end of each
    # head and copied lse and delta number by number. Now they take 222 to 234 registers without a spill, as
    # many programs fit (two), and loads continue from head to head; three stages take 254 with documents. Not
    # measured. dq of sm_100 and forward at 128 columns have three stages, dk/dv of sm_80 and sm_120 two: when
    # compiled, they spill nothing and fit no fewer programs. dk/dv of sm_100 keeps one: two take a third more
    # instructions at Triton 3.6. dq of 128 columns on sm_90 keeps one: with two, ptxas serializes its
    # products. On sm_80 and sm_120 mma.sync keeps the accumulators in registers, which leaves dk/dv room for
    # 32 queries only. On gfx a prefetch spills. A branch around the mask costs sm_90 nothing. On sm_100 dk/dv
    # of 64 columns is better without it, and dq of 128 spills 8 bytes with it at Triton 3.6. Elsewhere it
    # sends the matrix operands through shared memory, or spills. (In the interpreter fp32 has the branch and
    # 16 bits have not, so that the tests run both.)
    "attention_fwd": (
        Row(64, LaunchConfig(128, 64, num_warps=8, num_stages=3), (2,), ("sm_80", "sm_120")),
        Row(64, LaunchConfig(64, 64, num_warps=4, num_stages=3, branch=True), (2,), WARPGROUP),
        Row(64, LaunchConfig(128, 64, num_warps=4, num_stages=1), (2,), ("gfx942",)),
        Row(64, LaunchConfig(128, 64, num_warps=8, num_stages=1), (2,), ("gfx1100",)),
        Row(128, LaunchConfig(64, 32, num_warps=4, num_stages=2), (2,), ("sm_80",)),
        Row(128, LaunchConfig(128, 32, num_warps=8, num_stages=2), (2,), ("sm_120",)),
        Row(128, LaunchConfig(128, 32, num_warps=8, num_stages=1), (2,), ("gfx942",)),
        Row(128, LaunchConfig(128, 16, num_warps=8, num_stages=1), (2,), ("gfx1100",)),
        Row(128, LaunchConfig(128, 64, num_warps=8, num_stages=3, branch=True), (2,), WARPGROUP),
        Row(128, LaunchConfig(128, 64, num_warps=8, num_stages=2), (2,), (INTERPRETER,)),
        Row(128, LaunchConfig(32, 32, num_warps=8, num_stages=1, branch=True), (4,), (INTERPRETER,)),
        Row(128, LaunchConfig(32, 32, num_warps=8, num_stages=1)),
    ),
    "attention_bwd_dq": (
        Row(64, LaunchConfig(128, 32, num_warps=8, num_stages=1), (2,), ("gfx942",)),
        Row(64, LaunchConfig(64, 32, num_warps=8, num_stages=1), (2,), ("gfx1100",)),
        Row(64, LaunchConfig(64, 64, num_warps=4, num_stages=2, branch=True), (2,), ("sm_90",)),
        Row(64, LaunchConfig(128, 64, num_warps=8, num_stages=3, branch=True), (2,), ("sm_100",)),
        Row(64, LaunchConfig(128, 64, num_warps=8, num_stages=2), (2,)),
        Row(128, LaunchConfig(128, 32, num_warps=8, num_stages=1), (2,), ("gfx942",)),
        Row(128, LaunchConfig(64, 16, num_warps=8, num_stages=1), (2,), ("gfx1100",)),
        Row(128, LaunchConfig(64, 64, num_warps=8, num_stages=1, branch=True), (2,), ("sm_90",)),
        Row(128, LaunchConfig(64, 64, num_warps=8, num_stages=1), (2,)),
        Row(128, LaunchConfig(32, 32, num_warps=8, num_stages=1, branch=True), (4,), (INTERPRETER,)),
        Row(128, LaunchConfig(32, 32, num_warps=8, num_stages=1)),
    ),
    "attention_bwd_dkv": (
        Row(64, LaunchConfig(32, 64, num_warps=4, num_stages=2), (2,), ("sm_80", "sm_120")),
        Row(64, LaunchConfig(32, 64, num_warps=4, num_stages=1), (2,), ("gfx942",)),
        Row(64, LaunchConfig(64, 64, num_warps=8, num_stages=1), (2,), ("sm_100",)),
        Row(64, LaunchConfig(16, 32, num_warps=8, num_stages=1), (2,), ("gfx1100",)),
        Row(64, LaunchConfig(64, 64, num_warps=4, num_stages=2, branch=True), (2,), ("sm_90",)),
        Row(128, LaunchConfig(16, 64, num_warps=8, num_stages=1), (2,), ("gfx942",)),
        Row(128, LaunchConfig(16, 16, num_warps=8, num_stages=1), (2,), ("gfx1100",)),
        Row(128, LaunchConfig(64, 64, num_warps=8, num_stages=1, branch=True), (2,), WARPGROUP),
        Row(128, LaunchConfig(64, 64, num_warps=8, num_stages=1), (2,)),
        Row(128, LaunchConfig(16, 32, num_warps=8, num_stages=1, branch=True), (4,), (INTERPRETER,)),
        Row(128, LaunchConfig(16, 32, num_warps=8, num_stages=1)),
    ),
    # block_n: keys of a tile, whose rows are the queries of a group, padded to 16; the size is the head dim
    "decode_attention": (Row(128, LaunchConfig(16, 64, num_warps=4, num_stages=2)),),
    # The same in a decode layer, whose few rows wait for latency: three stages request all keys of a split at
    # once. Where there is less shared memory they would leave room for fewer programs.
    "decode_layer_attention": (
        Row(64, LaunchConfig(16, 64, num_warps=4, num_stages=3), (2,), WARPGROUP),
        Row(128, LaunchConfig(16, 64, num_warps=4, num_stages=2)),
    ),
    # The products of a decode step. block_n: weight rows of a program, in groups of eight (four pairs in the
    # norm products); block_m: tiles of 32 elements a warp that it requests ahead; the size is the length of a
    # row.
    "decode_qkv": (
        INTERPRETED_GROUPS,
        AMD_GROUPS,
        Row(1024, LaunchConfig(8, 1, num_warps=4)),
        Row(4096, LaunchConfig(8, 1, num_warps=8)),
        Row(1 << 14, LaunchConfig(8, 1, num_warps=16)),
    ),
    "decode_gate_up": (
        INTERPRETED_GROUPS,
        AMD_GROUPS,
        Row(640, LaunchConfig(5, 4, num_warps=4)),
        Row(4096, LaunchConfig(8, 2, num_warps=8)),
        Row(1 << 14, LaunchConfig(4, 2, num_warps=16)),
    ),
    "decode_o": (
        INTERPRETED_GROUPS,
        AMD_GROUPS,
        Row(4096, LaunchConfig(8, 1, num_warps=8)),
        Row(1 << 14, LaunchConfig(8, 1, num_warps=16)),
    ),
    "decode_down": (
        INTERPRETED_GROUPS,
        AMD_GROUPS,
        Row(4096, LaunchConfig(8, 1, num_warps=8)),
        Row(1 << 14, LaunchConfig(4, 1, num_warps=16)),
    ),
    # A program requests a whole row of the embedding at once; with more warps the 64 lanes of gfx942 would
    # have less than 16 bytes each.
    "decode_inputs": (
        Row(1024, LaunchConfig(1, 0, num_warps=2)),
        Row(4096, LaunchConfig(1, 0, num_warps=4)),
        Row(1 << 14, LaunchConfig(1, 0, num_warps=16)),
    ),
    # block_n: scores at a time, all of which are requested before one is needed
    "next_token": (Row(1 << 20, LaunchConfig(1, 8192, num_warps=16)),),
    # block_m: programs of a multiprocessor; block_n: columns of the vocabulary at a time. On an H200 4.3 TB/s
    # at a latency of 1.2 us want 40 kB under way on each multiprocessor: there are 128. Not measured.
    "decode_head": (
        Row(1 << 14, LaunchConfig(2, 32, num_warps=4), architectures=(INTERPRETER,)),
        Row(1 << 14, LaunchConfig(2, 128, num_warps=4, num_stages=5), (2,), WARPGROUP),
        Row(1 << 14, LaunchConfig(2, 64, num_warps=4, num_stages=4), (2,), ("sm_80", "sm_120")),
        Row(1 << 14, LaunchConfig(2, 64, num_warps=8, num_stages=2), (2,), ("gfx1100",)),
        Row(1 << 14, LaunchConfig(2, 64, num_warps=4, num_stages=2), (2,), ("gfx942",)),
        Row(1 << 14, LaunchConfig(4, 32, num_warps=4, num_stages=2)),
    ),
    # block_n: columns of the vocabulary at a time. 16 warps, because all rows between their two passes must
    # fit in L2. More than one stage would prefetch the next columns; not measured.
    "linear_cross_entropy": (Row(1 << 20, LaunchConfig(1, 8192, num_warps=16)),),
    # block_n: columns of a program; block_m: tokens of equal id, or sums of them, loaded at a time
    "embedding_fwd": (Row(1 << 20, LaunchConfig(1, 1024, num_warps=1)),),
    "embedding_bwd": (Row(1 << 20, LaunchConfig(8, 1024, num_warps=4)),),
    # A chunk is block_m blocks of block_n elements in both kernels that own one; in adamw_norm block_n is the
    # number of partial sums at a time. A thread has one 16-byte load of each tensor in flight and 56
    # registers on sm_90; two loads (1,024 elements) take 72 and spill on sm_120.
    "adamw": (
        Row(1, LaunchConfig(16, 1024, num_warps=4), architectures=(INTERPRETER,)),
        Row(1, LaunchConfig(8, 1024, num_warps=4), architectures=("gfx942",)),
        Row(1, LaunchConfig(16, 512, num_warps=4)),
    ),
    "adamw_squares": (Row(1, LaunchConfig(0, 2048, num_warps=4)),),
    "adamw_norm": (Row(1, LaunchConfig(0, 4096, num_warps=8)),),
    # block_m: tokens of a program, block_n: heads at most; the size is the head dim. gfx942 has 64 lanes, so
    # 16-byte accesses need twice as many tokens.
    "rope": (
        Row(64, LaunchConfig(16, 5, num_warps=1), architectures=("gfx942",)),
        Row(64, LaunchConfig(8, 5, num_warps=1)),
        Row(1 << 10, LaunchConfig(16, 5, num_warps=2), architectures=("gfx942",)),
        Row(1 << 10, LaunchConfig(8, 5, num_warps=2)),
    ),
}


@functools.cache
def launch_config(op: str, dtype: torch.dtype, device: torch.device, size: int) -> LaunchConfig:
    """The launch of a kernel for a dtype, a device and a size. Raises ValueError if the table has no line."""
    target = architecture(device)
    for row in TABLE[op]:
        there = not row.architectures or target in row.architectures
        if there and size <= row.size and dtype.itemsize in row.itemsizes:
            return row.launch
    raise ValueError(f"{op}: expected a size of at most {TABLE[op][-1].size}, got {size}")


@functools.cache
def architecture(device: torch.device) -> str:
    """The name of a device's target, "sm_90" or "gfx942", or "interpreter" when Triton runs in numpy. Raises
    ValueError for a device that runs no Triton kernels.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return INTERPRETER
    if device.type in ("cpu", "mps"):
        raise ValueError(
            f"Triton kernels: expected tensors on a CUDA, ROCm or XPU device, got {device.type}; set "
            "TRITON_INTERPRET=1 before Python starts, or use backend 'torch', which computes the same"
        )
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return name if name in AMD else AMD[0]
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        # a list: torch.compile, which looks into this, has no generators
        return f"sm_{max([NVIDIA[0], *[target for target in NVIDIA if target <= 10 * major + minor]])}"
    return f"sm_{NVIDIA[0]}"  # XPU, and any other device: the most modest target


def dependence(device: torch.device, dependent: bool = True) -> dict[str, bool]:
    """The constant and the option of a launch that may begin before the one before it has ended
    (kernels/decode_product.py), where the device has that.
    """
    dependent = dependent and architecture(device) in DEPENDENT_LAUNCH
    return {"DEPENDENT": True, "launch_pdl": True} if dependent else {"DEPENDENT": False}


def decode_launch(
    op: str, dtype: torch.dtype, device: torch.device, size: int, dependent: bool = True
) -> dict[str, int | bool]:
    """The constants and options of a product of a decode step with rows of that size."""
    config = launch_config(op, dtype, device, size)
    tiles = -(-size // (32 * config.num_warps))
    return {
        "GROUPS": config.block_n, "WARPS": config.num_warps, "AHEAD": min(config.block_m, tiles),
        "num_warps": config.num_warps, **dependence(device, dependent),
    }  # fmt: skip


def has_descriptors(device: torch.device) -> bool:
    """Whether kernels use tensor descriptors for matrices on that device."""
    return architecture(device) in DESCRIPTORS


def fuses_mlp(device: torch.device) -> bool:
    """Whether the fused form of the MLP is used on that device."""
    return architecture(device) in FUSED_MLP


def joins_layers(device: torch.device) -> bool:
    """Whether all layers of a decode step are one launch on that device."""
    return architecture(device) in ONE_LAUNCH


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs the device runs at a time if each of them fills a multiprocessor."""
    if architecture(device) == INTERPRETER:
        return 3  # few, so that programs own several rows even in small tests
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128


@functools.cache
def programs(device: torch.device) -> int:
    """How many programs a kernel that loops over rows needs to keep the device busy: 8 a multiprocessor."""
    return multiprocessors(device) * (1 if architecture(device) == INTERPRETER else 8)
