"""The clock and the power of a GPU while something is measured.

Near its power limit a GPU lowers its clock. A second of work is then faster than an hour of it, and only the
clock tells a slow program from a slow GPU.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench.record import one_line

INTERVAL = 0.1  # seconds between two readings; the driver has a new one every 0.17 to 1 s


def reading(device: torch.device) -> tuple[int, float]:
    """(MHz of the multiprocessors, watts). Raises what torch raises where the driver or nvidia-ml-py is
    missing.
    """
    return torch.cuda.clock_rate(device), torch.cuda.power_draw(device) / 1e3


def summary(readings: list[tuple[int, float]]) -> dict[str, float]:
    """Median and lowest clock in MHz, median power in watts; nothing of no readings."""
    if not readings:
        return {}
    clocks, watts = zip(*readings, strict=True)
    return {"mhz": statistics.median(clocks), "lowest_mhz": min(clocks), "watts": statistics.median(watts)}


@contextmanager
def watched(device: torch.device) -> Iterator[dict[str, Any]]:
    """A dictionary that has the `summary` of the time under this context when it ends, or the reason under
    "failed"; it stays empty where there is no GPU.
    """
    found: dict[str, Any] = {}
    if device.type != "cuda":
        yield found
        return
    readings: list[tuple[int, float]] = []
    ended = threading.Event()

    def watch() -> None:
        try:
            while not ended.wait(INTERVAL):
                readings.append(reading(device))
        except Exception as failure:  # noqa: BLE001 - what is measured meanwhile stays
            found["failed"] = one_line(failure)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
        found.update(summary(readings))
