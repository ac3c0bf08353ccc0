"""The recorder behind the certificate: what it says would be launched. Each test runs where Triton is not
interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")


def run(root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python in the project's root without TRITON_INTERPRET (unless it is given)."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment | variables, capture_output=True, text=True
    )


def result(root: Path, script: str) -> Any:
    """What the script prints as JSON."""
    done = run(root, "-c", script)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


RECORD = """
import dataclasses, json, torch
from kernels.certify import cases, targets
from kernels.certify.recorder import recording, tensor
from kernels.backend import load_triton
ops = load_triton()
def record(target, case):
    with recording(targets.TARGETS[target]) as recorder:
        case(recorder)
    return recorder.launches
def show(found):
    print(json.dumps([dataclasses.asdict(launch) | {"key": launch.key} for launch in found]))
"""


def test_records_both_passes_of_a_simple_op(project_root: Path) -> None:
    forward, backward = result(
        project_root, RECORD + "show(record('sm_90', lambda run: cases.swiglu_separate(run, ops)))"
    )
    assert (forward["kernel"], forward["phase"]) == ("_swiglu_fwd_kernel", "forward")
    assert (backward["kernel"], backward["phase"]) == ("_swiglu_bwd_kernel", "backward")
    assert forward["op"] == "swiglu" and forward["dtype"] == "bfloat16"
    assert forward["constants"]["WIDTH"] == 1536
    assert forward["signature"]["gate_ptr"] == "*bf16"
    assert forward["options"]["num_warps"] > 0
    assert forward["key"] != backward["key"]


def test_specialisation_follows_the_call(project_root: Path) -> None:
    """A slice that starts at two bytes is not aligned, a stride of 1544 is no multiple of 16; the number of
    rows is never looked at.
    """
    script = """
def case(run):
    for rows, width, first in ((16, 1552, 0), (5, 1544, 1), (1, 1552, 0)):
        x = tensor(rows, width, dtype=torch.bfloat16)[:, first : first + 1536]
        ops.swiglu(x, x)
show(record('sm_90', case))
"""
    aligned, odd, single = result(project_root, RECORD + script)
    divisible = [["tt.divisibility", 16]]
    names = list(aligned["signature"])
    gate, stride, rows = (str(names.index(name)) for name in ("gate_ptr", "gate_stride", "rows"))
    assert aligned["attributes"][gate] == divisible and aligned["attributes"][stride] == divisible
    assert gate not in odd["attributes"] and stride not in odd["attributes"]
    for launch in (aligned, odd, single):  # 16, 5 and 1 rows: one compilation serves all
        assert launch["signature"]["rows"] == "i32" and rows not in launch["attributes"]
    assert single["key"] == aligned["key"]


def test_each_target_gets_its_own_configuration(project_root: Path) -> None:
    script = """
from kernels import launch_config
table = dict(launch_config.TABLE)
launch_config.TABLE["swiglu"] = (launch_config.Row(1 << 20, launch_config.Launch(2, 256, 8), architectures=("gfx1100",)), *table["swiglu"])
show([record(target, lambda run: cases.swiglu_separate(run, ops))[0] for target in ("sm_90", "gfx1100")])
"""
    nvidia, amd = result(project_root, RECORD + script)
    assert nvidia["target"] == "sm_90" and amd["target"] == "gfx1100"
    assert (amd["constants"]["ROWS"], amd["constants"]["BLOCK"], amd["options"]["num_warps"]) == (2, 256, 8)
    assert (nvidia["constants"]["ROWS"], nvidia["constants"]["BLOCK"]) != (2, 256)


def test_launch_counts_are_those_of_the_model(project_root: Path) -> None:
    """The step that the certificate composes from a layer, a norm and a loss is the step that the model
    makes.
    """
    script = """
from kernels.certify.__main__ import launch_counts
from kernels.certify.cases import record as record_cases
from smollm2.config import SmolLM2Config
from smollm2.model import SmolLM2ForCausalLM
with torch.device("meta"):
    model = SmolLM2ForCausalLM(SmolLM2Config.preset("135M"), backend=ops, compute_dtype=torch.bfloat16)
def step(run):
    ids = torch.zeros(32, 512, dtype=torch.int64, device="meta")
    run.backward(model(ids, labels=ids).loss)
from collections import Counter
found = Counter((launch.phase, launch.op) for launch in record("sm_90", step))
composed = launch_counts(record_cases(targets.TARGETS["sm_90"]))["step"]
print(json.dumps([{phase: {op: n for (p, op), n in found.items() if p == phase} for phase in composed}, composed]))
"""
    model, composed = result(project_root, RECORD + script)
    assert model == composed


def test_a_decode_layer_is_five_launches_whatever_its_rows(project_root: Path) -> None:
    """And the same five: one machine code for 1 to 16 rows and any capacity is what makes a row's bits its
    own.
    """
    script = """
shapes = ((1, 1, 100), (1, 1, 1000), (2, 1, 1000), (15, 1, 1000), (16, 1, 2000), (1, 16, 1000), (5, 3, 1000))
found = [record('sm_90', lambda run: cases.decode(run, ops, *shape)) for shape in shapes]
print(json.dumps([[(launch.op, launch.kernel, launch.key) for launch in one] for one in found]))
"""
    first, *others = result(project_root, RECORD + script)
    assert [kernel for _, kernel, _ in first] == [
        "_norm_qkv_rope_kernel", "_decode_attention_split_kernel", "_combine_o_kernel",
        "_norm_gate_up_kernel", "_down_kernel",
    ]  # fmt: skip
    for other in others[:-2]:
        assert other == first
    for other in others[-2:]:  # several tokens of a row: their queries are one tile of the attention
        assert [launch for launch in other if launch[0] == "decode_layer"] == [
            launch for launch in first if launch[0] == "decode_layer"
        ]
        assert len(other) == 5


def test_interpreter_is_refused(project_root: Path) -> None:
    done = run(project_root, "-m", "kernels.certify", "--check", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1" in done.stderr and "unset" in done.stderr
