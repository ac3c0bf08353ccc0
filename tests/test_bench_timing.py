"""The clocks of the benchmarks: replays, captures and what cannot be captured."""

import contextlib
from unittest import mock

import pytest
import torch

from bench import timing

CUDA = torch.device("cuda")


def test_a_replay_on_a_gpu_lasts_a_millisecond_and_finds_a_cache_that_was_read_over(monkeypatch):
    """The first turn, by itself, says how often the others repeat the replay. What was written would have to
    be written back.
    """
    replays, flush = [], torch.ones(8)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(replays)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 0.01 * (end.at - self.at)  # ten microseconds a replay

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timing, "flush_buffer", lambda device: flush)
    found = timing.alternate({"one": lambda: replays.append(1)}, torch.device("cuda"), calls=2, rounds=3)
    assert len(replays) == 1 + 4 * 100
    assert found["one"].us == pytest.approx(5)
    assert flush._version == 0


def test_a_sample_is_a_median_with_its_spread():
    sample = timing.Sample.of([10.0, 11.0, 12.0, 13.0, 100.0])
    assert sample.us == 12.0 and 0 < sample.spread < 5
    assert timing.Sample.of([7.0]) == timing.Sample(7.0, 0.0)


class FakeGraphs:
    """What `bench.timing` asks torch.cuda for, without a GPU. ends: what ends every capture."""

    def __init__(self, monkeypatch, ends=None):
        self.log, self.mode, self._ends = [], "default", ends
        for name in ("Stream", "CUDAGraph", "current_stream", "default_stream", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, lambda *args: mock.MagicMock())
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: self.log.append("stream"))
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(self, "mode", mode))

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.log.append("capture")
        yield
        if self._ends:
            raise self._ends


def test_a_call_that_waits_for_the_device_is_not_captured_but_timed(monkeypatch):
    fake = FakeGraphs(monkeypatch)

    def call():
        if fake.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return "ran"

    timed, captured = timing.replayable_or_plain(lambda: call, CUDA)
    assert timed() == "ran" and not captured
    assert fake.log == [] and fake.mode == "default"  # nothing was begun that would have to be taken back
    with pytest.raises(timing.NotCapturable, match="synchronizing"):
        timing.replayable(lambda: call, CUDA)


def test_after_a_failed_capture_the_call_is_timed_on_the_stream_of_all_others(monkeypatch):
    fake = FakeGraphs(monkeypatch, ends=RuntimeError("invalidated"))
    timed, captured = timing.replayable_or_plain(lambda: lambda: "ran", CUDA)
    assert timed() == "ran" and not captured
    assert fake.log == ["capture", "stream"]


def test_a_call_that_can_be_captured_is_and_one_that_fails_fails(monkeypatch):
    fake = FakeGraphs(monkeypatch)
    assert timing.replayable_or_plain(lambda: lambda: None, CUDA)[1] and fake.log == ["capture"]

    def broken():
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        timing.replayable_or_plain(lambda: broken, CUDA)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_after_a_call_that_reads_a_value_the_process_goes_on():
    x = torch.ones(4, device="cuda")
    timed, captured = timing.replayable_or_plain(lambda: lambda: x * x.sum().item(), CUDA)
    assert not captured and torch.equal(timed(), 4 * x)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    good, captured = timing.replayable_or_plain(lambda: lambda: x.mul_(2.0), CUDA)
    assert captured
    assert timing.alternate({"good": good, "plain": timed}, CUDA, rounds=2)["plain"].us > 0
