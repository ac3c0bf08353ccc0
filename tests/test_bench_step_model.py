"""`python -m bench.step_model`: every kernel of the measured step belongs to the line that its place in the step says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bench import step_model
from smollm2.cli import LoadError

LAYERS = 30


@pytest.fixture(scope="module")
def trace(project_root: Path) -> list[tuple[str, float]]:
    return step_model.read(project_root / "bench" / "results" / "h100" / "trace-triton.json")


def is_product(name: str) -> bool:
    return any(part in name for part in step_model.PRODUCTS)


def test_every_layer_has_every_product_once(trace: list[tuple[str, float]]) -> None:
    lines = [line for _, (line, _) in (pairs for pairs in zip(trace, step_model.lines(trace), strict=True) if is_product(pairs[0][0]))]
    assert Counter(lines) == {**dict.fromkeys(step_model.GROUPS["products of the body"], LAYERS), "head: products": 12}


def test_the_lines_add_up_to_the_step(trace: list[tuple[str, float]]) -> None:
    lines = list(step_model.lines(trace))
    assert len(lines) == len(trace) == 1381
    assert sum(us for _, us in lines) == pytest.approx(sum(us for _, us in trace))
    assert sum(us for line, us in lines if line == "other") < 0.01 * sum(us for _, us in trace)
    grouped = [name for names in step_model.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted([*step_model.MODEL, "other"])


def test_the_table_is_the_one_of_the_results(trace: list[tuple[str, float]], project_root: Path) -> None:
    page = (project_root / "bench" / "results" / "h100" / "README.md").read_text(encoding="utf-8")
    assert step_model.table(trace) in page


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "step.json").write_text("{}", encoding="utf-8")
    with pytest.raises(LoadError, match="step.json: not a trace of bench.train_step --traces"):
        step_model.read(tmp_path / "step.json")
