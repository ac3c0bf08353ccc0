"""Which AdamW a run gets, with which settings, and what FusedAdamW refuses or converts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from adamw_cases import DECAY, Small, clipped_far, ours, tiny
from kernel_cases import DEVICE
from torch import nn

from smollm2.errors import UsageError
from smollm2.working_copies import WorkingCopies
from train.config import RunConfig
from train.optim import (
    FusedAdamW,
    MuonWithAdamW,
    build_optimizer,
    describe_optimizer,
    parameter_groups,
)
from train.resume import compare_for_resume

pytestmark = pytest.mark.usefixtures("poison_empty")


def test_the_backend_and_the_key_choose():
    def chosen(model: nn.Module, **keys: Any) -> tuple[type, str]:
        config = RunConfig(**keys)
        return type(build_optimizer(model, config, DEVICE)), describe_optimizer(model, config, DEVICE)

    own = "AdamW of the Triton backend, which clips and writes the working copies too"
    fused = "AdamW: torch's fused form ({})"
    torchs_adamw = torch.optim.AdamW
    assert chosen(tiny()) == (FusedAdamW, own)
    assert chosen(tiny(), optimizer="adamw,torch") == (torchs_adamw, fused.format("asked for"))
    for model in (tiny("torch"), nn.Linear(3, 4).to(DEVICE)):
        assert chosen(model) == (torchs_adamw, fused.format("the backend is torch"))
    assert chosen(tiny().bfloat16()) == (torchs_adamw, fused.format("a parameter is not contiguous fp32"))
    assert chosen(tiny(), sharding="full")[1] == fused.format("sharding=full cuts the parameters")
    assert chosen(tiny(), optimizer="muon")[0] is MuonWithAdamW
    mps = describe_optimizer(tiny(), RunConfig(), torch.device("mps"))
    assert mps == fused.format("the device is mps")


def test_settings_reach_the_groups():
    model = tiny()
    copies = WorkingCopies(model, torch.bfloat16)
    config = RunConfig(weight_decay=0.2, betas=[0.8, 0.9], eps=1e-6, lr=0.1)
    optimizer = build_optimizer(model, config, DEVICE, captured=True, copies=copies)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.8, 0.9), 1e-6)
    assert optimizer.copies is copies


def test_what_it_cannot_update_is_refused():
    for wrong, got in (
        (torch.zeros(3, device=DEVICE, dtype=torch.bfloat16), "torch.bfloat16"),
        (torch.zeros(3, 4, device=DEVICE).t(), "torch.float32 on .*, not contiguous"),
    ):
        with pytest.raises(ValueError, match=f"expected contiguous fp32 parameters on .*, got {got}"):
            FusedAdamW([nn.Parameter(wrong)])
    model = Small()
    other = torch.optim.AdamW(parameter_groups(model, DECAY), amsgrad=True)
    optimizer = ours(model)
    optimizer.load_state_dict(other.state_dict())
    model.give_gradients(0)
    with pytest.raises(ValueError, match="expected amsgrad=False"):
        optimizer.step()


def test_a_run_may_go_on_with_the_other_adamw_but_not_with_muon():
    own, torchs_own = RunConfig(), RunConfig(optimizer="adamw,torch")
    assert compare_for_resume(asdict(own), torchs_own) == ["optimizer: adamw -> adamw,torch"]
    assert compare_for_resume(asdict(torchs_own), own) == ["optimizer: adamw,torch -> adamw"]
    with pytest.raises(UsageError, match="optimizer=adamw"):
        compare_for_resume(asdict(RunConfig()), RunConfig(optimizer="muon"))
    RunConfig(optimizer="adamw,torch", sharding="full").validate()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (dict(lr=-1.0), "lr"),
        (dict(betas=(1.5, 0.9)), "betas"),
        (dict(eps=-1.0), "eps"),
        (dict(weight_decay=-1.0), "w"),
    ],
)
def test_settings_that_torchs_refuses_are_refused(settings, name):
    with pytest.raises(ValueError, match=f"FusedAdamW: {name}"):
        FusedAdamW([nn.Parameter(torch.zeros(2, device=DEVICE))], **settings)
    with pytest.raises(ValueError, match="at least one parameter"):
        FusedAdamW([{"params": []}])
    with pytest.raises(ValueError, match="no closure"):
        FusedAdamW([nn.Parameter(torch.zeros(2, device=DEVICE))]).step(lambda: 0.0)  # type: ignore[arg-type]


def test_a_gradient_that_is_changed_after_clipping_is_read_anew():
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


def test_moments_of_another_shape_are_refused_and_of_another_dtype_converted():
    weight, optimizer = clipped_far()
    optimizer.step()
    optimizer.state[weight]["exp_avg"] = optimizer.state[weight]["exp_avg"].bfloat16()
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32
    optimizer.state[weight]["exp_avg_sq"] = torch.zeros(2, device=DEVICE)
    with pytest.raises(ValueError, match=r"exp_avg_sq of parameter 0: expected shape \[4\], got \[2\]"):
        optimizer.step()


def test_parameters_that_join_a_group_are_trained():
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


def test_a_sparse_gradient_is_refused():
    table = nn.Embedding(5, 2, sparse=True, device=DEVICE)
    optimizer = FusedAdamW(table.parameters())
    table(torch.tensor([1], device=DEVICE)).sum().backward()
    with pytest.raises(ValueError, match="expected dense gradients"):
        optimizer.step()
