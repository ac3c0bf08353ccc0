"""The arithmetic behind the figures of bench/ (bytes, operations, MFU), its summary, and its training text."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import summary, text, work
from smollm2.config import SmolLM2Config

CONFIG = SmolLM2Config.preset("135M")


def test_flops_per_token():
    assert work.flops_per_token(CONFIG, 512) == pytest.approx(860e6, rel=1e-3)
    assert work.flops_per_token(CONFIG, 2048) == pytest.approx(1019e6, rel=1e-3)


def test_mfu_is_that_of_training_runs():
    metrics = pytest.importorskip("train.metrics")
    assert work.PEAK_TFLOPS == metrics.PEAK_TFLOPS
    assert work.flops_per_token(CONFIG, 512) == metrics.flops_per_token(CONFIG, 512)


def test_a_steps_operations_are_those_of_the_convention():
    """The sum over the parts of a step against 6 operations per weight and token; attention backward is 5/4 of twice its forward."""
    total = sum(work.step(CONFIG, 32, 512, 2).values(), work.Cost(work.Work()))
    attention = CONFIG.num_hidden_layers * work.attention(32, 512, 9, 3, 64, 2).forward.flops
    assert total.forward.flops + total.backward.flops - attention // 2 == 16384 * work.flops_per_token(CONFIG, 512)


def test_bytes_of_the_memory_bound_operations():
    rows, elements = 16384, 16384 * 576
    assert work.add_rms_norm(rows, 576, 2).forward.bytes == 8 * elements + 4 * rows
    assert work.swiglu(rows, 1536, 2) == work.Cost(work.Work(6 * rows * 1536), work.Work(10 * rows * 1536))
    assert work.rope_qkv(rows, 512, 9, 3, 64, 2).forward.bytes == rows * 3072 + 512 * 64 * 4
    assert work.attention(32, 512, 9, 3, 64, 2).forward.flops == pytest.approx(9.7e9, rel=0.01)


def test_bytes_of_a_decode_step_are_its_weights_and_its_cache():
    weights = work.decode_layer(CONFIG, 0, 512, 2).forward
    assert weights.bytes == 2 * (576 * 960 + 576 * 576 + 3 * 576 * 1536 + 2 * 576) and weights.flops == 0
    one, two = (work.decode_layer(CONFIG, rows, 512, 2).forward for rows in (1, 2))
    # of each row: 512 keys and values of 3 heads of 64, x in and out, two tables of 32 in fp32
    assert two.bytes - one.bytes == one.bytes - weights.bytes == 2 * 2 * 512 * 3 * 64 + 2 * 2 * 576 + 2 * 4 * 32
    assert one.flops == 2 * (576 * 960 + 576 * 576 + 3 * 576 * 1536) + 4 * 9 * 512 * 64
    assert work.decode_head(2, 576, 49152, 2).forward == work.Work(2 * 576 * (49152 + 3) + 4 * 2 * 49152, 2 * 2 * 576 * 49152)


def test_a_layer_is_no_more_than_its_operations_one_by_one():
    """In one piece it needs neither queries nor activations in memory; the arithmetic is the same."""
    for rows, keys in ((1, 512), (16, 1024)):
        items = [item for name, item in work.token_items(CONFIG, rows, keys, 2).items() if name != "logits"]
        apart = sum((item.cost.forward for item in items), work.Work())
        whole = work.decode_layer(CONFIG, rows, keys, 2).forward
        assert whole.bytes < apart.bytes and whole.flops == apart.flops


def test_rope_alone_moves_what_it_moves_in_a_packed_projection():
    alone, packed = work.rope(16384, 512, 9, 3, 64, 2), work.rope_qkv(16384, 512, 9, 3, 64, 2)
    assert alone.forward == packed.forward == alone.backward
    assert packed.backward.bytes > alone.backward.bytes  # the gradient of the values is copied into the packed one


def test_a_floor_is_the_slower_of_moving_and_computing():
    assert work.Work(10, 10).floor(1.0, 100.0) == 10.0
    assert work.Work(10, 10).floor(100.0, 1.0) == 10.0


def test_the_floor_of_a_step_is_no_less_than_its_operations_alone():
    operations = 16384 * work.flops_per_token(CONFIG, 512) / 800e12
    assert operations < work.step_floor(CONFIG, 32, 512, 2, 3e12, 800e12) < 2 * operations


def test_an_unknown_device_has_no_peak():
    assert work.peak_flops(torch.device("cpu")) is None


def test_document_starts():
    rows = np.array([[5, 6, 0, 7, 8, 0, 0, 9], [0, 1, 2, 3, 4, 5, 6, 7]])
    assert text.document_starts(rows).tolist() == [[0, 0, 0, 3, 3, 3, 6, 7], [0, 1, 1, 1, 1, 1, 1, 1]]


def test_held_out_texts_are_not_trained_on():
    documents = text.read_documents(2_000_000)
    assert documents == text.read_documents(2_000_000)
    assert documents.training and documents.held_out
    assert not set(documents.training) & set(documents.held_out)
    assert documents.bytes >= 2_000_000


def test_batches_are_consecutive_rows_and_begin_again():
    batches = text.Batches(np.arange(1, 36, dtype=np.int32), batch=2, length=5, device=torch.device("cpu"))
    ids, starts = batches(1)
    assert ids.tolist() == [[11, 12, 13, 14, 15], [16, 17, 18, 19, 20]] and ids.dtype == torch.int64
    assert starts.tolist() == [[0] * 5] * 2 and starts.dtype == torch.int32
    assert batches.per_epoch == 3
    assert torch.equal(batches(4)[0], ids)
    with pytest.raises(ValueError, match="at least 10 tokens, got 9"):
        text.Batches(np.arange(9), 2, 5, torch.device("cpu"))


def write(folder: Path, name: str, **sections) -> None:
    head = {"device": "NVIDIA H100", "versions": {"torch": "2.11.0", "triton": "3.6.0"}, "commit": "0123456789abcdef", "date": "2026-01-01"}
    (folder / name).write_text(json.dumps({**head, **sections}), encoding="utf-8")


def row(variant: str, us: float, phase: str = "forward") -> dict[str, object]:
    return {"op": "swiglu", "phase": phase, "variant": variant, "us": us, "percent_of_roof": 81.0}


def test_summary_compares_with_the_fastest_other_and_names_what_is_missing(tmp_path):
    rows = [row("triton", 50.0), row("reference", 200.0), row("compile", 60.0), {"op": "swiglu", "variant": "liger", "failed": "absent"}]
    write(tmp_path, "kernels.json", kernels={"status": "stopped after 9 s", "rows": rows})
    lines = summary.summarise(tmp_path).splitlines()
    assert lines[0] == "NVIDIA H100; torch 2.11.0, triton 3.6.0; commit 0123456789ab; 2026-01-01"
    assert "kernels: stopped after 9 s; what it had:" in lines
    assert any("swiglu" in line and "forward 50.0 us 81.0 % (1.20x compile)" in line for line in lines)
    assert "  not timed: liger: absent" in lines
    assert {"roofline: not run", "tests: not run", "step: not run", "run: not run"} <= set(lines)


def test_summary_names_failures_and_stays_short(tmp_path):
    outcome = {"counts": {"passed": 3, "failed": 60}, "failures": [f"tests/test_x.py::test_{i}" for i in range(60)], "end": "complete"}
    crashed = {"counts": {}, "failures": [], "end": "exit code -11: Segmentation fault"}
    numerics = [{"op": "swiglu", "dtype": "bfloat16", "worst": 0.7}, {"op": "attention", "dtype": "float32", "worst": 1.2}]
    tests = {"status": "complete", "files": {"test_x.py": outcome, "test_y.py": crashed}, "numerics": numerics}
    write(tmp_path, "tests.json", tests=tests)
    write(tmp_path, "kernels.json", kernels={"status": "complete", "rows": [{**row("triton", 1.0), "op": f"op {i}"} for i in range(60)]})
    found = summary.summarise(tmp_path)
    assert len(found.splitlines()) == 40 and "more lines" in found.splitlines()[-1]
    assert "tests: 3 passed, 60 failed in 2 files" in found
    assert "FAILED tests/test_x.py::test_3" in found and "and 56 more" in found
    assert "test_y.py: exit code -11: Segmentation fault" in found
    assert "worst error over budget: 1.20 (attention, float32)" in found


def test_summary_of_nothing(tmp_path):
    assert summary.summarise(tmp_path).startswith("no results")
