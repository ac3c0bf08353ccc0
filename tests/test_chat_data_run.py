"""Runs on conversations: resumed to the last bit, the mean over what is learned, and what they say."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cases import (
    DEADLINE,
    arguments,
    assert_same_curve,
    checkpoint_folder,
    curve,
    run_config,
    torchrun,
)
from trl_cases import talk, tokenizer

from smollm2.errors import LoadError
from smollm2.model import IGNORE_INDEX
from smollm2.pretrained.load import load_model
from train import step
from train.build import build
from train.config import RunConfig
from train.data.batches import Batch, training_batches
from train.distributed import World
from train.evaluation import evaluate
from train.metrics import read_metrics
from train.run import print_plan, train


def chat_config(folder: Path, name: str = "run", **changes: Any) -> RunConfig:
    """A run on twenty conversations, with a tokenizer that has SmolLM2's chat template."""
    corpus, kept = folder / "chat.jsonl", folder / "tokenizer"
    if not corpus.exists():
        rows = [{"messages": talk(f"and {n}?", f"{n * n} dogs. " * (1 + n % 5))} for n in range(20)]
        corpus.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"a": 1}]), encoding="utf-8")
        tokenizer().save(kept)
    keys = dict(format="chat", tokenizer=str(kept), paths=[str(corpus)], sequence_length=160, eval_every=3)
    return run_config(folder, name, **{**keys, **changes})


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(grad_accumulation=2, workers=1, token_cache="tokens"), dict(train_on="all", dtype="bf16")],
    ids=["plain", "accumulation-workers-cache", "all-bf16"],
)
def test_three_steps_and_three_more_are_six_steps_to_the_last_bit(tmp_path, changes):
    if "token_cache" in changes:
        changes = {**changes, "token_cache": str(tmp_path / "tokens")}
    straight, parts = (chat_config(tmp_path, name, **changes) for name in ("straight", "parts"))
    train(straight)
    parts.steps = 3
    train(parts)
    parts.steps, parts.resume = 6, "auto"
    train(parts)
    assert curve(parts) == curve(straight) and len(curve(parts)) == 6
    held_out = [
        [line["held_out_loss"] for line in read_metrics(Path(one.output_dir)) if "held_out_loss" in line]
        for one in (straight, parts)
    ]
    assert held_out[0] == held_out[1] and len(held_out[0]) == 2
    ends = [checkpoint_folder(config, 6) for config in (straight, parts)]
    one, other = (load_model(end).state_dict() for end in ends)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    records = [json.loads((end / "run.json").read_text(encoding="utf-8"))["data"] for end in ends]
    assert records[0] == records[1] and records[0]["padding"] > 0


def test_a_run_says_what_was_padded_cut_and_passed_over(tmp_path, capsys):
    config = chat_config(tmp_path, sequence_length=120, eval_every=0)
    train(config)
    out = capsys.readouterr().out
    last = read_metrics(Path(config.output_dir))[-1]
    assert 0 < last["padded_share"] < 1 and last["truncated_conversations"] > 0
    assert last["invalid_documents"] > 0
    cut = f"conversations: {last['documents']} read, {last['truncated_conversations']} of them longer than"
    assert f"{cut} sequence_length=120 and cut; {last['padded_share']:.0%} of all tokens were padding" in out


def batches_of(config: RunConfig, count: int) -> list[Batch]:
    run = build(config, World(torch.device("cpu")))
    options: dict[str, Any] = dict(rows=config.rows_per_step, length=config.sequence_length, seed=config.seed)
    fraction = run.held_out_fraction
    batches = training_batches(run.source, run.tokenizer, **options, validation_fraction=fraction)
    return list(itertools.islice(batches, count))


