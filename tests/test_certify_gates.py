"""The certificate's gates, on planted rows: a kernel that spills, does not fit, or moves data in small pieces
does not pass.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from kernels.certify import __main__ as certify
from kernels.certify.gates import differences
from kernels.certify.measure import amd_occupancy, early_barriers, nvidia_occupancy
from kernels.certify.targets import TARGETS

FIGURES = {
    "registers": 128, "spill_bytes": 0, "scalar_spills": 0, "shared": 65536, "warps": 8,
    "matrix": {"wgmma": 16}, "wide_loads": 8, "wide_stores": 4, "occupancy": 0.25, "limited_by": "registers",
    "serialized": 0,
}  # fmt: skip


def row(version: str = "3.7.1", **changes: Any) -> dict[str, Any]:
    """A row that passes every gate, the attention kernel on sm_90, with figures of one version; then what is
    changed of it and of them.
    """
    passing = {
        "key": "0", "target": "sm_90", "dtype": "bfloat16", "op": "attention", "phase": "forward",
        "kernel": "_attention_fwd_kernel", "cases": ["planted"], "constants": {}, "not_divisible": [],
        "options": {"num_warps": 8, "num_stages": 2},
    }  # fmt: skip
    own = (*FIGURES, "early_barriers", "error")
    changed = {name: value for name, value in changes.items() if name in own}
    others = {name: value for name, value in changes.items() if name not in changed}
    return {**passing, "figures": {version: {**FIGURES, **changed}}, **others}


OF_O = {"kernel": "_combine_o_kernel", "op": "decode_layer", "matrix": {"mma.sync": 8}}


def test_clean_row_passes():
    assert certify.faults([row()]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"spill_bytes": 8, "dtype": "float16"}, "spills 8 bytes"),
        ({"shared": 227 * 1024 + 1}, "shared memory"),
        ({"shared": 227 * 1024 + 1, "dtype": "float32"}, "shared memory"),
        ({"serialized": 1}, "serialized"),
        ({**OF_O, "early_barriers": 5}, "5 barriers before it waits"),
        ({"matrix": {"mma.sync": 128}}, "no wgmma"),
        ({"target": "sm_100"}, "no tcgen05"),
        ({"matrix": {}, "target": "gfx1100", "shared": 1024}, "no v_wmma"),
        ({**OF_O, "matrix": {"wgmma": 16}}, "no mma.sync instruction, only {'wgmma': 16}"),
        ({**OF_O, "matrix": {}, "kernel": "_project_kernel"}, "no mma.sync instruction, only none"),
        ({"kernel": "_norm_head_kernel", "matrix": {}, "target": "sm_80", "dtype": "float16"}, "no mma.sync"),
        ({**OF_O, "target": "gfx942", "shared": 1024}, "no v_mfma"),
        ({**OF_O, "wide_loads": 0, "wide_stores": 0}, "0 loads"),
        ({"kernel": "_swiglu_fwd_kernel", "wide_loads": 0}, "0 loads"),
        ({"kernel": "_swiglu_fwd_kernel", "wide_stores": 0}, "0 stores"),
        ({"kernel": "_next_token_kernel", "wide_loads": 0, "constants": {"SCORES": True}}, "0 loads"),
        (
            {"kernel": "_softmax_gradient_kernel", "wide_stores": 0, "constants": {"GRADIENT": True}},
            "0 stores",
        ),
        ({"error": "CompilationError: no"}, "does not compile"),
    ],
)
def test_planted_fault_fails(changes, message):
    (fault,) = certify.faults([row(), row(**changes)])
    assert message in fault
    assert "planted" in fault


def test_a_fault_in_one_version_is_a_fault():
    (fault,) = certify.faults([row(figures={"3.7.1": FIGURES, "3.6.0": {**FIGURES, "spill_bytes": 104}})])
    assert fault.endswith("Triton 3.6.0: spills 104 bytes")


def two_versions(which: str, newer: int, older: int, **changes: Any) -> dict[str, Any]:
    figures = {"3.7.1": {**FIGURES, which: newer}, "3.6.0": {**FIGURES, which: older}}
    return row(figures=figures, **changes)


def test_twofold_shared_memory_in_one_version_is_a_fault():
    (fault,) = certify.faults([two_versions("shared", 4096, 8192)])
    assert "(planted): shared memory 4096 with Triton 3.7.1, 8192 with Triton 3.6.0" in fault
    near = two_versions("shared", 4096, 8191), two_versions("shared", 0, 1024)
    others = two_versions("shared", 4096, 8192, dtype="float32"), {**row(), "figures": {"3.7.1": FIGURES}}
    assert certify.faults([*near, *others]) == []


def test_registers_that_differ_between_versions_are_named_but_no_fault():
    rows = [two_versions("registers", 114, 150), two_versions("registers", 100, 125)]
    (difference,) = differences(rows)
    assert difference.endswith("(planted): registers 114 with Triton 3.7.1, 150 with Triton 3.6.0")
    assert certify.faults(rows) == []
    certificate = {"triton": ["3.7.1", "3.6.0"], "launches": {}, "numerics": [], "rows": rows}
    assert f"- {difference}\n" in certify.page(certificate)


EXCHANGE = """
import json
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def kernel(x_ptr, EARLY: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 256))
    if EARLY:
        x = tl.sum(x)
    tl.extra.cuda.gdc_wait()
    tl.store(x_ptr, x if EARLY else tl.sum(x))

