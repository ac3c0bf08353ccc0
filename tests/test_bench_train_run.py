"""`python -m bench.train_run`: the training program, followed, stopped and read. Tiny, on a CPU, with backend
torch where speed is all.
"""

import argparse
import json
import signal
import subprocess
import sys

import pytest
import torch

from bench import text, train_run
from bench.record import Part, read_json
from smollm2.pretrained.tokenizer import train_tokenizer
from train.command_line import parse
from train.prepare import prepare
from train.run import train

TINY = ("--device", "cpu", "--tiny")
ENDLESS = ("steps=1000000", "eval_every=0", "sample_every=0")


@pytest.fixture
def followed(monkeypatch):
    """Makes the clock of a part run out by an event: when `ends(section)` holds for what it has saved.
    Returns the processes started.
    """
    processes = []
    start = subprocess.Popen

    def recorded(*arguments, **options):
        processes.append(start(*arguments, **options))
        return processes[-1]

    def install(ends):
        monkeypatch.setattr(Part, "left", lambda part: 0.0 if ends(part.data) else 1.0)
        return processes

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(train_run, "POLL", 0.02)
    monkeypatch.setattr(train_run, "SAVING", 120.0)
    monkeypatch.setattr(train_run.subprocess, "Popen", recorded)
    yield install
    assert all(process.poll() is not None for process in processes), "a run was left behind"


def test_a_run_that_ends_by_itself(tmp_path, followed):
    followed(lambda data: False)
    assert train_run.main([*TINY, "--json", str(tmp_path / "training.json"), "backend=torch"]) == 0
    run = read_json(tmp_path / "training.json")["run"]
    assert run["status"] == "complete" and run["exit_code"] == 0 and "end" not in run
    assert [point["step"] for point in run["points"]] == [1, 2, 3, 4]
    assert [line["step"] for line in run["held_out"]] == [2, 4] and run["held_out"][0]["unigram_entropy"] > 0
    assert run["sample"]["step"] == 4 and run["sample"]["text"].startswith("The")
    assert run["unique_examples"] == run["documents"] and run["memory_peak_gb"] > 0
    assert "backend=torch" in run["arguments"]


def test_when_the_time_is_up_the_run_saves_and_what_it_wrote_is_a_result(tmp_path, followed):
    followed(lambda data: len(data.get("points", [])) > 2)
    options = ("--scratch", str(tmp_path), "--json", str(tmp_path / "training.json"))
    assert train_run.main([*TINY, *options, *ENDLESS, "backend=torch"]) == 0
    run = read_json(tmp_path / "training.json")["run"]
    last = run["points"][-1]["step"]
    assert (run["status"], run["exit_code"]) == ("complete", 128 + signal.SIGTERM)
    assert run["end"] == f"the time was up after step {last}" and run["tokens_per_second"] > 0
    assert [point["step"] for point in run["points"]] == list(range(1, last + 1))
    assert (tmp_path / "run" / "checkpoints" / f"step-{last:06d}").is_dir()


def test_a_run_that_had_no_time_for_a_step_is_no_failure(tmp_path, followed):
    followed(lambda data: True)
    assert train_run.main([*TINY, "--json", str(tmp_path / "training.json"), *ENDLESS]) == 0
    run = read_json(tmp_path / "training.json")["run"]
    assert run["points"] == [] and run["end"] == "the time was up before the first step"


def test_a_run_that_takes_too_long_to_leave_is_killed(tmp_path, monkeypatch, followed):
    monkeypatch.setattr(train_run, "SAVING", 0.0)
    followed(lambda data: bool(data.get("points")))
    assert train_run.main([*TINY, "--json", str(tmp_path / "training.json"), *ENDLESS, "backend=torch"]) == 0
    run = read_json(tmp_path / "training.json")["run"]
    assert run["exit_code"] == -signal.SIGKILL and run["end"].endswith("saving took too long")