@pytest.mark.parametrize("masking", [True, False])
def test_the_loss_is_the_mean_over_all_that_is_learned(tmp_path, masking):
    """Micro-batches of one row each, of which every one learns another number of tokens."""
    config = chat_config(tmp_path, batch_size=1, grad_accumulation=4, document_masking=masking)
    (batch,) = batches_of(config, 1)
    assert batch.labels is not None
    learned = (batch.labels != IGNORE_INDEX).sum(1)
    assert len(set(learned.tolist())) > 1 and learned.sum() == batch.learned
    run = build(config, World(torch.device("cpu")))
    starts = batch.doc_start if masking else None
    with torch.no_grad():
        whole = run.model(batch.input_ids, labels=batch.labels, doc_start=starts).loss
    made = step.TrainStep(run.forward, run.optimizer, run.guard, config, run.world)
    loss, _ = made(batch)
    assert float(loss) == pytest.approx(float(whole), rel=1e-5)


def test_the_held_out_loss_is_that_of_the_answers(tmp_path, capsys):
    config = chat_config(tmp_path, validation_fraction=1e-6)
    run = build(config, World(torch.device("cpu")))
    print_plan(run, "a test")
    learned = run.held_out.learned
    expected = f"held out  1 rows, {len(learned)} tokens that are learned"
    assert expected in capsys.readouterr().out
    text = run.tokenizer.decode(learned.tolist())
    assert text.count("<|im_end|>") == 1 and " dogs. " in text and "You are" not in text
    with torch.no_grad():
        logits = run.model(run.held_out.ids, doc_start=run.held_out.doc_start).logits.float()
    assert run.held_out.labels is not None
    here = run.held_out.labels[:, 1:] != IGNORE_INDEX
    by_hand = torch.nn.functional.cross_entropy(logits[:, :-1][here], run.held_out.labels[:, 1:][here])
    found = evaluate(run.model, run.held_out, config, run.world)
    assert found == pytest.approx(float(by_hand), rel=1e-5)


def test_a_captured_step_takes_the_labels_of_each_batch(tmp_path, monkeypatch):
    """With a stand-in for the graph, which computes again what was recorded from the same tensors."""

    class Graph:
        replay: Any

    graph, recording = Graph(), [False]

    @contextlib.contextmanager
    def capture(*_: Any, **__: Any) -> Any:
        recording[0] = True
        yield
        recording[0] = False

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(step, "on_stream", lambda _: contextlib.nullcontext())
    compute = step.TrainStep._compute

    def recorded(self: step.TrainStep, *tensors: Any) -> Any:
        if not recording[0]:
            return compute(self, *tensors)
        results = torch.zeros(()), torch.zeros(())

        def replay() -> None:
            for place, value in zip(results, compute(self, *tensors), strict=True):
                place.copy_(value)

        graph.replay = replay
        return results

    monkeypatch.setattr(step.TrainStep, "_compute", recorded)
    config, losses = chat_config(tmp_path), []
    batches = batches_of(config, 5)
    for captured in (False, True):
        torch.manual_seed(0)
        run = build(config, World(torch.device("cpu")))
        what = run.forward, run.optimizer, run.guard, config, run.world
        made = step.CapturedStep(None, *what) if captured else step.TrainStep(*what)  # type: ignore[arg-type]
        losses.append([float(made(batch)[0]) for batch in batches])
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_two_processes_have_the_curve_of_one(tmp_path, project_root):
    changes = dict(batch_size=2, grad_accumulation=2, eval_every=0)
    one, two = chat_config(tmp_path, "one", **changes), chat_config(tmp_path, "two", **changes)
    train(one)
    command = [*torchrun(2), "-m", "train.run", *arguments(two)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=project_root, env=alone, timeout=DEADLINE, check=True, capture_output=True)
    assert_same_curve(one, two)


def test_files_without_a_conversation_say_what_a_row_is(tmp_path):
    config = chat_config(tmp_path)
    Path(config.paths[0]).write_text('{"text": "no conversation"}\n' * 3, encoding="utf-8")
    wanted = r"expected conversations to train on, found none \(3 unreadable .*; a row is \{\"messages\""
    with pytest.raises(LoadError, match=wanted):
        train(config)


def test_conversations_given_to_a_run_on_texts_are_told_what_to_do(tmp_path, capsys):
    with pytest.raises(LoadError, match="expected documents to train on, .*format=chat for conversations"):
        train(chat_config(tmp_path, format="text"))
    assert "conversations, not 'text', are passed over; add format=chat" in capsys.readouterr().out
