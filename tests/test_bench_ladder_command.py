"""`python -m bench.ladder` at toy size, and the plain operations that its first row is made of."""

import json
import os
import weakref

import pytest
import torch
from in_process import printed

from bench import ladder
from bench.ladder_rungs import PLAIN, RUNGS, SeparateAttention, SeparateMLP
from kernels import TORCH
from kernels.types import OPS
from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError
from smollm2.layers import rotary_tables

TINY = SmolLM2Config.preset("tiny", num_hidden_layers=1)
CPU = torch.device("cpu")
IDS = torch.arange(16).view(2, 8)
SIZE = ladder.Size(TINY, torch.float32, IDS, "eager")


def drawn(generator, *sizes):
    return [torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True) for size in sizes]


def cases(generator):
    """Operation -> its inputs and the arguments that follow them, in float64."""
    cos, sin = (table[:6].double() for table in rotary_tables(TINY, CPU))
    weight, width = (96,), (2, 6, 96)
    q, kv = (2, 6, 3, 32), (2, 6, 1, 32)
    starts = torch.tensor([[0, 0, 0, 3, 3, 3], [0, 1, 1, 1, 1, 5]], dtype=torch.int32)
    targets = torch.tensor([5, -100, 0, 11])
    return {
        "rms_norm": (drawn(generator, width, weight), (1e-5,)),
        "add_rms_norm": (drawn(generator, width, width, weight), (1e-5,)),
        "rope": (drawn(generator, q, kv), (cos, sin)),
        "rope_qkv": (drawn(generator, (2, 6, 5, 32)), (cos, sin, 1)),
        "attention": (drawn(generator, q, kv, kv), ()),
        "attention with documents": (drawn(generator, q, kv, kv), (starts,)),
        "attention over more keys": (drawn(generator, q, (2, 9, 1, 32), (2, 9, 1, 32)), ()),
        "swiglu": (drawn(generator, width, width), ()),
        "swiglu of a packed buffer": (drawn(generator, width), ()),
        "linear_cross_entropy": (drawn(generator, (4, 8), (12, 8)), (targets,)),
    }


def naming(name):
    """What assert_close says, with the name of what differs."""
    return lambda text: f"{name}: {text}"


def test_plain_operations_compute_what_the_specification_says(generator):
    for name, (inputs, rest) in cases(generator).items():
        op = name.split()[0]
        results = []
        for backend in (PLAIN, TORCH):
            outputs = getattr(backend, op)(*inputs, *rest)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            ramps = (torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape) for out in outputs)
            upstream = [ramp + 0.5 for ramp in ramps]
            results.append([*outputs, *torch.autograd.grad(outputs, inputs, upstream)])
        for plain, specified in zip(*results, strict=True):
            torch.testing.assert_close(plain, specified, rtol=1e-6, atol=1e-6, msg=naming(name))


def test_a_row_has_all_that_the_rows_above_it_have():
    found = list(ladder.setups(TORCH, cuda=True).items())
    assert [name for name, _ in found] == list(RUNGS)
    bottom, top = found[0][1], found[-1][1]
    assert bottom == ladder.Setup(PLAIN, False, False, False, False, False)
    assert top.packed and top.fused_optimizer and top.captured and top.compiled
    training = {op for op in OPS if not op.startswith("decode_") and op not in ("rope_cache", "next_token")}
    assert top.backend.replaced == training
    assert not any(setup.own_optimizer for _, setup in found)  # there is none for backend torch
    changing = [one for one in found if one[0] != "optimizer + copies"]
    for (_, before), (name, after) in zip(changing, changing[1:], strict=False):
        fields = ("packed", "fused_optimizer", "captured", "compiled")
        changes = [getattr(before, field) != getattr(after, field) for field in fields]
        assert sum(changes) + (before.backend != after.backend) == 1, name
        assert before.backend.replaced <= after.backend.replaced
    assert not any(setup.captured for setup in ladder.setups(TORCH, cuda=False).values())


def test_separate_projections_are_the_same_model():
    setups = ladder.setups(TORCH, cuda=False)
    separate, packed = (ladder.build(setups[name], SIZE) for name in ("plain eager", "packed projections"))
    blocks = separate.model.model.layers
    assert {type(block.self_attn) for block in blocks} == {SeparateAttention}
    assert {type(block.mlp) for block in blocks} == {SeparateMLP}
    assert separate.model.state_dict().keys() == packed.model.state_dict().keys()
    losses = []
    for step in (separate, packed):
        losses.append(step.model(IDS, IDS).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1])
    ours, theirs = (dict(step.model.named_parameters()) for step in (separate, packed))
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, msg=naming(name))


