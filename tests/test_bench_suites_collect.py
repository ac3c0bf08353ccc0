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

from bench import bench_kernels, bench_train, figures, startup, step_peers, train_step
from bench.bench_kernels import CASES, NOT_HERE, Operations, rates
from bench.conftest import joined, pytest_benchmark_update_machine_info
from bench.kernels import COMPILED
from bench.ops import MAKERS
from bench.peak_memory import peak_memory
from bench.peers import choice
from bench.peers import status as peers
from bench.suite import FACTS
from bench.work import Work

SUITES = ("bench_data", "bench_generate", "bench_kernels", "bench_startup", "bench_train")
ORIGIN = {"device", "versions", "commit", "date", "sources"}
# Of every suite a few, and of each kind one that is compiled, which takes seconds.
CHOSEN = (
    "pipeline or (generation and (fp32 or int8) and not litgpt) or ((first_token or command or first_step)"
    " and fp32) or add_rms_norm or (rope_qkv and not compile) or cudnn or loss_memory"
    " or (step and (ours or transformers or liger) and not (compile and (bf16 or transformers)))"
)


def run(project_root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments], cwd=project_root,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_every_operation_has_its_phases_and_backends():
    found = {(op, phase) for op, _, phase in CASES}
    assert {op for op, _ in found} == set(MAKERS)
    without = {op for op in MAKERS if op.startswith("decode_") or op in ("rope_cache", "next_token")}
    assert {op for op, phase in found if phase == "backward"}.isdisjoint(without)
    assert {("attention", "backward"), ("rope", "backward")} <= found
    for op in MAKERS:
        assert {"triton", "reference", "compile"} <= {variant for name, variant, _ in CASES if name == op}


def test_a_step_has_several_sizes_and_the_peer_beside_ours():
    assert len(bench_train.SIZES) > 1
    configs = [size.config(tiny=False) for size in bench_train.SIZES.values()]
    assert torch.cuda.is_available() or len({(c.hidden_size, c.num_hidden_layers) for c in configs}) >= 3
    plain, peer = ("torch", "triton") if torch.cuda.is_available() else ("ours", "transformers")
    for case in [(size, dtype) for size in bench_train.SIZES for dtype in bench_train.DTYPES]:
        variants = [variant for size, dtype, variant in bench_train.CASES if (size, dtype) == case]
        assert variants[0] == plain and peer in variants, "the losses of the first are those of comparison"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_cpu_leaves_large_and_compiled_steps_out_unless_asked():
    large, small = bench_train.SIZES["135M, 2 x 512"], bench_train.SIZES["tiny, 8 x 128"]
    compiles = "compiles for a minute; add --full"
    assert bench_train.left_out(large, "ours", full=False, tiny=False) == "a large case; add --full"
    assert bench_train.left_out(small, "ours+compile", full=False, tiny=False) == compiles
    assert not bench_train.left_out(small, "ours+doc_start", full=False, tiny=False)
    assert not bench_train.left_out(large, "transformers+compile", full=True, tiny=False)
    assert not bench_train.left_out(small, "transformers+compile", full=False, tiny=True)


def test_a_gpu_compares_the_peers_too(monkeypatch):
    monkeypatch.setattr(bench_train, "DEVICE", torch.device("cuda"))
    assert {"triton", "torch", *choice.VARIANTS} <= set(bench_train.variants("bf16"))


def test_a_step_of_a_gpu_is_that_of_its_variant():
    pytest.importorskip("transformers", reason="the comparison needs transformers")
    size = bench_train.CPU_SIZES["tiny, 8 x 128"]
    config, ids = size.config(tiny=True), size.ids(tiny=True).cpu()
    ours, theirs = (train_step.build_step(name, config, ids, "eager") for name in ("torch", "transformers"))
    for _ in range(2):
        assert float(theirs(ids)) == pytest.approx(float(ours(ids)), abs=step_peers.LOSS_TOLERANCE["fp32"])
    with pytest.raises(peers.Unavailable, match="liger-kernel"):
        train_step.build_step("liger", config, ids, "eager")


def test_another_loss_is_far_but_for_documents():
    steps = bench_train.Steps(tiny=True)
    assert not steps.far("tiny", "fp32", "ours", [3.0, 2.0])
    assert not steps.far("tiny", "fp32", "ours+doc_start", [9.0, 9.0])
    assert "5.0e-01 nats" in steps.far("tiny", "fp32", "transformers", [3.0, 2.5])


