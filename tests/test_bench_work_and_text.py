"""The arithmetic behind the figures of bench/ (bytes, operations, MFU), its summary, and its training
text.
"""

import glob
import json
from pathlib import Path

import pytest
import torch

from bench import summary, text, work
from smollm2.config import SmolLM2Config
from train.command_line import parse
from train.data.local import LocalSource

CONFIG = SmolLM2Config.preset("135M")


def test_flops_per_token():
    assert work.flops_per_token(CONFIG, 512) == pytest.approx(860e6, rel=1e-3)
    assert work.flops_per_token(CONFIG, 2048) == pytest.approx(1019e6, rel=1e-3)


def test_a_steps_operations_are_those_of_the_convention():
    """The sum over the parts of a step against 6 operations per weight and token; attention backward is 5/4
    of twice its forward.
    """
    total = sum(work.step(CONFIG, 32, 512, 2).values(), work.Cost(work.Work()))
    attention = CONFIG.num_hidden_layers * work.attention(32, 512, 9, 3, 64, 2).forward.flops
    assert total.forward.flops + total.backward.flops - attention // 2 == 16384 * work.flops_per_token(
        CONFIG, 512
    )


def test_bytes_of_the_memory_bound_operations():
    rows, elements = 16384, 16384 * 576
    assert work.add_rms_norm(rows, 576, 2).forward.bytes == 8 * elements + 4 * rows
    assert work.swiglu(rows, 1536, 2) == work.Cost(work.Work(6 * rows * 1536), work.Work(10 * rows * 1536))
    assert work.rope_qkv(rows, 512, 9, 3, 64, 2).forward.bytes == rows * 3072 + 512 * 64 * 4
    assert work.attention(32, 512, 9, 3, 64, 2).forward.flops == pytest.approx(9.7e9, rel=0.01)


def test_bytes_of_what_holds_weights():
    rows, hidden, width = 16384, 16384 * 576, 16384 * 1536
    matrix = 576 * 1536
    # gate and up, what comes of them, down
    forward = hidden + 2 * matrix + 2 * width, width, width + matrix + hidden
    of_down, of_gate_up = (
        (hidden + matrix + 4 * width, hidden + width + matrix),
        (2 * width + 2 * matrix + hidden,) * 2,
    )
    found = work.mlp(rows, 576, 1536, 2)
    assert (found.forward.bytes, found.backward.bytes) == (2 * sum(forward), 2 * sum((*of_down, *of_gate_up)))
    assert (found.forward.flops, found.backward.flops) == (6 * rows * matrix, 12 * rows * matrix)
    apart = work.layer(CONFIG, 32, 512, 2)
    assert found.forward.bytes == 4 * width * -1 + sum(
        apart[name].forward.bytes for name in ("gate and up projection", "swiglu", "down projection")
    )
    found = work.tied_embedding(rows, 5000, 49152, 576, 2)
    assert found.forward.bytes == 2 * hidden + 8 * rows + 5000 * 576 * 4
    assert found.backward.bytes == 2 * hidden + 8 * rows + 4 * 49152 * 576 + 5000 * 576 * 8
    assert (
        work.step(CONFIG, 32, 512, 2)["optimizer"].backward
        == work.adamw(CONFIG.num_parameters())
        == work.Work(32 * 134_515_008)
    )


def test_bytes_of_a_decode_step_are_its_weights_and_its_cache():
    weights = work.decode_layer(CONFIG, 0, 512, 2).forward
    assert weights.bytes == 2 * (576 * 960 + 576 * 576 + 3 * 576 * 1536 + 2 * 576) and weights.flops == 0
    one, two = (work.decode_layer(CONFIG, rows, 512, 2).forward for rows in (1, 2))
    # of each row: 512 keys and values of 3 heads of 64, x in and out, two tables of 32 in fp32
    assert (
        two.bytes - one.bytes == one.bytes - weights.bytes == 2 * 2 * 512 * 3 * 64 + 2 * 2 * 576 + 2 * 4 * 32
    )
    assert one.flops == 2 * (576 * 960 + 576 * 576 + 3 * 576 * 1536) + 4 * 9 * 512 * 64
    assert work.decode_head(2, 576, 49152, 2).forward == work.Work(
        2 * 576 * (49152 + 3) + 4 * 2 * 49152, 2 * 2 * 576 * 49152
    )


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
    # the gradient of the values is copied into the packed one
    assert packed.backward.bytes > alone.backward.bytes