def test_the_plain_optimizer_makes_the_same_update():
    setups = ladder.setups(TORCH, cuda=False)
    plain, fused = (ladder.build(setups[name], SIZE) for name in ("fused loss", "fused optimizer"))
    for step in (plain, fused):
        step(IDS)
    for one, other in zip(plain.model.parameters(), fused.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(stdout, section of the JSON file) of all rungs."""
    path = tmp_path_factory.mktemp("ladder") / "ladder.json"
    stdout = printed(ladder.main, "--device", "cpu", "--tiny", "--json", path)
    return stdout, json.loads(path.read_text(encoding="utf-8"))["ladder"]


def test_every_rung_has_its_row(measured):
    stdout, section = measured
    assert section["status"] == "complete" and list(section["rungs"]) == list(RUNGS)
    assert section["rungs"].pop("graph capture") == {"failed": "needs a GPU"}
    assert section["rungs"].pop("optimizer + copies") == {"failed": "needs Triton kernels"}
    for name, row in section["rungs"].items():
        assert row["step_ms"] > 0 and row["tokens_per_second"] > 0 and row["peak_mb"] > 0, name
        assert set(row["phases_ms"]) == {"forward", "backward", "update"}
        assert f"\n{name} " in stdout


def test_all_rungs_compute_the_same_losses(measured):
    _, section = measured
    assert set(section["loss_distance"]) == set(RUNGS) - {"graph capture", "optimizer + copies"}
    assert max(section["loss_distance"].values()) < 1e-4


def test_fused_operations_launch_less(measured):
    pytest.importorskip("triton", reason="launches are counted where triton is installed")
    rows = measured[1]["rungs"]
    counts = {name: row["launches"] for name, row in rows.items() if "launches" in row}
    assert "compile of the rest" not in counts
    order = ("plain eager", "packed projections", "fused add+norm", "fused rope", "fused attention")
    both = [counts[name]["forward"] + counts[name]["backward"] for name in order]
    assert both == sorted(both, reverse=True) and both[-1] < both[0]
    assert counts["fused optimizer"]["update"] < counts["fused loss"]["update"]


@pytest.fixture
def ladder_here(monkeypatch, tmp_path):
    """Runs the command in this process: the section of its JSON file for some arguments."""
    # what the command sets goes again
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "1"))
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    path = tmp_path / "ladder.json"

    def run(*argv):
        assert ladder.main(["--tiny", "--device", "cpu", "--json", str(path), *argv]) == 0
        return json.loads(path.read_text(encoding="utf-8"))["ladder"]

    return run


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")


@pytest.mark.parametrize("alone", [[], ["--alone"]], ids=["in turns", "alone"])
@pytest.mark.parametrize("when", ["when it is built", "when it is timed"])
def test_a_rung_that_fails_costs_itself_only(ladder_here, monkeypatch, alone, when):
    original = ladder.build

    def build(setup, *rest):
        if not setup.packed and when == "when it is built":
            out_of_memory()
        step = original(setup, *rest)
        if not setup.packed:
            step.phases = out_of_memory
        return step

    monkeypatch.setattr(ladder, "build", build)
    few = ("plain eager", "fused loss", "graph capture", "compile of the rest")
    rows = ladder_here("--no-compile", *alone, *(word for name in few for word in ("--rung", name)))["rungs"]
    failure = rows["plain eager"]["failed"]
    assert failure.startswith("OutOfMemoryError: CUDA out of memory") and "step_ms" not in rows["plain eager"]
    assert rows["graph capture"]["failed"] == "needs a GPU"
    assert "left out" in rows["compile of the rest"]["failed"] and list(rows) == list(few)
    assert rows["fused loss"]["step_ms"] > 0 and rows["fused loss"]["peak_mb"] > 0


def test_a_profiler_that_fails_costs_no_times(ladder_here, monkeypatch):
    monkeypatch.setattr(ladder, "peak_memory", out_of_memory)
    monkeypatch.setattr(ladder, "count_launches", out_of_memory)
    row = ladder_here("--rung", "fused optimizer")["rungs"]["fused optimizer"]
    assert row["step_ms"] > 0 and row["phases_ms"] and len(row["losses"]) == ladder.COMPARED_STEPS
    assert "out of memory" in row["peak_failed"] and "launches" not in row


def test_alone_a_rung_is_freed_before_the_next_is_built(ladder_here, monkeypatch):
    original, built, alive = ladder.build, [], []

    def build(*arguments):
        alive.append(sum(step() is not None for step in built))
        step = original(*arguments)
        built.append(weakref.ref(step.model))
        return step

    monkeypatch.setattr(ladder, "build", build)
    few = ("plain eager", "packed projections", "fused optimizer", "compile of the rest")
    section = ladder_here("--alone", *(word for name in few for word in ("--rung", name)))
    assert alive == [0] * 4 and section["status"] == "complete"
    assert set(section["loss_distance"]) == set(few) and max(section["loss_distance"].values()) < 1e-4


def test_the_compiled_rung_begins_only_with_time_left(ladder_here, monkeypatch):
    monkeypatch.setattr(ladder.Part, "left", lambda self: -1.0)
    rows = ladder_here("--rung", "compile of the rest")["rungs"]
    assert rows["compile of the rest"] == {"failed": "no time was left"}


def test_wrong_usage_is_refused():
    with pytest.raises(UsageError, match="at least 1, got 0"):
        ladder.main(["--tiny", "--device", "cpu", "--rounds", "0"])
