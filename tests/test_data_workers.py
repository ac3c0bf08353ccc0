"""Worker processes: they change nothing but the time, and end with the training process whatever ends it."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_sources import ListSource, same, some_source
from train_cases import DEADLINE

from smollm2.errors import LoadError
from smollm2.pretrained.tokenizer import train_tokenizer
from train.data import worker_pool
from train.data.batches import held_out_rows, training_batches
from train.data.prefetch import Prefetch
from train.data.worker_pool import WorkerPool

SHAPE = dict(rows=2, length=16, seed=3, validation_fraction=0.1)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["document 0123456789 . " * 5], 280)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(pids: list[int]) -> bool:
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end and any(map(alive, pids)):
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_the_stream_does_not_depend_on_the_workers(tokenizer, monkeypatch):
    monkeypatch.setattr(worker_pool, "CHUNK_DOCUMENTS", 2)  # several chunks a block
    source = some_source(shards=3, blocks=3, documents=11)
    alone = list(itertools.islice(training_batches(source, tokenizer, **SHAPE), 60))
    for workers in (1, 3):
        ahead = training_batches(source, tokenizer, **SHAPE, workers=workers)
        assert all(same(next(ahead), batch) for batch in alone)
        ahead.close()
    rows = held_out_rows(source, tokenizer, 0.3, 4, 16)
    again = held_out_rows(source, tokenizer, 0.3, 4, 16, workers=2)
    assert [part.tolist() for part in again[:2]] == [part.tolist() for part in rows[:2]]


def test_workers_start_when_they_are_needed_and_end_when_the_stream_is_closed(tokenizer):
    pool = WorkerPool(tokenizer, 2)
    assert pool.processes == []
    block = pool.submit(["some text", 5, None]).result(threading.Event())
    assert (
        block.lengths[0] > 1
        and block.lengths[1:].tolist() == [0, 0]
        and block.unusable.tolist() == [False, True, True]
    )
    pids = [process.pid or 0 for process in pool.processes]
    assert pids and all(map(alive, pids))
    pool.close()
    assert gone(pids)
    threads = {thread.name for thread in threading.enumerate()}
    batches = training_batches(some_source(), tokenizer, **SHAPE, workers=1)
    next(batches)
    batches.close()
    assert {thread.name for thread in threading.enumerate() if thread.name == "prefetch"} <= threads


def test_a_worker_that_is_killed_is_reported_and_not_waited_for(tokenizer):
    pool = WorkerPool(tokenizer, 1)
    stop = threading.Event()
    pool.submit(["warm"]).result(stop)
    os.kill(pool.processes[0].pid or 0, signal.SIGKILL)
    with pytest.raises(LoadError, match=r"a worker process .* ended unexpectedly .*resume=auto.*workers=1"):
        for _ in range(100):  # it may take a moment until the death is noticed
            pool.submit(["more"]).result(stop)
    pool.close()


def test_the_kill_reaches_the_training_loop_with_its_signal(tokenizer, monkeypatch):
    pools: list[WorkerPool] = []
    create = WorkerPool.__init__

    def remember(self: WorkerPool, *args: object) -> None:
        create(self, *args)  # type: ignore[arg-type]
        pools.append(self)

    monkeypatch.setattr(WorkerPool, "__init__", remember)
    source = ListSource([[["document 5 . " * 2000] * 20] * 5])
    batches = training_batches(source, tokenizer, rows=1, length=4096, workers=2)
    next(batches)
    os.kill(pools[0].processes[0].pid or 0, signal.SIGKILL)
    with pytest.raises(LoadError, match="killed by SIGKILL, as when memory runs out"):
        for _ in range(2000):
            next(batches)


class Pickled(str):
    """A document whose worker calls something as it reads it."""

    call: tuple[object, tuple[object, ...]]

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ((os._exit, (3,)), "exit code 3"),
        ((os._exit, (0,)), "exit code 0"),
        ((signal.raise_signal, (signal.SIGKILL,)), "killed by SIGKILL"),
        ((os.closerange, (3, 200)), "exit code 0"),
        ((bytes, (1 << 60,)), "MemoryError"),
        ((exec, ("raise SystemError('none of ours')",)), "none of ours"),
    ],
)
def test_whatever_ends_a_worker_ends_the_wait_for_it(tokenizer, call, reason):
    pool, document = WorkerPool(tokenizer, 1), Pickled("text")
    document.call = call
    parts = pool.submit(["before", document]), pool.submit(["after"])
    with pytest.raises(LoadError, match=rf"ended unexpectedly \(.*{reason}.*\); continue with resume=auto"):
        for part in parts:
            part.result(threading.Event())
    pool.close()
    assert gone([process.pid or 0 for process in pool.processes])


def test_a_worker_that_is_killed_in_the_middle_of_an_answer_is_noticed(tokenizer, monkeypatch):
    """Its answer does not fit into the pipe, so that it is still writing while nobody reads."""
    pool, begun, reading = WorkerPool(tokenizer, 1), threading.Event(), threading.Event()
    pool.submit(["warm"]).result(threading.Event())
    connection = pool._workers[0]._connection
    receive = connection.recv

    class Slow:
        send = connection.send

        def recv(self) -> object:
            while not connection.poll(0.1):  # until the first bytes are there
                pass
            begun.set()
            assert reading.wait(DEADLINE)
            return receive()

    monkeypatch.setattr(pool._workers[0], "_connection", Slow())
    part = pool.submit(["document 5 . " * 100_000])
    assert begun.wait(DEADLINE)
    os.kill(pool.processes[0].pid or 0, signal.SIGKILL)
    reading.set()
    with pytest.raises(LoadError, match="killed by SIGKILL"):
        part.result(threading.Event())
    pool.close()


@pytest.mark.parametrize("where", [worker_pool._WorkerProcess, threading.Thread])
def test_a_worker_that_cannot_start_is_reported(tokenizer, monkeypatch, where):
    def refused(_: object) -> None:
        raise (
            OSError(12, "Cannot allocate memory")
            if where is not threading.Thread
            else RuntimeError("can't start new thread")
        )

    pool = WorkerPool(tokenizer, 1)
    monkeypatch.setattr(where, "start", refused)
    with pytest.raises(LoadError, match="Cannot allocate memory|can't start new thread"):
        pool.submit(["text"]).result(threading.Event())
    with pytest.raises(LoadError, match="Cannot allocate memory|can't start new thread"):
        next(training_batches(some_source(), tokenizer, **SHAPE, workers=1))


def test_a_worker_that_fails_at_its_start_is_reported(tokenizer):
    pool = WorkerPool(tokenizer, 1)
    pool._start = ("no tokenizer", *pool._start[1:])
    with pytest.raises(LoadError, match="ended unexpectedly .exit code 1"):
        pool.submit(["text"]).result(threading.Event())
    pool.close()


def test_a_reader_that_runs_out_of_memory_is_reported():
    def large() -> Iterator[int]:
        raise MemoryError("1 TiB")
        yield 1

    with pytest.raises(LoadError, match="data: memory ran out .1 TiB."):
        next(Prefetch(large(), threading.Event(), 1))


def test_a_reader_that_ends_without_a_word_is_noticed(monkeypatch):
    monkeypatch.setattr(Prefetch, "_work", lambda self: None)
    with pytest.raises(LoadError, match="the thread that reads ahead ended unexpectedly"):
        next(Prefetch(iter(()), threading.Event(), 1))


PROGRAM = """
import itertools, sys, threading
sys.path.insert(0, {tests!r})
from data_sources import some_source
from smollm2.pretrained.tokenizer import train_tokenizer
from train.data.worker_pool import WorkerPool
pool = WorkerPool(train_tokenizer(["document"], 280), 2)
for part in [pool.submit(["text"] * 5000) for _ in range(4)]:
    part.result(threading.Event())
print(*[process.pid for process in pool.processes], flush=True)
sys.stdin.readline()
for part in [pool.submit(["text"] * 5000) for _ in range(8)]:
    part.result(threading.Event())
print("worked", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_workers_leave_when_the_training_process_is_killed_and_ignore_signals_meant_for_it(project_root):
    # The program has no `if __name__ == "__main__"`: workers must not run it again.
    program = PROGRAM.format(tests=str(project_root / "tests"))
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=project_root,
        text=True
    )  # fmt: skip
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert not any("torch" in Path(f"/proc/{pid}/maps").read_text() for pid in pids), (
        "workers load what they need, not torch"
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        for pid in pids:
            os.kill(pid, number)
    assert parent.stdin is not None
    parent.stdin.write("go on\n")
    parent.stdin.flush()
    assert parent.stdout.readline() == "worked\n"
    assert all(map(alive, pids))
    parent.kill()
    parent.wait()
    assert gone(pids)
