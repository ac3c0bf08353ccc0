"""A background thread that prepares what comes next."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Iterator
from typing import TypeVar

from smollm2.errors import LoadError

Item = TypeVar("Item")
ENDED = "data: the thread that reads ahead ended unexpectedly"


class Prefetch(Iterator[Item]):
    """The same items, `depth` of them prepared ahead by a background thread; ahead=False: as they are, in the
    calling thread.

    An error in the thread is raised by next(), in its place in the order. Setting `stop`, or close(), ends
    the thread, which closes `items`. A thread that hangs in a network call is left behind; it ends with the
    process.
    """

    def __init__(
        self, items: Generator[Item, None, None], stop: threading.Event, depth: int, ahead: bool = True,
        deadline: float | None = None,
    ) -> None:  # fmt: skip
        """deadline: seconds after which next() raises TimeoutError. (The time-out of a socket never ends a
        server that sends a byte a second.)
        """
        self.deadline = deadline
        self._items, self._stop, self._closed = items, stop, threading.Event()
        self._queue: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True) if ahead else None
        if self._thread is not None:
            try:
                self._thread.start()
            except RuntimeError as error:
                raise LoadError(f"data: {error}; use workers=0, or allow more memory") from None

    @property
    def ready(self) -> bool:
        """Whether next() would not have to wait."""
        return self._thread is None or not self._queue.empty()

    def __next__(self) -> Item:
        if self._thread is None:
            return next(self._items)
        begin = time.monotonic()
        while not self._over:
            try:
                item, error = self._queue.get(timeout=0.1)
            except queue.Empty:
                if not self._thread.is_alive() and self._queue.empty():  # as where memory ran out
                    raise LoadError(f"{ENDED}; continue with resume=auto") from None
                if self.deadline is not None and time.monotonic() - begin > self.deadline:
                    raise TimeoutError(f"nothing came for {self.deadline:.0f} s") from None
                continue
            if error is not None:
                self._closed.set()
                if isinstance(error, MemoryError):
                    raise LoadError(f"data: memory ran out ({error}); continue with resume=auto") from error
                raise error
            return item  # type: ignore[return-value]
        raise StopIteration

    def close(self) -> None:
        self._closed.set()
        if self._thread is None:
            self._items.close()
        elif self.deadline is None:
            self._thread.join(timeout=5)

    @property
    def _over(self) -> bool:
        return self._stop.is_set() or self._closed.is_set()

    def _work(self) -> None:
        try:
            for item in self._items:
                self._offer(item, None)
                if self._over:
                    return
            self._offer(None, StopIteration())
        except BaseException as error:  # noqa: BLE001 - handed to the consumer
            self._offer(None, error)
        finally:
            self._items.close()

    def _offer(self, item: Item | None, error: BaseException | None) -> None:
        while not self._over:
            try:
                return self._queue.put((item, error), timeout=0.1)
            except queue.Full:
                continue
