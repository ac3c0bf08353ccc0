"""The pytest-benchmark suites of bench/: what they collect, and that they run at toy size and carry their
facts.
"""

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

from bench import bench_kernels, bench_train, figures, startup, step_peers
from bench.bench_kernels import CASES, NOT_HERE, Measurements, in_turns, rates
from bench.conftest import joined, pytest_benchmark_update_machine_info
from bench.kernels import OPS
from bench.part import FACTS
from bench.peak_memory import peak_memory
from bench.peers import choice
from bench.peers import status as peers
from bench.work import Work

SUITES = ("bench_data", "bench_generate", "bench_kernels", "bench_startup", "bench_train")
ORIGIN = {"device", "versions", "commit", "date", "sources"}


def run(project_root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments], cwd=project_root,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
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
        "bench/bench_kernels.py::test_operation[decode_layer-forward-compile]",
        "bench/bench_kernels.py::test_operation[rope-backward-triton]",
        "bench/bench_startup.py::test_first_token[import torch-bf16]",
        "bench/bench_data.py::test_pipeline[cache, workers=0]",
    ):  # fmt: skip
        assert wanted in ids


def test_every_operation_has_its_phases_and_backends() -> None:
    found = {(op, phase) for op, phase, _ in CASES}
    assert {op for op, _ in found} == set(OPS)
    assert {op for op, phase in found if phase == "backward"}.isdisjoint(
        ("decode_attention", "decode_layer", "decode_head")
    )
    assert {("attention", "backward"), ("rope", "backward")} <= found
    for op in OPS:
        assert {"triton", "reference", "compile"} <= {variant for name, _, variant in CASES if name == op}


def test_a_step_has_several_sizes_and_the_peer_beside_ours() -> None:
    assert len(bench_train.SIZES) > 1
    compared = [(size, dtype) for size in bench_train.SIZES for dtype in bench_train.DTYPES]
    models = {
        (size.config(tiny=False).hidden_size, size.config(tiny=False).num_hidden_layers)
        for size in bench_train.SIZES.values()
    }
    assert torch.cuda.is_available() or len(models) >= 3
    plain, peer = ("torch", "triton") if torch.cuda.is_available() else ("ours", "transformers")
    for case in compared:
        variants = {variant for size, dtype, variant in bench_train.CASES if (size, dtype) == case}
        assert {plain, peer} <= variants


def test_a_cpu_leaves_large_and_compiled_steps_out_unless_asked() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    large, small = bench_train.SIZES["135M, 2 x 512"], bench_train.SIZES["tiny, 8 x 128"]
    assert bench_train.left_out(large, "ours", full=False, tiny=False) == "a large case; add --full"
    assert (
        bench_train.left_out(small, "ours+compile", full=False, tiny=False)
        == "compiles for a minute; add --full"
    )
    assert not bench_train.left_out(small, "ours+doc_start", full=False, tiny=False)
    assert not bench_train.left_out(large, "transformers+compile", full=True, tiny=False)
    assert not bench_train.left_out(small, "transformers+compile", full=False, tiny=True)


def test_a_gpu_compares_the_peers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "DEVICE", torch.device("cuda"))
    found = bench_train.variants(bench_train.GPU_SIZES["135M, 8 x 512"], "bf16")
    assert {"triton", "torch", *choice.VARIANTS} <= set(found)


def test_a_step_of_a_gpu_is_that_of_its_variant() -> None:
    pytest.importorskip("transformers", reason="the comparison needs transformers")
    size = bench_train.CPU_SIZES["tiny, 8 x 128"]
    config, ids = size.config(tiny=True), size.ids(tiny=True).cpu()
    ours, theirs = (bench_train.gpu_step(name, config, ids, "eager") for name in ("torch", "transformers"))
    for _ in range(2):  # theirs is under autocast to bf16
        assert float(theirs()) == pytest.approx(float(ours()), abs=step_peers.LOSS_TOLERANCE["bf16"])
    with pytest.raises(peers.Unavailable, match="liger-kernel"):
        bench_train.gpu_step("liger", config, ids, "eager")


def test_a_peer_that_cannot_be_measured_is_skipped_with_its_reason_and_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = bench_train.CPU_SIZES["tiny, 8 x 128"]
    monkeypatch.setattr(bench_train, "SIZES", {"tiny": size})
    monkeypatch.setattr(bench_train, "variants", lambda size, dtype: ["ours", "liger"])
    measurements = bench_train.Measurements(tiny=True)
    reason = measurements.of("tiny", "fp32", "liger")["failed"]
    assert (
        reason.startswith("liger-kernel")
        and "Unavailable" not in reason
        and measurements.of("tiny", "fp32", "ours")["seconds"]
    )
    found = measurements.status()
    assert not found["liger-kernel"]["used"] and found["liger-kernel"]["why"] in reason


