"""Programmatic dependent launch: a kernel may start before the one before it has ended, so before its wait it
must not read what that one writes. Nothing on a CPU runs that early, but the interpreter can act it out, and
the compiled code shows where the wait stands.
"""

import json
import os
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import triton.language as tl
from kernel_cases import DEVICE, EPS, TRITON, assert_same
from test_kernel_decode_layer import layer
from triton.runtime import interpreter

from kernels import launch_config

WAIT, NEXT = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
# What may be read before the wait: no kernel of a step writes the weights.
EARLY = {"w_ptr", "scale_ptr"}
# The lengths are written before a layer. Its first launch may follow the one that does, the others do not.
LATER = "lengths_ptr"
PRODUCTS = {
    "_norm_qkv_rope_kernel", "_combine_o_kernel", "_norm_gate_up_kernel", "_project_kernel",
    "_norm_head_kernel",
}  # fmt: skip


class Overlap:
    """Dependent launches in the interpreter, each begun before the one before it has ended: until a program
    waits, what that one wrote is not there yet.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written: list[tuple[torch.Tensor, torch.Tensor]] = []  # by the launch before
        self.waits: list[int] = []  # of every dependent launch
        executor, set_grid = interpreter.GridExecutor, interpreter.interpreter_builder.set_grid_idx
        launch = executor.__call__

        def run(grid, *args, **options):
            tensors = [x for x in (*args, *options.values()) if isinstance(x, torch.Tensor)]
            self.dependent = options.get("DEPENDENT", False)
            if self.dependent:
                self.waits.append(0)
            before = [x.clone() for x in tensors]
            launch(grid, *args, **options)
            changed = zip(tensors, before, strict=True)
            self.written = [(x, x.clone()) for x, old in changed if not torch.equal(x, old)]
            self.dependent = False

        def begin(*index):
            set_grid(*index)
            if self.dependent:
                for x, _ in self.written:
                    x.fill_(float("nan") if x.is_floating_point() else 10**6)

        def wait():
            self.waits[-1] += 1
            for x, kept in self.written:
                x.copy_(kept)

        def prefetch(builder, text, constraints, values, kind, pure, pack):
            assert text.startswith("prefetch")  # has no effect
            result = interpreter.TensorHandle(np.zeros(1, dtype=np.int32), tl.int32)
            return types.SimpleNamespace(get_result=lambda index: result)

        monkeypatch.setattr(executor, "__call__", run)
        monkeypatch.setattr(interpreter.interpreter_builder, "set_grid_idx", begin)
        monkeypatch.setattr(tl.extra.cuda, "gdc_wait", wait)
        monkeypatch.setattr(tl.extra.cuda, "gdc_launch_dependents", lambda: None)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", prefetch)
        monkeypatch.setattr(launch_config, "DEPENDENT_LAUNCH", (launch_config.INTERPRETER,))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU overlaps launches by itself")
@pytest.mark.parametrize("lengths, new", [((9,), 1), ((140, 20), 2), ((300, 1, 2, 3, 40, 130), 1)])
def test_a_layer_reads_nothing_too_early(lengths, new, monkeypatch):
    arguments = layer(lengths, new, 300, dtype=torch.float16)
    caches = "key_cache", "value_cache"

    def run():
        copies = {name: arguments[name].clone() for name in caches}
        out = TRITON.decode_layer(**{**arguments, **copies}, eps=EPS, ops=TRITON, dependent=True)
        return out, *copies.values()

    alone = run()
    overlap = Overlap(monkeypatch)
    assert_same(run(), alone)
    launches = 5 if len(lengths) * new == 1 else 6
    assert len(overlap.waits) == launches and all(overlap.waits)


COMPILE = """
import json
from importlib import import_module
from triton.compiler import ASTSource
from triton import compile
from kernels.certify import cases
from kernels.certify.targets import TARGETS

target = TARGETS["sm_90"]
labels = "decode 1x1, 1000 keys", "decode 16x1, 1024 keys"
cases.CASES = [case for case in cases.CASES if case.label in labels or case.label == "ends of a step 135M"]
launches = {launch.key: launch for launch in cases.record(target) if launch.dtype == "bfloat16"}
for launch in launches.values():
    if launch.constants.get("DEPENDENT"):
        function = getattr(import_module("kernels." + launch.op), launch.kernel)
        attributes = {(index,): value for index, value in launch.attributes.items()}
        source = ASTSource(function, launch.signature, launch.constants, attributes)
        built = compile(source, target=target.gpu, options=dict(launch.options))
        names = [name for name, kind in launch.signature.items() if kind != "constexpr"]
        print(json.dumps([launch.kernel, launch.options["launch_pdl"], names, built.asm["ptx"]]))
