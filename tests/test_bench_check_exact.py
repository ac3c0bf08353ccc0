"""What is exact and must not change unnoticed: the memory of the loss, and how many machine codes a kernel
needs for all lengths.

Launch counts are held by test_certify_recording.py and test_bench_kernels_command.py, registers and spills by
the committed certificate (test_certify_table.py, test_certify_gates.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from bench.case import Variant
from bench.ops import Shapes, cases
from bench.peak_memory import peak_memory
from kernels import TORCH, Backend, products, select_backend
from smollm2.config import SmolLM2Config

CPU = torch.device("cpu")

# Lengths and batches as a run meets them: divisible and not, one and many.
VARIANTS = """
import json, torch
from kernels.certify import cases, targets
from kernels.certify.recorder import recording, tensor
from kernels.backend import load_triton

ops = load_triton()
SHAPES = ((1, 1), (1, 7), (2, 64), (3, 65), (1, 127), (8, 200), (5, 257), (32, 512), (4, 1024), (1, 8192))

def layers(run, docs=False, train=True):
    for batch, length in SHAPES if train else SHAPES[:-1]:  # the cache of the case is shorter than the last
        cases.layer(run, ops, "135M", docs, batch, length, train)

def losses(run):
    for tokens in (1, 7, 64, 200, 1000, 4097, 16384):
        hidden = tensor(tokens, 576, dtype=run.dtype)
        weight = tensor(49152, 576, dtype=torch.float32)
        targets = tensor(tokens, dtype=torch.int64, grad=False)
        run.backward(ops.linear_cross_entropy(hidden, weight, targets))

def decodes(run):
    for batch in (1, 2, 3, 16):
        for keys in (1, 15, 16, 100, 129, 1000, 2048):
            cases.decode(run, ops, batch, 1, keys)

runs = {"train": layers, "documents": lambda run: layers(run, True), "loss": losses,
        "prefill": lambda run: layers(run, train=False), "decode": decodes}
found = {}
for name, case in runs.items():
    with recording(targets.TARGETS["sm_90"]) as recorder:
        case(recorder)
    keys = {(launch.kernel, launch.key) for launch in recorder.launches}
    kernels = sorted({kernel for kernel, _ in keys})
    found[name] = {kernel: sum(one == kernel for one, _ in keys) for kernel in kernels}
print(json.dumps(found))
"""
ONCE = dict.fromkeys(
    (
        "_attention_bwd_dkv_kernel", "_attention_bwd_dq_kernel", "_attention_fwd_kernel",
        "_rms_norm_bwd_dw_kernel",
        "_rms_norm_bwd_dx_kernel", "_rms_norm_fwd_kernel", "_swiglu_bwd_kernel", "_swiglu_fwd_kernel",
    ),
    1,
)  # fmt: skip


def test_a_kernel_is_compiled_as_often_as_ever_whatever_the_lengths(project_root):
    """A compilation takes a second, in the middle of a run: a length, a batch or a position must not become
    part of a key.
    """
    pytest.importorskip("triton")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")
    }
    done = subprocess.run(
        [sys.executable, "-c", VARIANTS], cwd=project_root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["train"] == ONCE | {"_rope_kernel": 2}  # forward and backward: the sign of the sine
    # doc_start [B, T] is read by its row's stride, which is the length: 1, a multiple of 16, or neither.
    attention = dict.fromkeys(
        ("_attention_bwd_dkv_kernel", "_attention_bwd_dq_kernel", "_attention_fwd_kernel"), 3
    )
    assert found["documents"] == ONCE | attention | {"_rope_kernel": 2}
    forward = {name: 1 for name in ONCE if "_fwd_" in name}
    assert found["prefill"] == forward | {"_rope_kernel": 1}
    assert found["loss"] == {"_softmax_gradient_kernel": 1, "_rescale_kernel": 1}
    # o and down are one kernel; a single row's o another, which adds the splits itself
    assert found["decode"].pop("_project_kernel") == 2
    assert set(found["decode"].values()) == {1} and len(found["decode"]) == 5


def loss_memory(backend: Backend, variant: str, tokens: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Bytes that a loss and its gradients hold at one time beyond their inputs; 96 wide."""
    shapes = Shapes(SmolLM2Config.preset("tiny", vocab_size=vocabulary), 1, tokens, dtype, CPU)
    case = next(case for case in cases(shapes, backend, "eager") if case.op == "linear_cross_entropy")
    call = Variant(case, variant, 1).through_autograd
    peak_memory(call, CPU)  # the second counts
    return peak_memory(call, CPU)


@pytest.mark.parametrize("dtype, expected", [(torch.float32, 19_160_464), (torch.bfloat16, 17_456_528)])
def test_the_memory_of_the_loss_is_that_of_a_chunk(dtype, expected, monkeypatch):
    """2,048 tokens of 4,096 kinds, whose logits are 34 MB in fp32. What grows with the tokens is the gradient
    of their states.
    """
    monkeypatch.setattr(products, "rows_in_fp32", lambda dtype: None)  # else fp32 copies are added
    found = loss_memory(TORCH, "reference", 2048, 4096, dtype)
    assert found == expected
    # and a number in fp32
    assert loss_memory(TORCH, "reference", 4096, 4096, dtype) - found == 2048 * (96 * dtype.itemsize + 4)
    assert loss_memory(TORCH, "all logits", 2048, 4096, dtype) > 1.5 * found


def test_the_memory_of_the_triton_loss_is_that_of_a_chunk(monkeypatch):
    """The same with Triton, in the interpreter, with chunks of 32 tokens instead of 4,096."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip(
            "where there is a GPU, Triton's kernels are compiled for it, and the CPU's memory is "
            "measured here"
        )
    from kernels import linear_cross_entropy

    monkeypatch.setattr(linear_cross_entropy, "CHUNK_TOKENS", 32)
    triton = select_backend("triton", CPU)
    small, large = (loss_memory(triton, "triton", tokens, 512, torch.float32) for tokens in (64, 128))
    # the gradient of the hidden states, scaled where it lies, and the losses
    assert large - small == 64 * (96 * 4 + 4)
    assert small < 64 * 512 * 4 + 2 * 512 * 96 * 4, (
        "less than all logits and the gradient of the weights with its sum"
    )
