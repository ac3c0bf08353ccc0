"""Conversations are trained on as by trl's SFTTrainer: the same ids, labels and loss.

trl_golden.json is what trl 1.16.0 makes of the rows of trl_cases.py. Where an environment with trl is named,
it is asked again:

    python -m venv --system-site-packages trl && trl/bin/pip install trl==1.16.0
    SMOLLM2_TRL_PYTHON=$PWD/trl/bin/python pytest tests/test_chat_data_trl.py
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import trl_cases
from trl_cases import CASES, GOLDEN, LENGTH, MARKED, NARROW, encoded, ids_and_labels, packed

from smollm2.model import IGNORE_INDEX

WORKER = Path(__file__).with_name("trl_worker.py")
VARIABLE = "SMOLLM2_TRL_PYTHON"


@functools.cache
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model():
    return trl_cases.model()


def check(found: dict[str, Any], name: str, model: Any) -> None:
    rows, train_on, *_ = CASES[name]
    arrays = encoded(rows, train_on)
    ours = [ids_and_labels(array) for array in arrays]
    assert [ids for ids, _ in ours] == found["ids"]
    assert [labels for _, labels in ours] == found["labels"]
    for length in (LENGTH, 2 * LENGTH):  # a row for most of them, and several in one
        made = packed([array[:LENGTH] for array in arrays], length)
        with torch.no_grad():
            loss = model(made.ids, labels=made.labels, doc_start=made.doc_start).loss
        assert float(loss) == pytest.approx(found["loss"], abs=1e-5)
        assert float(loss) == pytest.approx(found["packed_loss"], abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_ids_labels_and_loss_are_those_of_trl(name, model):
    check(golden()["cases"][name], name, model)


def test_trl_that_is_installed_makes_the_same(tmp_path, model):
    if (python := os.environ.get(VARIABLE)) is None:
        pytest.skip(f"{VARIABLE} names no Python with trl")
    trl_cases.write_cases(tmp_path)
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    offline.pop("PYTHONPATH", None)
    subprocess.run([python, str(WORKER), str(tmp_path)], check=True, env=offline, capture_output=True)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["cases"]
    assert found.keys() == CASES.keys()
    for name in CASES:
        check(found[name], name, model)


def test_a_template_with_generation_marks_gives_the_same_labels():
    rows = CASES["messages"][0]
    pairs = zip(encoded(rows, "assistant"), encoded(rows, "assistant", MARKED), strict=True)
    assert all(one.tolist() == other.tolist() for one, other in pairs)
    # and the marks decide, where they enclose less
    few, many = (
        sum(label != IGNORE_INDEX for label in ids_and_labels(encoded(rows, "assistant", one)[0])[1])
        for one in (NARROW, MARKED)
    )
    assert few == many - 2  # the end of the turn, and that of the line


def test_two_lists_are_their_messages_with_the_loss_on_the_second():
    (one,) = encoded([trl_cases.TURNS[0]], "assistant")
    whole = {"messages": trl_cases.TURNS[0]["prompt"] + trl_cases.TURNS[0]["completion"]}
    assert one.tolist() == encoded([whole], "assistant")[0].tolist()
