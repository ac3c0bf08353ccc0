"""`python -m bench.roofline` at toy size, and the arithmetic of its floors and of its list."""

import argparse
import json
import math
import os

import pytest
import torch
from in_process import printed

from bench import probes, roofline, work
from bench.case import Case
from bench.ops import Shapes
from bench.record import INTERPRETER_NOTE, Part
from kernels import TORCH
from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError
from smollm2.model import SmolLM2ForCausalLM

CONFIG, TINY = SmolLM2Config.preset("135M"), SmolLM2Config.preset("tiny", num_hidden_layers=1)
ROOF = (30e9, 400e9)  # bytes and operations per second


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(stdout, section of the JSON file)"""
    path = tmp_path_factory.mktemp("roofline") / "roofline.json"
    stdout = printed(roofline.main, "--device", "cpu", "--tiny", "--dtype", "bf16", "--json", path)
    return stdout, json.loads(path.read_text(encoding="utf-8"))["roofline"]


def test_the_roof_is_measured(measured):
    _, section = measured
    assert section["status"] == "complete" and section["note"] == INTERPRETER_NOTE
    assert all(section[f"{name}_gb_per_s"] > 0 for name in ("copy", "read", "in_place"))
    assert set(section["matmul_tflops"]) == {"fp32", "fp16", "bf16"}
    assert all(rate > 0 for rate in section["matmul_tflops"].values())


def test_every_part_of_a_step_and_of_a_token_has_a_floor_and_a_time(measured):
    _, section = measured
    wanted = {
        "step": {"products", "attention", "norms", "swiglu", "loss", "optimizer", "weights"},
        "token": {"weights", "KV", "logits", "norms", "swiglu"},
    }
    for unit, parts in wanted.items():
        found = section[unit]
        assert set(found["parts_ms"]) == parts
        no_package = "whole, compiled: there is no compiled step"
        assert [line for line in found["not_measured"] if not line.startswith(no_package)] == []
        assert all(row["floor"] > 0 and row["torch"] > 0 for row in found["parts_ms"].values())
        floor = sum(row["floor"] for row in found["parts_ms"].values())
        assert math.isclose(floor, found["floor_ms"], rel_tol=1e-2)
        assert found["whole_ms"]["torch"] > 0


def test_what_loses_most_comes_first(measured):
    stdout, section = measured
    for unit in ("step", "token"):
        rows = section[unit]["next"]["torch"]
        losses = [row["loses_ms"] for row in rows]
        assert losses == sorted(losses, reverse=True)
        assert {row["operation"] for row in rows} - {"between"} == set(section[unit]["operations_ms"])
        first = f"{rows[0]['operation']} {rows[0]['phase']}".strip()
        listed = stdout.split(f"next to optimise, {unit}, torch")[1].splitlines()[1]
        assert listed.strip().startswith(f"1. {first}")


def total(items):
    return sum((item.cost * item.times for item in items.values()), work.Cost(work.Work()))


def test_the_operations_of_a_step_are_the_step():
    for size in (2, 4):
        parts = work.step(CONFIG, 32, 512, size)
        assert total(work.step_items(CONFIG, 32, 512, size)) == sum(parts.values(), work.Cost(work.Work()))
    floors = [item.floors(*ROOF) for item in work.step_items(CONFIG, 32, 512, 2).values()]
    whole = work.step_floor(CONFIG, 32, 512, 2, *ROOF)
    assert sum(sum(floor.values()) for floor in floors) == pytest.approx(whole)


def test_weights_are_cast_only_to_sixteen_bits_and_the_tied_matrix_is_counted_with_the_loss():
    assert "weights" not in work.step_items(CONFIG, 2, 512, 4)
    cast = work.step_items(CONFIG, 2, 512, 2)["weights"].cost
    tied = CONFIG.vocab_size * CONFIG.hidden_size
    assert cast.forward.bytes == cast.backward.bytes == 6 * (CONFIG.num_parameters() - tied)


def test_a_token_reads_every_weight_once_and_the_cache_once():
    items = work.token_items(CONFIG, 1, 512, 2)
    norms = (2 * CONFIG.num_hidden_layers + 1) * CONFIG.hidden_size
    products = {name: item for name, item in items.items() if item.part in ("weights", "logits")}
    matrices = total(products).forward
    assert matrices.flops == 2 * (CONFIG.num_parameters() - norms)
    weights = 2 * (CONFIG.num_parameters() - norms)
    assert weights < matrices.bytes < 1.01 * weights
    cache = items["decode_attention"].cost.forward.bytes * CONFIG.num_hidden_layers
    assert cache == pytest.approx(512 * 2 * 30 * 3 * 64 * 2, rel=0.01)
    assert all("backward" not in item.floors(*ROOF) for item in items.values())


def test_every_operation_can_be_measured():
    shapes = Shapes(TINY, 1, 8, torch.bfloat16, torch.device("cpu"))
    model = SmolLM2ForCausalLM(TINY, "torch")
    assert set(work.step_items(TINY, 1, 8, 2)) <= set(probes.step_cases(shapes, TORCH, model))
    row = Shapes(TINY, 2, 1, torch.float32, torch.device("cpu"))
    found = probes.token_cases(row, 5, TORCH)
    assert set(work.token_items(TINY, 2, 5, 4)) <= set(found)
    logits = found["logits"].variants[probes.OURS](*found["logits"].inputs(0))
    assert logits.shape == (2, 1, TINY.vocab_size) and logits.isfinite().all()
    mixed = found["decode_attention"].variants[probes.OURS](*found["decode_attention"].inputs(0))
    assert mixed.shape == (2, 1, TINY.num_attention_heads, TINY.head_dim) and mixed.isfinite().all()


def test_the_list_has_phases_apart_and_what_the_parts_do_not_explain():
    items = {
        "loss": work.Item("loss", 1, work.Cost(work.Work(0, 400_000_000), work.Work(0, 800_000_000))),
        "swiglu": work.Item("swiglu", 2, work.Cost(work.Work(30_000_000), work.Work(60_000_000))),
    }
    measured = {
        "loss": {"torch": {"forward+backward": 0.010}},
        "swiglu": {"torch": {"forward": 0.004, "backward": 0.014}, "triton": {}},
    }
    rows = work.losses(items, measured, "torch", 0.030, ROOF)
    assert [(row["operation"], row["phase"]) for row in rows] == [
        ("swiglu", "backward"), ("loss", "forward+backward"), ("swiglu", "forward"), ("between", ""),
    ]  # fmt: skip
    assert [row["loses_ms"] for row in rows] == pytest.approx([10.0, 7.0, 2.0, 2.0])
    assert [row["floor_ms"] for row in rows] == pytest.approx([4.0, 3.0, 2.0, 0.0])


def test_a_backend_without_an_operation_has_no_figure_for_its_part():
    norm = work.Item("norms", 1, work.Cost(work.Work(30_000_000)))
    items = {"rms_norm": norm, "add_rms_norm": norm}
    measured = {
        "rms_norm": {"torch": {"forward": 0.002}, "triton": {"forward": 0.001}},
        "add_rms_norm": {"torch": {"forward": 0.003}},
    }
    norms = {"floor": pytest.approx(2.0), "torch": pytest.approx(5.0)}
    assert work.by_part(items, measured, ROOF) == {"norms": norms}


def test_a_cpu_is_measured_at_full_size_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    options = argparse.Namespace(device="cpu", tiny=False, json=None, seconds=1.0)
    part = Part("roofline", options, cpu=True)
    assert part.device.type == "cpu" and not part.tiny and "note" not in part.data
    assert "TRITON_INTERPRET" not in os.environ
    assert part.model("135M") == CONFIG


def test_a_probe_that_fails_is_a_line_and_not_the_end():
    def broken(*tensors):
        raise RuntimeError("no such kernel")

    part = argparse.Namespace(left=lambda: 1.0, device=torch.device("cpu"), tiny=True)
    item = work.Item("norms", 1, work.Cost(work.Work(8)))
    case = Case("rms_norm", item.cost, lambda seed: [torch.ones(2)], {"triton": broken})
    found, missing = probes.measure_all({"rms_norm": item}, {"torch": {"rms_norm": case}}, part, ROOF)
    assert found == {"rms_norm": {}} and missing == ["rms_norm, torch: RuntimeError: no such kernel"]


def test_what_cannot_be_measured_here_is_refused():
    with pytest.raises(UsageError, match="at least 2 keys, got 1"):
        roofline.main(["--device", "cpu", "--tiny", "--context", "1"])
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no GPU is visible"):
            roofline.main(["--device", "cuda"])
