"""AdamW and Muon; learning-rate schedules as pure functions of the step, so that a resumed run computes the
same rates; gradient clipping and skipped steps, for which the host never waits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kernels.fused_adamw import FusedAdamW
from smollm2.model import SmolLM2ForCausalLM
from smollm2.working_copies import WorkingCopies
from train.config import RunConfig


def parameter_groups(
    model: nn.Module, weight_decay: float, decayed: str = "matrices"
) -> list[dict[str, Any]]:
    """Two groups: parameters that are decayed, and those that are not.

    decayed: "matrices" leaves out vectors (the norms' weights); "all" decays them too, as SmolLM2's own
    training did. The tied embedding is decayed: it is the head's matrix too. `parameters()` yields it once,
    so it is updated once.
    """
    changed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            kept = decayed == "matrices" and parameter.dim() < 2
            (plain if kept else changed).append(parameter)
    return [{"params": changed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def _obstacle(model: nn.Module, config: RunConfig, device: torch.device | None) -> str | None:
    """Why a run cannot use this project's own AdamW, or None if it can."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = (device or parameters[0].device).type
    backend = getattr(getattr(model, "backend", None), "name", "torch").partition(",")[0]
    # then kernels read the memory of the host, and only that
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    obstacles = {
        "asked for": config.optimizer == "adamw,torch",
        f"sharding={config.sharding} cuts the parameters": config.sharded,
        f"the backend is {backend}": backend != "triton",
        f"the device is {kind}": kind != "cpu" if interpreted else kind not in ("cuda", "xpu"),
        "a parameter is not contiguous fp32": not all(
            one.dtype == torch.float32 and one.is_contiguous() for one in parameters
        ),
    }
    return next((text for text, there in obstacles.items() if there), None)


def describe_optimizer(model: nn.Module, config: RunConfig, device: torch.device | None = None) -> str:
    """What `build_optimizer` gives, and why, for the first lines of a run."""
    if config.optimizer == "muon":
        return "Muon for the matrices of the blocks, torch's fused AdamW for embedding and norms"
    if obstacle := _obstacle(model, config, device):
        return f"AdamW: torch's fused form ({obstacle})"
    return "AdamW of the Triton backend, which clips and writes the working copies too"


def working_copies(
    model: SmolLM2ForCausalLM, config: RunConfig, device: torch.device
) -> WorkingCopies | None:
    """Copies of the weights in the dtype of the activations, or None where that is fp32 or copies are of no
    use: torch.compile casts by itself, a shard has no whole weights, and on a CPU there are no launches to
    save.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and model.backend.name.startswith("triton")
    of_use = config.dtype == "bf16" and not config.sharded and not config.compile
    return WorkingCopies(model, torch.bfloat16) if of_use and (device.type == "cuda" or interpreted) else None


def build_optimizer(
    model: nn.Module, config: RunConfig, device: torch.device | None = None, captured: bool = False,
    copies: WorkingCopies | None = None,
) -> torch.optim.Optimizer:  # fmt: skip
    """MuonWithAdamW with optimizer=muon, else AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101):
    FusedAdamW where the model's backend is Triton's, torch's fused form elsewhere and with
    optimizer=adamw,torch. The state of either AdamW loads into the other, and their numbers differ in the
    last place.

    Each takes `found_inf`, with which a step is skipped on the device; see `update`. captured: the learning
    rate is then a tensor on the device, which a captured step reads at every replay. copies: what
    FusedAdamW writes too; with the others the caller refreshes them.
    """
    if config.optimizer == "muon":
        return MuonWithAdamW(model, config)
    beta1, beta2 = config.betas
    groups = parameter_groups(model, config.weight_decay, config.weight_decay_on)
    if _obstacle(model, config, device) is None:
        return FusedAdamW(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, copies=copies)
    lr = torch.tensor(config.lr, device=device) if captured else config.lr
    return torch.optim.AdamW(
        groups, lr=lr, betas=(beta1, beta2), eps=config.eps, fused=True, capturable=captured
    )


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the blocks, AdamW for the embedding (which is the head) and the norms, as one
    optimizer.

    Muon orthogonalises the averaged gradient of a matrix by five Newton-Schulz iterations in bf16 (Jordan et
    al. 2024, kellerjordan.github.io/posts/muon). Its updates are scaled to the size of AdamW's, 0.2
    sqrt(max(rows, columns)) (Liu et al. 2025, arXiv 2502.16982), so that lr and weight_decay hold for both.
    It keeps one average where AdamW keeps two.

    Every projection is orthogonalised by itself, although q, k and v, gate and up lie side by side in memory.
    The parameter groups are Muon's, then AdamW's. The state is one dictionary, so that state_dict() has all
    of it.
    """

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        matrices = [one for one in model.parameters() if one.dim() == 2 and id(one) not in tables]
        ours = {id(parameter) for parameter in matrices}
        groups = parameter_groups(model, config.weight_decay, config.weight_decay_on)
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ours]
        decay = config.weight_decay if config.muon_weight_decay is None else config.muon_weight_decay
        scale = 1.0 if config.muon_lr is None else config.muon_lr / config.lr
        self._muon = torch.optim.Muon(
            [{"params": matrices, "lr_scale": scale}], lr=config.lr * scale, weight_decay=decay,
            momentum=config.muon_momentum, nesterov=config.muon_nesterov, adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        beta1, beta2 = config.betas
        betas, eps = (beta1, beta2), config.eps
        self._adamw = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=eps, fused=True)
        self.found_inf: Tensor | None = None  # see `update`
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Both work on the groups and the state of this one."""
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # which makes new groups and a new state
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both, or of none if found_inf says so. Takes no closure: the gradients are there."""
        bad = self.found_inf
        if bad is None or (bad.device.type == "cpu" and not bad):
            self._muon.step()
        elif bad.device.type != "cpu":  # reading the value would wait for the device
            self._step_unless(bad)
        self._adamw.found_inf = bad  # type: ignore[attr-defined]
        self._adamw.step()

    def _step_unless(self, bad: Tensor) -> None:
        """Muon's step, undone on the device if `bad` is 1, since torch's Muon has no found_inf. Takes the
        memory of one matrix at a time.
        """
        (group,) = self._muon.param_groups
        skip = bad > 0
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            average = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter.grad))
            # an average with itself changes no bit
            parameter.grad.copy_(torch.where(skip, average, parameter.grad))
            before = parameter.clone()
            self._muon.param_groups = [{**group, "params": [parameter]}]
            self._muon.step()
            parameter.copy_(torch.where(skip, before, parameter))
        self._muon.param_groups = [group]


