"""One optimizer step: micro-batches forward and backward, one norm, one decision, one update; eager, or
captured in a CUDA graph.

Nothing here waits for the device: the loss and the norm stay there, and it decides whether a step is skipped.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from smollm2.cli import program
from smollm2.errors import UsageError
from smollm2.working_copies import WorkingCopies
from train import sharding
from train.config import RunConfig
from train.data.batches import Batch
from train.distributed import World
from train.optim import FusedAdamW, StepGuard, clip_gradients, update

# Steps before the capture, in which memory is allocated and kernels are compiled. They train like any other.
# DDP changes its buckets and keeps statistics in its first ten, and torch asks for eleven.
EAGER_STEPS, EAGER_STEPS_OF_DDP = 2, 11


def capture_choice(config: RunConfig, world: World) -> tuple[bool, str]:
    """(Whether the step is captured in a CUDA graph, why). Raises UsageError where cuda_graph=true cannot be.

    With several processes the sums over the ranks are captured too, which torch allows. auto does not do so,
    because it was never run on more than one GPU.
    """
    if config.cuda_graph == "true" and world.device.type != "cuda":
        raise UsageError(f"cuda_graph: needs a CUDA device, got {world.device.type}; drop cuda_graph=true")
    if config.cuda_graph != "auto":
        return config.cuda_graph == "true", "asked for"
    obstacles = {
        f"the device is {world.device.type}": world.device.type != "cuda",
        f"there are {world.size} processes, which only cuda_graph=true captures": world.size > 1,
        "Muon cannot be captured": config.optimizer == "muon",
        "a captured step cannot recompute activations": config.gradient_checkpointing,
        "compile=true has graphs of its own": config.compile,
        "dropout draws anew in every step": config.attention_dropout > 0 or config.lora_dropout > 0,
    }
    obstacle = next((text for text, there in obstacles.items() if there), None)
    return obstacle is None, f"auto: {obstacle or 'one GPU'}"


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work on that stream, in the order of the calls with what the present stream does. None: no change."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


class TrainStep:
    """batch -> (loss, gradient norm before clipping), fp32 scalars on the device.

    The loss is the mean over all valid targets of the step, of all ranks: with unequal micro-batches a mean
    of means would weigh some tokens more than others.
    """

    def __init__(
        self, forward: nn.Module, optimizer: torch.optim.Optimizer, guard: StepGuard, config: RunConfig,
        world: World, copies: WorkingCopies | None = None,
    ) -> None:  # fmt: skip
        """forward: the model, compiled and wrapped as the run wants it. copies: 16-bit copies of its weights,
        which it reads.
        """
        self._forward, self._copies, self._optimizer, self._guard = forward, copies, optimizer, guard
        self._config, self._world = config, world
        self._parameters = [parameter for parameter in forward.parameters() if parameter.requires_grad]
        self._sharded = config.sharded
        # DDP takes the mean over ranks where the sum is wanted.
        self._factor = 1 if self._sharded else world.size
        self._targets = torch.ones((), device=world.device)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        self._targets.fill_(self._count_targets(batch))
        starts = self._to_device(batch.doc_start) if self._config.document_masking else None
        labels = None if batch.labels is None else self._to_device(batch.labels)
        return self._compute(self._to_device(batch.input_ids), starts, labels)

    def _count_targets(self, batch: Batch) -> int:
        """Valid targets of the step over all ranks: all tokens but the last of each row and, with masking, of
        each document; of conversations, what is learned of them.
        """
        if batch.learned is not None:
            return max(1, batch.learned)
        rows, length = batch.input_ids.shape
        hidden = batch.inner_starts if self._config.document_masking else 0
        return max(1, rows * self._world.size * (length - 1) - hidden)

    def _to_device(self, values: Tensor) -> Tensor:
        return values.to(self._world.device, non_blocking=True)

    def _compute(self, ids: Tensor, doc_start: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), device=self._world.device)
        scale = self._factor / self._targets
        if self._copies is not None:
            if not isinstance(self._optimizer, FusedAdamW):
                self._copies.invalidate()  # so that a captured step copies the weights at every replay
            self._copies.refresh()
        pieces = list(_micro_batches(ids, doc_start, labels, self._config.batch_size))
        for index, (piece, starts, targets) in enumerate(pieces):
            last = index == len(pieces) - 1
            if self._sharded:
                sharding.sum_over_copies(self._forward, last)
            with self._world.no_sync(self._forward, not last):
                how = dict(doc_start=starts, reduction="sum", scale=scale)
                part = self._forward(piece, labels=targets, **how).loss
                part.backward()
            loss += part.detach()
        loss = self._world.sum(loss) / self._factor
        if isinstance(self._optimizer, FusedAdamW):
            gradient_norm = self._optimizer.clip(self._config.grad_clip)
        else:
            clip = sharding.clip_gradients if self._sharded else clip_gradients
            gradient_norm = clip(self._parameters, self._config.grad_clip)
        update(self._optimizer, self._guard.judge(loss, gradient_norm))
        self._optimizer.zero_grad(set_to_none=True)
        return loss, gradient_norm


class CapturedStep(TrainStep):
    """The same, as one CUDA graph: after a few eager steps the next is captured, and from then on replayed
    without Python between kernels. All batches have one shape.

    The first steps run on the stream of the capture, as torch demands of what is captured later.
    """

    def __init__(self, stream: torch.cuda.Stream, *args: Any, **kwargs: Any) -> None:
        """stream: of the capture, on which DDP was made too; what follows is TrainStep's."""
        super().__init__(*args, **kwargs)
        self._stream = stream
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager = EAGER_STEPS if self._world.size == 1 else EAGER_STEPS_OF_DDP
        self._ids = self._starts = self._loss = self._norm = torch.empty(0)
        self._labels: Tensor | None = None

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self._eager:
            self._eager -= 1
            with on_stream(self._stream):
                return super().__call__(batch)
        if self._graph is None:
            self._capture(batch)
        assert self._graph is not None
        self._targets.fill_(self._count_targets(batch))
        self._ids.copy_(batch.input_ids, non_blocking=True)
        self._starts.copy_(batch.doc_start, non_blocking=True)
        if self._labels is not None and batch.labels is not None:
            self._labels.copy_(batch.labels, non_blocking=True)
        if self._copies is not None and isinstance(self._optimizer, FusedAdamW):
            self._copies.refresh()  # after a write from outside
        self._graph.replay()
        if self._copies is not None and not isinstance(self._optimizer, FusedAdamW):
            # they were made at the beginning of the replay, and its end changed the weights
            self._copies.invalidate()
        return self._loss.clone(), self._norm.clone()

    def _capture(self, batch: Batch) -> None:
        """Records a step; recording computes nothing, so the weights stay as they are."""
        device = self._world.device
        self._ids, self._starts = batch.input_ids.to(device), batch.doc_start.to(device)
        self._labels = None if batch.labels is None else batch.labels.to(device)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that pins the next batches may ask the driver for memory meanwhile, which
        # would end a global capture.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            starts = self._starts if self._config.document_masking else None
            self._loss, self._norm = self._compute(self._ids, starts, self._labels)


def _micro_batches(
    ids: Tensor, doc_start: Tensor | None, labels: Tensor | None, rows: int
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Pieces of `rows` rows: ids, doc_start, labels."""
    starts = doc_start.split(rows) if doc_start is not None else itertools.repeat(None)
    return zip(ids.split(rows), starts, (ids if labels is None else labels).split(rows), strict=False)


@contextlib.contextmanager
def memory_advice(config: RunConfig) -> Iterator[None]:
    """Out of memory: says which keys need less."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and "can't allocate memory" not in str(error):
            raise
        reason = str(error).partition("\n")[0] or "in Python"
        raise UsageError(
            f"out of memory ({reason}); lower batch_size={config.batch_size} and raise grad_accumulation="
            f"{config.grad_accumulation} by the same factor, or set gradient_checkpointing=true or "
            f"dtype=bf16, or lower sequence_length={config.sequence_length}; "
            f"{program('python -m train.run')} ... --dry-run estimates the memory; "
            "a run that has saved continues with resume=auto"
        ) from error
