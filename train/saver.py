"""Checkpoints written beside the training, in a thread."""

from __future__ import annotations

import threading
from pathlib import Path

from train.checkpoint import ALONE, SaveError, Snapshot, write_snapshot
from train.distributed import World


class Saver:
    """Writes the snapshots of a run, in the background if asked: one at a time, in their order.

    A checkpoint that cannot be written does not end the training: the next call of `failure` returns the
    error, and earlier checkpoints are intact. last: the error of the newest write that is over, or None.
    """

    def __init__(
        self, run: Path, keep: int, keep_every: int = 0, *, background: bool = True, writers: World = ALONE
    ) -> None:
        """writers: the ranks that write together, with a group of their own (`sharding.writers`), or this
        process alone.
        """
        self._where, self._background, self._writers = (run, keep, keep_every), background, writers
        self._thread: threading.Thread | None = None
        self.last: SaveError | None = None
        self._failure: SaveError | None = None  # not told yet

    def save(self, snapshot: Snapshot) -> None:
        """Starts to write a snapshot, once the one before is written."""
        self.wait()
        if not self._background:
            self._write(snapshot)
            return
        # Not a daemon: a program that ends waits for the write.
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            run, keep, keep_every = self._where
            write_snapshot(run, snapshot, keep, keep_every, self._writers)
            self.last = None
        except SaveError as error:
            self.last = self._failure = error

    def wait(self) -> None:
        """Returns when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def failure(self) -> SaveError | None:
        """Why a write failed since the last call; None if none did. Does not wait."""
        failure, self._failure = self._failure, None
        return failure