def test_an_interrupted_part_has_saved_what_the_run_wrote_and_leaves_none_behind(tmp_path, followed):
    file = tmp_path / "training.json"

    def interrupt(_):
        # in the file already, so that even a kill would lose nothing
        if read_json(file)["run"].get("points"):
            raise KeyboardInterrupt
        return False

    processes = followed(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_run.main([*TINY, "--json", str(file), *ENDLESS, "backend=torch"])
    assert processes[-1].returncode == 128 + signal.SIGTERM
    assert read_json(file)["run"]["points"]


def test_a_run_that_fails_is_a_failure_with_its_own_words(tmp_path, followed, capfd):
    followed(lambda data: False)
    assert train_run.main([*TINY, "--json", str(tmp_path / "training.json"), "lr=-1"]) == 1
    output = capfd.readouterr()
    assert "lr: expected a number above 0" in output.err.splitlines()[-1]
    assert read_json(tmp_path / "training.json")["run"]["exit_code"] == 2


def test_the_clock_of_the_gpu_is_read_until_the_driver_refuses(tmp_path, monkeypatch):
    readings = iter([(1980, 690.0), (1700, 695.0)])
    monkeypatch.setattr(train_run, "POLL", 0.001)
    monkeypatch.setattr(train_run.clocks, "reading", lambda device: next(readings))
    options = argparse.Namespace(device="cpu", tiny=True, json=None, seconds=600.0)
    part = Part("run", options)
    part.device = torch.device("cuda")
    monkeypatch.setattr(part, "left", lambda: 0.0 if "gpu_failed" in part.data else 1.0)
    waiting = [sys.executable, "-c", "import signal; signal.pause()"]
    assert train_run.follow(part, subprocess.Popen(waiting), tmp_path)
    assert part.data["gpu"] == [(1980, 690.0), (1700, 695.0)]
    assert part.data["gpu_failed"].startswith("StopIteration")


def test_what_is_read_of_a_run(tmp_path):
    assert train_run.collect(tmp_path) == {"points": [], "held_out": []}
    first = dict(step=10, loss=9.0, lr=1e-4, tokens=100, epochs=0.1, documents=5, unique_examples=4)
    rated = dict(step=20, loss=8.0, tokens=200, epochs=0.2, documents=9, unique_examples=7)
    held_out = dict(step=20, held_out_loss=8.5, held_out_bits_per_byte=2.0, unigram_entropy=6.0)
    last = dict(step=30, loss="nan", tokens=300, epochs=0.3, documents=12, unique_examples=9)
    rates = dict(tokens_per_second=50.0, mfu=0.2), dict(tokens_per_second=70.0, mfu=0.4)
    lines = [first, rated | rates[0], held_out, last | rates[1]]
    written = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "metrics.jsonl").write_text(written + '\n{"step": 40, "lo', encoding="utf-8")
    samples = "step 20 sample: a\n\nstep 30 sample: def f():\n\n    step = 1\n\n"
    (tmp_path / "samples.txt").write_text(samples, encoding="utf-8")
    found = train_run.collect(tmp_path)
    assert [point["step"] for point in found["points"]] == [10, 20, 30] and "lr" not in found["points"][0]
    assert found["held_out"] == [held_out]
    assert found["tokens_per_second"] == 60.0 and found["mfu"] == pytest.approx(0.3)
    assert (found["epochs"], found["documents"], found["unique_examples"]) == (0.3, 12, 9)
    assert found["sample"] == {"step": 30, "text": "def f():\n\n    step = 1"}


@pytest.mark.parametrize("carried", [True, False])
def test_what_is_prepared_is_what_the_run_reads(tmp_path, carried):
    """Also where each of them learns the tokenizer by itself: the same documents give the same one."""
    if carried:
        train_tokenizer(["def f(x):\n    return x\n"], 300).save(tmp_path / "tok")
    tokenizer = str(tmp_path / "tok" / "tokenizer.json") if carried else "train"
    shared = text.configuration(True, tokenizer, tmp_path / "tokens")
    prepare(parse([*shared, "workers=0"])[0])
    stored = {path: path.stat().st_size for path in tmp_path.joinpath("tokens").rglob("shard-*")}
    assert sum(stored.values()) > 10_000
    keys = "device=cpu", "workers=0", "backend=torch", "sample_every=0", f"output_dir={tmp_path / 'run'}"
    assert train(parse([*shared, *train_run.TINY, *keys])[0]) == 0
    assert {path: path.stat().st_size for path in tmp_path.joinpath("tokens").rglob("shard-*")} == stored
