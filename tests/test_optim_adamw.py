"""FusedAdamW beside torch's: numbers, skipped steps, state in both directions, working copies."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numerics
import pytest
import torch
from adamw_cases import LR, Small, Trio, advance, clipped_far, ours, same, torchs, values
from kernel_cases import DEVICE, INTERPRETED, TRITON
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import adamw
from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.working_copies import WorkingCopies
from train import checkpoint
from train.optim import (
    StepGuard,
    clip_gradients,
    set_learning_rate,
    update,
)

pytestmark = pytest.mark.usefixtures("poison_empty")


@pytest.mark.parametrize("max_norm", [0.0, 2.0, 1e9])
def test_the_numbers_of_torchs_fused_adamw(max_norm):
    trio = Trio()
    trio.advance(range(12), max_norm)
    trio.hold()
    assert trio.model.unused not in trio.optimizer.state


def test_clip_returns_the_norm_and_leaves_the_gradients():
    model = Small()
    optimizer = ours(model)
    model.give_gradients(1)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    before = [gradient.clone() for gradient in gradients]
    norm = optimizer.clip(0.5)
    assert all(torch.equal(*pair) for pair in zip(gradients, before, strict=True))
    truth = torch.cat([one.double().flatten() for one in before]).norm()
    numerics.check("clip norm", "norm", norm, clip_gradients(model.parameters(), 0.5), truth)
    assert norm.dim() == 0 and norm.dtype == torch.float32


@pytest.mark.parametrize(
    ("between", "clipped"),
    [("", True), ("step", False), ("zero_grad", False), ("state", False), ("new", False)],
)
def test_the_factor_serves_one_step_and_ends_with_its_gradients(between, clipped):
    weight, optimizer = clipped_far()
    if between == "step":
        optimizer.step()
        weight.data.zero_()
    elif between == "zero_grad":
        optimizer.zero_grad()
    elif between == "state":
        optimizer.load_state_dict(optimizer.state_dict())
    if between in ("zero_grad", "new"):
        weight.grad = torch.full_like(weight, 8.0)
    optimizer.step()
    gradient = 1e-3 / 4**0.5 if clipped else 8.0  # 4 elements whose norm is clipped to 1e-3
    torch.testing.assert_close(weight, torch.full_like(weight, -gradient / (gradient + 1.0)))


def test_gradients_that_are_not_contiguous():
    one, other = Small(), Small()
    for model in (one, other):
        model.give_gradients(1)
        model.second.bias.grad = model.second.bias.grad[:1].expand(5)
        if model is one:
            model.first.weight.grad = model.first.weight.grad.t().contiguous().t()
        else:
            model.second.bias.grad = model.second.bias.grad.clone()
        optimizer = ours(model)
        optimizer.clip(1.0)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(bad):
    model = Small()
    copies = WorkingCopies(model, torch.bfloat16)
    optimizer, guard = ours(model, copies), StepGuard(DEVICE)

    def step(seed: int, broken: bool) -> dict[str, Tensor]:
        model.give_gradients(seed)
        if broken:
            model.second.weight.grad[0, 0] = bad
        update(optimizer, guard.judge(torch.zeros((), device=DEVICE), optimizer.clip(1.0)))
        optimizer.zero_grad()
        for one in (model.first.weight, model.second.weight):
            assert torch.equal(copies.of(one), one.detach().bfloat16())
        return values(model, optimizer)

    # nor does it begin: the moments stay 0, the copy is that of the first weights
    first = step(0, broken=True)
    assert all(not value.any() for name, value in first.items() if "/" in name)
    before = step(1, broken=False)
    after = step(2, broken=True)
    assert same(before, after) and int(guard.skipped) == 2
    assert not torch.equal(step(3, broken=False)["first.weight"], before["first.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_working_copies_are_written_with_the_weights(dtype):
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = SmolLM2ForCausalLM(SmolLM2Config.preset("tiny", vocab_size=64, num_hidden_layers=1), TRITON)
    for layer in model.model.layers:
        layer.pack()  # parameters are views of one buffer, and so are their copies
    copies = WorkingCopies(model, dtype)
    optimizer = ours(model, copies)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            assert torch.equal(copies.of(parameter), parameter.detach().to(dtype))
    weights = [projection.weight for projection in model.model.layers[0].self_attn.projections()]
    assert torch.equal(copies.of_group(weights), torch.cat([weight.detach() for weight in weights]).to(dtype))
    copies.refresh()  # has nothing to do
    torchs(model).step()
    assert copies.of(weights[0]) is None


def test_a_write_is_counted_for_autograd():
    model = Small()
    optimizer = ours(model)
    model.give_gradients(0)
    optimizer.step()
    model.give_gradients(1)
    tensors = [model.first.weight, *optimizer.state[model.first.weight].values()]
    versions = [one._version for one in tensors]
    optimizer.step()
    assert all(one._version > version for one, version in zip(tensors, versions, strict=True))
    x = torch.randn(2, 37, device=DEVICE, requires_grad=True)
    out = model.first(x).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("saves", [ours, torchs])
@pytest.mark.parametrize("loads", [ours, torchs])
def test_moments_of_a_checkpoint_serve_both(saves, loads, tmp_path):
    model = Small()
    optimizer = saves(model)
    advance(model, optimizer, range(4))
    save_file(checkpoint._moments(model, optimizer, checkpoint._copy), tmp_path / checkpoint.MOMENTS)
    other_model = Small(1)
    other_model.load_state_dict(model.state_dict())
    other = loads(other_model)
    checkpoint.load_moments(tmp_path, other_model, other)
    assert same(values(model, optimizer), values(other_model, other))
    advance(other_model, other, range(4, 8))
    reference = Trio()
    reference.advance(range(8))
    reference.hold(values(other_model, other))
    groups = [one.state_dict()["param_groups"] for one in (optimizer, other)]
    assert [group.keys() for group in groups[0]] == [group.keys() for group in groups[1]]


def test_a_loaded_state_is_not_that_of_the_other_optimizer():
    """Step counts are views of one tensor: each optimizer needs its own."""
    one, other = Small(), Small()
    first, second = ours(one), ours(other)
    advance(one, first, range(3))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    advance(other, second, range(2))
    assert {int(entries["step"]) for entries in first.state.values()} == {3}
    assert {int(entries["step"]) for entries in second.state.values()} == {5}


def test_parameters_states_and_groups_may_be_replaced_between_steps():
    model = Small()
    optimizer = ours(model)
    advance(model, optimizer, range(2))
    old = model.first.weight.data
    model.first.weight.data = old.clone()
    optimizer.state[model.first.weight]["step"] = torch.tensor(7.0, device=DEVICE)
    extra = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    before = model.first.weight.detach().clone()
    extra.grad = torch.ones_like(extra)
    model.give_gradients(2)
    optimizer.step()
    assert torch.equal(old, before), "updated where it is now"
    assert not torch.equal(before, model.first.weight) and not (extra == 1).any()
    stepped = (model.first.weight, model.second.weight, extra)
    assert [int(optimizer.state[parameter]["step"]) for parameter in stepped] == [8, 3, 1]
    optimizer.state.clear()
    model.give_gradients(3)
    optimizer.step()
    assert {int(entries["step"]) for entries in optimizer.state.values()} == {1}


def test_a_copy_of_the_optimizer_goes_on_by_itself():
    model = Small()
    optimizer = ours(model)
    advance(model, optimizer, range(2))
    copies = copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))
    for other_model, other in copies:
        advance(other_model, other, range(2, 4))
        assert {int(entries["step"]) for entries in other.state.values()} == {4}
    assert {int(entries["step"]) for entries in optimizer.state.values()} == {2}


def test_the_learning_rate_is_a_tensor_that_is_filled():
    model = Small()
    optimizer = ours(model)
    advance(model, optimizer, range(1))
    tensors = [group["lr"] for group in optimizer.param_groups]
    set_learning_rate(optimizer, 0.125)
    pairs = zip(optimizer.param_groups, tensors, strict=True)
    assert all(group["lr"] is one and one == 0.125 for group, one in pairs)
    set_learning_rate(optimizer, 0.0)
    before = model.second.bias.detach().clone()
    model.give_gradients(1)
    optimizer.step()
    assert torch.equal(before, model.second.bias)
    optimizer.param_groups[1]["lr"] = 1.0  # as a scheduler of torch's writes it
    model.give_gradients(2)
    optimizer.step()
    assert not torch.equal(before, model.second.bias) and isinstance(optimizer.param_groups[1]["lr"], Tensor)


class NoWait(TorchDispatchMode):
    """Raises where a value of a tensor is asked for, which on a GPU would wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_a_step_asks_for_no_value_and_sends_addresses_only_when_they_change(monkeypatch):
    model = Small()
    copies = WorkingCopies(model, torch.bfloat16)
    optimizer, guard = ours(model, copies), StepGuard(DEVICE)
    model.give_gradients(0)
    optimizer.step()
    sent = []
    send = adamw.AddressTable.send
    monkeypatch.setattr(
        adamw.AddressTable, "send", lambda self, words: (sent.append(words), send(self, words))[1]
    )
    if INTERPRETED:  # launches themselves read scalars there
        for name in ("gradient_norm", "adamw"):
            monkeypatch.setattr(adamw, name, lambda *_: torch.zeros(2))
    with NoWait():
        for _ in range(3):
            update(optimizer, guard.judge(torch.zeros((), device=DEVICE), optimizer.clip(1.0)))
        assert len(sent) == 3 and sent[0] == sent[2]  # once in clip, not again in step
        optimizer.zero_grad()
        model.first.weight.grad = torch.ones_like(model.first.weight)
        optimizer.step()
    assert sent[3] != sent[0]


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
def test_a_captured_step_has_the_eager_numbers():
    """With gradients at other addresses than those of the steps before, and an eager step between two
    replays.
    """
    models = [Small(), Small()]
    optimizers = [ours(model, WorkingCopies(model, torch.bfloat16)) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        advance(model, optimizer, range(2))
    captured, optimizer = models[0], optimizers[0]
    captured.give_gradients(2)
    kept = [parameter.grad for parameter in captured.parameters()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.clip(2.0)
        optimizer.step()
    for step in range(2, 6):
        for model, one in zip(models, optimizers, strict=True):
            set_learning_rate(one, LR * (1 + step % 3))
            model.give_gradients(step)
        if step == 4:
            optimizer.clip(2.0)
            optimizer.step()
        else:
            for parameter, gradient in zip(captured.parameters(), kept, strict=True):
                if gradient is not None:
                    gradient.copy_(parameter.grad)
            graph.replay()
        optimizers[1].clip(2.0)
        optimizers[1].step()
    assert same(values(models[0], optimizer), values(models[1], optimizers[1]))
    assert torch.equal(optimizer.copies.of(captured.first.weight), captured.first.weight.detach().bfloat16())
