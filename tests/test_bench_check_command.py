"""`python -m bench.check`: how ratios are judged, and a run at toy size, where none is."""

import json

import pytest
from in_process import printed

from bench import check
from smollm2.errors import LoadError, UsageError

BOUND = {"at_least": 1.5, "at_most": 4.0, "measured": [2.0, 1.8, 2.5], "reason": "it does less"}
BEFORE = "before it was 1.8 to 2.5"


def test_every_ratio_that_is_measured_has_a_bound_and_a_reason():
    assert set(check.read_expected(check.EXPECTED)) == set(check.Contests(check.TINY).makers)


def test_every_bound_is_well_below_several_measured_ratios():
    for name, bound in check.read_expected(check.EXPECTED).items():
        assert len(bound["measured"]) >= 3 and bound["at_least"] <= 0.9 * min(bound["measured"]), name


@pytest.mark.parametrize("found, wanted", [
    ({"ratio": 1.5}, f"holds; {BEFORE}"),
    ({"ratio": 4.0}, f"holds; {BEFORE}"),
    ({"ratio": 1.49}, f"VIOLATED: below 1.5; {BEFORE}, because it does less"),
    ({"ratio": 4.1}, f"VIOLATED: above 4.0; {BEFORE}; does the first still do all the work?"),
    ({"ratio": float("nan")}, f"VIOLATED: below 1.5; {BEFORE}, because it does less"),
    ({"ratio": 2.0, "difference": "the tokens differ"}, "VIOLATED: the tokens differ"),
    ({"failed": "RuntimeError: no"}, "VIOLATED: RuntimeError: no"),
    ({"missing": "transformers is not installed"}, "not measured: transformers is not installed"),
])  # fmt: skip
def test_verdict(found, wanted):
    assert check.verdict(found, BOUND) == wanted


def test_the_two_ways_are_measured_in_turns_and_do_the_same_amount():
    calls = []
    contest = check.Contest(lambda: calls.append("ours"), lambda: calls.append("other"), times=8)
    found = check.measure(contest, 2)
    assert calls == ["ours", "other"] * 3
    assert found["ratio"] > 0 and found["ours_ms"] >= 0


def test_a_row_that_cannot_be_had_or_fails_is_a_result():
    def missing():
        raise UsageError("the peers need transformers; pip install transformers")

    def broken():
        raise RuntimeError("no\ncompiler")

    assert check.run(missing, 1) == {"missing": "the peers need transformers; pip install transformers"}
    assert check.run(broken, 1) == {"failed": "RuntimeError: no compiler"}
    assert check.run(lambda: 2.5, 1) == {"ratio": 2.5}
    contest = check.Contest(lambda: None, lambda: None, "the tokens differ")
    assert check.run(lambda: contest, 1)["difference"] == "the tokens differ"


@pytest.mark.parametrize("text, message", [
    ("{}", "expected a JSON object with 'ratios'"), ("[", "expected a JSON object with 'ratios'"),
    ('{"ratios": {"a over b": {"at_least": 2.0}}}', "'a over b' needs 'at_least' (a number) and a 'reason'"),
    ('{"ratios": {"a over b": {"at_least": "2", "reason": "r"}}}', "needs 'at_least' (a number) and a"),
    ('{"ratios": {"a over b": {"at_least": 2.0, "reason": "r"}}}', "'a over b' needs 'measured' (a list"),
])  # fmt: skip
def test_bounds_that_cannot_be_read_are_named(tmp_path, text, message):
    path = tmp_path / "expected.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LoadError) as caught:
        check.read_expected(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


class Fixed:
    """Contests whose ratios are known."""

    def __init__(self, sizes):
        self.sizes = sizes
        self.makers = {"a over b": lambda: 2.0, "c over d": lambda: 0.5, "e over f": self._missing}

    @staticmethod
    def _missing():
        raise UsageError("no e here")


@pytest.fixture
def fixed(tmp_path, monkeypatch):
    """A file of bounds for the three ratios."""
    monkeypatch.setattr(check, "Contests", Fixed)
    path = tmp_path / "expected.json"
    bounds = {
        name: {"at_least": 1.0, "measured": [2.0], "reason": "r"}
        for name in ("a over b", "c over d", "e over f")
    }
    path.write_text(json.dumps({"ratios": bounds}), encoding="utf-8")
    return path


def test_a_violation_is_exit_code_1(fixed, tmp_path, capsys):
    results = tmp_path / "results.json"
    assert check.main(["--expected", str(fixed), "--json", str(results)]) == 1
    lines = capsys.readouterr().out.splitlines()
    before = "before it was 2.0 to 2.0"
    judged = [f"holds; {before}", f"VIOLATED: below 1.0; {before}, because r", "not measured: no e here"]
    assert [line.split("  ")[-1] for line in lines[-4:-1]] == judged
    again = "1 violated; on a quiet machine once more: python -m bench.check --only 'c over d'"
    assert lines[-1] == f"1 of 3 hold, 1 not measured, {again}"
    rows = json.loads(results.read_text(encoding="utf-8"))["check"]["rows"]
    assert rows["c over d"] == {"ratio": 0.5, "at_least": 1.0, "verdict": judged[1]}


def test_what_holds_or_cannot_be_measured_is_exit_code_0(fixed):
    assert check.main(["--expected", str(fixed), "--only", "a over b", "--only", "e over f"]) == 0
    assert check.main(["--expected", str(fixed), "--tiny"]) == 0


def test_a_name_without_a_bound_is_refused(fixed):
    with pytest.raises(
        UsageError, match="'g over h': expected a ratio that is measured and has a bound, one of a over b"
    ):
        check.main(["--expected", str(fixed), "--only", "g over h"])


def test_ratios_of_a_gpu_are_refused():
    with pytest.raises(UsageError, match="--device cuda"):
        check.main(["--device", "cuda"])


def test_a_tiny_run_compares_what_both_ways_compute_and_judges_no_time(tmp_path):
    path = tmp_path / "check.json"
    # which starts worker processes
    names = [name for name in check.Contests(check.TINY).makers if name != "token cache over text"]
    only = [word for name in names for word in ("--only", name)]
    printed(check.main, "--tiny", "--json", path, *only)
    section = json.loads(path.read_text(encoding="utf-8"))["check"]
    assert section["note"] == check.TINY_NOTE and list(section["rows"]) == names
    for name, row in section["rows"].items():
        assert row["verdict"] == "not judged" or row["verdict"].startswith("not measured: "), (name, row)
    for name in ("int8 over bf16 decode", "cached over uncached generation", "batch of 8 over 8 singles"):
        assert section["rows"][name]["ratio"] > 0 and "difference" not in section["rows"][name]
