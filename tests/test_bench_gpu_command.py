"""`python -m bench.gpu` on a CPU at toy size: every part runs, every file is there, and a part that is stopped leaves what it had."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import pytest

from bench import gpu
from bench.part import INTERPRETER_NOTE

SECTIONS = {
    "kernels.json": ("kernels", "tuning", "roofline"),
    "tests.json": ("tests", "memcheck"),
    "training.json": ("step", "ladder", "run"),
    "generation.json": ("generation",),
}
# The machine that has the GPU has none of these.
BLOCKER = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("omegaconf", "datasets", "gguf", "transformers", "matplotlib"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Blocker())
"""


def environment(root: Path, *paths: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, root])), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, project_root):
    """(folder, completed process) of one whole run, with optional packages blocked, started outside the project's root."""
    work = tmp_path_factory.mktemp("gpu")
    (work / "sitecustomize.py").write_text(textwrap.dedent(BLOCKER), encoding="utf-8")
    command = [sys.executable, "-m", "bench.gpu", "--out", "results", "--device", "cpu", "--tiny", "--minutes", "9"]
    done = subprocess.run(command, cwd=work, env=environment(project_root, work), capture_output=True, text=True, timeout=550)
    return work / "results", done


@pytest.mark.slow
def test_every_part_completes(finished):
    folder, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    for name, sections in SECTIONS.items():
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        for section in sections:
            assert content[section]["status"] == "complete", content[section]
            assert content[section]["note"] == INTERPRETER_NOTE


@pytest.mark.slow
def test_files_and_where_their_figures_come_from(finished):
    folder, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == gpu.RESULTS
    for name in SECTIONS:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        assert {"device", "versions", "commit", "sources", "date"} <= content.keys()
        assert {"python", "torch", "triton"} <= content["versions"].keys()
    with tarfile.open(folder / "logs.tgz") as archive:
        assert sorted(archive.getnames()) == sorted(f"{stage.section}.log" for stage in gpu.STAGES)


@pytest.mark.slow
def test_content_of_the_parts(finished):
    folder, _ = finished
    read = {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in [*SECTIONS, "numerics.json"]}
    assert sum(outcome["counts"].get("passed", 0) for outcome in read["tests.json"]["tests"]["files"].values()) > 0
    assert read["numerics.json"] == read["tests.json"]["tests"]["numerics"] != []
    assert read["tests.json"]["memcheck"]["skipped"] == "no GPU"

    ours = {(row["op"], row["phase"]) for row in read["kernels.json"]["kernels"]["rows"] if row["variant"] == "triton"}
    assert ours >= {(op, "forward") for op in ("rms_norm", "add_rms_norm", "rope_qkv", "attention", "decode_attention", "swiglu")}
    assert ours >= {("attention", "backward"), ("linear_cross_entropy", "forward+backward")}

    variants = read["training.json"]["step"]["variants"]
    assert variants["triton"]["launches"]["ours"] > 0 == variants["torch"]["launches"]["ours"]
    assert read["training.json"]["step"]["loss_distance"]["triton"] < 1e-4
    assert read["training.json"]["step"]["loss_distance"]["torch+compile"] < 1e-4
    assert max(read["training.json"]["ladder"]["loss_distance"].values()) < 1e-4
    assert read["kernels.json"]["roofline"]["step"]["next"] and read["kernels.json"]["roofline"]["token"]["next"]
    run = read["training.json"]["run"]
    assert [point["step"] for point in run["points"]] == [1, 2, 3, 4]
    assert run["held_out"][0]["step"] == 0 and run["held_out"][-1]["step"] == 4

    generation = read["generation.json"]["generation"]
    assert generation["fp32_agreement"]["share"] == 1.0
    assert [row["variant"] for row in generation["rows"] if "failed" in row] == ["transformers"]
    assert {row["logits_distance"] < 1e-5 for row in generation["rows"] if row["variant"] == "torch captured"} == {True}


@pytest.mark.slow
def test_summary_is_short_and_comes_last(finished):
    folder, done = finished
    text = (folder / "summary.txt").read_text(encoding="utf-8")
    assert done.stdout.endswith(text)
    assert len(text.splitlines()) <= 40
    assert INTERPRETER_NOTE in text
    for word in ("tests: ", "swiglu", "training step", "ladder", "training run", "generation", "memcheck", "launch table"):
        assert word in text


def test_results_are_never_overwritten(tmp_path, project_root):
    (tmp_path / "kernels.json").write_text("{}", encoding="utf-8")
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path), "--device", "cpu", "--tiny"]
    done = subprocess.run(command, cwd=project_root, env=environment(project_root), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "found kernels.json" in done.stderr


def test_an_interrupted_run_keeps_what_is_finished(tmp_path, project_root):
    command = [
        sys.executable,
        "-m",
        "bench.gpu",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        "--tiny",
        "--only",
        "tests",
        "--only",
        "roofline",
    ]
    process = subprocess.Popen(command, cwd=project_root, env=environment(project_root), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("tests: complete")
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "roofline: interrupted" in rest
    assert (tmp_path / "summary.txt").is_file() and (tmp_path / "logs.tgz").is_file()
    assert json.loads((tmp_path / "tests.json").read_text(encoding="utf-8"))["tests"]["status"] == "complete"
    assert json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))["roofline"]["status"] == "interrupted"


def test_what_is_finished_survives_a_kill(tmp_path, project_root):
    command = [
        sys.executable,
        "-m",
        "bench.gpu",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        "--tiny",
        "--only",
        "tests",
        "--only",
        "roofline",
    ]
    process = subprocess.Popen(
        command, cwd=project_root, env=environment(project_root), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("tests: complete")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert json.loads((tmp_path / "tests.json").read_text(encoding="utf-8"))["tests"]["status"] == "complete"
    with tarfile.open(tmp_path / "logs.tgz") as archive:
        assert archive.getnames() == ["tests.log"]


def test_a_part_that_takes_too_long_is_stopped_and_recorded(tmp_path):
    options = argparse.Namespace(device="cpu", tiny=True)
    stage = gpu.Stage("kernels", "kernels", "kernels.json", 1)
    end = gpu.run_stage(stage, options, tmp_path, tmp_path / "log", limit=0.5)
    assert end.startswith("stopped after")
    gpu.record_end(stage, tmp_path, end)
    assert json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))["kernels"]["status"] == end


def test_a_part_that_fails_is_recorded_with_its_reason(tmp_path):
    options = argparse.Namespace(device="cpu", tiny=False)  # refused: the full sizes need a GPU
    stage = gpu.Stage("kernels", "kernels", "kernels.json", 1)
    end = gpu.run_stage(stage, options, tmp_path, tmp_path / "log", limit=60)
    assert end.startswith("failed with exit code 2") and "need a GPU" in end
    assert gpu.trouble(tmp_path, {"kernels": end})
