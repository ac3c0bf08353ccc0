"""Processes that tokenise. They start when the first block needs them, and end with the training process.

They are spawned, not forked, since a process with threads and a GPU must not fork. Each is served by a thread
of a `ThreadPoolExecutor` over a pipe of its own, which ends with the process: whatever ends a worker, the
thread that waits for it is woken, and no future stays open. (With a queue that processes share, a worker that
is killed while it writes, or a helper thread that cannot start, leaves futures that nobody will finish.) A
worker does not import the program's main module, and with it torch; it ignores a Ctrl-C, which is meant for
the training loop; and it ends when the training process is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.data.conversations import DTYPE, ChatEncoder, ChatFormat
from train.data.tokenise import Encoder, Select, TokenBlock, join

if TYPE_CHECKING:
    from smollm2.pretrained.tokenizer import Tokenizer

CHUNK_CHARACTERS, CHUNK_DOCUMENTS = 1 << 18, 1 << 12  # of a block, for one worker: a few tenths of a second
START_TIMEOUT = 300.0  # seconds in which a worker must have imported what it needs
SHUTDOWN_TIMEOUT = 2.0  # seconds in which a killed worker is gone
_QUIET = {signal.SIGINT, signal.SIGTERM}
_starting = threading.Lock()


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


def _encoder(tokenizer_json: str, end: int, dtype: str, chat: ChatFormat | None) -> Encoder | ChatEncoder:
    return Encoder(tokenizer_json, end, dtype) if chat is None else ChatEncoder(tokenizer_json, chat)


def _work(connection: Connection, *tokeniser: Any) -> None:
    """What a worker does: it says that it is ready, then answers chunks until the pipe is closed."""
    for number in _QUIET:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    os.environ["RAYON_NUM_THREADS"] = "1"
    encoder = _encoder(*tokeniser)
    answer: TokenBlock | str | None = None
    with suppress(EOFError, OSError):
        while True:
            connection.send(answer)
            try:
                answer = encoder(*connection.recv())
            except (EOFError, OSError):
                raise
            except BaseException as error:  # noqa: BLE001 - the tokenizer's panics are none of Exception
                answer = f"{type(error).__name__}: {error}"


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Worker:
    """A worker process, for the thread that serves it."""

    def __init__(self, start: tuple[Any, ...]) -> None:
        """Raises OSError where it cannot be started."""
        self._connection, theirs = multiprocessing.Pipe()
        self.process = _WorkerProcess(target=_work, args=(theirs, *start), daemon=True)
        try:
            self.process.start()
        finally:
            theirs.close()  # so that the pipe ends with the process

    def ready(self) -> None:
        """Waits until it has started. Raises EOFError or TimeoutError."""
        if not self._connection.poll(START_TIMEOUT):
            self.process.kill()
            raise TimeoutError(f"it did not start in {START_TIMEOUT:.0f} s")
        self._connection.recv()

    def ask(self, documents: list[Any], select: Select | None) -> TokenBlock:
        self._connection.send((documents, select))
        answer = self._connection.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


class Pending:
    """A block that is being tokenised, in parts."""

    def __init__(self, pool: WorkerPool, parts: list[Future[TokenBlock]]) -> None:
        self._pool, self._parts = pool, parts

    @property
    def chunks(self) -> int:
        """How many of its parts workers have still to do."""
        return sum(not part.done() for part in self._parts)

    def result(self, stop: threading.Event) -> TokenBlock:
        """Waits for the block. Raises LoadError if a worker failed, and Stopped if `stop` is set first."""
        return join([self._pool.wait(part, stop) for part in self._parts], self._pool.dtype)


class Stopped(Exception):
    """The reader closed the stream while something was being waited for."""


class WorkerPool:
    """Tokenises blocks with `workers` processes; with 0, in the calling thread at once."""

    def __init__(
        self, tokenizer: Tokenizer, workers: int, select: Select | None = None, train_on: str | None = None
    ) -> None:
        """train_on: what is learned of conversations; None: documents are texts. Raises LoadError when the
        tokenizer has no token to put between documents, UsageError when it has no chat template.
        """
        from smollm2.errors import LoadError  # not at the top: it comes with torch, which no worker needs

        end = tokenizer.eot_token_id
        if end is None:
            wanted = "an end-of-text or end-of-sequence token to put between documents"
            raise LoadError(f"tokenizer: expected {wanted}, found none")
        self.workers, self.dtype, self._select = workers, token_dtype(tokenizer, train_on), select
        chat = None if train_on is None else ChatFormat.of(tokenizer, train_on)
        self._start = (tokenizer.to_json(), end, self.dtype, chat)
        self._encoder: Encoder | ChatEncoder | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._threads = threading.local()  # of each its worker
        self._workers: list[_Worker] = []

    def encode(self, documents: Sequence[Any]) -> TokenBlock:
        """Tokenises here and now."""
        self._encoder = self._encoder or _encoder(*self._start)
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
            self._executor = ThreadPoolExecutor(self.workers, "tokenise")
        try:
            return Pending(self, [self._executor.submit(self._ask, part) for part in _chunks(documents)])
        except RuntimeError as error:  # no thread can be started
            raise _failed(str(error)) from None

    def _ask(self, documents: list[Any]) -> TokenBlock:
        """In a thread: hands a chunk to its worker, and waits. Raises LoadError when the worker fails."""
        worker: _Worker | None = getattr(self._threads, "worker", None)
        try:
            if worker is None:
                worker = self._threads.worker = _Worker(self._start)
                self._workers.append(worker)
                worker.ready()
            return worker.ask(documents, self._select)
        except BaseException as error:  # noqa: BLE001 - whatever it was, there will be no answer
            raise _failed(_reason(error, worker)) from error

    def wait(self, part: Future[TokenBlock], stop: threading.Event) -> TokenBlock:
        while not stop.is_set():
            try:
                return part.result(timeout=0.1)
            except NotYet:
                continue
            except CancelledError:
                break
        raise Stopped

    @property
    def processes(self) -> list[_WorkerProcess]:
        """Those that run, or died."""
        return [worker.process for worker in self._workers]

    def close(self) -> None:
        """Ends the workers by force: what they are at is not wanted any more."""
        if self._executor is None:
            return
        self._executor.shutdown(wait=False, cancel_futures=True)
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join(SHUTDOWN_TIMEOUT)
        self._executor = None


def _failed(reason: str) -> Exception:
    from smollm2.errors import LoadError

    what = f"data: a worker process that tokenises ended unexpectedly ({reason})"
    fewer = "with fewer of them (workers=1, or workers=0 for none) if memory ran out"
    return LoadError(f"{what}; continue with resume=auto, {fewer}")


def token_dtype(tokenizer: Tokenizer, train_on: str | None = None) -> str:
    """The smallest of uint16 and uint32 that holds every id; of conversations, with a bit beside it."""
    if train_on is not None:
        return DTYPE
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _reason(error: BaseException, worker: _Worker | None) -> str:
    """How the worker ended; the error where it did not end, or never began."""
    if worker is not None and isinstance(error, (EOFError, OSError)):
        worker.process.join(SHUTDOWN_TIMEOUT)
        if (code := worker.process.exitcode) is not None:
            if code >= 0:
                return f"exit code {code}"
            name = signal.Signals(-code).name
            return f"killed by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")
    return str(error) or type(error).__name__


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
