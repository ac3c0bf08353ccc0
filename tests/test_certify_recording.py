"""The recorder behind the certificate: what it says would be launched, where Triton is not interpreted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from kernels.certify import __main__ as certify  # noqa: E402

RECORD = """
import dataclasses, json, torch
from collections import Counter
from triton.compiler import ASTSource, compile
from kernels import decode_step, launch_config
from kernels.backend import load_triton
from kernels.certify import cases, targets
from kernels.certify.recorder import recording, tensor
from kernels.certify.__main__ import launch_counts
from smollm2.config import SmolLM2Config
from smollm2.model import SmolLM2ForCausalLM

ops = load_triton()

def record(case, target="sm_90"):
    with recording(targets.TARGETS[target]) as recorder:
        case(recorder)
    return [dataclasses.asdict(launch) | {"key": launch.key} for launch in recorder.launches]

def swiglu(run):
    cases.swiglu_separate(run, ops)

def swiglu_of_slices(run):
    for rows, width, first in ((16, 1552, 0), (5, 1544, 1), (1, 1552, 0)):
        x = tensor(rows, width, dtype=torch.bfloat16)[:, first : first + 1536]
        ops.swiglu(x, x)

def step(run):
    with torch.device("meta"):
        config = SmolLM2Config.preset("135M")
        model = SmolLM2ForCausalLM(config, backend=ops, compute_dtype=torch.bfloat16)
        ids = torch.zeros(32, 512, dtype=torch.int64)
    run.backward(model(ids, labels=ids).loss)

def ptx(launch):
    attributes = {(int(index),): value for index, value in launch["attributes"].items()}
    kernel = getattr(decode_step, launch["kernel"])
    source = ASTSource(kernel, launch["signature"], launch["constants"], attributes)
    return compile(source, targets.TARGETS["sm_90"].gpu, launch["options"]).asm["ptx"]

