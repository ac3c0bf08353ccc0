"""`python -m bench.step_model`: every kernel of the measured step has its line, and a step of this code is
predicted from it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter

import pytest

from bench import step_model
from bench.step_model import GROUPS, LAYERS, RESULTS, Work, main
from smollm2.cli import run_command
from smollm2.errors import LoadError


@pytest.fixture(scope="module")
def trace():
    return step_model.read(step_model.MEASURED)


@pytest.fixture(scope="module")
def recorded(project_root, tmp_path_factory):
    """What the command prints, and the work of each line. In a process of its own: it replaces much of torch
    while it records.
    """
    path = tmp_path_factory.mktemp("step") / "launches.json"
    command = [sys.executable, "-m", "bench.step_model", "--json", str(path)]
    done = subprocess.run(command, cwd=project_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    return done.stdout, {line: Work(*entry) for line, entry in found.items()}


@pytest.fixture(scope="module")
def now(recorded):
    return recorded[1]


def test_every_layer_has_every_product_once(trace):
    names = [name for name, _ in trace]
    every = zip(names, step_model.lines(names), strict=True)
    products = [line for name, line in every if any(part in name for part in step_model.PRODUCTS[:4])]
    body = dict.fromkeys(GROUPS["products of the body"], LAYERS)
    assert Counter(products) == {**body, "head: products": 12}


def test_the_lines_add_up_to_the_step(trace):
    spent = step_model.spent(trace)
    assert len(trace) == 1381
    assert sum(spent.values()) == pytest.approx(sum(us for _, us in trace) / 1e3)
    assert spent["other"] < 0.01 * sum(spent.values())
    assert spent.keys() <= {name for names in GROUPS.values() for name in names}


def test_the_recorded_step_has_the_work_that_its_shapes_say(now):
    tokens, hidden, ffn, heads = 32 * 512, 576, 1536, 15 * 64
    assert now.keys() <= {name for names in GROUPS.values() for name in names}
    products = (("qkv", heads, hidden), ("down dW", hidden, ffn), ("gate_up dX", 2 * ffn, hidden))
    for line, rows, columns in products:
        assert (now[line].launches, now[line].flops) == (LAYERS, LAYERS * 2 * tokens * rows * columns), line
    assert now["head: products"].flops == 6 * tokens * 49152 * hidden
    assert now["attention forward"].flops == LAYERS * 2 * 32 * 9 * 512**2 * 64
    assert now["swiglu forward"].bytes == LAYERS * 3 * tokens * ffn * 2
    assert now["swiglu backward"].bytes == LAYERS * 5 * tokens * ffn * 2


def test_a_line_is_scaled_by_its_work_and_a_new_one_has_the_rate_of_the_memory():
    then = {"gate_up": Work(1, 10.0, 100.0), "rope forward": Work(1, 10.0)}
    new = Work(1, step_model.MEMORY_RATE / 1e3)
    now = {"gate_up": Work(2, 5.0, 200.0), "rope forward": Work(1, 5.0), "embedding": new}
    found = step_model.predicted(now, then, {"gate_up": 3.0, "rope forward": 2.0})
    assert found == pytest.approx({"gate_up": 6.0, "rope forward": 1.0, "embedding": 1.0})


def test_the_table_is_the_one_of_the_results(recorded, project_root):
    table, host = recorded[0].split("\n\n")
    assert table in (project_root / "bench" / "results" / "h100" / "README.md").read_text(encoding="utf-8")
    assert host.startswith("host, without a graph")


def test_another_file_is_refused(tmp_path):
    (tmp_path / "step.json").write_text("{}", encoding="utf-8")
    with pytest.raises(LoadError, match="step.json: not a trace of bench.train_step --traces"):
        step_model.read(tmp_path / "step.json")


def test_without_triton_the_command_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run_command(main, []) == 1
    assert capsys.readouterr().err == (
        "error: the launches of a step are recorded with triton; install it with: pip install triton\n"
    )


def test_the_module_is_imported_without_triton():
    code = "import sys; sys.modules['triton'] = None; import bench.step_model"
    subprocess.run([sys.executable, "-c", code], cwd=RESULTS.parents[2], check=True, timeout=600)