def learning_rate(step: int, config: RunConfig) -> float:
    """The learning rate of step 0, 1, ..., steps - 1, above 0 at each of them.

    Linear warm-up to lr over warmup_steps, then
      constant  lr
      wsd       lr, then down to min_lr over the last decay_fraction of all steps, linearly (SmolLM2's
                schedule) or as 1 - sqrt(progress), which falls faster at first (both: Haegele et al. 2024,
                arXiv 2405.18392)
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
    if config.schedule == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        remaining = 1 - (math.sqrt(progress) if config.decay_shape == "1-sqrt" else progress)
    return config.min_lr + (config.lr - config.min_lr) * remaining


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group, times its lr_scale if it has one; called before the step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr * group.get("lr_scale", 1.0)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales all gradients so that their global norm is at most max_norm (0: leaves them), and returns the
    norm before that.

    -> fp32 scalar on the device; nothing waits for it. Not finite if any gradient is not.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch._foreach_norm([gradient.float() for gradient in gradients])
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm > 0:
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


SPIKE_WINDOW = 100  # steps over which the mean and the variance of the loss fade
SPIKE_WARMUP = 50  # steps before the guard judges: the first losses fall too fast to have a mean


class StepGuard:
    """Decides, on the device, which steps to leave out, and counts them: reading the counts is the caller's
    choice of when to wait.

    Left out is a step whose loss or gradient norm is not finite and, with zscore > 0, one whose loss lies
    more than `zscore` standard deviations above its recent mean (exponential averages over steps that were
    not left out).
    """

    def __init__(self, device: torch.device, zscore: float = 0.0) -> None:
        def zero(dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros((), dtype=dtype, device=device)

        self.zscore = zscore
        self.skipped, self._in_a_row, self._longest, self._seen = zero(), zero(), zero(), zero()
        self._mean, self._variance = zero(torch.float32), zero(torch.float32)

    def judge(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """loss, gradient_norm: fp32 scalars of this step -> fp32 scalar, 1 if the step is to be left out,
        else 0. Updates in place.
        """
        bad = ~(torch.isfinite(loss) & torch.isfinite(gradient_norm))
        if self.zscore:
            deviation = loss - self._mean
            bad = bad | ((self._seen >= SPIKE_WARMUP) & (deviation > self.zscore * self._variance.sqrt()))
            weight = torch.clamp(1.0 / (self._seen + 1), min=1.0 / SPIKE_WINDOW)
            variance = (1 - weight) * (self._variance + weight * deviation.square())
            self._variance.copy_(torch.where(bad, self._variance, variance))
            self._mean.copy_(torch.where(bad, self._mean, self._mean + weight * deviation))
            self._seen += (~bad).to(torch.int64)
        count = bad.to(torch.int64)
        self.skipped += count
        self._in_a_row.add_(1).mul_(count)
        torch.maximum(self._longest, self._in_a_row, out=self._longest)
        return bad.float()

    def longest(self) -> int:
        """The most steps left out in a row so far. Waits for the device."""
        return int(self._longest)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, on the CPU."""
        return {name: value.cpu().clone() for name, value in self._tensors().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Continues from `state()`. A row of skipped steps, which may have ended the run, begins anew."""
        for name, value in self._tensors().items():
            value.copy_(state[name])

    def _tensors(self) -> dict[str, Tensor]:
        return {"skipped": self.skipped, "seen": self._seen, "mean": self._mean, "variance": self._variance}


def update(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """One optimizer step, or none at all (no decay, no momentum) if `bad` (fp32 scalar) is 1; decided on the
    device.

    `found_inf` is the hook by which torch.amp.GradScaler skips a step of a fused optimizer.
    """
    optimizer.found_inf = bad  # type: ignore[attr-defined]
    optimizer.step()
