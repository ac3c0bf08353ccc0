"""A peer in a process of its own: one line of JSON against another, and what becomes of a peer that does not
keep to it.
"""

import io
import json
import subprocess
import sys

import pytest
import torch

from bench import litgpt_peer, step_peers
from bench.peers import choice, litgpt, litgpt_worker
from bench.peers.litgpt import LitgptStep, LitgptTurns, PeerFailed, PeerProcess
from bench.peers.status import NotInstalled
from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError

TINY = SmolLM2Config.preset("tiny", num_hidden_layers=1)
IDS = torch.arange(16)[None]

# Speaks the protocol of bench/peers/litgpt_worker.py; loses 1 nat a step, and puts out 7s.
RIGHT = """
import json, sys
loss = 9.0
for line in sys.stdin:
    request = json.loads(line)
    call = request["call"]
    result = {}
    if call == "load":
        result = {"parameters": PARAMETERS, "weight_bytes": 1, "config": request["config"]}
    if call == "steps":
        loss -= request["count"]
        result = {"loss": loss, "peak_memory_bytes": None}
    if call == "prefill":
        result = {"tokens": [[7]]}
    if call == "decode":
        result = {"tokens": [[7] * request["steps"]]}
    print(json.dumps({"result": result}), flush=True)
"""
BROKEN = {
    "crash": ("import sys; sys.stdin.readline(); sys.exit('no memory left')",
        "ended with exit code 1: no memory left"),
    "garbage": ("print('hello', flush=True); input(); input()",
        "expected an answer to 'load' in JSON, got b'hello"),
    "no answer": ("print('[]', flush=True); input(); input()", "expected an answer to 'load' in JSON"),
    "error": ('print(\'{"error": "KeyError: name"}\', flush=True); input(); input()', "KeyError: name"),
    "silence": ("import time; time.sleep(60)", "no answer to 'load' within 1 s"),
}  # fmt: skip


def peer(source, seconds=60.0):
    return PeerProcess([sys.executable, "-c", source], seconds=seconds)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Puts a script in the place of litgpt's environment: source -> None."""

    def put(source, seconds=60.0):
        monkeypatch.setattr(litgpt, "venv_python", lambda venv: tmp_path)
        monkeypatch.setattr(litgpt, "litgpt_version", lambda venv=None: "0.0.1")
        monkeypatch.setattr(choice, "litgpt_version", lambda: "0.0.1")
        monkeypatch.setattr(litgpt.Path, "is_file", lambda path: True)
        monkeypatch.setattr(litgpt, "PeerProcess", lambda command, environment: peer(source, seconds))

    return put


def right(parameters):
    return RIGHT.replace("PARAMETERS", str(parameters))


@pytest.mark.parametrize("name", BROKEN)
def test_a_peer_that_fails_is_named_with_the_reason_and_ended(name):
    source, message = BROKEN[name]
    process = peer(source, seconds=1.0 if name == "silence" else 60.0)
    with pytest.raises(PeerFailed) as raised:
        process.ask("load", weights="somewhere")
    assert message in str(raised.value)
    assert process._process.wait(10) is not None
    with pytest.raises(PeerFailed, match="ended with exit code"):
        process.ask("load")


def test_a_peer_ends_with_whoever_holds_it():
    process = peer(right(1))
    assert process.ask("load", config={})["parameters"] == 1
    child = process._process
    del process
    assert child.wait(10) != 0


def measured(rounds):
    """The rows of litgpt and of ours."""
    steps, failed = step_peers.build_all(["litgpt", "ours"], TINY, torch.float32, IDS, "eager")
    return {name: {"failed": why} for name, why in failed.items()} | step_peers.measure(
        steps, rounds, lambda: 60.0
    )


@pytest.mark.parametrize("name", ["crash", "garbage", "silence"])
def test_the_others_are_measured_when_a_peer_fails(name, stand_in):
    stand_in(BROKEN[name][0], 1.0)
    found = measured(2)
    assert "litgpt" in found and found["litgpt"]["failed"].startswith("PeerFailed: ")
    assert found["ours"]["rounds"] == 2
    why = choice.step_status(found)["litgpt"]["why"]
    assert BROKEN[name][1].replace("'load'", "") in why.replace("'load'", "")


