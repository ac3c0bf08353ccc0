"""`python -m bench.step_peers` at toy size, and the pieces that its figures are made of."""

import json

import pytest
import torch
from in_process import printed

from bench import step_peers
from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError

TINY = SmolLM2Config.preset("tiny", num_hidden_layers=1)
IDS = torch.arange(16)[None]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(stdout, section of the JSON file) of all eager variants and of ours compiled."""
    pytest.importorskip("transformers", reason="the comparison needs transformers")
    path = tmp_path_factory.mktemp("peers") / "peers.json"
    names = ("ours", "ours+doc_start", "ours+compile", "transformers", "transformers bf16")
    eager = [word for name in names for word in ("--variant", name)]
    stdout = printed(step_peers.main, "--tiny", "--json", path, *eager)
    return stdout, json.loads(path.read_text(encoding="utf-8"))


def test_every_variant_has_a_time_and_the_peers_a_ratio(measured):
    stdout, content = measured
    section = content["step_peers"]
    assert section["status"] == "complete" and section["note"] == step_peers.TINY_NOTE
    assert content["versions"]["transformers"] in stdout
    for dtype, names in (("fp32", {"transformers"}), ("bf16", {"transformers", "transformers bf16"})):
        found = section["results"][dtype]
        assert set(found["variants"]) == names | {"ours", "ours+doc_start", "ours+compile"}
        assert all(row["step_ms"] > 0 and row["rounds"] == 1 for row in found["variants"].values())
        assert set(found["ours_is_faster"]) == names
        assert found["matmul_floor_ms"] > 0


def test_all_variants_compute_the_same_losses(measured):
    for dtype, found in measured[1]["step_peers"]["results"].items():
        assert set(found["loss_distance"]) == set(found["variants"]) - {"ours+doc_start"}
        assert max(found["loss_distance"].values()) <= step_peers.LOSS_TOLERANCE[dtype]


def test_a_library_that_was_not_measured_has_a_line_and_a_reason(measured):
    stdout, content = measured
    found = content["step_peers"]["peers"]
    assert set(found) == {"transformers", "liger-kernel", "litgpt", "torch.compile"}
    used = {"version": content["versions"]["transformers"], "used": True, "why": None}
    assert found["transformers"] == used
    assert found["torch.compile"]["used"]
    for name in ("liger-kernel", "litgpt"):
        assert not found[name]["used"] and found[name]["why"]
        assert f"not measured: {name}" in stdout and found[name]["why"] in stdout


def test_what_runs_elsewhere_is_measured_unless_other_variants_are_named():
    among = (*step_peers.VARIANTS, *step_peers.ELSEWHERE)
    assert {"litgpt", "litgpt+compile", "liger"} <= set(step_peers.chosen("fp32", (), True, among))
    assert step_peers.chosen("fp32", ("ours", "litgpt"), True, among) == ["ours", "litgpt"]
    assert step_peers.chosen("fp32", (), False, among)[-2:] == ["litgpt", "liger"]
    assert "litgpt" not in step_peers.chosen("fp32", (), True)  # what the suites measure runs in this process


def test_peers_start_from_the_same_weights():
    pytest.importorskip("transformers", reason="the comparison needs transformers")
    mine, other = step_peers.ours(TINY, torch.float32).state_dict(), step_peers.theirs(TINY).state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_a_peer_in_bf16_keeps_the_precision_that_its_row_names():
    pytest.importorskip("transformers", reason="the comparison needs transformers")
    for variant in ("ours", "transformers", "transformers bf16"):
        step = step_peers.build(variant, TINY, torch.bfloat16, IDS)
        first, second = float(step()), float(step())
        assert second < first


def test_the_ratio_against_a_compiled_peer_takes_the_better_of_ours():
    times = {
        "ours": 100.0, "ours+compile": 80.0, "transformers": 130.0, "transformers+compile": 88.0,
        "transformers bf16": 90.0,
    }  # fmt: skip
    found = {name: {"step_ms": time} for name, time in times.items()}
    found["transformers bf16+compile"] = {"failed": "no compiler"}
    ratios = {"transformers": 1.3, "transformers+compile": 1.1, "transformers bf16": 0.9}
    assert step_peers.ratios(found) == ratios
    assert step_peers.ratios({"transformers": {"step_ms": 1.0}}) == {}


def test_a_variant_that_computes_another_loss_is_far():
    """With document boundaries it is another one; of a peer whose updates are rounded the first is
    compared.
    """
    losses = {"ours": [3.0, 2.0], "other": [3.0, 2.5], "ours+doc_start": [9.0, 9.0]}
    found = {name: {"losses": of} for name, of in {**losses, "transformers bf16": [3.25, 2.75]}.items()}
    assert step_peers.distances(found) == {"ours": 0.0, "other": 0.5, "transformers bf16": 0.25}


def test_a_variant_that_raises_is_a_result_among_others():
    def broken():
        raise RuntimeError("no compiler\nfound")

    found = step_peers.measure({"broken": broken, "right": lambda: torch.ones(())}, 3, lambda: 1.0)
    assert found["broken"] == {"failed": "RuntimeError: no compiler found"}
    assert found["right"]["losses"] == [1.0, 1.0, 1.0] and found["right"]["rounds"] == 3


def test_nothing_new_is_timed_when_no_time_is_left():
    found = step_peers.measure({"right": lambda: torch.ones(())}, 9, lambda: -1.0)
    assert found["right"]["rounds"] == 1


@pytest.mark.parametrize(
    "arguments, message",
    [(["--device", "cuda"], "bench.train_step"), (["--rounds", "0"], "at least 1, got 0")],
)
def test_what_cannot_be_measured_here_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        step_peers.main(arguments)