def test_a_step_that_fails_later_leaves_the_others_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "SIZES", {"tiny": bench_train.CPU_SIZES["tiny, 8 x 128"]})
    monkeypatch.setattr(bench_train, "variants", lambda size, dtype: ["dies", "ours"])
    build, losses = bench_train.build, iter([torch.tensor(1.0)])
    monkeypatch.setattr(
        bench_train, "build", lambda name, *rest: losses.__next__ if name == "dies" else build(name, *rest)
    )
    measurements = bench_train.Measurements(tiny=True)
    assert measurements.of("tiny", "fp32", "dies") == {"failed": "StopIteration:"}
    assert len(measurements.of("tiny", "fp32", "ours")["losses"]) == step_peers.COMPARED_STEPS


def test_a_library_is_used_where_one_of_the_suites_measured_it() -> None:
    used, not_asked, absent = (
        {"transformers": {"version": "5.0", "used": why is None, "why": why}}
        for why in (None, peers.NOT_ASKED, "needs a GPU")
    )
    assert joined([]) == {}
    assert joined([absent, used, not_asked]) == joined([not_asked, used]) == used
    assert joined([not_asked, absent, {"transformers": {**absent["transformers"], "why": "later"}}]) == absent
    assert joined([used, {"litgpt": absent["transformers"]}]) == {**used, "litgpt": absent["transformers"]}