for early in (True, False):
    source = ASTSource(kernel, {"x_ptr": "*fp32", "EARLY": "constexpr"}, {"EARLY": early})
    options = {"num_warps": 4, "launch_pdl": True}
    print(json.dumps(triton.compile(source, GPUTarget("cuda", 90, 32), options).asm["ptx"]))
"""


def test_barriers_before_the_wait_are_counted(tmp_path):
    """Where the sum of what four warps loaded comes before the wait, and where it comes after."""
    script = tmp_path / "exchange.py"
    script.write_text(EXCHANGE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    early, late = (json.loads(line) for line in done.stdout.splitlines())
    assert early_barriers(early) > 0 == early_barriers(late)
    assert early_barriers(early.replace("griddepcontrol.wait", "")) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"spill_bytes": 8, "dtype": "float32"},  # ieee fp32: reported only
        {"early_barriers": 5, "dtype": "float32"},
        {"spill_bytes": 8, "target": "gfx942", "matrix": {"v_mfma": 4}, "shared": 1024},
        {"kernel": "_decode_attention_split_kernel", "matrix": {"mma.sync": 4}},
        {**OF_O, "wide_stores": 0},
        {**OF_O, "matrix": {}, "dtype": "float32"},
        {**OF_O, "matrix": {"v_mfma": 4}, "target": "gfx942", "shared": 1024},
        {"kernel": "_softmax_gradient_kernel", "wide_stores": 0, "constants": {"GRADIENT": False}},
    ],
)
def test_what_is_reported_only(changes):
    assert certify.faults([row(**changes)]) == []


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "expected"),
    [
        ("sm_90", 128, 8, 65536, (0.25, "registers")),
        ("sm_90", 129, 8, 65536, (0.125, "registers")),
        ("sm_90", 32, 8, 0, (1.0, "warps")),
        ("sm_90", 32, 1, 0, (0.5, "warps")),  # 32 programs of one warp
        ("sm_120", 64, 4, 60 * 1024, (0.083, "shared memory")),
        ("sm_80", 40, 4, 0, (0.75, "registers")),
    ],
)
def test_occupancy_of_nvidia_targets(target, registers, warps, shared, expected):
    assert nvidia_occupancy(TARGETS[target], registers, warps, shared) == expected


def test_occupancy_by_tensor_memory_and_of_amd():
    assert nvidia_occupancy(TARGETS["sm_100"], 64, 4, 0, tensor_columns=256) == (0.125, "tensor memory")
    assert amd_occupancy(TARGETS["gfx942"], waves=2, warps=8, shared=16384) == (0.25, "registers")
    assert amd_occupancy(TARGETS["gfx1100"], waves=16, warps=4, shared=65536) == (0.125, "shared memory")


def test_numerics_are_merged_by_op_and_dtype():
    old = [{"op": "rope", "dtype": "float16", "worst": 0.5}, {"op": "rope", "dtype": "float32", "worst": 0.1}]
    merged = certify.merge_numerics(old, [{"op": "rope", "dtype": "float16", "worst": 0.7}])
    assert merged == [
        {"op": "rope", "dtype": "float16", "worst": 0.7},
        {"op": "rope", "dtype": "float32", "worst": 0.1},
    ]


def test_files_are_a_function_of_the_certificate():
    both = {"3.7.1": FIGURES, "3.6.0": {**FIGURES, "registers": 255}}
    certificate = {
        "triton": ["3.7.1", "3.6.0"],
        "launches": {"layer": {"forward": {"rope": 1}, "backward": {}}},
        "numerics": [{"op": "rope", "dtype": "float16", "worst": 0.7}],
        "rows": [
            row(key="1", constants={"BLOCK_M": 64}),
            row(key="2", constants={"BLOCK_M": 128}, figures=both),
        ],
    }
    assert json.loads(certify.dump(certificate)) == certificate
    page = certify.page(certificate)
    assert "| BLOCK_M=64 | bfloat16 | 8 x 2 | 128 | 0 |" in page
    assert "| BLOCK_M=128 | bfloat16 | 8 x 2 | 128; 255 | 0 |" in page
    assert "| sm_90 | 3.6.0 | 1 | 255 | 0 |" in page and "| sm_90 | 3.7.1 | 2 | 128 | 0 |" in page
    assert "| layer | 1 | 0 | rope 1 |" in page
    assert "| rope | float16 | 0.700 |" in page
