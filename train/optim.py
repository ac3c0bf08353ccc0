"""AdamW with two parameter groups, learning-rate schedules as pure functions of the step, and gradient clipping without host syncs.

A schedule that is a function of the step alone needs no state: a resumed run computes the same learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from train.config import RunConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, which are decayed, and vectors (the norms' weights), which are not.

    The tied embedding is decayed: it is the head's matrix too. `parameters()` yields it once, so it is updated once.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) in its fused form: one launch for all parameters.

    The fused form also takes `found_inf`, with which a step is skipped on the device; see `update`.
    """
    beta1, beta2 = config.betas
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)


def learning_rate(step: int, config: RunConfig) -> float:
    """The learning rate of step 0, 1, ..., steps - 1; above 0 at each of them (unless lr is below min_lr = 0).

    Linear warm-up to lr over warmup_steps, then
      constant  lr
      wsd       lr, then linear to min_lr over the last decay_fraction of all steps (arXiv 2405.18392; SmolLM2's schedule)
      cosine    half a cosine from lr to min_lr (arXiv 1608.03983)
    """
    if step < config.warmup_steps:
        return config.lr * ((step + 1) / config.warmup_steps)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        begin = config.warmup_steps
    else:
        begin = max(config.warmup_steps, config.steps - round(config.decay_fraction * config.steps))
    # The last step is not at min_lr yet: with min_lr = 0 it would do nothing.
    progress = min(1.0, max(0.0, (step - begin) / max(1, config.steps - begin)))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.min_lr + (config.lr - config.min_lr) * remaining


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group; called before the step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales all gradients so that their global norm is at most max_norm (0: leaves them), and returns the norm before that.

    -> fp32 scalar on the device; nothing waits for it. Not finite if any gradient is not.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch._foreach_norm([gradient.float() for gradient in gradients])
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm > 0:
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


class SkipCounter:
    """Counts steps whose gradients are not finite, on the device: reading the counts is the caller's choice of when to wait."""

    def __init__(self, device: torch.device, skipped: int = 0) -> None:
        self.skipped = torch.tensor(skipped, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._longest = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, bad: Tensor) -> None:
        """bad: scalar, 1 if this step was skipped, else 0."""
        bad = bad.to(torch.int64)
        self.skipped += bad
        self._in_a_row = (self._in_a_row + 1) * bad
        self._longest = torch.maximum(self._longest, self._in_a_row)

    def longest(self) -> int:
        """The most steps skipped in a row so far. Waits for the device."""
        return int(self._longest)


def update(optimizer: torch.optim.AdamW, gradient_norm: Tensor, counter: SkipCounter) -> None:
    """One optimizer step, or none at all (no decay, no momentum) if the gradient norm is not finite; decided on the device.

    `found_inf` is the hook by which torch.amp.GradScaler skips a step of a fused optimizer.
    """
    bad = (~torch.isfinite(gradient_norm)).float()
    optimizer.found_inf = bad  # type: ignore[attr-defined]
    optimizer.step()
    counter.add(bad)
