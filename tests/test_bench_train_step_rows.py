"""`python -m bench.train_step`: rows come as they are measured, in order of value, and no error takes one
away that was there.
"""

from __future__ import annotations

import argparse
import fcntl
import threading
from typing import Any

import pytest
import torch

from bench import launches, train_step
from bench.peers import choice
from bench.record import Part, read_json
from bench.step import COMPARED_STEPS, TrainingStep, loss_distances
from bench.timing import alone
from smollm2.config import SmolLM2Config

CONFIG = SmolLM2Config.preset("tiny", num_hidden_layers=1)
IDS = torch.randint(CONFIG.vocab_size, (1, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def part(tmp_path):
    return Part(
        "step", argparse.Namespace(device="cpu", tiny=True, json=tmp_path / "step.json", seconds=600.0)
    )


def rows(part: Part, variant: str) -> dict[str, dict[str, Any]]:
    return dict(train_step.Bench(CONFIG, IDS, part).attempt(variant))


def test_a_profiler_error_costs_the_launches_only(part, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("CUPTI is busy")

    monkeypatch.setattr(launches, "count", broken)
    row = rows(part, "torch")["torch"]
    assert row["launches_failed"] == "RuntimeError: CUPTI is busy"
    assert row["step_ms"] > 0 and len(row["losses"]) == COMPARED_STEPS


def test_blocks_last_as_long_as_they_should(part, monkeypatch):
    part.tiny, clock, lengths = False, iter([0.25, *[1.0] * 8]), list[int]()

    def seconds(block: Any, device: torch.device) -> float:
        before = len(lengths)
        block()
        lengths[before:] = [len(lengths) - before]
        return next(clock)

    monkeypatch.setattr(train_step.timing, "seconds", seconds)
    monkeypatch.setattr(TrainingStep, "__call__", lambda *_: lengths.append(0) or torch.zeros(()))
    monkeypatch.setattr(train_step.Bench, "launches", lambda *_: {})
    monkeypatch.setattr(train_step, "SECONDS", 14.0)
    row = rows(part, "torch")["torch"]
    assert lengths[COMPARED_STEPS:] == [1] + [7] * 8 and row["step_ms"] == pytest.approx(1e3 / 7, abs=1e-3)


def test_a_variant_that_fails_is_a_row_with_its_message(part, monkeypatch):
    def broken(*_: object) -> None:
        raise torch.OutOfMemoryError("78 of 79 GB are in use")

    monkeypatch.setattr(train_step, "build", broken)
    assert rows(part, "torch") == {"torch": {"failed": "OutOfMemoryError: 78 of 79 GB are in use"}}


def test_a_graph_needs_a_gpu_and_time_may_run_out(part, monkeypatch):
    assert rows(part, "triton+graph") == {"triton+graph": {"failed": "needs a GPU"}}
    monkeypatch.setattr(part, "left", lambda: -1.0)
    assert rows(part, "torch") == {"torch": {"failed": "no time was left"}}


def test_a_variant_that_computes_another_loss_is_far():
    found: dict[str, dict[str, Any]] = {
        "first": {"losses": [3.0, 2.0]}, "graph": {"failed": "needs a GPU"}, "other": {"losses": [3.0, 2.5]},
        "short": {"losses": [3.25]},
    }  # fmt: skip
    assert loss_distances(found) == {"first": 0.0, "other": 0.5, "short": 0.25}
    assert loss_distances(found, "other")["first"] == 0.5
    assert loss_distances(found, "graph") == loss_distances({}) == {}


def test_what_compiles_comes_last(monkeypatch, tmp_path):
    asked: list[str] = []

    def attempt(_: object, variant: str) -> list[tuple[str, dict[str, Any]]]:
        asked.append(variant)
        return [(variant, {"failed": "not tried"})]

    monkeypatch.setattr(train_step.Bench, "attempt", attempt)
    assert train_step.main(["--device", "cpu", "--tiny", "--json", str(tmp_path / "step.json")]) == 0
    compiled = [index for index, name in enumerate(asked) if "+compile" in name]
    assert compiled == list(range(len(asked) - len(compiled), len(asked)))
    assert asked[:2] == ["triton", "triton+graph"]
    assert asked.index("transformers eager") == compiled[0] - 1  # what is not compiled, in order of value
    assert set(read_json(tmp_path / "step.json")["step"]["variants"]) == set(asked)


def test_both_attentions_of_transformers_compute_our_losses(part):
    pytest.importorskip("transformers", reason="the comparison needs transformers")
    results = {name: rows(part, name)[name] for name in ("torch", "transformers", "transformers eager")}
    distances = loss_distances(results, "torch")
    assert max(distances.values()) < 1e-4 and len(distances) == 3
    assert choice.step_status(results)["transformers"]["used"]
    weights = train_step.build(CONFIG, "torch", IDS.device).state_dict()
    for name, attention in (("transformers", "sdpa"), ("transformers eager", "eager")):
        step = choice.peer_step(name, CONFIG, weights, IDS, False, "eager")
        assert isinstance(step, TrainingStep) and step.model.config._attn_implementation == attention
        assert all(torch.equal(value, weights[key]) for key, value in step.model.state_dict().items())
        assert type(step.optimizer) is torch.optim.AdamW and step.optimizer.defaults["fused"]


def test_all_logits_are_the_same_loss():
    ours, whole = (
        train_step.build(CONFIG, name, torch.device("cpu"))(IDS, IDS).loss
        for name in ("torch", "torch,all-logits")
    )
    assert whole.item() == pytest.approx(ours.item(), rel=1e-5)


def test_a_lock_is_waited_for_and_given_back(tmp_path):
    path = tmp_path / "lock"
    done = threading.Event()

    def measure() -> None:
        with alone(path):
            done.set()

    with path.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = threading.Thread(target=measure)
        waiting.start()
        assert not done.wait(0.2)
    waiting.join()
    assert done.is_set()
    with alone(None), alone(path):
        pass
