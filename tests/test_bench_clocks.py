"""bench/clocks.py: what is said of the GPU while something is measured."""

import threading

import pytest
import torch

from bench import clocks
from bench.summary import run_lines, step_lines

CUDA = torch.device("cuda")


@pytest.fixture
def driver(monkeypatch):
    """A driver with these values, the last of which stays; an event that is set once all are read."""
    values = [(1980, 350_000), (1500, 698_000), (1700, 690_000)]
    read = threading.Event()

    def clock_rate(device):
        assert device == CUDA
        return values[0][0]

    def power_draw(device):
        assert device == CUDA
        watts = values[0][1]
        if len(values) > 1:
            del values[0]
        else:
            read.set()
        return watts

    monkeypatch.setattr(torch.cuda, "clock_rate", clock_rate)
    monkeypatch.setattr(torch.cuda, "power_draw", power_draw)
    monkeypatch.setattr(clocks, "INTERVAL", 0.001)
    return read


def test_the_clock_and_the_power_of_the_time_under_the_context(driver):
    with clocks.watched(CUDA) as found:
        assert driver.wait(60)
        assert found == {}
    assert found["lowest_mhz"] == 1500 and found["mhz"] <= 1700 and 690 <= found["watts"] <= 698


def test_a_driver_that_says_nothing_costs_the_figure_only(driver, monkeypatch):
    asked = threading.Event()

    def absent(device):
        asked.set()
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")  # as torch says it

    monkeypatch.setattr(torch.cuda, "power_draw", absent)
    with clocks.watched(CUDA) as found:
        assert asked.wait(60)
    assert found == {"failed": "ModuleNotFoundError: nvidia-ml-py does not seem to be installed"}


def test_what_fails_is_passed_on_and_no_thread_is_left(driver):
    before = threading.active_count()
    with pytest.raises(ValueError, match="of the measurement"), clocks.watched(CUDA):
        raise ValueError("of the measurement")
    assert threading.active_count() == before


def test_a_cpu_has_none():
    with clocks.watched(torch.device("cpu")) as found:
        pass
    assert found == {} and clocks.summary([]) == {}


def test_the_summary_says_at_which_clock_a_figure_holds():
    row = {"step_ms": 33.1, "tokens_per_second": 494_000, "mfu": None}
    lines = step_lines({"variants": {"slow": row | {"gpu": {"mhz": 1500, "watts": 690.4}}, "cpu": row}})
    assert lines[1].endswith("  1,500 MHz 690 W") and lines[2].endswith("MFU none")
    readings = [(345, 76.0)] * 9 + [(1700, 690.0)] * 60
    run = {"points": [{"step": 1, "loss": 2.0}], "epochs": 0.1, "gpu": readings}
    assert run_lines(run)[0].endswith(", 1,700 MHz 690 W")
