"""Processes that tokenise. They start when the first block needs them, and end with the training process.

They are spawned, not forked, since a process with threads and a GPU must not fork; `concurrent.futures` hands
out the work. Three things it does not do are done here: a worker does not import the program's main module,
and with it torch; it ignores a Ctrl-C, which is meant for the training loop; and it ends when the training
process is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.data.tokenise import Encoder, Select, TokenBlock, join

if TYPE_CHECKING:
    from smollm2.pretrained.tokenizer import Tokenizer

CHUNK_CHARACTERS, CHUNK_DOCUMENTS = 1 << 18, 1 << 12  # of a block, for one worker: a few tenths of a second
SHUTDOWN_TIMEOUT = 2.0  # seconds that workers have to finish their chunk when the pool is closed
_QUIET = {signal.SIGINT, signal.SIGTERM}
_starting = threading.Lock()
_encoder: Encoder | None = None  # of this worker process


class _WorkerProcess(SpawnProcess):
    """A process that imports what its work needs and nothing else, deaf to SIGINT and SIGTERM from its first
    instruction on.
    """

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        # Spawning runs the parent's main module in the child. With worker_main.py in its place, the child
        # starts without torch, and programs need no `if __name__ == "__main__"`.
        with _starting:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = types.ModuleType("__main__")
            sys.modules["__main__"].__file__ = str(Path(__file__).with_name("worker_main.py"))
            masks = hasattr(signal, "pthread_sigmask")
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _QUIET) if masks else set()  # inherited
            try:
                return SpawnProcess._Popen(process_obj)
            finally:
                sys.modules["__main__"] = main
                if masks:
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def terminate(self) -> None:
        """SIGKILL: a worker ignores SIGTERM, and has nothing to lose."""
        self.kill()


class _Context(SpawnContext):
    Process = _WorkerProcess


def _start_worker(tokenizer_json: str, end: int, dtype: str) -> None:
    for number in _QUIET:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    os.environ["RAYON_NUM_THREADS"] = "1"
    global _encoder
    _encoder = Encoder(tokenizer_json, end, dtype)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _tokenise(documents: list[Any], select: Select | None) -> TokenBlock:
    assert _encoder is not None  # the initializer ran
    return _encoder(documents, select)


class Pending:
    """A block that is being tokenised, in parts."""

    def __init__(self, pool: WorkerPool, parts: list[Future[TokenBlock]]) -> None:
        self._pool, self._parts = pool, parts

    @property
    def chunks(self) -> int:
        """How many of its parts workers have still to do."""
        return sum(not part.done() for part in self._parts)

    def result(self, stop: threading.Event) -> TokenBlock:
        """Waits for the block. Raises LoadError when a worker died, and Stopped when `stop` is set first."""
        return join([self._pool.wait(part, stop) for part in self._parts], self._pool.dtype)


class Stopped(Exception):
    """The reader closed the stream while something was being waited for."""


class WorkerPool:
    """Tokenises blocks with `workers` processes; with 0, in the calling thread at once."""

    def __init__(self, tokenizer: Tokenizer, workers: int, select: Select | None = None) -> None:
        """Raises LoadError when the tokenizer has no token to put between documents."""
        from smollm2.errors import LoadError  # not at the top: it comes with torch, which no worker needs

        end = tokenizer.eot_token_id
        if end is None:
            wanted = "an end-of-text or end-of-sequence token to put between documents"
            raise LoadError(f"tokenizer: expected {wanted}, found none")
        self.workers, self.dtype, self._select = workers, token_dtype(tokenizer), select
        self._start = (tokenizer.to_json(), end, self.dtype)
        self._encoder: Encoder | None = None
        self._executor: ProcessPoolExecutor | None = None

    def encode(self, documents: Sequence[Any]) -> TokenBlock:
        """Tokenises here and now."""
        self._encoder = self._encoder or Encoder(*self._start)
        return self._encoder(documents, self._select)

    def submit(self, documents: Sequence[Any]) -> Pending:
        """Hands a block to the workers, in parts that several of them can do at a time. Raises LoadError when
        they are dead.
        """
        if not self.workers:
            done: Future[TokenBlock] = Future()
            done.set_result(self.encode(documents))
            return Pending(self, [done])
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                self.workers, mp_context=_Context(), initializer=_start_worker, initargs=self._start
            )  # fmt: skip
        try:
            parts = [self._executor.submit(_tokenise, part, self._select) for part in _chunks(documents)]
            return Pending(self, parts)
        except (BrokenProcessPool, OSError) as error:
            raise self._dead(error) from None

    def wait(self, part: Future[TokenBlock], stop: threading.Event) -> TokenBlock:
        while not stop.is_set():
            try:
                return part.result(timeout=0.1)
            except BrokenProcessPool as error:
                raise self._dead(error) from None
            except NotYet:
                continue
        raise Stopped

    @property
    def processes(self) -> list[_WorkerProcess]:
        """Those that run, or died."""
        return list((getattr(self._executor, "_processes", None) or {}).values())

    def close(self) -> None:
        """Ends the workers: after the chunk that each is at, or by force after two seconds."""
        if self._executor is None:
            return
        processes = self.processes
        self._executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.join(SHUTDOWN_TIMEOUT)
            if process.is_alive():
                process.terminate()
        self._executor = None

    def _dead(self, error: Exception) -> Exception:
        from smollm2.errors import LoadError

        end = time.monotonic() + SHUTDOWN_TIMEOUT  # the executor kills the others: then all have an exit code
        while time.monotonic() < end and any(process.exitcode is None for process in self.processes):
            time.sleep(0.01)
        codes = [process.exitcode for process in self.processes if process.exitcode]
        what = f"data: a worker process that tokenises ended unexpectedly ({_reason(codes) or error})"
        fewer = "with fewer of them (workers=1, or workers=0 for none) if memory ran out"
        return LoadError(f"{what}; continue with resume=auto, {fewer}")


def token_dtype(tokenizer: Tokenizer) -> str:
    """The smallest of uint16 and uint32 that holds every id."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _reason(codes: list[int]) -> str:
    """How the first of them ended; those that the executor killed because of it are passed over."""
    if not codes:
        return ""
    code = next((code for code in codes if code != -signal.SIGKILL), codes[0])
    if code > 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")


def _chunks(documents: Sequence[Any]) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    size = 0
    for document in documents:
        # what is not text need not travel
        usable = document if isinstance(document, (str, bytes)) else None
        chunk.append(usable)
        size += len(usable or "")
        if size >= CHUNK_CHARACTERS or len(chunk) == CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
