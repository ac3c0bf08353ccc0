"""`python -m bench.step_model --decode`: loops are counted, a warp waits for its operands, and the steps that
were measured on an H100 are predicted.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from bench import decode_model, sass, trip_counts
from bench.decode_model import Kernel
from smollm2.errors import LoadError

MEASURED = sorted(decode_model.measurements())


@triton.jit
def _row_sum(x_ptr, row, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        total += tl.load(x_ptr + row * count + start + tl.arange(0, BLOCK))
    return tl.sum(total, axis=0)


@triton.jit
def _sums_kernel(x_ptr, lengths_ptr, y_ptr, z_ptr, rows, BLOCK: tl.constexpr):
    length = tl.minimum(tl.load(lengths_ptr).to(tl.int32), 4096)
    first = _row_sum(x_ptr, 0, length, BLOCK)
    for row in range(1, rows):
        if tl.program_id(0) < 2:
            tl.store(y_ptr + row, first)
        else:
            tl.store(z_ptr + row, first)
        first = _row_sum(x_ptr, row, length, BLOCK)


@triton.jit
def _lines_kernel(x_ptr, COUNT: tl.constexpr):
    for start in range(0, COUNT, 1024 // x_ptr.dtype.element_ty.primitive_bitwidth):
        tl.store(x_ptr + start, 0.0)


def sums(rows, length, grid=(4,)):
    numbers = torch.zeros(8)
    arguments = dict(
        x_ptr=numbers, lengths_ptr=numbers.long(), y_ptr=numbers, z_ptr=numbers, rows=rows, BLOCK=16
    )
    return trip_counts.run(_sums_kernel, arguments, grid, length)


@pytest.mark.parametrize(("rows", "length", "inner"), [(1, 100, 0), (5, 100, 7), (5, 16, 1), (2, 10000, 256)])
def test_a_loop_runs_as_often_as_its_sizes_say(rows, length, inner):
    found = {
        (source[0][1], outside and outside[0][1]): times
        for (source, outside), times in sums(rows, length).trips.items()
    }
    first, last = sorted({line for line, _ in found})
    outer = {(last, None): rows - 1} | ({(first, last): inner} if rows > 1 else {})
    assert found == {(first, None): min(-(-length // 16), 256)} | outer


@pytest.mark.parametrize(("dtype", "times"), [(torch.bfloat16, 8), (torch.float32, 16)])
def test_a_loop_may_depend_on_the_size_of_an_element(dtype, times):
    found = trip_counts.run(_lines_kernel, dict(x_ptr=torch.zeros(1, dtype=dtype), COUNT=512), (1,), 1)
    assert list(found.trips.values()) == [times]


def test_the_first_and_the_last_programs_say_what_is_read_and_written():
    assert (sums(2, 16).read, sums(2, 16).written) == ({"x_ptr", "lengths_ptr"}, {"y_ptr", "z_ptr"})
    assert sums(2, 16, grid=(1,)).written == {"y_ptr"}


def code_of(*rows):
    """A listing as nvdisasm prints it; rows are instructions, or marks that end in a colon."""
    listing = [row if row.endswith(":") or row.startswith("//##") else f"  /*{16 * place:04x}*/  {row} ;"
               for place, row in enumerate(rows)]  # fmt: skip
    return sass.parsed("\n".join(listing))


LOOP = (
    '//## File "/there/kernels/x.py", line 3', "MOV R1, RZ",
    ".L_x_0:", '//## File "/there/kernels/x.py", line 5', "LDG.E.128 R4, desc[UR4][R2.64]", "FADD R1, R1, R7",
    "@P0 BRA `(.L_x_0)", "STG.E.64 desc[UR4][R2.64], R8", "EXIT",
)  # fmt: skip
SOURCE = ("/here/kernels/x.py", 4), ("/here/kernels/x.py", 6)


@pytest.mark.parametrize("times", [0, 1, 7])
def test_a_loop_of_the_machine_code_is_walked_as_often_as_its_source(times):
    code = code_of(*LOOP)
    work = sass.warp_work(code, sass.loops(code, {(SOURCE, None): times}))
    assert (work.instructions, work.loaded, work.stored) == (3 + 3 * times, 512 * times, 256)


def test_an_unrolled_loop_takes_several_iterations_at_once():
    body, rest = list(LOOP[2:7]), [row.replace("L_x_0", "L_x_1") for row in LOOP[2:7]]
    body[2:3] = [body[2]] * 4
    code = code_of(LOOP[0], *body, *rest)
    found = sass.loops(code, {(SOURCE, None): 11})
    assert [loop.times for loop in found] == [2, 3]


@pytest.mark.parametrize(
    ("rows", "cycles"),
    [
        (("MOV R1, RZ", "MOV R2, RZ"), 2),
        (("MOV R1, RZ", "MOV R2, R1"), 4 + 1),  # waits for its operand
        (("LDG.E R1, [R2.64]", "LDG.E R3, [R2.64]", "FADD R5, R1, R3"), 1 + sass.MEMORY + 1),
        (("LDG.E.64 R2, [R8.64]", "LDG.E R4, [R2.64]", "MOV R5, R4"), 2 * sass.MEMORY + 1),
        (("HMMA.16816.F32 R4, R8, R12, R4", "FADD R1, R7, R7"), 33 + 1),  # the last of four results
        (("LDGSTS.E [R1], [R2.64]", "LDGDEPBAR", "DEPBAR.LE SB0, 0x0", "MOV R5, RZ"), sass.MEMORY + 2),
        # what precedes the wait for the kernel before costs nothing
        (("LDG.E R1, [R2.64]", "ACQBULK", "FADD R5, R1, R1"), 2),
    ],
)  # fmt: skip
def test_a_warp_waits_for_its_operands(rows, cycles):
    assert sass.warp_work(code_of(*rows), []).cycles == cycles


def test_every_measured_step_is_predicted():
    steps = decode_model.read(decode_model.RECORDED)
    errors = {
        step: decode_model.total_us(steps[step]) / us - 1 for step, us in decode_model.measurements().items()
    }
    assert max(abs(errors[batch, 1024]) for batch in (1, 16, 256)) < 0.01  # what the constants are set by
    assert max(map(abs, errors.values())) < 0.2


@pytest.mark.parametrize(
    ("changes", "less"), [({"dependent": True}, True), ({"cycles": 900}, True), ({"issue": 10**6}, False)]
)
def test_a_launch_takes_what_its_slowest_part_takes(changes, less):
    kernel = Kernel("_some_kernel", 1000, 0, 0, programs=200, warps=4, resident=8, cycles=1000, issue=100)
    changed = dataclasses.replace(kernel, **changes)
    assert changed.us != kernel.us and (changed.us < kernel.us) == less


def test_a_file_of_launches_is_read_again_and_another_one_refused(tmp_path):
    steps = {(2, 64): {Kernel("a", 1, 2, 3, programs=4): 5, Kernel("b", 0, 0, 0, flops=1e9): 1}}
    decode_model.write(tmp_path / "steps.json", steps)
    assert decode_model.read(tmp_path / "steps.json") == steps
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    with pytest.raises(LoadError, match="other.json: not launches of bench.step_model --decode"):
        decode_model.read(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("most", "moved"),
    [
        (200, {1: 100, 2: 50, 3: 10}),
        (90, {1: 30, 2: 50, 3: 10}),
        (15, {1: 0, 2: 5, 3: 10}),
        (0, {1: 0, 2: 0, 3: 0}),
    ],
)
def test_no_more_bytes_are_moved_than_instructions_move(most, moved):
    assert decode_model._moved({1: 100, 2: 50, 3: 10}, most) == moved


@pytest.mark.parametrize(
    ("text", "reads", "writes"),
    [
        ("IADD3 R8, P1, P2, R7, R12, R9", {"R7", "R12", "R9"}, {"R8", "P1", "P2"}),
        ("ISETP.GE.AND P0, PT, R2, UR4, PT", {"R2", "UR4"}, {"P0"}),
        ("@!P3 FSEL R1, R2, -INF , !P4", {"R2", "P3", "P4"}, {"R1"}),
        ("LDG.E.64 R4, desc[UR6][R2.64+0x80]", {"UR6", "R2", "R3"}, {"R4", "R5"}),
        ("STG.E.64 desc[UR6][R2.64], R4", {"UR6", "UR7", "R2", "R3", "R4", "R5"}, set()),
        ("IMAD.WIDE R6, R1, 0x2, R4.reuse", {"R1", "R4"}, {"R6", "R7"}),
        ("ACQBULK", set(), set()),
    ],
)  # fmt: skip
def test_registers_of_an_instruction(text, reads, writes):
    (one,) = code_of(text)
    assert (set(one.reads), set(one.writes)) == (reads, writes)


@pytest.fixture(scope="module")
def predicted(project_root, tmp_path_factory):
    """What the command prints of a small step, and its launches. In a process of its own: it needs the
    compiler.
    """
    path = tmp_path_factory.mktemp("decode") / "launches.json"
    command = "-m bench.step_model --decode --batch 1 --keys 64 --json".split()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command, str(path)],
        cwd=project_root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, decode_model.read(path)[1, 64]


def test_the_recorded_step_reads_every_weight_once(predicted):
    printed, step = predicted
    weights = 2 * 134_515_008  # the tied head serves as embedding too, of which one row is read
    assert sum(one.weights * launches for one, launches in step.items()) == pytest.approx(weights, rel=1e-3)
    ours = [one for one in step if one.cycles]
    assert ours and all(one.instructions and one.resident and one.programs for one in ours)
    assert printed.startswith("Predicted, not measured") and "| 1 x 64 | " in printed


def test_every_kernel_of_this_project_is_walked(predicted):
    assert all(not one.name.startswith("_") for one in predicted[1] if not one.cycles)
