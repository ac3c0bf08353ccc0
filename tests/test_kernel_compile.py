"""torch.compile with the kernels: every launcher is a correct custom operation; the model, and operations
with options that it does not use, trace as one graph.
"""

import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import CALLS, TRITON, small_calls

from kernels import attention, decode_attention, linear_cross_entropy, rms_norm, rope, swiglu

MODULES = (rms_norm, rope, attention, decode_attention, swiglu, linear_cross_entropy)
FOUND = [(name, module, value) for module in MODULES for name, value in vars(module).items()]
LAUNCHERS = {name: (module, value) for name, module, value in FOUND if hasattr(value, "op")}

# fullgraph=True: any break is an error.
GRAPHS = """
import torch
from kernels import launch_config, select_backend
from smollm2 import SmolLM2Config, SmolLM2ForCausalLM

device = "cuda" if torch.cuda.is_available() else "cpu"
ops = select_backend("triton", device)

def drawn(*shape):
    return torch.randn(shape, device=device)

def model(compiler):
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1)).to(device)
    doc_start = torch.zeros(2, 9, dtype=torch.int32, device=device)
    doc_start[0, 4:] = 4

    config = SmolLM2Config.preset("tiny", vocab_size=64, num_hidden_layers=1)

    def build():
        torch.manual_seed(0)
        with torch.device(device):
            return SmolLM2ForCausalLM(config, backend="triton")

    # Inductor compiles for seconds: it gets one of the two.
    for inputs in ((ids, ids, doc_start), (ids, ids))[: 1 if compiler == "inductor" else 2]:
        eager, model = build(), build()
        compiled = torch.compile(model, fullgraph=True, backend=compiler)
        losses = [call(*inputs).loss for call in (eager, compiled)]
        [loss.backward() for loss in losses]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
        for (name, ours), expected in zip(model.named_parameters(), eager.parameters(), strict=True):
            message = lambda text: f"{name}: {text}"
            torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=message)

def fused_mlp(compiler):
    launch_config.FUSED_MLP = (launch_config.architecture(torch.device(device)),)
    tensors = [drawn(*shape).half().requires_grad_() for shape in ((3, 5, 72), (80, 72), (72, 40))]
    both = [f(*tensors) for f in (ops.mlp, torch.compile(ops.mlp, fullgraph=True, backend=compiler))]
    torch.testing.assert_close(*both)
    torch.testing.assert_close(*(torch.autograd.grad(y.float().square().mean(), tensors) for y in both))

def embedding_and_loss(compiler):
    "With all options of both."
    ids, weight = torch.randint(0, 23, (2, 20)).to(device), drawn(23, 32)
    copy, scale = weight.half(), torch.tensor(0.25, device=device)

    def loss(weight, copy, scale):
        x, head = ops.tied_embedding(ids, weight, torch.float16, copy)
        options = dict(weight_copy=copy, scale=scale, chunk_tokens=16)
        return ops.linear_cross_entropy(x.flatten(0, 1), head, ids.flatten(), **options)

    leaves = [weight.clone().requires_grad_() for _ in range(2)]
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    losses = [call(leaf, copy, scale) for call, leaf in zip((loss, compiled), leaves)]
    [(3 * one).backward() for one in losses]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-3, atol=1e-3)

for case in (model, fused_mlp, embedding_and_loss):
    for compiler in ("aot_eager", "inductor") if case is model else ("aot_eager",):
        case(compiler)
        torch.compiler.reset()
        print(case.__name__, compiler, flush=True)
"""


@pytest.fixture(scope="module")
def graphs(project_root):
    """The lines and errors that a process of its own prints: Dynamo's state is global."""
    command, path = [sys.executable, "-c", GRAPHS], [str(project_root), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    done = subprocess.run(command, cwd=project_root, env=environment, capture_output=True, text=True)
    return done.stdout.splitlines(), done.stderr[-4000:]


def recorded_arguments(monkeypatch, name):
    """The arguments of each call of that launcher in the small calls."""
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
        "_rms_norm_backward", "_rms_norm_forward", "_rope_cache", "_rope_gather_gradient", "_rope_rotate",
        "_swiglu_backward", "_swiglu_forward",
    ]  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHERS)
def test_opcheck(name, monkeypatch):
    """The schema is true (writes, if it names what, and no aliases), and the fake has the real shapes, dtypes
    and strides.
    """
    calls = recorded_arguments(monkeypatch, name)
    assert calls
    for args in calls:
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        with torch.no_grad():
            torch.library.opcheck(LAUNCHERS[name][1].op, detached)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["model aot_eager", "model inductor", "fused_mlp aot_eager", "embedding_and_loss aot_eager"]
)
def test_it_is_one_graph_with_the_results_of_eager_mode(case, graphs):
    lines, error = graphs
    assert case in lines, error
