"""The limits that the figures of a certificate must keep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kernels.certify.targets import TARGETS

# Kernels that only move data: each must read and write 16 bytes at a time.
MEMORY_BOUND = {
    "_rms_norm_fwd_kernel", "_rms_norm_bwd_dx_kernel", "_rope_kernel", "_rope_cache_kernel",
    "_swiglu_fwd_kernel", "_swiglu_bwd_kernel", "_softmax_gradient_kernel", "_adamw_kernel",
    "_norm_qkv_rope_kernel", "_norm_gate_up_kernel", "_combine_o_kernel", "_project_kernel",
    "_norm_head_kernel", "_decode_inputs_kernel", "_next_token_kernel", "_decode_layers_kernel",
}  # fmt: skip
# The ops and kernels of a decode step that read weights or scores but write only single rows, or numbers.
READS_ONLY = {"decode_layer", "decode_layers", "decode_head", "_next_token_kernel"}
# Kernels that must use their target's own matrix instruction.
MATRIX_BOUND = {
    "_attention_fwd_kernel", "_attention_bwd_dq_kernel", "_attention_bwd_dkv_kernel", "_mlp_fwd_kernel",
    "_mlp_bwd_kernel", "_norm_head_kernel",
}  # fmt: skip
# The products of a decode layer have 16 rows. On every NVIDIA target that takes mma.sync: wgmma and tcgen05
# want 64 and more.
SIXTEEN_ROWS = {
    "_norm_qkv_rope_kernel", "_combine_o_kernel", "_project_kernel", "_norm_gate_up_kernel",
    "_decode_layers_kernel",
}  # fmt: skip
LITTLE_SHARED = 1024  # bytes: a twofold difference of less is only another way to sum

# One line of certificate.json: a launch, without its repetitions, and its Figures by version of Triton.
Row = dict[str, Any]


def faults(rows: Iterable[Row]) -> list[str]:
    """The violations of the gates, one line each."""
    found = []
    for row in rows:
        target, kernel, dtype = TARGETS[row["target"]], row["kernel"], row["dtype"]
        shared = _of_versions(row, "shared")
        if shared and max(shared.values()) >= 2 * max(LITTLE_SHARED, min(shared.values())):
            found.append(f"{name_of(row)}: shared memory {_text(shared)}: another layout?")
        for version, figures in row["figures"].items():
            name = f"{name_of(row)}, Triton {version}"
            if "error" in figures:
                found.append(f"{name}: does not compile: {figures['error']}")
                continue
            if figures["shared"] > (limit := target.shared_limit):
                found.append(f"{name}: {figures['shared']} bytes of shared memory, the target has {limit}")
            if dtype == "float32":
                continue  # for tests, without matrix instructions: reported only
            if figures["spill_bytes"] and target.nvidia:
                found.append(f"{name}: spills {figures['spill_bytes']} bytes")
            if figures.get("serialized"):
                found.append(f"{name}: ptxas serialized its matrix instructions")
            if early := figures.get("early_barriers"):
                found.append(f"{name}: {early} barriers before it waits for the launch before it")
            wanted = "mma.sync" if kernel in SIXTEEN_ROWS and target.nvidia else target.matrix
            if kernel in MATRIX_BOUND | SIXTEEN_ROWS and not figures["matrix"].get(wanted):
                found.append(f"{name}: no {wanted} instruction, only {figures['matrix'] or 'none'}")
            loads, stores = figures["wide_loads"], figures["wide_stores"]
            wide = (loads or not _reads_rows(row)) and (stores or not _stores_rows(row))
            if kernel in MEMORY_BOUND and dtype == "bfloat16" and not wide:
                found.append(f"{name}: {loads} loads and {stores} stores of 16 bytes")
    return found


def differences(rows: Iterable[Row]) -> list[str]:
    """The rows whose registers differ by more than a quarter between versions of Triton, one line each. No
    faults, but reasons to look at the code: a layout that only one version chose may show in nothing else.
    """
    found = []
    for row in rows:
        registers = _of_versions(row, "registers")
        if registers and max(registers.values()) > 1.25 * min(registers.values()):
            found.append(f"{name_of(row)}: registers {_text(registers)}")
    return found


def name_of(row: Row) -> str:
    """A row in a message."""
    return f"{row['target']} {row['kernel']} {row['dtype']} ({row['cases'][0]})"


def _text(figures: dict[str, int]) -> str:
    return ", ".join(f"{number} with Triton {version}" for version, number in figures.items())


def _of_versions(row: Row, which: str) -> dict[str, int]:
    """That figure by version of Triton, for NVIDIA and 16 bits; empty for other rows."""
    if row["dtype"] == "float32" or not TARGETS[row["target"]].nvidia:
        return {}
    return {version: figures[which] for version, figures in row["figures"].items() if which in figures}


def _reads_rows(row: Row) -> bool:
    """Whether the kernel reads more than single numbers. The end of a sampled decode step does not."""
    return bool(row["constants"].get("SCORES", True))


def _stores_rows(row: Row) -> bool:
    """Whether the kernel writes tensors as large as those it reads. A decode step and the loss without its
    gradient do not.
    """
    return not READS_ONLY & {row["op"], row["kernel"]} and bool(row["constants"].get("GRADIENT", True))
