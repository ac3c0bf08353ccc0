"""The pytest-benchmark suites of bench/: what they collect, and that they run at toy size and carry their facts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bench_kernels, bench_train, figures
from bench.bench_kernels import CASES, Measurements, in_turns, rates
from bench.conftest import pytest_benchmark_update_machine_info
from bench.kernels import OPS
from bench.peak_memory import peak_memory
from bench.work import Work

SUITES = ("bench_data", "bench_generate", "bench_kernels", "bench_startup", "bench_train")
ORIGIN = {"device", "versions", "commit", "date", "sources"}


def run(project_root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=project_root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_every_suite_is_collected_with_its_ids(project_root: Path) -> None:
    done = run(project_root, "--collect-only", *(f"bench/{name}.py" for name in SUITES))
    assert done.returncode == 0, done.stdout + done.stderr
    ids = [line for line in done.stdout.splitlines() if "::" in line]
    counted = Counter(Path(line.partition("::")[0]).stem for line in ids)
    assert set(counted) == set(SUITES)
    assert len(ids) == len(set(ids))
    for wanted in (
        "bench/bench_kernels.py::test_operation[linear_cross_entropy-forward+backward-reference]",
        "bench/bench_startup.py::test_first_token[import torch-bf16]", "bench/bench_data.py::test_pipeline[cache, workers=0]",
    ):  # fmt: skip
        assert wanted in ids


def test_every_operation_has_its_phases_and_backends() -> None:
    found = {(op, phase) for op, phase, _ in CASES}
    assert {op for op, _ in found} == set(OPS)
    assert ("decode_attention", "backward") not in found and ("attention", "backward") in found
    for op in OPS:
        assert {"triton", "reference"} <= {variant for name, _, variant in CASES if name == op}


def test_a_step_has_several_sizes_and_the_peer_beside_ours() -> None:
    assert len(bench_train.SIZES) > 1
    compared = [(size, dtype) for size in bench_train.SIZES for dtype in bench_train.DTYPES]
    plain, peer = ("torch", "triton") if torch.cuda.is_available() else ("ours", "transformers")
    for case in compared:
        variants = {variant for size, dtype, variant in bench_train.CASES if (size, dtype) == case}
        assert {plain, peer} <= variants


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, project_root: Path) -> dict[str, Any]:
    """pytest-benchmark's JSON of the kernels and the steps at toy size."""
    pytest.importorskip("transformers", reason="the comparison needs transformers")
    path = tmp_path_factory.mktemp("suites") / "suites.json"
    suites = ("bench/bench_kernels.py", "bench/bench_train.py")
    done = run(project_root, *suites, "--tiny", "--benchmark-only", "--benchmark-quiet", f"--benchmark-json={path}")
    assert done.returncode == 0, done.stdout + done.stderr
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@pytest.mark.slow
def test_a_figure_carries_what_makes_it_worth_something(measured: dict[str, Any]) -> None:
    operations = [one["extra_info"] for one in measured["benchmarks"] if "bench_kernels" in one["fullname"]]
    steps = [one["extra_info"] for one in measured["benchmarks"] if "bench_train" in one["fullname"]]
    assert operations and steps
    for facts in operations + steps:
        assert facts.keys() >= ORIGIN | {"phase", "variant", "dtype", "peak_memory_bytes"}
        assert facts["peak_memory_bytes"] > 0
    for facts in operations:
        if facts["op"] != "loss memory":
            assert facts.keys() >= {"bytes", "flops", "us", "gb_per_s", "tflops", "percent_of_roof", "output_hash"}
    for facts in steps:
        assert facts.keys() >= {"tokens_per_second", "flops", "bytes", "percent_of_roof", "mfu", "mfu_convention", "losses"}


@pytest.mark.slow
def test_groups_hold_what_is_compared(measured: dict[str, Any]) -> None:
    groups: dict[str, set[str]] = {}
    for one in measured["benchmarks"]:
        groups.setdefault(one["group"], set()).add(one["extra_info"]["variant"])
    assert groups["add_rms_norm forward"] >= {"triton", "reference", "compile", "F.rms_norm"}
    for dtype in bench_train.DTYPES:
        assert any(group.startswith(f"step {dtype}") and len(variants) > 1 for group, variants in groups.items())


@pytest.mark.slow
def test_a_time_is_one_that_was_measured(measured: dict[str, Any]) -> None:
    for one in measured["benchmarks"]:
        facts = one["extra_info"]
        if "us" in facts:
            assert facts["us"] == pytest.approx(one["stats"]["median"] * 1e6, rel=1e-2)
        if "tokens_per_second" in facts:
            tokens = facts["batch"] * facts["length"]
            assert facts["tokens_per_second"] == pytest.approx(tokens / one["stats"]["median"], rel=1e-2)


@pytest.mark.slow
def test_the_json_does_not_name_the_machine(measured: dict[str, Any]) -> None:
    assert "node" not in measured["machine_info"] and measured["commit_info"]["project"] == "smollm2-kernels"
    text = json.dumps(measured)
    assert str(Path.home()) not in text and str(Path(figures.__file__).resolve().parent.parent) not in text


def test_of_a_machine_only_what_a_figure_needs_is_kept() -> None:
    found: dict[str, Any] = {"node": "alice-laptop", "release": "6.1", "system": "Linux", "cpu": {"brand_raw": "A CPU", "flags": ["avx"]}}
    pytest_benchmark_update_machine_info(config=None, machine_info=found)  # type: ignore[arg-type]
    assert found == {"system": "Linux", "cpu": {"brand_raw": "A CPU"}}


def test_peak_memory_is_the_highest_sum_of_what_is_alive() -> None:
    def call() -> torch.Tensor:
        first = torch.ones(1 << 20)  # 4 MiB
        second = first * 2
        del first
        return second + torch.ones(1 << 18)[0]  # 1 MiB more than the second, and the result

    assert peak_memory(call, torch.device("cpu")) == pytest.approx(4 * ((1 << 20) * 2 + (1 << 18)), rel=1e-3)


def test_variants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "ON_GPU", False)
    monkeypatch.setattr(bench_kernels, "DEVICE", torch.device("cpu"))
    log: list[str] = []
    seconds = in_turns({name: lambda name=name: log.append(name) for name in ("a", "b")}, tiny=True)  # type: ignore[misc]
    assert "".join(log) == "ab" + "ab" + "abab"  # warmed up, timed once for the number of rounds, then in turns
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_percent_of_roof_is_the_floor_over_the_time() -> None:
    found = rates(Work(bytes=10**6, flops=10**6), seconds=4e-5, bandwidth=1e11, rate=1e12)
    assert (found["percent_of_roof"], found["gb_per_s"], found["tflops"]) == (25.0, 25.0, 0.025)


def test_a_variant_that_fails_is_skipped_with_its_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    found = Measurements(tiny=True).of("attention", "forward", "cudnn")
    assert found.keys() == {"failed"} and "RuntimeError" in found["failed"]