"""


@pytest.fixture(scope="module")
def compiled():
    """[kernel, whether it is launched dependently, names of its parameters, PTX] of each kernel of a step."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, check=True, env=environment
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def accesses(ptx, names):
    """What the PTX of a kernel does, in order: (instruction, the parameters that its address comes from)."""
    origin, found = {}, []
    for statement in re.sub(r"//.*|^\s*\.loc.*|^\$\w+:", "", ptx, flags=re.M).split(";"):
        code = re.sub(r"^@\S+ ", "", " ".join(statement.split()))
        if loaded := re.match(r"ld\.param\.b?u?64 (%rd\d+), \[\w+_param_(\d+)\]", code):
            origin[loaded[1]] = {names[int(loaded[2])]}
        elif re.match(r"ld\.global|st\.global|cp\.async\.c[ag]|prefetch", code):
            address = re.findall(r"\[ ?(%rd\d+)", code)[-1]
            found.append((code.split()[0], origin.get(address, set())))
        elif code.startswith((WAIT, NEXT)):
            found.append((code, set()))
        elif match := re.match(r"[\w.]+ (%rd\d+), (.*)", code):
            registers = re.findall(r"%rd\d+", match[2])
            origin[match[1]] = set().union(*(origin.get(register, set()) for register in registers))
    return found


def test_the_wait_stands_before_what_other_kernels_write(compiled):
    assert {kernel for kernel, *_ in compiled} == PRODUCTS | {
        "_decode_attention_split_kernel", "_decode_attention_combine_kernel", "_decode_inputs_kernel",
        "_next_token_kernel",
    }  # fmt: skip
    for kernel, dependent, names, ptx in compiled:
        assert dependent, kernel
        assert len(re.findall(WAIT, ptx)) == 1, kernel
        steps = accesses(ptx, names)
        place = next(place for place, (code, _) in enumerate(steps) if code == WAIT)
        first_next = next(place for place, (code, _) in enumerate(steps) if code == NEXT)
        assert first_next > place, f"{kernel}: the next launch may start before this one has waited"
        early = [(code, origins) for code, origins in steps[:place] if not code.startswith("prefetch")]
        allowed = EARLY if kernel == "_norm_qkv_rope_kernel" else EARLY | {LATER}
        for code, origins in early:
            assert code.startswith("ld.global"), f"{kernel}: {code} before the wait"
            assert origins and origins <= allowed, f"{kernel}: {origins} before the wait"
        if kernel in PRODUCTS:
            requested = any("w_ptr" in origins for _, origins in steps[:place])
            assert requested, f"{kernel} requests no weights before the wait"


def test_the_wait_stands_in_no_loop(compiled):
    """Or Triton would move loads of the loop above it."""
    for kernel, _, _, ptx in compiled:
        before, after = ptx.split(WAIT)
        labels = set(re.findall(r"^(\$\w+):", before, re.M))
        assert not labels & set(re.findall(r"bra(?:\.uni)?\s+(\$\w+)", after)), kernel


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="launches overlap on a GPU only")
@pytest.mark.parametrize("rows", [1, 4, 5, 16])
def test_overlapping_launches_give_the_bits_of_separate_ones(rows, monkeypatch):
    """Many layers behind each other in one graph, again and again: whatever was read too early would show."""
    arguments = layer([100 + 30 * row for row in range(rows)], capacity=600, dtype=torch.bfloat16)
    names = "key_cache", "value_cache"

    def captured():
        static = {**arguments, **{name: arguments[name].clone() for name in names}}

        def step():
            x = static["x"]
            for _ in range(30):
                x = TRITON.decode_layer(**{**static, "x": x}, eps=EPS, ops=TRITON, dependent=True)
            return x

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        return graph, [out, *(static[name] for name in names)]

    overlapping, ours = captured()
    monkeypatch.setattr(launch_config, "DEPENDENT_LAUNCH", ())
    separate, expected = captured()
    separate.replay()
    for _ in range(300):
        overlapping.replay()
        assert_same(ours, expected)
