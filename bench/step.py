"""One optimizer step, whoever's model it is, and what the benchmarks of training say about it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import TORCH, Backend
from smollm2.config import SmolLM2Config
from smollm2.model import SmolLM2ForCausalLM

COMPARED_STEPS = 3  # whose losses must agree between variants: nobody wins by computing less
BETAS = (0.9, 0.95)


def training_model(
    config: SmolLM2Config, backend: Backend | str, device: torch.device, dtype: torch.dtype
) -> SmolLM2ForCausalLM:
    """The model in training mode with the fp32 weights that seed 0 gives on this device. dtype: of the
    activations.
    """
    torch.manual_seed(0)
    with torch.device(device):
        compute = None if dtype == torch.float32 else dtype
        return SmolLM2ForCausalLM(config, backend, compute_dtype=compute).train()


class TrainingStep:
    """One optimizer step as a call: tokens -> loss, which stays on the device."""

    def __init__(
        self,
        model: SmolLM2ForCausalLM,
        forward: Callable[..., Any] | None = None,
        own: bool | None = None,
        fused: bool = True,
    ) -> None:
        """forward: the model, or torch.compile of it. own: AdamW is ours and writes the working copies of the
        weights (default: as in a training run, where the backend is Triton's and nothing is compiled). fused:
        torch's AdamW takes one launch, not one parameter after the other.
        """
        self.model = model
        self._forward = model if forward is None else forward
        matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        device = model.lm_head.weight.device
        # a tensor, so that a schedule needs no other step and a captured graph sees it
        self.lr = torch.tensor(3e-4, device=device)
        if own is None:
            own = forward is None and getattr(model, "backend", TORCH).name.startswith("triton")
        self.optimizer: torch.optim.Optimizer
        rate = self.lr
        if own:
            from kernels.fused_adamw import FusedAdamW
            from smollm2.working_copies import WorkingCopies

            copies = None if model.compute_dtype is None else WorkingCopies(model, model.compute_dtype)
            model.use_working_copies(copies)
            self.optimizer = FusedAdamW(groups, lr=rate, copies=copies, betas=BETAS)
        elif fused:
            on_gpu = device.type == "cuda"
            self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True, capturable=on_gpu)
        else:  # this form would read a tensor back from the device
            number = float(rate)
            self.optimizer = torch.optim.AdamW(groups, lr=number, betas=BETAS, foreach=False, fused=False)

    def __call__(self, ids: Tensor, doc_start: Tensor | None = None) -> Tensor:
        """ids, doc_start [B, T] -> loss in nats."""
        self.begin()
        loss = self._forward(ids, ids, doc_start).loss
        loss.backward()
        self.update()
        return loss.detach()

    def begin(self) -> None:
        """Without gradients, and with working copies of the weights as they are."""
        self.optimizer.zero_grad(set_to_none=True)
        if (copies := getattr(self.model, "working_copies", None)) is not None:
            copies.refresh()

    def update(self) -> None:
        """Clipping to a global norm of 1, and AdamW."""
        if (clip := getattr(self.optimizer, "clip", None)) is not None:
            clip(1.0)
        else:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def phases(self, ids: Tensor) -> dict[str, Callable[[], None]]:
        """The parts of one step, to be called once each and in order."""
        losses: list[Tensor] = []

        def forward() -> None:
            self.begin()
            losses.append(self._forward(ids, ids, None).loss)

        return {"forward": forward, "backward": lambda: losses[0].backward(), "update": self.update}


class CapturedStep:
    """A TrainingStep as one CUDA graph: no Python and no launches between its kernels. Runs two steps before
    it is captured.
    """

    def __init__(self, step: TrainingStep, ids: Tensor) -> None:
        self._ids = ids.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.first_losses = [step(self._ids) for _ in range(2)]
        torch.cuda.synchronize()
        # the gradients of the capture live in the graph's own memory
        step.optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._loss = step(self._ids)

    def __call__(self, ids: Tensor) -> Tensor:
        self._ids.copy_(ids)
        self._graph.replay()
        return self._loss.clone()


def all_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean",
    **others: Any,
) -> Tensor:  # fmt: skip
    """linear_cross_entropy as torch has it: all logits [N, V], the loss in fp32 or more. No scale, no
    penalty, and it reads no copy.
    """
    wanted = [name for name in ("scale", "z_loss", "label_smoothing") if others.get(name)]
    if wanted:
        raise ValueError(f"the plain loss has no {', '.join(wanted)}")
    logits = F.linear(hidden, weight.to(hidden.dtype))
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction=reduction)


# what is said of a step


def rates(seconds: list[float], tokens: int) -> dict[str, float]:
    """The figures of a step of so many tokens, from the seconds that it took each time."""
    typical = statistics.median(seconds)
    return {
        "step_ms": round(1e3 * typical, 3),
        "tokens_per_second": round(tokens / typical, 1),
        "spread": round((max(seconds) - min(seconds)) / typical, 3),
    }


def loss_distances(rows: Mapping[str, Mapping[str, Any]], base: str | None = None) -> dict[str, float]:
    """Variant -> largest distance of its first "losses" from those of `base`, or of the first row that has
    any; of as many steps as it has. Without a base there are none.
    """
    losses: dict[str, list[float]] = {name: row["losses"] for name, row in rows.items() if "losses" in row}
    exact = losses.get(next(iter(losses), "") if base is None else base)
    if exact is None:
        return {}
    return {
        name: max(abs(a - b) for a, b in zip(found, exact, strict=False)) for name, found in losses.items()
    }