def test_a_floor_is_the_slower_of_moving_and_computing():
    assert work.Work(10, 10).floor(1.0, 100.0) == 10.0
    assert work.Work(10, 10).floor(100.0, 1.0) == 10.0


def test_the_floor_of_a_step_is_no_less_than_its_operations_alone():
    operations = 16384 * work.flops_per_token(CONFIG, 512) / 800e12
    assert operations < work.step_floor(CONFIG, 32, 512, 2, 3e12, 800e12) < 2 * operations


def test_an_unknown_device_has_no_peak():
    assert work.peak_flops(torch.device("cpu")) is None


def test_training_text_leaves_out_what_is_held_out(tmp_path, monkeypatch):
    """An installation like conda's, whose site-packages lie within the standard library, and which has two of
    the held-out packages.
    """
    library, site = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    of_packages = ("torch/__init__", "jinja2/loaders", "patsy/nested/build")
    for name in ("json/decoder", *(f"site-packages/{module}" for module in of_packages)):
        (library / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (library / f"{name}.py").write_text(f"# {name}\n", encoding="utf-8")
    (site / "optax").mkdir()  # has no Python file
    (tmp_path / "link").symlink_to(site)
    places = {"stdlib": library, "purelib": site, "platlib": tmp_path / "link"}
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(places[name]))
    monkeypatch.setattr(text.torch, "__file__", str(site / "torch" / "__init__.py"))
    paths, held_out = text.globs(tiny=False)
    assert paths == [f"{library}/**/*.py"]
    assert held_out == [f"{site}/jinja2/**/*.py", f"{site}/patsy/**/*.py"]
    source = LocalSource(paths, "text", held_out)
    assert [file.stem for file in source.files] == ["decoder", "__init__"]


def test_training_text_of_this_installation(tmp_path):
    paths, held_out = text.globs(tiny=False)
    assert all(next(glob.iglob(pattern, recursive=True), None) for pattern in [*paths, *held_out])
    assert any(Path(torch.__file__).is_relative_to(pattern.removesuffix("/**/*.py")) for pattern in paths)
    assert held_out, "torch depends on jinja2"
    few, apart = text.globs(tiny=True)
    assert len(LocalSource(few, "text", apart).files) < 20


def test_a_tokenizers_path_holds_in_every_folder(tmp_path, monkeypatch):
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").touch()
    (tmp_path / "train").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = str((tmp_path / "tok").resolve())
    assert {text.tokenizer_source(name) for name in ("tok", "tok/tokenizer.json", folder)} == {folder}
    assert text.tokenizer_source("train") == "train"  # learn one, whatever the folder is called
    assert text.tokenizer_source("HuggingFaceTB/cosmo2-tokenizer") == "HuggingFaceTB/cosmo2-tokenizer"


@pytest.mark.parametrize("tiny", [True, False])
def test_the_preparation_means_the_tokens_of_the_run(tmp_path, tiny):
    shared = text.configuration(tiny, "train", tmp_path)
    command = text.preparation(tiny, "train", tmp_path, workers=3, seconds=2.0)
    assert command[1:3] == ["-m", "train.prepare"] and command[3 : 3 + len(shared)] == shared
    assert command[3 + len(shared) :] == ["workers=3", "--tokens", "1000000"]
    config, _ = parse(shared)
    assert config.token_cache == str(tmp_path) and config.validation_paths and config.trains_tokenizer
    assert tiny or config.model_config(config.vocab_size) == CONFIG


def write(folder: Path, name: str, **sections) -> None:
    versions = {"torch": "2.11.0", "triton": "3.6.0"}
    head = {"device": "NVIDIA H100", "versions": versions, "commit": "0123456789abcdef", "date": "2026-01-01"}
    (folder / name).write_text(json.dumps({**head, **sections}), encoding="utf-8")


