"""torch.compile with the kernels: every launcher is a correct custom operation, and the model traces as one
graph.
"""

import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import CALLS, TRITON, small_calls

from kernels import attention, decode_attention, linear_cross_entropy, rms_norm, rope, swiglu

MODULES = (rms_norm, rope, attention, decode_attention, swiglu, linear_cross_entropy)
LAUNCHERS = {
    name: (module, launcher)
    for module in MODULES
    for name, launcher in vars(module).items()
    if hasattr(launcher, "op")
}

COMPILE = """
import sys
import torch
from smollm2 import SmolLM2Config, SmolLM2ForCausalLM

device = "cuda" if torch.cuda.is_available() else "cpu"
ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1)).to(device)
doc_start = torch.zeros(2, 9, dtype=torch.int32, device=device)
doc_start[0, 4:] = 4

def build():
    torch.manual_seed(0)
    with torch.device(device):
        return SmolLM2ForCausalLM(SmolLM2Config.preset("tiny", vocab_size=64, num_hidden_layers=1), backend="triton")

for inputs in ((ids, ids), (ids, ids, doc_start)):
    eager, model = build(), build()
    compiled = torch.compile(model, fullgraph=True, backend=sys.argv[1])
    losses = [call(*inputs).loss for call in (eager, compiled)]
    [loss.backward() for loss in losses]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    for (name, ours), expected in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=lambda text: f"{name}: {text}")
    print("agrees")
"""


def recorded_arguments(monkeypatch, name):
    """What the launcher of that name is called with in the small calls: (arguments, ...)."""
    module, launcher = LAUNCHERS[name]
    seen = []

    def record(*args):
        seen.append(args)
        return launcher(*args)

    monkeypatch.setattr(module, name, record)
    for call in (small_calls()[name] for name in CALLS):
        if sys.modules[getattr(TRITON, call.op).__module__] is module:
            call.run(TRITON, call.upstream())
    return seen


def test_all_launchers_are_known():
    assert sorted(LAUNCHERS) == [
        "_attention_backward", "_attention_forward", "_decode_attention", "_linear_cross_entropy",
        "_rms_norm_backward", "_rms_norm_forward", "_rope_gather_gradient", "_rope_rotate",
        "_swiglu_backward", "_swiglu_forward",
    ]  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHERS)
def test_opcheck(name, monkeypatch):
    """The schema is true (nothing is written, nothing aliases), and the fake has the real shapes, dtypes and
    strides.
    """
    calls = recorded_arguments(monkeypatch, name)
    assert calls
    for args in calls:
        with torch.no_grad():
            torch.library.opcheck(
                LAUNCHERS[name][1].op, [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
            )


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_model_is_one_graph(compiler, project_root):
    """fullgraph=True: any break is an error. In a process of its own, for Dynamo's state is global."""
    environment = {**os.environ, "PYTHONPATH": str(project_root)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, compiler],
        cwd=project_root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["agrees", "agrees"]
