"""What a run shows while it trains: a tqdm bar where stderr is a terminal, plain lines elsewhere.

The record is metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO, cast

from smollm2.streams import StandardStream

# The bar is narrow, so that the figures after it fit on a usual terminal; tqdm cuts off what does not fit.
BAR = "{n_fmt}/{total_fmt} |{bar:10}| ETA {remaining}{postfix}"


def columns(values: Mapping[str, Any]) -> list[str]:
    """The figures of one step, the most useful first, without those that are missing or None.

    values: as in metrics.jsonl.
    """

    def shown(name: str, write: str, factor: float = 1.0) -> list[str]:
        value = values.get(name)
        return [] if value is None else [write.format(value * factor)]

    about = "" if values.get("unique_examples_exact", True) else "~"
    return [
        *shown("loss", "loss {:.3f}"),
        *shown("lr", "lr {:.2e}"),
        *shown("gradient_norm", "|g| {:.2f}"),
        *shown("tokens_per_second", "{:,.0f} tok/s"),
        *shown("mfu", "MFU {:.1f}%", 100),
        *shown("wait_ms", "wait {:.0f} ms"),
        *shown("memory_gb", "{:.1f} GB"),
        *shown("unique_examples", about + "{:,.0f} docs"),
        *([f"{values['skipped_steps']} skipped"] if values.get("skipped_steps") else []),
    ]


def duration(seconds: float) -> str:
    """0:07, 12:34, 3:25:45"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _has_terminal() -> bool:
    """Whether stderr can show a bar. The pseudo-terminals of some containers have no columns for it."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


@contextlib.contextmanager
def optional_output(shown: bool, *, needed: bool = False) -> Iterator[None]:
    """Inside, no stream that is closed, full or lacks a character ends the work: what cannot be printed is
    lost, which `lost_output` tells. shown: False drops stdout altogether. needed: stdout is what the command
    was asked for, so that its error is raised.
    """
    out = sys.stdout if shown and sys.stdout is not None else io.StringIO()
    optional = StandardStream(out, needed=needed)
    err: Any = sys.stderr  # that of a command is optional already
    if not isinstance(err, StandardStream):
        err = StandardStream(err or io.StringIO(), needed=False)
    with contextlib.redirect_stdout(cast(TextIO, optional)), contextlib.redirect_stderr(err):
        yield


def lost_output() -> dict[str, str]:
    """Why stdout and stderr cannot be written any more, as lost_stdout and lost_stderr; empty if they can."""
    streams = (("lost_stdout", sys.stdout), ("lost_stderr", sys.stderr))
    failures = ((name, getattr(stream, "failure", None)) for name, stream in streams)
    return {name: str(error) for name, error in failures if error is not None}


class Display:
    """The progress of a run from step `done` to step `steps`."""

    def __init__(self, steps: int, done: int) -> None:
        from tqdm import tqdm

        self._steps = steps
        self._bar: tqdm | None = None
        if _has_terminal():
            self._bar = tqdm(total=steps, initial=done, dynamic_ncols=True, smoothing=0.1, bar_format=BAR)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """The figures of one step: behind the bar, which has an ETA of its own, or on a line."""
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(columns(values)))
            return
        left = values.get("eta_seconds")
        width = len(str(self._steps))  # of every step's number, so that the columns stay in line
        eta = [] if left is None else [f"ETA {duration(left)}"]
        print("  ".join([f"step {step:{width}}/{self._steps}", *columns(values), *eta]), flush=True)

    def line(self, text: str) -> None:
        """Text of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
