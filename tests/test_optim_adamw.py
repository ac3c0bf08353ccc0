"""FusedAdamW beside torch's: choice, numbers, skipped steps, state in both directions, working copies, no
wait for the device.
"""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numerics
import pytest
import torch
from kernel_cases import DEVICE, INTERPRETED, TRITON
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import adamw
from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.errors import UsageError
from smollm2.working_copies import WorkingCopies
from train import checkpoint
from train.config import RunConfig, compare_for_resume
from train.optim import (
    FusedAdamW,
    MuonWithAdamW,
    StepGuard,
    build_optimizer,
    clip_gradients,
    describe_optimizer,
    parameter_groups,
    set_learning_rate,
    update,
)

pytestmark = pytest.mark.usefixtures("poison_empty")

LR, BETAS, DECAY = 0.03, (0.9, 0.95), 0.1


class Small(nn.Module):
    """Two decayed matrices, a vector, a tensor without elements, and one that never has a gradient."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(37, 45, bias=False)
        self.second = nn.Linear(13, 5)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.unused = nn.Parameter(torch.zeros(3, 3))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.to(DEVICE)

    def give_gradients(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter is not self.unused:
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(
                    parameter
                )


def ours(model: nn.Module, copies: WorkingCopies | None = None, lr: float | Tensor = LR) -> FusedAdamW:
    return FusedAdamW(parameter_groups(model, DECAY), lr=lr, betas=BETAS, copies=copies)


def torchs(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(model, DECAY), lr=LR, betas=BETAS, fused=True)


def advance(model: Small, optimizer: torch.optim.Optimizer, steps: range, max_norm: float = 2.0) -> None:
    for step in steps:
        set_learning_rate(optimizer, LR * (1 + step % 3))
        model.give_gradients(step)
        if isinstance(optimizer, FusedAdamW):
            optimizer.clip(max_norm)
        else:
            clip_gradients(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def doubled(model: Small) -> Small:
    return copy.deepcopy(model).double()


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, entries in optimizer.state.items():
        found |= {f"{names[id(parameter)]}/{entry}": value.clone() for entry, value in entries.items()}
    return found


def hold(found: dict[str, Tensor], base: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert found.keys() == base.keys() == truth.keys()
    for name, one in found.items():
        if name.endswith("/step"):
            assert torch.equal(one, base[name]) and one.dtype == torch.float32 and one.dim() == 0
        else:
            numerics.check("adamw", name, one, base[name], truth[name].double())


class Trio:
    """A model with FusedAdamW, its copy with torch's fused AdamW, and the truth: torch's in float64."""

    def __init__(self) -> None:
        self.model = Small()
        self.base_model, self.truth_model = copy.deepcopy(self.model), doubled(self.model)
        self.optimizer, self.base, self.truth = (
            ours(self.model),
            torchs(self.base_model),
            torchs(self.truth_model),
        )

    def advance(self, steps: range, max_norm: float = 2.0) -> None:
        advance(self.model, self.optimizer, steps, max_norm)
        advance(self.base_model, self.base, steps, max_norm)
        advance(self.truth_model, self.truth, steps, max_norm)

    def hold(self) -> None:
        hold(
            values(self.model, self.optimizer),
            values(self.base_model, self.base),
            values(self.truth_model, self.truth),
        )


@pytest.mark.parametrize("max_norm", [0.0, 2.0, 1e9])
def test_the_numbers_of_torchs_fused_adamw(max_norm: float) -> None:
    trio = Trio()
    trio.advance(range(12), max_norm)
    trio.hold()
    assert trio.model.unused not in trio.optimizer.state


def test_clip_returns_the_norm_and_leaves_the_gradients() -> None:
    model = Small()
    optimizer = ours(model)
    model.give_gradients(1)
    before = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    norm = optimizer.clip(0.5)
    assert all(
        torch.equal(parameter.grad, before[name])
        for name, parameter in model.named_parameters()
        if name in before
    )
    truth = torch.cat([one.double().flatten() for one in before.values()]).norm()
    numerics.check("clip norm", "norm", norm, clip_gradients(model.parameters(), 0.5), truth)
    assert norm.dim() == 0 and norm.dtype == torch.float32


def test_the_factor_serves_one_step_and_ends_with_its_gradients() -> None:
    def after(*calls: str) -> dict[str, Tensor]:
        model = Small()
        optimizer = ours(model)
        model.give_gradients(1)
        for call in calls:
            getattr(optimizer, call)(*([0.01] if call == "clip" else []))
            if call == "zero_grad":
                model.give_gradients(1)
        return values(model, optimizer)

    plain, clipped = after("step"), after("clip", "step")
    assert not torch.equal(plain["first.weight/exp_avg"], clipped["first.weight/exp_avg"])
    twice, other = after("clip", "step", "step"), after("clip", "zero_grad", "step")
    small, large = (one["first.weight/exp_avg"].norm() for one in (clipped, twice))
    assert large > 10 * small
    assert all(torch.equal(value, other[name]) for name, value in plain.items())


def test_gradients_that_are_not_contiguous() -> None:
    one, other = Small(), Small()
    for model, transposed in ((one, True), (other, False)):
        model.give_gradients(1)
        if transposed:
            model.first.weight.grad = model.first.weight.grad.t().contiguous().t()
            model.second.bias.grad = model.second.bias.grad[:1].expand(5).clone()[:1].expand(5)
        else:
            model.second.bias.grad = model.second.bias.grad[:1].expand(5).clone()
        optimizer = ours(model)
        optimizer.clip(1.0)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
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
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert int(guard.skipped) == 2
    assert not torch.equal(step(3, broken=False)["first.weight"], before["first.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_working_copies_are_written_with_the_weights(dtype: torch.dtype) -> None:
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


def test_a_write_is_counted_for_autograd() -> None:
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


@pytest.mark.parametrize("forth", [True, False], ids=["torch loads ours", "ours loads torch's"])
def test_state_dicts_are_interchangeable(forth: bool) -> None:
    trio = Trio()
    trio.advance(range(5))
    saved = copy.deepcopy((trio.optimizer if forth else trio.base).state_dict())
    if forth:
        trio.base_model.load_state_dict(trio.model.state_dict())
        trio.base.load_state_dict(saved)
        advance(trio.base_model, trio.base, range(5, 10))  # the rest by torch, from the state of ours
    else:
        trio.model.load_state_dict(trio.base_model.state_dict())
        trio.optimizer.load_state_dict(saved)
        advance(trio.model, trio.optimizer, range(5, 10))
    reference = Trio()
    reference.advance(range(10))
    found = values(trio.base_model, trio.base) if forth else values(trio.model, trio.optimizer)
    hold(found, values(reference.base_model, reference.base), values(reference.truth_model, reference.truth))
    entries = [
        {name: (value.shape, value.dtype) for name, value in one.items()} for one in saved["state"].values()
    ]
    other = (reference.base if forth else reference.optimizer).state_dict()
    assert entries == [
        {name: (value.shape, value.dtype) for name, value in one.items()} for one in other["state"].values()
    ]
    assert all(
        one.keys() == two.keys()
        for one, two in zip(saved["param_groups"], other["param_groups"], strict=True)
    )


@pytest.mark.parametrize("saves", [ours, torchs])
@pytest.mark.parametrize("loads", [ours, torchs])
def test_moments_of_a_checkpoint_serve_both(saves: Any, loads: Any, tmp_path: Path) -> None:
    model = Small()
    optimizer = saves(model)
    advance(model, optimizer, range(4))
    save_file(checkpoint._moments(model, optimizer, checkpoint._copy), tmp_path / checkpoint.MOMENTS)
    other_model = Small(1)
    other_model.load_state_dict(model.state_dict())
    other = loads(other_model)
    checkpoint.load_moments(tmp_path, other_model, other)
    loaded = values(other_model, other)
    assert all(torch.equal(value, loaded[name]) for name, value in values(model, optimizer).items())
    advance(other_model, other, range(4, 8))
    reference = Trio()
    reference.advance(range(8))
    hold(
        values(other_model, other),
        values(reference.base_model, reference.base),
        values(reference.truth_model, reference.truth),
    )


def test_a_loaded_state_is_not_that_of_the_other_optimizer() -> None:
    """Step counts are views of one tensor: each optimizer needs its own."""
    one, other = Small(), Small()
    first, second = ours(one), ours(other)
    advance(one, first, range(3))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    advance(other, second, range(2))
    assert {int(entries["step"]) for entries in first.state.values()} == {3}
    assert {int(entries["step"]) for entries in second.state.values()} == {5}


def test_parameters_states_and_groups_may_be_replaced_between_steps() -> None:
    model = Small()
    optimizer = ours(model)
    advance(model, optimizer, range(2))
    model.first.weight.data = model.first.weight.data.clone()
    optimizer.state[model.first.weight]["step"] = torch.tensor(7.0, device=DEVICE)
    extra = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    before = model.first.weight.detach().clone()
    extra.grad = torch.ones_like(extra)
    model.give_gradients(2)
    optimizer.step()
    assert not torch.equal(before, model.first.weight) and not (extra == 1).any()
    steps = [
        int(optimizer.state[parameter]["step"])
        for parameter in (model.first.weight, model.second.weight, extra)
    ]
    assert steps == [8, 3, 1]
    optimizer.state.clear()
    model.give_gradients(3)
    optimizer.step()
    assert {int(entries["step"]) for entries in optimizer.state.values()} == {1}


def test_a_copy_of_the_optimizer_goes_on_by_itself() -> None:
    model = Small()
    optimizer = ours(model)
    advance(model, optimizer, range(2))
    for other_model, other in (
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ):
        advance(other_model, other, range(2, 4))
        assert {int(entries["step"]) for entries in other.state.values()} == {4}
    assert {int(entries["step"]) for entries in optimizer.state.values()} == {2}


def test_the_learning_rate_is_a_tensor_that_is_filled() -> None:
    model = Small()
    optimizer = ours(model)
    advance(model, optimizer, range(1))
    tensors = [group["lr"] for group in optimizer.param_groups]
    set_learning_rate(optimizer, 0.125)
    assert all(
        group["lr"] is one and one == 0.125
        for group, one in zip(optimizer.param_groups, tensors, strict=True)
    )
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


def test_a_step_asks_for_no_value_and_sends_addresses_only_when_they_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
def test_a_captured_step_has_the_eager_numbers() -> None:
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
    found, expected = values(models[0], optimizer), values(models[1], optimizers[1])
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert torch.equal(optimizer.copies.of(captured.first.weight), captured.first.weight.detach().bfloat16())


def tiny(backend: Any = TRITON) -> SmolLM2ForCausalLM:
    with torch.device(DEVICE):
        return SmolLM2ForCausalLM(SmolLM2Config.preset("tiny", vocab_size=64, num_hidden_layers=1), backend)


def test_the_backend_and_the_key_choose() -> None:
    def chosen(model: nn.Module, **keys: Any) -> tuple[type, str]:
        config = RunConfig(**keys)
        return type(build_optimizer(model, config, DEVICE)), describe_optimizer(model, config, DEVICE)

    assert chosen(tiny()) == (
        FusedAdamW,
        "AdamW of the Triton backend, which clips and writes the working copies too",
    )
    assert chosen(tiny(), optimizer="adamw,torch") == (
        torch.optim.AdamW,
        "AdamW: torch's fused form (asked for)",
    )
    assert chosen(tiny("torch")) == (torch.optim.AdamW, "AdamW: torch's fused form (the backend is torch)")
    assert chosen(nn.Linear(3, 4).to(DEVICE)) == (
        torch.optim.AdamW,
        "AdamW: torch's fused form (the backend is torch)",
    )
    assert chosen(tiny().bfloat16()) == (
        torch.optim.AdamW,
        "AdamW: torch's fused form (a parameter is not contiguous fp32)",
    )
    assert (
        chosen(tiny(), sharding="full")[1] == "AdamW: torch's fused form (sharding=full cuts the parameters)"
    )
    assert chosen(tiny(), optimizer="muon")[0] is MuonWithAdamW
    elsewhere = torch.device("mps")
    assert (
        describe_optimizer(tiny(), RunConfig(), elsewhere) == "AdamW: torch's fused form (the device is mps)"
    )


def test_settings_reach_the_groups() -> None:
    model = tiny()
    copies = WorkingCopies(model, torch.bfloat16)
    config = RunConfig(weight_decay=0.2, betas=[0.8, 0.9], eps=1e-6, lr=0.1)
    optimizer = build_optimizer(model, config, DEVICE, captured=True, copies=copies)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert all(
        (group["lr"], group["betas"], group["eps"]) == (0.1, (0.8, 0.9), 1e-6)
        for group in optimizer.param_groups
    )
    assert optimizer.copies is copies


def test_what_it_cannot_update_is_refused() -> None:
    with pytest.raises(ValueError, match="expected contiguous fp32 parameters on .*, got torch.bfloat16"):
        FusedAdamW([nn.Parameter(torch.zeros(3, device=DEVICE, dtype=torch.bfloat16))])
    with pytest.raises(
        ValueError, match="expected contiguous fp32 parameters on .*, got torch.float32 on .*, not contiguous"
    ):
        FusedAdamW([nn.Parameter(torch.zeros(3, 4, device=DEVICE).t())])
    model = Small()
    other = torch.optim.AdamW(parameter_groups(model, DECAY), amsgrad=True)
    optimizer = ours(model)
    optimizer.load_state_dict(other.state_dict())
    model.give_gradients(0)
    with pytest.raises(ValueError, match="expected amsgrad=False"):
        optimizer.step()


def test_a_run_may_go_on_with_the_other_adamw_but_not_with_muon() -> None:
    lines = compare_for_resume(asdict(RunConfig()), RunConfig(optimizer="adamw,torch"))
    assert lines == ["optimizer: adamw -> adamw,torch"]
    assert compare_for_resume(asdict(RunConfig(optimizer="adamw,torch")), RunConfig()) == [
        "optimizer: adamw,torch -> adamw"
    ]
    with pytest.raises(UsageError, match="optimizer=adamw"):
        compare_for_resume(asdict(RunConfig()), RunConfig(optimizer="muon"))
    RunConfig(optimizer="adamw,torch", sharding="full").validate()


def test_parameters_that_moved_are_updated_where_they_are() -> None:
    weight = nn.Parameter(torch.ones(5, 3, device=DEVICE))
    optimizer = FusedAdamW([weight], lr=0.5, weight_decay=0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    old = weight.data
    before, weight.data = old.clone(), weight.data.clone()
    optimizer.step()
    assert torch.equal(old, before) and not torch.equal(weight, before)


def test_a_factor_does_not_outlive_the_state_it_was_made_with() -> None:
    weight = nn.Parameter(torch.zeros(4, device=DEVICE))
    optimizer = FusedAdamW([weight], lr=1.0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0)
    weight.grad = torch.full_like(weight, 8.0)
    optimizer.clip(1e-3)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    torch.testing.assert_close(weight, torch.full_like(weight, -8.0 / 9.0))  # unclipped: g / (|g| + eps)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (dict(lr=-1.0), "lr"),
        (dict(betas=(1.5, 0.9)), "betas"),
        (dict(eps=-1.0), "eps"),
        (dict(weight_decay=-1.0), "w"),
    ],
)
def test_settings_that_torchs_refuses_are_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"FusedAdamW: {name}"):
        FusedAdamW([nn.Parameter(torch.zeros(2, device=DEVICE))], **settings)
    with pytest.raises(ValueError, match="at least one parameter"):
        FusedAdamW([{"params": []}])
    with pytest.raises(ValueError, match="no closure"):
        FusedAdamW([nn.Parameter(torch.zeros(2, device=DEVICE))]).step(lambda: 0.0)  # type: ignore[arg-type]


def clipped_far() -> tuple[nn.Parameter, FusedAdamW]:
    """A parameter whose gradient of 8 is clipped to next to nothing in the next step, which subtracts g /
    (|g| + 1).
    """
    weight = nn.Parameter(torch.zeros(4, device=DEVICE))
    optimizer = FusedAdamW([weight], lr=1.0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0)
    weight.grad = torch.full_like(weight, 8.0)
    optimizer.clip(1e-3)
    return weight, optimizer


def test_a_factor_is_that_of_the_gradients_that_were_clipped() -> None:
    weight, optimizer = clipped_far()
    weight.grad = torch.full_like(weight, 8.0)
    optimizer.step()
    torch.testing.assert_close(weight, torch.full_like(weight, -8.0 / 9.0))


def test_a_gradient_that_is_changed_after_clipping_is_read_anew() -> None:
    found = []
    for gradient in (torch.ones(3, 4, device=DEVICE), torch.ones(4, 3, device=DEVICE).t()):
        weight = nn.Parameter(torch.zeros(3, 4, device=DEVICE))
        optimizer = FusedAdamW([weight], lr=1.0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0)
        weight.grad = gradient
        optimizer.clip(1)  # an integer is a number
        weight.grad.mul_(10)
        optimizer.step()
        found.append(weight.detach())
    assert torch.equal(*found)


def test_moments_of_another_shape_are_refused_and_of_another_dtype_converted() -> None:
    weight, optimizer = clipped_far()
    optimizer.step()
    optimizer.state[weight]["exp_avg"] = optimizer.state[weight]["exp_avg"].bfloat16()
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32
    optimizer.state[weight]["exp_avg_sq"] = torch.zeros(2, device=DEVICE)
    with pytest.raises(ValueError, match=r"exp_avg_sq of parameter 0: expected shape \[4\], got \[2\]"):
        optimizer.step()


def test_parameters_that_join_a_group_are_trained() -> None:
    weight, optimizer = clipped_far()
    optimizer.step()
    other = nn.Parameter(torch.zeros(3, device=DEVICE))
    optimizer.param_groups[0]["params"].append(other)
    other.grad = torch.ones_like(other)
    optimizer.step()
    torch.testing.assert_close(other, torch.full_like(other, -0.5))
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(ValueError, match="maximize=False"):
        optimizer.step()


def test_a_sparse_gradient_is_refused() -> None:
    table = nn.Embedding(5, 2, sparse=True, device=DEVICE)
    optimizer = FusedAdamW(table.parameters())
    table(torch.tensor([1], device=DEVICE)).sum().backward()
    with pytest.raises(ValueError, match="expected dense gradients"):
        optimizer.step()