def test_a_library_is_used_where_one_of_the_suites_measured_it():
    used, not_asked, absent = (
        {"transformers": {"version": "5.0", "used": why is None, "why": why}}
        for why in (None, peers.NOT_ASKED, "needs a GPU")
    )
    assert joined([]) == {}
    assert joined([absent, used, not_asked]) == joined([not_asked, used]) == used
    assert joined([not_asked, absent, {"transformers": {**absent["transformers"], "why": "later"}}]) == absent
    assert joined([used, {"litgpt": absent["transformers"]}]) == {**used, "litgpt": absent["transformers"]}


def test_peak_memory_of_a_process_is_its_own_and_not_that_of_the_one_that_started_it():
    held = bytearray(400 << 20)  # pages of zeros are not in memory until they are written
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    own = "own = bytearray(64 << 20)\nown[:: 1 << 12] = b'x' * len(own[:: 1 << 12])\n"
    found: Any = startup.measured(f"{startup.CLOCK}{own}print(json.dumps(peak_memory_bytes()))")
    if found is None:
        pytest.skip("the system does not say")
    assert 64 << 20 < found
    assert not sys.platform.startswith("linux") or found < len(held) // 2


@pytest.fixture(scope="module")
def ran(tmp_path_factory, project_root):
    """What a run of CHOSEN at toy size prints, and pytest-benchmark's JSON of it."""
    pytest.importorskip("transformers", reason="the comparison needs transformers")
    path = tmp_path_factory.mktemp("suites") / "suites.json"
    options = ("--tiny", "--benchmark-only", "--benchmark-quiet", f"--benchmark-json={path}", "-k", CHOSEN)
    done = run(project_root, "bench", "-rs", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return done.stdout, content


@pytest.fixture
def measured(ran):
    return ran[1]


def elsewhere(facts: dict[str, Any]) -> bool:
    """Whether it ran in a process of its own, whose memory and launches are not known here."""
    return str(facts["variant"]).startswith("litgpt")


# What a figure of a suite has, beside its origin. A launch of what is compiled or not torch's is not counted
# on a CPU.
COMPUTED = {"bytes", "flops", "percent_of_roof", "tokens_per_second", "output_hash", "peak_memory_bytes"}
MEANT = {
    "bench_data": {"bytes", "tokens_per_second", "rates"},
    "bench_generate": COMPUTED | {"launches", "read_gb_per_s", "agreement_with_fp32_eager"},
    "bench_kernels": COMPUTED | {"us", "gb_per_s", "tflops", "error", "dtype"},
    "bench_startup": {"phases", "output_hash"},
    "bench_train": COMPUTED | {"mfu_convention", "losses", "floor_ms", "dtype"},
}  # fmt: skip


@pytest.mark.slow
def test_every_figure_of_every_suite_has_all_facts_and_those_that_mean_something_are_there(measured):
    seen = Counter[str]()
    for one in measured["benchmarks"]:
        suite, facts = Path(one["fullname"].partition("::")[0]).stem, one["extra_info"]
        assert facts.keys() >= set(FACTS) | ORIGIN, one["fullname"]
        meant = {*ORIGIN, "phase", "variant"}
        if facts.get("op") == "loss memory":
            meant.add("peak_memory_bytes")
        elif facts["phase"] != "command":
            meant |= MEANT[suite]
        meant -= {"peak_memory_bytes", "launches"} if elsewhere(facts) else set()
        meant -= {"launches"} if str(facts["variant"]).startswith("torchao") else set()
        assert not [name for name in meant if facts[name] is None], one["fullname"]
        if suite in ("bench_kernels", "bench_train") and facts.get("op") != "loss memory":
            compiled = "compile" in facts["variant"] or facts["variant"] in COMPILED
            assert compiled or elsewhere(facts) or facts["launches"] > 0
        if suite == "bench_startup" and facts["phase"] != "command":
            assert facts["peak_memory_bytes"] is None or facts["peak_memory_bytes"] > 1 << 20
        assert one["group"]
        seen[suite] += 1
    assert set(seen) == set(SUITES) and seen["bench_kernels"] > 12


@pytest.mark.slow
def test_the_libraries_of_all_suites_stand_together_in_the_json_and_at_the_end(ran):
    found = ran[1]["peers"]
    libraries = {"transformers", "torchao", "liger-kernel", "litgpt", "llama-cpp-python"}
    libraries |= {"flash-attn", "quack-kernels"}
    assert set(peers.OF_TORCH) | libraries == set(found)
    assert found["transformers"]["used"] and found["torch.compile"]["used"]
    for row in found.values():
        assert row.keys() == {"version", "used", "why"} and row["used"] == (row["why"] is None)
    assert not found["flash-attn"]["used"]
    for line in peers.not_measured(found):
        assert line in ran[0]
    assert NOT_HERE[:60] in ran[0], "what is skipped says why"


@pytest.mark.slow
def test_groups_hold_what_is_compared(measured):
    groups: dict[str, set[str]] = {}
    for one in measured["benchmarks"]:
        groups.setdefault(one["group"], set()).add(one["extra_info"]["variant"])
    assert groups["add_rms_norm forward, 1 x 8"] >= {"reference", "compile", "F.rms_norm"}
    assert groups["decode, batch 1, prompt 4"] >= {"eager fp32", "eager int8", "transformers fp32"}
    for dtype in bench_train.DTYPES:
        assert len(groups[f"step {dtype}, {next(iter(bench_train.SIZES))}"]) > 1


@pytest.mark.slow
def test_a_time_is_that_of_the_real_call(measured):
    for one in measured["benchmarks"]:
        facts, median = one["extra_info"], one["stats"]["median"]
        if "us" in facts and facts["device"]:
            assert facts["us"] == pytest.approx(median * 1e6 / bench_kernels.SETS, rel=1e-2)
        if facts["phase"] == "step":
            tokens = facts["batch"] * facts["length"]
            assert facts["tokens_per_second"] == pytest.approx(tokens / median, rel=1e-2)
        if facts["phase"] in ("first token", "first step"):
            assert 0 < sum(facts["phases"].values()) <= median


@pytest.mark.slow
def test_the_json_does_not_name_the_machine(measured):
    assert "node" not in measured["machine_info"] and measured["commit_info"]["project"] == "smollm2-kernels"
    text = json.dumps(measured)
    assert str(Path.home()) not in text and str(Path(figures.__file__).resolve().parent.parent) not in text


@pytest.mark.slow
def test_two_files_are_compared_by_group(measured, tmp_path):
    for name in ("first.json", "second.json"):
        (tmp_path / name).write_text(json.dumps(measured), encoding="utf-8")
    tool = Path(sys.executable).with_name("pytest-benchmark")
    command = [tool, "compare", "first.json", "second.json", "--columns=median"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "benchmark 'step fp32, tiny, 8 x 128'" in done.stdout


def test_of_a_machine_only_what_a_figure_needs_is_kept():
    cpu = {"brand_raw": "A CPU", "flags": ["avx"]}
    found: dict[str, Any] = {"node": "alice-laptop", "release": "6.1", "system": "Linux", "cpu": cpu}
    pytest_benchmark_update_machine_info(config=None, machine_info=found)  # type: ignore[arg-type]
    assert found == {"system": "Linux", "cpu": {"brand_raw": "A CPU"}}


def test_peak_memory_is_the_highest_sum_of_what_is_alive():
    def call() -> torch.Tensor:
        first = torch.ones(1 << 20)  # 4 MiB
        second = first * 2
        del first
        return second + torch.ones(1 << 18)[0]  # 1 MiB more than the second, and the result

    assert peak_memory(call, torch.device("cpu")) == pytest.approx(4 * ((1 << 20) * 2 + (1 << 18)), rel=1e-3)


def test_percent_of_roof_is_the_floor_over_the_time():
    found = rates(Work(bytes=10**6, flops=10**6), seconds=4e-5, bandwidth=1e11, rate=1e12)
    assert (found["percent_of_roof"], found["gb_per_s"], found["tflops"]) == (25.0, 25.0, 0.025)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_variant_that_fails_is_none_and_its_reason_is_kept_for_its_library():
    operations = Operations(tiny=True)
    variant, facts = operations.ready("attention", "cudnn")
    assert variant is None and "needs a GPU" in facts["failed"]
    assert operations.ready("attention", "triton") == (None, {"failed": NOT_HERE})
    assert operations.status()["torch cuDNN attention"]["why"] == "needs a GPU"
