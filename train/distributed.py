"""Several processes, one model: how those that torchrun started agree, and how gradients are summed (DDP).

    torchrun --nproc-per-node 8 -m train.run ...

The number of ranks does not change what is trained: the rows of a step are a function of (seed, step), each
rank takes its share of them, and gradients and losses are sums over all ranks, divided by the valid targets
of the whole step. Messages between hosts (signals, objects, the exit) go over gloo, so that the device never
waits for them. For ranks that share one copy of the model see sharding.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smollm2.cli import resolve_device
from smollm2.errors import LoadError, UsageError
from train.rng import rng_states, set_rng_states

T = TypeVar("T")
ECHO = 2.0  # seconds within which one Ctrl-C reaches a rank twice: from the terminal and from torchrun


@dataclass(frozen=True)
class World:
    """The processes of a run. Without torchrun it is a world of one, whose methods are local operations."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: dist.ProcessGroup | None = None  # gloo, for messages between hosts

    @property
    def main(self) -> bool:
        """Whether this process reports and saves."""
        return self.rank == 0

    def from_main(self, make: Callable[[], T]) -> T:
        """Calls `make` on rank 0 alone and returns its result, or raises its error, on every rank."""
        if self.size == 1:
            return make()
        message: list[Any] = [None, None]
        if self.main:
            try:
                message = [make(), None]
            except (UsageError, LoadError) as error:
                message = [None, error]
        dist.broadcast_object_list(message, src=0, group=self.control)
        if message[1] is not None:
            raise message[1]
        return message[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in their order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, in place. On a GPU the host does not wait for it."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)

    def wrap(self, forward: nn.Module) -> nn.Module:
        """The module; of several processes, with gradients that DDP averages in every backward pass."""
        if self.size == 1:
            return forward
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(forward, device_ids=devices, gradient_as_bucket_view=True)

    def no_sync(self, forward: nn.Module, skip: bool) -> contextlib.AbstractContextManager[None]:
        """A context in which gradients stay local if `skip`, as in all but the last micro-batch of a step."""
        if skip and isinstance(forward, DistributedDataParallel):
            return forward.no_sync()
        return contextlib.nullcontext()


def join_world(device: str) -> World:
    """Joins the processes that torchrun started, or is a world of one. device: as on every command line.

    Raises UsageError when a rank has no GPU of its own.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(resolve_device(device))
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    place = resolve_device(device)
    if place.type == "mps":
        remedy = "start one process without torchrun, or device=cpu"
        raise UsageError(f"device: several processes train on cuda or cpu, got mps; {remedy}")
    if place.type == "cuda":
        if local_rank >= (count := torch.cuda.device_count()):
            reason = f"local rank {local_rank} has no GPU, there are {count}"
            raise UsageError(f"torchrun: {reason}; lower --nproc-per-node")
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
        threading.Thread(target=_stop_when_orphaned, args=(os.getppid(),), daemon=True).start()
    return World(place, rank, size, local_rank, dist.new_group(backend="gloo"))


def _stop_when_orphaned(launcher: int) -> None:
    """Sends SIGTERM to this process when torchrun is gone, which was killed without a chance to do so: the
    run saves and ends, instead of training on where nobody sees it.

    A rank that then waits for one that is gone is ended by the broken connection, or by the next rank's end.
    """
    while os.getppid() == launcher:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def leave_world() -> None:
    """Ends the communication, if there is any. Otherwise NCCL warns at exit."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def settle_buckets(world: World, forward: nn.Module, rows: int, length: int) -> None:
    """One forward and backward pass on zeros, whose gradients are thrown away.

    DDP changes the layout of its buckets after the first backward pass, and with three ranks or more the
    layout decides the order of sums. After this pass a resumed run sums in the order of an uninterrupted one.
    """
    if world.size == 1:
        return
    states = rng_states()
    ids = torch.zeros((rows, length), dtype=torch.int64, device=world.device)
    starts = torch.zeros((rows, length), dtype=torch.int32, device=world.device)
    forward(ids, labels=ids, doc_start=starts, reduction="sum").loss.backward()
    for parameter in forward.parameters():
        parameter.grad = None
    set_rng_states(states)


class Interrupted(BaseException):
    """A signal came while a run waited for its data. No Exception: what retries a read would catch it."""


class StopRequest:
    """Inside this context the first SIGTERM, SIGINT or SIGHUP is noted, and the second ends the process at
    once. A SIGHUP never does: a terminal that closes sends several. Under nohup there is none.

    All ranks stop after the same step, whichever of them got the signal, and when. A process that trains
    alone also leaves a wait (`waiting`).
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._noted = 0
        self._since = 0.0
        self._agreed = 0
        self._waiting = False
        self._message: Tensor | None = None
        self._sent: dist.Work | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # not on Windows
            for number in {signal.SIGTERM, signal.SIGINT, hangup}:
                if number != hangup or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._sent is not None and kind is None:
            self._sent.wait()  # the other ranks have sent theirs too: they stop after the same step
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._noted:
            if number == getattr(signal, "SIGHUP", None):
                return
            if self._world.size == 1 or time.monotonic() - self._since > ECHO:
                os._exit(128 + number)
            return
        self._noted, self._since = number, time.monotonic()
        if self._world.main:
            what = "the wait for data ends here" if self._waiting else "finishing the step, then saving"
            text = f"\n{signal.Signals(number).name}: {what}; once more leaves at once"
            with contextlib.suppress(
                OSError, RuntimeError
            ):  # no terminal, or it came while this was printing
                print(text, file=sys.stderr, flush=True)
        if self._waiting:
            raise Interrupted

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what may take minutes and changes nothing that is saved. Of a process that trains alone, the
        first signal raises Interrupted in it, or one that was noted before at its beginning.

        Several processes wait on: the others are in a collective operation, and would not hear of it.
        """
        self._waiting = self._world.size == 1
        try:
            if self._waiting and self._noted:
                raise Interrupted
            yield
        finally:
            self._waiting = False

    def agree(self) -> int:
        """Called by every rank once a step -> the number of the signal on which to stop now, or 0.

        Several processes agree on what was noted one step earlier: that message travels while a step is
        computed.
        """
        if self._world.size == 1:
            self._agreed = self._noted
            return self._agreed
        if self._sent is not None:
            self._sent.wait()
            assert self._message is not None
            self._agreed = int(self._message)
        self._sent = None
        if not self._agreed:
            self._message = torch.tensor(self._noted)
            self._sent = dist.all_reduce(
                self._message, op=dist.ReduceOp.MAX, group=self._world.control, async_op=True
            )
        return self._agreed
