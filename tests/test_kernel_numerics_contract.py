"""The contract itself: what it refuses, and the report that the certificate takes up."""

import json

import numerics
import pytest
import torch


@pytest.fixture(autouse=True)
def own_record(monkeypatch):
    """These made-up results are none of the session's."""
    monkeypatch.setattr(numerics, "WORST", {})


TRUTH = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
BASE = TRUTH.float() + 1e-5  # an error of 1e-5: the budget is 2e-5 and the allowance of 2e-6


@pytest.mark.parametrize("error", [0.0, 1.9e-5, -2.1e-5])
def test_within_the_budget(error):
    numerics.check("op", "y", (TRUTH + error).float(), BASE, TRUTH)
    assert numerics.WORST[("op", "float32")] == pytest.approx(abs(error) / 2.2e-5, abs=0.03)


@pytest.mark.parametrize(
    "ours, base, truth, message",
    [
        ((TRUTH + 2.5e-5).float(), BASE, TRUTH, "over the budget"),
        (torch.tensor([1.0, float("nan"), 3.0]), BASE, TRUTH, "1 values are not finite"),
        (torch.tensor([1.0, float("inf"), 3.0]), BASE, TRUTH, "1 values are not finite"),
        (TRUTH.half(), BASE, TRUTH, "dtype torch.float16, expected torch.float32"),
        (TRUTH[:2].float(), BASE, TRUTH, "shape"),
        (TRUTH.float(), BASE, TRUTH.float(), "the truth must be float64"),
    ],
)
def test_refused(ours, base, truth, message):
    with pytest.raises(AssertionError, match=message):
        numerics.check("op", "y", ours, base, truth)


def test_the_report_holds_the_worst(tmp_path):
    for error in (1e-5, 2e-5, 0.0):
        numerics.check("b", "y", (TRUTH + error).float(), BASE, TRUTH)
    numerics.check("a", "y", TRUTH.half(), TRUTH.half(), TRUTH)
    numerics.write_report(str(tmp_path / "numerics.json"))
    first, second = json.loads((tmp_path / "numerics.json").read_text())
    assert first == {"op": "a", "dtype": "float16", "worst": 0.0}
    assert (second["op"], second["dtype"]) == ("b", "float32") and second["worst"] == pytest.approx(
        2 / 2.2, abs=0.03
    )
    numerics.WORST["b", "float32"] = 0.1  # as another process found it
    numerics.write_report(str(tmp_path / "numerics.json"))
    assert json.loads((tmp_path / "numerics.json").read_text()) == [first, second]


def test_no_report_of_nothing(tmp_path):
    numerics.write_report(str(tmp_path / "numerics.json"))
    assert not (tmp_path / "numerics.json").exists()