shapes = ((1, 1, 100), (1, 1, 1000), (2, 1, 1000), (15, 1, 1000), (16, 1, 2000), (1, 16, 1000), (5, 3, 1000))
counted = Counter((launch["phase"], launch["op"]) for launch in record(step))
composed = launch_counts(cases.record(targets.TARGETS["sm_90"]))["step"]
found = {
    "swiglu": record(swiglu),
    "slices": record(swiglu_of_slices),
    "step": [{p: {op: n for (q, op), n in counted.items() if p == q} for p in composed}, composed],
    "ends": [
        [launch["kernel"], ptx(launch)]
        for launch in record(lambda run: cases.ends(run, ops, "135M"))
        if launch["op"] == "decode_step"
    ],
    "decode": [record(lambda run: cases.decode(run, ops, *shape)) for shape in shapes],
}
row = launch_config.Row(1 << 20, launch_config.LaunchConfig(2, 256, 8), architectures=("gfx1100",))
launch_config.TABLE["swiglu"] = (row, *launch_config.TABLE["swiglu"])
found["targets"] = [record(swiglu, target)[0] for target in ("sm_90", "gfx1100")]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def recorded(project_root):
    """What RECORD prints."""
    changed = ("TRITON_INTERPRET", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in changed}
    command = [sys.executable, "-c", RECORD]
    done = subprocess.run(command, cwd=project_root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_records_both_passes_of_a_simple_op(recorded):
    forward, backward = recorded["swiglu"]
    assert (forward["kernel"], forward["phase"]) == ("_swiglu_fwd_kernel", "forward")
    assert (backward["kernel"], backward["phase"]) == ("_swiglu_bwd_kernel", "backward")
    assert forward["op"] == "swiglu" and forward["dtype"] == "bfloat16"
    assert forward["constants"]["WIDTH"] == 1536
    assert forward["signature"]["gate_ptr"] == "*bf16"
    assert forward["options"]["num_warps"] > 0
    assert forward["key"] != backward["key"]


def test_specialisation_follows_the_call(recorded):
    """A slice that starts at two bytes is not aligned, a stride of 1544 is no multiple of 16; the number of
    rows is never looked at.
    """
    aligned, odd, single = recorded["slices"]
    divisible = [["tt.divisibility", 16]]
    names = list(aligned["signature"])
    gate, stride, rows = (str(names.index(name)) for name in ("gate_ptr", "gate_stride", "rows"))
    assert aligned["attributes"][gate] == divisible and aligned["attributes"][stride] == divisible
    assert gate not in odd["attributes"] and stride not in odd["attributes"]
    for launch in (aligned, odd, single):  # 16, 5 and 1 rows: one compilation serves all
        assert launch["signature"]["rows"] == "i32" and rows not in launch["attributes"]
    assert single["key"] == aligned["key"]


def test_each_target_gets_its_own_configuration(recorded):
    nvidia, amd = recorded["targets"]
    assert nvidia["target"] == "sm_90" and amd["target"] == "gfx1100"
    assert (amd["constants"]["ROWS"], amd["constants"]["BLOCK"], amd["options"]["num_warps"]) == (2, 256, 8)
    assert (nvidia["constants"]["ROWS"], nvidia["constants"]["BLOCK"]) != (2, 256)


def test_launch_counts_are_those_of_the_model(recorded):
    """The step that the certificate composes from a layer, a norm and a loss is the step that the model
    makes.
    """
    model, composed = recorded["step"]
    assert model == composed


def test_a_decode_layer_is_the_same_launches_whatever_its_rows(recorded):
    """One machine code for 1 to 16 rows and any capacity is what makes a row's bits its own. Only the launch
    of o is another one for a single row, which adds the splits itself.
    """
    first, *others = [
        {launch["kernel"] + str(launch["constants"].get("INPUTS", "")): launch["key"] for launch in launches}
        for launches in recorded["decode"]
    ]
    both = ["_norm_qkv_rope_kernel", "_norm_gate_up_kernel", "_project_kernel1536"]
    assert first.keys() == {*both, "_decode_attention_split_kernel", "_combine_o_kernel"}
    assert others[0] == first
    for other in others[1:]:
        assert other.keys() == {
            *both, "_decode_attention_split_kernel", "_decode_attention_combine_kernel", "_project_kernel576"
        }  # fmt: skip
        assert [other[kernel] for kernel in both] == [first[kernel] for kernel in both]
    many = others[1]
    assert many["_decode_attention_split_kernel"] == first["_decode_attention_split_kernel"]
    assert others[2:4] == [many, many]
    for other in others[4:]:  # several tokens of a row: their queries are one tile of the attention
        del other["_decode_attention_split_kernel"]
        assert other.items() <= many.items()


def test_what_a_program_writes_over_it_has_read_before_a_barrier(recorded):
    """All threads of a program read its row's length, or its mark and slot, and one of them writes these. No
    interpreter shows this race.
    """
    assert len(recorded["ends"]) == 4  # of a greedy step, twice the end; of a sampled one, the end
    for kernel, text in recorded["ends"]:
        accesses = re.findall(r"\b(ld\.global|st\.global|bar\.sync)(?:.*?\[ *(%rd\d+)[ +\]])?", text)
        reads = {address for kind, address in accesses if kind == "ld.global"}
        last = max(index for index, (kind, _) in enumerate(accesses) if kind == "bar.sync")
        before, after = accesses[:last], accesses[last:]
        assert not reads & {address for kind, address in before if kind == "st.global"}, kernel
        written = [address for kind, address in after if kind == "st.global"]
        assert len(written) == {"_decode_inputs_kernel": 1, "_next_token_kernel": 2}[kernel]
        assert reads >= set(written), kernel


def test_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert certify.main(["--check"]) == 2
    error = capsys.readouterr().err
    assert "TRITON_INTERPRET=1" in error and "unset" in error
