"""`python -m bench.gpu` on a CPU at toy size: every part runs, every file is there, and a part that is
stopped leaves what it had.
"""

import argparse
import contextlib
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

from bench import gpu, text, train_run
from bench.record import INTERPRETER_NOTE, read_json, write_json
from smollm2.errors import LoadError, UsageError
from smollm2.pretrained.tokenizer import train_tokenizer

SECTIONS = {
    "kernels.json": ("kernels", "tuning", "roofline"),
    "tests.json": ("tests", "memcheck"),
    "training.json": ("step", "ladder", "run"),
    "generation.json": ("generation",),
}
# A machine that has a GPU need not have any of the blocked packages. The interpreter is the one of the other
# tests, which repeats less than Triton's own.
SITE = """
    import os, sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name == "kernels.tracing" and os.environ.get("TRITON_INTERPRET") == "1":  # before any kernel
                sys.path.append({tests!r})
                import interpreter
                interpreter.install()
            if name.partition(".")[0] in ("datasets", "gguf", "transformers", "matplotlib"):
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

    sys.meta_path.insert(0, Blocker())
"""


def environment(root: Path, *paths: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, root])), "OMP_NUM_THREADS": "1"}


def bench_gpu(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--tiny", *map(str, arguments)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, project_root):
    """(folder, completed process) of one whole run, with optional packages blocked, started outside the
    project's root.
    """
    work = tmp_path_factory.mktemp("gpu")
    site = textwrap.dedent(SITE).format(tests=str(Path(__file__).parent))
    (work / "sitecustomize.py").write_text(site, encoding="utf-8")
    command = bench_gpu("--out", "results", "--minutes", 90)  # of which a loaded machine may need some
    done = subprocess.run(
        command, cwd=work, env=environment(project_root, work), capture_output=True, text=True
    )
    return work / "results", done


@pytest.fixture(scope="module")
def learned_tokenizer(tmp_path_factory):
    """The folder of a small tokenizer, as one carries it to a machine without a network."""
    folder = tmp_path_factory.mktemp("carried") / "tok"
    train_tokenizer(["def f(x):\n    return x\n"], 300).save(folder)
    return folder.resolve()


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
        assert sorted(archive.getnames()) == sorted(
            ["prepare.log", *(f"{stage.section}.log" for stage in gpu.STAGES)]
        )
        prepared = archive.extractfile("prepare.log")
        assert prepared is not None and b"tokenised now" in prepared.read()


@pytest.mark.slow
def test_content_of_the_parts(finished):
    folder, _ = finished
    read = {
        name: json.loads((folder / name).read_text(encoding="utf-8")) for name in [*SECTIONS, "numerics.json"]
    }
    outcomes = read["tests.json"]["tests"]["files"].values()
    assert sum(outcome["counts"].get("passed", 0) for outcome in outcomes) > 0
    assert read["numerics.json"] == read["tests.json"]["tests"]["numerics"] != []
    assert read["tests.json"]["memcheck"]["skipped"] == "no GPU"

    rows = read["kernels.json"]["kernels"]["rows"]
    ours = {(row["op"], row["phase"]) for row in rows if row["variant"] == "triton"}
    assert ours == {
        *(("swiglu", phase) for phase in ("forward", "backward")),
        *(("linear_cross_entropy", phase) for phase in ("forward", "forward+backward")),
        ("decode_attention", "forward"),
    }

    variants = read["training.json"]["step"]["variants"]
    assert variants["triton"]["launches"]["ours"] > 0 == variants["torch"]["launches"]["ours"]
    assert read["training.json"]["step"]["loss_distance"]["triton"] < 1e-4
    assert read["training.json"]["step"]["loss_distance"]["torch+compile"] < 1e-4
    assert max(read["training.json"]["ladder"]["loss_distance"].values()) < 1e-4
    roofline = read["kernels.json"]["roofline"]
    assert roofline["step"]["next"] and roofline["token"]["next"]
    run = read["training.json"]["run"]
    assert [point["step"] for point in run["points"]] == [1, 2, 3, 4]
    assert [line["step"] for line in run["held_out"]] == [2, 4] and run["sample"]["step"] == 4
    assert run["documents"] >= run["unique_examples"] > 0 and run["tokens_per_second"] > 0


@pytest.mark.slow
def test_all_ways_to_generate_compute_the_same(finished):
    found = json.loads((finished[0] / "generation.json").read_text(encoding="utf-8"))["generation"]
    assert found["fp32_agreement"]["share"] == 1.0 and found["bandwidth"]["read_gb_per_s"] > 0
    assert [row["variant"] for row in found["rows"] if "failed" in row] == ["transformers"]
    rows = {(row["variant"], row["keys"]): row for row in found["rows"] if row["batch"] is not None}
    ways = ("triton captured", "torch captured")
    assert rows.keys() == {("triton eager", 16), *((way, keys) for way in ways for keys in (16, 8))}
    for row in rows.values():
        assert row["step_us"] > 0 and row["finite"], row
        assert row.get("logits_distance", 0.0) < 1e-5 and row.get("same_tokens", 1.0) == 1.0
    assert rows["triton captured", 16]["launches"] < rows["torch captured", 16]["launches"]
    assert {row["backend"] for row in found["prefill"]} == {"triton", "torch"}
    assert found["many"][0]["engine"].startswith("eager") and found["many"][0]["tokens_per_second"] > 0


@pytest.mark.slow
def test_summary_is_short_and_comes_last(finished):
    folder, done = finished
    text = (folder / "summary.txt").read_text(encoding="utf-8")
    assert done.stdout.endswith(text)
    assert len(text.splitlines()) <= 44
    assert INTERPRETER_NOTE in text
    told = "tests: ,swiglu,training step,ladder,training run,generation,memcheck,launch table"
    for word in told.split(","):
        assert word in text


def test_results_are_never_overwritten(tmp_path):
    (tmp_path / "kernels.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match="found kernels.json"):
        gpu.main(["--out", str(tmp_path), "--device", "cpu", "--tiny"])


@pytest.fixture
def halfway(tmp_path, project_root):
    """A run whose first part, the tests, is complete, and whose second, the roofline, has begun; it leads a
    group.
    """
    command = bench_gpu("--out", tmp_path, "--minutes", 90, "--only", "tests", "--only", "roofline")
    process = subprocess.Popen(
        command, cwd=project_root, env=environment(project_root), stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().startswith("tests: complete")
    while read_json(tmp_path / "kernels.json").get("roofline", {}).get("status") != "running":
        assert process.poll() is None
        time.sleep(0.05)
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_an_interrupted_run_keeps_what_is_finished(halfway, tmp_path):
    halfway.send_signal(signal.SIGTERM)
    rest, _ = halfway.communicate()
    assert halfway.returncode == 130
    assert "roofline: interrupted" in rest
    assert (tmp_path / "summary.txt").is_file() and (tmp_path / "logs.tgz").is_file()
    assert read_json(tmp_path / "tests.json")["tests"]["status"] == "complete"
    assert read_json(tmp_path / "kernels.json")["roofline"]["status"] == "interrupted"


def test_what_is_finished_survives_a_kill(halfway, tmp_path):
    os.killpg(halfway.pid, signal.SIGKILL)
    halfway.wait()
    assert read_json(tmp_path / "tests.json")["tests"]["status"] == "complete"
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
    end = gpu.run_stage(stage, options, tmp_path, tmp_path / "log", limit=600)
    assert end.startswith("failed with exit code 2") and "need a GPU" in end
    assert gpu.trouble(tmp_path, {"kernels": end})


FOR_EVER = [sys.executable, "-c", "import signal; signal.pause()"]
FAILS = [sys.executable, "-c", "raise SystemExit(3)"]


def stages(*sections: str) -> list[gpu.Stage]:
    return [stage for stage in gpu.STAGES if stage.section in sections]


def prepared(tmp_path, *sections: str):
    options = argparse.Namespace(tiny=True, tokenizer="train", minutes=9.0)
    return gpu.preparation(options, stages(*sections), tmp_path / "prepare.log", tmp_path)


def test_nothing_is_prepared_without_a_run_or_before_it_at_once_or_in_vain(tmp_path, monkeypatch):
    for sections in (("step", "kernels"), ("run",), ("run", "ladder")):
        with prepared(tmp_path, *sections) as process:
            assert process is None
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    with prepared(tmp_path, "step", "run") as process:
        assert process is None


def test_the_preparation_has_the_lowest_priority_and_ends_with_everything_else(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "preparation", lambda *_, **__: FOR_EVER)
    with pytest.raises(KeyboardInterrupt), prepared(tmp_path, "step", "run") as process:
        assert process is not None and os.getpriority(os.PRIO_PROCESS, process.pid) == 19
        assert os.getpgid(process.pid) == os.getpgrp()  # a signal to the group reaches both
        raise KeyboardInterrupt
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("processors, workers", [(1, 1), (2, 1), (8, 1), (16, 3), (64, 15)])
def test_the_preparation_takes_a_quarter_of_the_processors(tmp_path, monkeypatch, processors, workers):
    asked = {}
    monkeypatch.setattr(text, "preparation", lambda *_, **given: asked.update(given) or FAILS)
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    with prepared(tmp_path, "step", "run"):
        pass
    assert asked["workers"] == workers
    assert asked["seconds"] == pytest.approx(540 * 60 / 160)  # the share of the run


def test_the_run_waits_for_the_preparation_no_longer_than_it_takes():
    assert gpu.await_preparation(subprocess.Popen([sys.executable, "-c", ""]), 600) == "complete"
    assert gpu.await_preparation(subprocess.Popen(FAILS), 600).startswith("failed with exit code 3")
    process = subprocess.Popen(FOR_EVER)
    assert gpu.await_preparation(process, 0.0).startswith("stopped")
    assert process.returncode == -signal.SIGKILL


@pytest.fixture
def started(monkeypatch):
    """Calls main(arguments) with parts that do nothing; returns (exit code, {section: (limit, its own
    arguments)}).
    """
    seen = {}

    def run_stage(stage, options, folder, log, limit, more=()):
        seen[stage.section] = limit, list(more)
        log.write_text(stage.section, encoding="utf-8")
        write_json(folder / stage.file, {stage.section: {"status": "complete"}})
        return "complete"

    def main(*arguments: str):
        seen.clear()
        return gpu.main(["--device", "cpu", "--tiny", *arguments]), dict(seen)

    monkeypatch.setattr(gpu, "run_stage", run_stage)
    before = signal.getsignal(signal.SIGTERM)
    yield main
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("command, end", [(FAILS, "failed with exit code 3"), (FOR_EVER, "stopped")])
def test_a_failed_preparation_costs_no_part(tmp_path, monkeypatch, capsys, started, command, end):
    monkeypatch.setattr(text, "preparation", lambda *_, **__: command)
    monkeypatch.setattr(gpu, "PATIENCE", 0.0 if command is FOR_EVER else 1.0)
    code, seen = started("--out", str(tmp_path), "--only", "tests", "--only", "run")
    assert code == 0 and list(seen) == ["tests", "run"]
    assert f"preparation: {end}" in capsys.readouterr().out
    with tarfile.open(tmp_path / "logs.tgz") as archive:
        assert sorted(archive.getnames()) == ["prepare.log", "run.log", "tests.log"]


def test_a_carried_tokenizer_reaches_the_preparation_and_the_run(
    tmp_path, monkeypatch, started, learned_tokenizer
):
    asked = []
    monkeypatch.setattr(
        text, "preparation", lambda tiny, tokenizer, folder, **_: asked.append((tokenizer, folder)) or FAILS
    )
    monkeypatch.chdir(learned_tokenizer.parent)
    only = ("--only", "tests", "--only", "run")
    for index, name in enumerate((learned_tokenizer.name, f"{learned_tokenizer.name}/tokenizer.json")):
        _, seen = started("--out", str(tmp_path / str(index)), "--tokenizer", name, *only)
        more = seen["run"][1]
        assert more[:3] == ["--tokenizer", str(learned_tokenizer), "--scratch"]
        assert asked.pop() == (str(learned_tokenizer), Path(more[3]) / "tokens")
    started("--out", str(tmp_path / "learned"), *only)
    assert asked.pop()[0] == "train"


def test_a_tokenizer_that_cannot_be_read_is_refused_at_once(tmp_path, started):
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(LoadError, match="not a readable tokenizer"):
        started("--out", str(tmp_path / "results"), "--tokenizer", str(tmp_path / "tokenizer.json"))
    with pytest.raises(LoadError, match="no such file"):
        started(
            "--out", str(tmp_path / "results"), "--tokenizer", str(tmp_path / "absent" / "tokenizer.json")
        )
    assert not (tmp_path / "results").exists()


def test_without_omegaconf_the_run_is_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert train_run.main(["--device", "cpu", "--tiny", "--json", str(tmp_path / "training.json")]) == 0
    section = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))["run"]
    assert section["status"] == "complete" and section["skipped"] == "omegaconf is not installed"
    assert "skipped: omegaconf is not installed" in capsys.readouterr().out
