"""Clocks. On a GPU: CUDA graphs replayed with a cold L2, timed by events. On a CPU: the wall clock, which
measures nothing useful here.

A kernel of this model runs for 10 to 50 us, about as long as Python needs to launch one. A graph takes the
launches out of the figure; the wall clock around plain calls puts them back in, and both are reported. What
reads a value on the host has no graph: its plain calls are timed by the same events.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from bench.record import one_line

# Read before every measurement: larger than any L2, and it gives the host time to queue what follows. Read,
# not written: the lines that a write leaves in the L2 have to be written back in the time of the next kernel.
FLUSH_BYTES = 256 << 20
K = TypeVar("K")
T = TypeVar("T")
LEAST_US = 1000.0  # of one measurement on a GPU, by repeated replays


@dataclass(frozen=True)
class Sample:
    """Median of several measurements in microseconds, and the distance of their quartiles over the median."""

    us: float
    spread: float

    @classmethod
    def of(cls, values: list[float]) -> Sample:
        median = statistics.median(values)
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (median, median, median)
        return cls(median, (high - low) / median if median else 0.0)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """Holds the lock of a file, if there is one, so that processes which share a GPU do not time at once."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class NotCapturable(RuntimeError):
    """A call that runs, but not while a CUDA graph is captured."""


def replayable(prepare: Callable[[], Callable[[], object]], device: torch.device) -> Callable[[], object]:
    """What `prepare()` returns, as one captured CUDA graph; on a CPU a plain call.

    prepare runs on the stream of the capture: autograd runs a backward pass on the stream of its forward
    pass, and a capture must not leave its stream. What the call returns is kept, so that its tensors do not
    share memory with each other.
    Raises NotCapturable, and whatever the call itself raises.
    """
    if device.type != "cuda":
        call = prepare()
        call()
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = prepare()
        for _ in range(2):  # compiles, and fills the caches of the libraries
            call()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        _check_never_waits(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            kept = call()
    except Exception as failure:  # that of the end of the capture; what ended it is its context
        torch.cuda.set_stream(torch.cuda.default_stream(device))  # the capture leaves its own in place
        with contextlib.suppress(RuntimeError):  # reports the error of the capture once more
            torch.cuda.synchronize()
        raise NotCapturable(str(failure.__context__ or failure)) from failure
    torch.cuda.synchronize()

    def replay(_kept: object = (call, kept)) -> None:
        graph.replay()

    return replay


def replayable_or_plain(
    prepare: Callable[[], Callable[[], object]], device: torch.device
) -> tuple[Callable[[], object], bool]:
    """(`replayable`, whether it is a graph): a plain call where it cannot be captured, and on a CPU."""
    with contextlib.suppress(NotCapturable):
        return replayable(prepare, device), device.type == "cuda"
    call = prepare()  # anew, on the stream that the clock looks at
    call()
    torch.cuda.synchronize()
    return call, False


def _check_never_waits(call: Callable[[], object]) -> None:
    """Raises NotCapturable for a call that makes the host wait for the device: found out before a capture
    that it would spoil.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as failure:
            raise NotCapturable(str(failure)) from failure
        finally:
            torch.cuda.set_sync_debug_mode(before)


def in_turns(
    calls: Mapping[str, T],
    rounds: int,
    once: Callable[[T], float],
    left: Callable[[], float] = lambda: math.inf,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """What `once` finds of each call, one number a round: A B C A B C, so that a drift of the machine meets
    all alike.

    left: no round but the first begins when it is below 0. A call that raises is left out from then on; the
    second result says why.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, str] = {}
    for number in range(rounds):
        if number and left() < 0:
            break
        for name, call in calls.items():
            if name not in failed:
                try:
                    found[name].append(once(call))
                except Exception as failure:  # noqa: BLE001 - a result like any other
                    failed[name] = one_line(failure)
    return found, failed


def alternate(
    replays: Mapping[K, Callable[[], object]], device: torch.device, calls: int = 1, rounds: int = 30
) -> dict[K, Sample]:
    """Microseconds per call of each variant, in turns. calls: how many calls of the operation one replay
    holds.

    The first two rounds do not count. On a GPU a replay is repeated until it lasts a millisecond: calls must
    then be so many that none finds its inputs in the L2, where the one before the last left them.
    """
    flush = flush_buffer(device)
    values: dict[K, list[float]] = {name: [] for name in replays}
    times = dict.fromkeys(replays, 1)
    for turn in range(rounds + 2):
        for name, replay in replays.items():
            us = 1e6 * seconds(replay, device) if flush is None else event_time(replay, flush, times[name])
            if turn >= 2:
                values[name].append(us / calls)
            elif flush is not None:
                times[name] = max(1, math.ceil(LEAST_US / us))
    return {name: Sample.of(found) for name, found in values.items()}


def flush_buffer(device: torch.device) -> torch.Tensor | None:
    """What `event_time` reads to empty the L2; None on a CPU."""
    return torch.ones(FLUSH_BYTES // 4, device=device) if device.type == "cuda" else None


def event_time(replay: Callable[[], object], flush: torch.Tensor, times: int = 1) -> float:
    """Microseconds of a replay that begins with a cold L2: the mean of `times` in a row."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.sum()
    start.record()
    for _ in range(times):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / times


def seconds(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Of one call by the wall clock: of several in a row, with a wait for the device at both ends."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - began) / calls


def median_seconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median of `rounds` calls after one that does not count."""
    return statistics.median([seconds(call, device) for _ in range(rounds + 1)][1:])


def eager(call: Callable[[], object], device: torch.device, budget: float, rounds: int) -> Sample:
    """Microseconds per plain call, host included: as many in a row as take about `budget` seconds a round."""
    count = max(1, min(100, int(budget / seconds(call, device))))
    return Sample.of([1e6 * seconds(call, device, count) for _ in range(rounds)])