def row(variant: str, us: float, phase: str = "forward") -> dict[str, object]:
    return {"op": "swiglu", "phase": phase, "variant": variant, "us": us, "percent_of_roof": 81.0}


def test_summary_compares_with_the_fastest_other_and_names_what_is_missing(tmp_path):
    rows = [row("triton", 50.0), row("reference", 200.0), row("compile", 60.0)]
    rows.append({"op": "swiglu", "variant": "liger", "failed": "absent"})
    write(tmp_path, "kernels.json", kernels={"status": "stopped after 9 s", "rows": rows})
    lines = summary.summarise(tmp_path).splitlines()
    assert lines[0] == "NVIDIA H100; torch 2.11.0, triton 3.6.0; commit 0123456789ab; 2026-01-01"
    assert "kernels: stopped after 9 s; what it had:" in lines
    assert any("swiglu" in line and "forward 50.0 us 81.0 % (1.20x compile)" in line for line in lines)
    assert "  not timed: liger: absent" in lines
    assert {"roofline: not run", "tests: not run", "step: not run", "run: not run"} <= set(lines)


def test_summary_names_failures_and_stays_short(tmp_path):
    failures = [f"tests/test_x.py::test_{i}" for i in range(60)]
    outcome = {"counts": {"passed": 3, "failed": 60}, "failures": failures, "end": "complete"}
    crashed = {"counts": {}, "failures": [], "end": "exit code -11: Segmentation fault"}
    numerics = [
        {"op": "swiglu", "dtype": "bfloat16", "worst": 0.7},
        {"op": "attention", "dtype": "float32", "worst": 1.2},
    ]
    files, rows = {"test_x.py": outcome, "test_y.py": crashed}, [row("triton", 1.0) for _ in range(60)]
    write(tmp_path, "tests.json", tests={"status": "complete", "files": files, "numerics": numerics})
    numbered = [{**one, "op": f"op {i}"} for i, one in enumerate(rows)]
    write(tmp_path, "kernels.json", kernels={"status": "complete", "rows": numbered})
    found = summary.summarise(tmp_path)
    assert len(found.splitlines()) == summary.LINES and "more lines" in found.splitlines()[-1]
    assert "tests: 3 passed, 60 failed in 2 files" in found
    assert "FAILED tests/test_x.py::test_3" in found and "and 56 more" in found
    assert "test_y.py: exit code -11: Segmentation fault" in found
    assert "worst error over budget: 1.20 (attention, float32)" in found


def test_summary_of_a_training_run(tmp_path):
    def told(**run):
        write(tmp_path, "training.json", run=run)
        return summary.summarise(tmp_path).splitlines()

    points = [{"step": step, "loss": 11.0 - step / 100} for step in range(10, 510, 10)]
    held = [
        {"step": step, "held_out_loss": loss, "unigram_entropy": 6.36}
        for step, loss in ((100, 7.5), (500, 6.25))
    ]
    rates = {"epochs": 0.07, "tokens_per_second": 371000.4, "mfu": 0.331}
    line = (
        "training run: 500 steps, loss 10.90 -> 6.45, held-out 7.50 -> 6.25, unigram entropy 6.36, 0.07 "
        "epochs, 371,000 tok/s, MFU 33.1 %"
    )
    assert line in told(status="complete", points=points, held_out=held, **rates)
    one = [{"step": 1, "loss": "nan"}]
    line = "training run: 1 steps, loss nan -> nan, 0.00 epochs"
    assert line in told(status="stopped after 9 s", points=one, held_out=[], epochs=0.0)
    line = "training run: no points: the time was up before the first step"
    assert line in told(status="complete", points=[], end="the time was up before the first step")
    line = "training run: skipped, omegaconf is not installed"
    assert line in told(status="complete", skipped="omegaconf is not installed")


def test_summary_of_nothing(tmp_path):
    assert summary.summarise(tmp_path).startswith("no results")