def test_a_peer_that_dies_between_two_rounds_is_a_result_among_others(stand_in):
    dies = right(TINY.num_parameters()).replace(
        "loss -= request", "sys.exit('killed') if loss < 7 else None\n        loss -= request"
    )
    stand_in(dies)
    found = measured(3)
    assert found["litgpt"] == {"failed": "PeerFailed: ended with exit code 1: killed"}
    assert found["ours"]["rounds"] == 3


def test_a_step_and_a_generation_go_through_the_process(stand_in):
    stand_in(right(TINY.num_parameters()))
    step = LitgptStep(step_peers.ours(TINY, torch.float32).state_dict(), TINY, IDS, autocast=False)
    assert [float(step()), float(step()), step.steps(3)["loss"]] == [8.0, 7.0, 4.0]
    assert step.facts["config"]["n_embd"] == TINY.hidden_size
    turns = LitgptTurns(step._process, IDS, 4)
    first = turns.prefill()
    assert torch.equal(torch.cat([first, turns.decode(first, 3)], 1), torch.full((1, 4), 7))


def test_a_model_whose_head_is_not_tied_is_refused(stand_in):
    stand_in(right(TINY.num_parameters() + TINY.vocab_size * TINY.hidden_size))
    with pytest.raises(PeerFailed, match="with a tied head"):
        LitgptStep(step_peers.ours(TINY, torch.float32).state_dict(), TINY, IDS, autocast=False)


def test_without_its_environment_litgpt_is_named_with_the_command_that_makes_it(monkeypatch, tmp_path):
    monkeypatch.setenv(litgpt.VENV_VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(NotInstalled, match=r"litgpt is not installed; python -m bench.litgpt_peer setup"):
        LitgptStep(step_peers.ours(TINY, torch.float32).state_dict(), TINY, IDS, autocast=False)
    assert litgpt.litgpt_version() is None
    folder = tmp_path / "absent" / "lib" / "python3.11" / "site-packages" / "litgpt-0.5.13.dist-info"
    folder.mkdir(parents=True)
    assert litgpt.litgpt_version() == "0.5.13"


def test_setup_installs_the_torch_that_runs_here_and_says_what_failed(monkeypatch, tmp_path):
    seen = []

    def run(command):
        seen.append(list(map(str, command)))
        if "-c" in seen[-1]:
            pins = open(seen[-1][seen[-1].index("-c") + 1], encoding="utf-8").read().split()
            assert f"torch=={torch.__version__.partition('+')[0]}" in pins
            # litgpt wants others
            assert not any(pin.startswith(("huggingface_hub", "tokenizers")) for pin in pins)
            return subprocess.CompletedProcess(command, 1)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(litgpt.subprocess, "run", run)
    message = "pip install .* failed; remove .*, or name another folder with --venv"
    with pytest.raises(UsageError, match=message):
        litgpt.setup(tmp_path / "venv")
    assert len(seen) == 2 and litgpt.LITGPT in seen[1]


def test_the_worker_answers_every_line_and_an_exception_is_an_answer():
    class Fake:
        def double(self, x):
            return {"y": 2 * x}

    answers = io.StringIO()
    asked = {"call": "double", "x": 4}, {"call": "nothing"}, {"call": "double", "z": 1}
    requests = [*map(json.dumps, asked), "no json"]
    litgpt_worker.serve(Fake(), io.StringIO("\n".join(requests) + "\n"), answers)
    found = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert found[0] == {"result": {"y": 8}}
    kinds = [one["error"].partition(":")[0] for one in found[1:]]
    assert kinds == ["AttributeError", "TypeError", "JSONDecodeError"]


def test_the_worker_imports_nothing_of_this_project_and_keeps_its_answers_apart(project_root):
    """As it is started: isolated, from another folder. What a library prints goes to stderr."""
    source = project_root / "bench" / "peers" / "litgpt_worker.py"
    done = subprocess.run(
        [sys.executable, "-I", source], input='{"call": "load"}\n', capture_output=True, text=True,
        cwd=project_root.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "TypeError" in json.loads(done.stdout)["error"]
    assert not any(
        f"{verb} {package}" in source.read_text()
        for verb in ("import", "from")
        for package in ("bench", "smollm2", "kernels")
    )


@pytest.mark.slow
@pytest.mark.skipif(
    litgpt.litgpt_version() is None, reason="litgpt is not installed; python -m bench.litgpt_peer setup"
)
def test_litgpt_has_our_losses_and_tokens(capsys):
    assert litgpt_peer.check() == 0
    assert "the same tokens as ours" in capsys.readouterr().out
