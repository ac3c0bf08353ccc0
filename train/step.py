"""One optimizer step: micro-batches forward and backward, one norm, one decision, one update; eager, or captured in a CUDA graph.

Nothing here waits for the device: the learning rate is set before, the loss and the norm stay on the device, and whether a step is left
out is decided there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from smollm2.cli import UsageError
from train import sharding
from train.config import RunConfig
from train.data import Batch
from train.distributed import World
from train.optim import StepGuard, clip_gradients, update

EAGER_STEPS = 2  # before a capture: memory is allocated and kernels are compiled in them; they train like any other


def capture_choice(config: RunConfig, world: World) -> tuple[bool, str]:
    """(Whether the step is captured in a CUDA graph, why). Raises UsageError where cuda_graph=true cannot be."""
    alone = world.device.type == "cuda" and world.size == 1
    if config.cuda_graph == "true" and not alone:
        raise UsageError(f"cuda_graph: needs one CUDA device, got {world.device.type} and {world.size} process(es); drop cuda_graph=true")
    if config.cuda_graph != "auto":
        return config.cuda_graph == "true", "asked for"
    obstacles = {
        f"the device is {world.device.type}": world.device.type != "cuda",
        f"there are {world.size} processes": world.size > 1,
        "Muon cannot be captured": config.optimizer == "muon",
        "a captured step cannot recompute activations": config.gradient_checkpointing,
        "compile=true has graphs of its own": config.compile,
        "dropout draws anew in every step": config.attention_dropout > 0,
    }
    obstacle = next((text for text, there in obstacles.items() if there), None)
    return obstacle is None, f"auto: {obstacle or 'one GPU'}"


class TrainStep:
    """batch -> (loss, gradient norm before clipping), fp32 scalars on the device.

    The loss is the mean over all valid targets of the step, of all ranks: with unequal micro-batches a mean of means would weigh some
    tokens more than others.
    """

    def __init__(self, forward: nn.Module, optimizer: torch.optim.Optimizer, guard: StepGuard, config: RunConfig, world: World) -> None:
        """forward: the model, compiled and wrapped as the run wants it."""
        self._forward, self._optimizer, self._guard, self._config, self._world = forward, optimizer, guard, config, world
        self._parameters = [parameter for parameter in forward.parameters() if parameter.requires_grad]
        self._sharded = config.sharding != "none"
        self._targets = torch.ones((), device=world.device)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        self._targets.fill_(self._count_targets(batch))
        doc_start = batch.doc_start if self._config.document_masking else None
        return self._compute(self._to_device(batch.input_ids), None if doc_start is None else self._to_device(doc_start))

    def _count_targets(self, batch: Batch) -> int:
        """Valid targets of the step over all ranks: all tokens but the last of each row and, with masking, of each document."""
        rows, length = batch.input_ids.shape
        return max(1, rows * self._world.size * (length - 1) - (batch.inner_starts if self._config.document_masking else 0))

    def _to_device(self, values: Tensor) -> Tensor:
        return values.to(self._world.device, non_blocking=True)

    def _compute(self, ids: Tensor, doc_start: Tensor | None) -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), device=self._world.device)
        pieces = list(_micro_batches(ids, doc_start, self._config.batch_size))
        for index, (piece, starts) in enumerate(pieces):
            last = index == len(pieces) - 1
            if self._sharded:
                sharding.sum_over_copies(self._forward, last)
            with self._world.no_sync(self._forward, not last):
                part = self._forward(piece, labels=piece, doc_start=starts, reduction="sum").loss / self._targets
                # DDP takes the mean over ranks where the sum is wanted.
                (part if self._sharded or self._world.size == 1 else part * self._world.size).backward()
            loss += part.detach()
        loss = self._world.sum(loss)
        clip = sharding.clip_gradients if self._sharded else clip_gradients
        gradient_norm = clip(self._parameters, self._config.grad_clip)
        update(self._optimizer, self._guard.judge(loss, gradient_norm))
        self._optimizer.zero_grad(set_to_none=True)
        return loss, gradient_norm


class CapturedStep(TrainStep):
    """The same, as one CUDA graph: after two eager steps the third is captured, and from then on replayed without Python between kernels.

    Holds for one shape of batch. The first steps run on the stream of the capture, as torch asks of what is captured later.
    """

    def __init__(self, forward: nn.Module, optimizer: torch.optim.Optimizer, guard: StepGuard, config: RunConfig, world: World) -> None:
        super().__init__(forward, optimizer, guard, config, world)
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._done = 0
        self._ids = self._starts = self._loss = self._norm = torch.empty(0)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self._done < EAGER_STEPS:
            self._done += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                found = super().__call__(batch)
            torch.cuda.current_stream().wait_stream(self._stream)
            return found
        if self._graph is None:
            self._capture(batch)
        assert self._graph is not None
        self._targets.fill_(self._count_targets(batch))
        self._ids.copy_(batch.input_ids, non_blocking=True)
        self._starts.copy_(batch.doc_start, non_blocking=True)
        self._graph.replay()
        return self._loss.clone(), self._norm.clone()

    def _capture(self, batch: Batch) -> None:
        """Records a step; recording computes nothing, so the weights stay as they are."""
        self._ids, self._starts = (values.to(self._world.device) for values in (batch.input_ids, batch.doc_start))
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that pins the next batches may ask the driver for memory meanwhile, which would end a global capture.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._loss, self._norm = self._compute(self._ids, self._starts if self._config.document_masking else None)


def _micro_batches(ids: Tensor, doc_start: Tensor | None, rows: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Pieces of `rows` rows."""
    starts = doc_start.split(rows) if doc_start is not None else itertools.repeat(None)
    return zip(ids.split(rows), starts, strict=False)