def test_a_suite_names_the_libraries_it_measured_in_its_json_and_at_its_end(
    tmp_path: Path, project_root: Path
) -> None:
    path = tmp_path / "suite.json"
    done = run(
        project_root,
        "bench/bench_kernels.py",
        "-k",
        "rope",
        "--tiny",
        "--benchmark-only",
        f"--benchmark-json={path}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))["peers"]
    assert found["torch.compile"] == {"version": torch.__version__, "used": True, "why": None}
    for row in found.values():
        assert row.keys() == {"version", "used", "why"} and row["used"] == (row["why"] is None)
    missing = [name for name, row in found.items() if not row["used"]]
    assert "flash-attn" in missing
    for line in peers.not_measured(found):
        assert line in done.stdout


def test_peak_memory_of_a_process_is_its_own_and_not_that_of_the_one_that_started_it() -> None:
    held = bytearray(400 << 20)  # pages of zeros are not in memory until they are written
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    script = (
        startup.CLOCK
        + "own = bytearray(64 << 20)\nown[:: 1 << 12] = b'x' * len(own[:: 1 << 12])\nprint(peak_memory_bytes())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *"1234", "0.0"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() == "None":
        pytest.skip("the system does not say")
    assert 64 << 20 < int(done.stdout)
    assert not sys.platform.startswith("linux") or int(done.stdout) < len(held) // 2


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, project_root: Path) -> dict[str, Any]:
    """pytest-benchmark's JSON of all suites at toy size."""
    pytest.importorskip("transformers", reason="the comparison needs transformers")
    path = tmp_path_factory.mktemp("suites") / "suites.json"
    done = run(
        project_root, "bench", "--tiny", "--benchmark-only", "--benchmark-quiet", f"--benchmark-json={path}"
    )
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
        assert elsewhere(facts) or facts["peak_memory_bytes"] > 0
    for facts in operations:
        if facts["op"] != "loss memory":
            assert facts.keys() >= {
                "bytes",
                "flops",
                "us",
                "gb_per_s",
                "tflops",
                "percent_of_roof",
                "output_hash",
            }
    for facts in steps:
        assert facts.keys() >= {
            "tokens_per_second",
            "flops",
            "bytes",
            "percent_of_roof",
            "mfu",
            "mfu_convention",
            "losses",
        }


def elsewhere(facts: dict[str, Any]) -> bool:
    """Whether it ran in a process of its own, whose memory and launches are not known here."""
    return str(facts["variant"]).startswith("litgpt")


# What a figure of a suite has, beside its origin. A launch of what is compiled or not torch's is not counted
# on a CPU.
MEANT = {
    "bench_data": {"bytes", "tokens_per_second"},
    "bench_generate": {
        "bytes",
        "flops",
        "percent_of_roof",
        "tokens_per_second",
        "output_hash",
        "peak_memory_bytes",
        "launches",
    },
    "bench_kernels": {
        "bytes",
        "flops",
        "percent_of_roof",
        "tokens_per_second",
        "output_hash",
        "peak_memory_bytes",
    },
    "bench_startup": set(),
    "bench_train": {
        "bytes",
        "flops",
        "percent_of_roof",
        "tokens_per_second",
        "output_hash",
        "peak_memory_bytes",
    },
}


@pytest.mark.slow
def test_every_figure_of_every_suite_has_all_facts_and_those_that_mean_something_are_there(
    measured: dict[str, Any],
) -> None:
    seen = set()
    for one in measured["benchmarks"]:
        suite, facts = Path(one["fullname"].partition("::")[0]).stem, one["extra_info"]
        assert facts.keys() >= set(FACTS), one["fullname"]
        meant = {"device", "versions", "commit", "date", "phase", "variant"}
        meant |= MEANT[suite] if facts.get("op") != "loss memory" else {"peak_memory_bytes"}
        meant -= {"peak_memory_bytes", "launches"} if elsewhere(facts) else set()
        assert not [name for name in meant if facts[name] is None], one["fullname"]
        if suite in ("bench_kernels", "bench_train") and facts.get("op") != "loss memory":
            compiled = "compile" in facts["variant"] or facts["variant"] in bench_kernels.COMPILED
            assert compiled or elsewhere(facts) or facts["launches"] > 0
        if suite == "bench_startup" and facts["phase"] != "command":
            assert facts["peak_memory_bytes"] is None or facts["peak_memory_bytes"] > 1 << 20
        assert one["group"] and facts["variant"] in one["name"]
        seen.add(suite)
    assert seen == set(SUITES)


@pytest.mark.slow
def test_the_libraries_of_all_suites_stand_together(measured: dict[str, Any]) -> None:
    found = measured["peers"]
    assert set(peers.OF_TORCH) | {
        "transformers",
        "liger-kernel",
        "litgpt",
        "llama-cpp-python",
        "flash-attn",
        "quack-kernels",
    } == set(found)
    assert found["transformers"]["used"] and found["torch.compile"]["used"]


@pytest.mark.slow
def test_groups_hold_what_is_compared(measured: dict[str, Any]) -> None:
    groups: dict[str, set[str]] = {}
    for one in measured["benchmarks"]:
        groups.setdefault(one["group"], set()).add(one["extra_info"]["variant"])
    assert groups["add_rms_norm forward, 1 x 8"] >= {"reference", "compile", "F.rms_norm"}
    assert groups["decode, batch 1, prompt 4"] >= {"eager fp32", "eager int8", "transformers fp32"}
    for dtype in bench_train.DTYPES:
        assert any(
            group.startswith(f"step {dtype}") and len(variants) > 1 for group, variants in groups.items()
        )


@pytest.mark.slow
def test_a_time_is_one_that_was_measured(measured: dict[str, Any]) -> None:
    for one in measured["benchmarks"]:
        facts = one["extra_info"]
        if "us" in facts:
            assert facts["us"] == pytest.approx(one["stats"]["median"] * 1e6, rel=1e-2)
        if facts["phase"] == "step":
            tokens = facts["batch"] * facts["length"]
            assert facts["tokens_per_second"] == pytest.approx(tokens / one["stats"]["median"], rel=1e-2)


@pytest.mark.slow
def test_the_json_does_not_name_the_machine(measured: dict[str, Any]) -> None:
    assert "node" not in measured["machine_info"] and measured["commit_info"]["project"] == "smollm2-kernels"
    text = json.dumps(measured)
    assert str(Path.home()) not in text and str(Path(figures.__file__).resolve().parent.parent) not in text


def test_of_a_machine_only_what_a_figure_needs_is_kept() -> None:
    found: dict[str, Any] = {
        "node": "alice-laptop",
        "release": "6.1",
        "system": "Linux",
        "cpu": {"brand_raw": "A CPU", "flags": ["avx"]},
    }
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
    # warmed up, timed once for the number of rounds, then in turns
    assert "".join(log) == "ab" + "ab" + "abab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_percent_of_roof_is_the_floor_over_the_time() -> None:
    found = rates(Work(bytes=10**6, flops=10**6), seconds=4e-5, bandwidth=1e11, rate=1e12)
    assert (found["percent_of_roof"], found["gb_per_s"], found["tflops"]) == (25.0, 25.0, 0.025)


def test_a_variant_that_fails_is_skipped_with_its_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    measurements = Measurements(tiny=True)
    found = measurements.of("attention", "forward", "cudnn")
    assert found.keys() == {"failed"} and found["failed"]
    assert measurements.of("attention", "forward", "triton") == {"failed": NOT_HERE}


@pytest.mark.slow
def test_two_files_are_compared_by_group(
    measured: dict[str, Any], tmp_path: Path, project_root: Path
) -> None:
    for name in ("first.json", "second.json"):
        (tmp_path / name).write_text(json.dumps(measured), encoding="utf-8")
    command = [
        str(Path(sys.executable).with_name("pytest-benchmark")),
        "compare",
        "first.json",
        "second.json",
        "--columns=median",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "benchmark 'step fp32, tiny, 8 x 128'" in done.stdout
