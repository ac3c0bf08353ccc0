"""Small models for the tests of FusedAdamW, torch's AdamW beside it, and the truth: torch's in float64."""

from __future__ import annotations

import copy
from typing import Any

import numerics
import torch
from kernel_cases import DEVICE, TRITON
from torch import Tensor, nn

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.working_copies import WorkingCopies
from train.optim import (
    FusedAdamW,
    clip_gradients,
    parameter_groups,
    set_learning_rate,
)

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
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.grad = drawn.to(parameter)


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


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, entries in optimizer.state.items():
        found |= {f"{names[id(parameter)]}/{entry}": value.clone() for entry, value in entries.items()}
    return found


class Trio:
    """A model with FusedAdamW, its copy with torch's fused AdamW, and the truth: torch's in float64."""

    def __init__(self) -> None:
        self.model = Small()
        self.base_model, self.truth_model = copy.deepcopy(self.model), copy.deepcopy(self.model).double()
        self.optimizer, self.base = ours(self.model), torchs(self.base_model)
        self.truth = torchs(self.truth_model)

    def advance(self, steps: range, max_norm: float = 2.0) -> None:
        advance(self.model, self.optimizer, steps, max_norm)
        advance(self.base_model, self.base, steps, max_norm)
        advance(self.truth_model, self.truth, steps, max_norm)

    def hold(self, found: dict[str, Tensor] | None = None) -> None:
        """found: what is compared, by default what FusedAdamW made."""
        base, truth = values(self.base_model, self.base), values(self.truth_model, self.truth)
        found = found or values(self.model, self.optimizer)
        assert found.keys() == base.keys() == truth.keys()
        for name, one in found.items():
            if name.endswith("/step"):
                assert torch.equal(one, base[name]) and one.dtype == torch.float32 and one.dim() == 0
            else:
                numerics.check("adamw", name, one, base[name], truth[name].double())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def clipped_far() -> tuple[nn.Parameter, FusedAdamW]:
    """A parameter whose gradient of 8 is clipped to next to nothing in the next step, which subtracts g /
    (|g| + 1).
    """
    weight = nn.Parameter(torch.zeros(4, device=DEVICE))
    optimizer = FusedAdamW([weight], lr=1.0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0)
    weight.grad = torch.full_like(weight, 8.0)
    optimizer.clip(1e-3)
    return weight, optimizer


def tiny(backend: Any = TRITON) -> SmolLM2ForCausalLM:
    with torch.device(DEVICE):
        return SmolLM2ForCausalLM(SmolLM2Config.preset("tiny", vocab_size=64, num_hidden_layers=1), backend)
