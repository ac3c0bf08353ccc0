"""Runs that train adapters: `train.run` with lora_rank, and `smollm2 finetune`."""

import json
import os
import shlex
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from train_cases import DEADLINE, arguments, checkpoint_folder, curve, run_config, torchrun

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.cli import run_command
from smollm2.errors import UsageError
from smollm2.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TARGETS, LoraConfig, adapter_parameters
from smollm2.pretrained.load import load_model, load_tokenizer
from smollm2.pretrained.tokenizer import train_tokenizer
from train import checkpoint, epochs, finetune
from train.distributed import World, dist
from train.estimate import memory_of
from train.metrics import flops_per_token
from train.run import main, train
from train.verify_resume import _same

TALK = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"  # noqa: E501


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that nobody has trained, with a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(["Numbers, and what follows them: 1 and 2 and 3."], 300)
    tokenizer.chat_template = TALK
    torch.manual_seed(0)
    SmolLM2ForCausalLM(SmolLM2Config.preset("tiny", vocab_size=300), "torch").save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def configured(tmp_path, base):
    def make(name, **changes):
        return run_config(
            tmp_path, name, **{"model": str(base), "tokenizer": "auto", "lora_rank": 4, **changes}
        )

    return make


@pytest.mark.parametrize("changes", [dict(), dict(dtype="bf16", grad_accumulation=2, lora_dropout=0.1)])
def test_three_steps_and_three_more_are_six_steps_to_the_last_bit(configured, changes):
    straight, parts = configured("straight", **changes), configured("parts", **changes, steps=3)
    train(straight)
    train(parts)
    parts.steps, parts.resume = 6, "auto"
    torch.manual_seed(99)  # whatever the process did in between
    train(parts)
    assert curve(parts) == curve(straight)
    ends = [checkpoint_folder(config, 6) for config in (straight, parts)]
    for name in (ADAPTER_WEIGHTS, checkpoint.MOMENTS):
        assert _same(*(load_file(end / name) for end in ends)), name


def test_a_checkpoint_holds_the_adapters_alone_and_loads_as_a_model(configured, base):
    config = configured("run")
    train(config)
    end = checkpoint_folder(config, 6)
    assert not (end / "model.safetensors").exists()
    given = json.loads((end / ADAPTER_CONFIG).read_text())
    assert (given["base_model_name_or_path"], given["r"]) == (str(base), 4)
    moments = load_file(end / checkpoint.MOMENTS)
    assert len(moments) == 3 * len(load_file(end / ADAPTER_WEIGHTS))
    model = load_model(config.output_dir, "torch")  # the folder of the run
    assert model.is_plain()
    first = load_model(base, "torch")
    for (name, ours), before in zip(model.named_parameters(), first.parameters(), strict=True):
        assert torch.equal(ours, before) != name.endswith(tuple(f"{target}.weight" for target in TARGETS)), (
            name
        )
    assert load_tokenizer(config.output_dir).fingerprint() == load_tokenizer(base).fingerprint()


def test_other_weights_under_the_name_of_the_base_are_noticed(configured, tmp_path, base):
    config = configured("run", steps=2)
    config.model = str(tmp_path / "model")
    load_model(base, "torch").save_pretrained(config.model)
    load_tokenizer(base).save(config.model)
    train(config)
    torch.manual_seed(1)
    SmolLM2ForCausalLM(SmolLM2Config.preset("tiny", vocab_size=300), "torch").save_pretrained(config.model)
    config.steps, config.resume = 4, "auto"
    with pytest.raises(UsageError, match="are not those that the adapters were trained on"):
        train(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model="tiny"), "lora_rank: adapters need a model to adapt"),
        (dict(optimizer="muon"), "lora_rank: adapters are trained with adamw"),
        (dict(sharding="full"), "lora_rank: adapters are trained with adamw in every process"),
        (dict(lora_targets=["q"]), "lora_targets: expected some of q_proj"),
        (dict(lora_targets=[]), "lora_targets: expected projections"),
        (dict(lora_rank=-1), "lora_rank: expected a number of at least 0"),
    ],
)
def test_what_adapters_cannot_do_is_refused(configured, changes, message):
    config = configured("run")
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(UsageError, match=message):
        config.validate()


def test_the_estimate_counts_what_is_trained(configured):
    config, shape = configured("run"), SmolLM2Config.preset("135M")
    trained = adapter_parameters(shape, LoraConfig(4))
    assert trained == 30 * 4 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    found = memory_of(config, shape, torch.device("cpu"), 2)
    assert (found.gradients, found.moments) == (4 * trained, 8 * trained)
    assert found.parameters == 4 * (134_515_008 + trained)
    weights = flops_per_token(shape, 64) - flops_per_token(shape, 64, LoraConfig(4))
    assert weights == 2 * (134_515_008 - 61 * 576) - 6 * trained


# ---- smollm2 finetune --------------------------------------------------------------------------------------


@pytest.fixture
def talks(tmp_path):
    path = tmp_path / "talks.jsonl"
    rows = [
        [{"role": "user", "content": f"{n} and {n}?"}, {"role": "assistant", "content": f"{2 * n}."}]
        for n in range(12)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


KEYS = "batch_size=1 sequence_length=128 sample_prompts=[1?] sample_tokens=4 device=cpu".split()


def test_finetune_counts_epochs_trains_and_merges(tmp_path, talks, base, capsys):
    out = tmp_path / "run"
    keys = [*KEYS, f"model={base}", f"output_dir={out}"]
    one, two = (finetune.configure([str(talks), *keys, f"epochs={epochs}"]).steps for epochs in (2, 4))
    assert two == pytest.approx(2 * one, abs=1) and one > 2
    assert capsys.readouterr().out == 2 * f"counting the tokens of {talks} ...\n"
    assert finetune.main([str(talks), *keys, "epochs=1"]) == 0
    said = capsys.readouterr().out
    assert "in adapters and trained" in said and "step 0: held-out loss" in said
    assert "sample: 1?\n" in said and "<|im_start|>" not in said  # the question, then the answer to it
    merged = load_model(out / "merged", "torch")
    for ours, theirs in zip(merged.parameters(), load_model(out, "torch").parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert load_tokenizer(out / "merged").chat_template == TALK
    hints = [
        shlex.split(line.partition(": ")[2])
        for line in said.splitlines()
        if line.startswith(("chat:", "export:"))
    ]
    assert [hint[-1] for hint in hints] == [str(out), "q8_0"]
    assert hints[1][hints[1].index("--model") + 1] == str(out)


@pytest.mark.slow
def test_of_several_processes_one_counts_merges_and_speaks(tmp_path, talks, base, project_root):
    out = tmp_path / "run"
    keys = [*KEYS, f"model={base}", f"output_dir={out}", "epochs=1", "grad_accumulation=2"]
    done = subprocess.run(
        [*torchrun(2), "-m", "train.finetune", str(talks), *keys], cwd=project_root, capture_output=True,
        text=True, timeout=DEADLINE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for line in ("counting the tokens of ", "merged: ", "chat: ", "export: "):
        assert done.stdout.count(line) == 1, line
    assert load_model(out / "merged", "torch").is_plain()


def test_the_other_processes_of_finetune_neither_count_nor_merge(tmp_path, talks, base, monkeypatch, capsys):
    def broadcast(message, **_):
        message[:] = [7, None]

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    monkeypatch.setattr(epochs, "open_source", lambda *_: pytest.fail("the data were read"))
    monkeypatch.setattr(finetune, "join_world", lambda _: World(torch.device("cpu"), rank=1, size=2))
    monkeypatch.setattr(finetune, "train", lambda config, *_, **__: config.steps - 7)
    monkeypatch.setattr(finetune, "load_model", lambda *_: pytest.fail("the model was merged"))
    monkeypatch.setenv("RANK", "1")
    assert finetune.main([str(talks), *KEYS, f"model={base}", f"output_dir={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr().out == ""


def test_finetune_of_all_weights_needs_no_merging(tmp_path, talks, base, capsys):
    out = tmp_path / "run"
    assert (
        finetune.main([str(talks), *KEYS, f"model={base}", f"output_dir={out}", "lora_rank=0", "steps=2"])
        == 0
    )
    assert not (out / "merged").exists()
    assert f"--model {out}" in capsys.readouterr().out


def test_the_name_of_a_file_may_have_an_equals_sign(talks, base, monkeypatch):
    monkeypatch.chdir(talks.parent)
    talks.rename("lr=2.jsonl")
    config = finetune.configure(["lr=2.jsonl", *KEYS, f"model={base}", "steps=2"])
    assert config.paths == ["lr=2.jsonl"] and config.lr == 1e-3


def test_a_dataset_of_the_hub_is_told_from_files():
    config = finetune.configure(["someone/talks", "steps=20"])
    assert (config.data, config.dataset, config.paths) == ("hub", "someone/talks", [])
    assert (config.steps, config.warmup_steps, config.eval_every) == (20, 2, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "expected a file of conversations, got none; a row is"),
        (["--fast", "x.jsonl"], "expected files of conversations and key=value pairs, got '--fast'"),
        (["x.jsonl", "epochs=none"], "epochs: expected a number above 0, got 'none'"),
        (["x.jsonl", "epochs=2", "steps=3"], "expected epochs= or steps=, got both"),
        (["someone/talks"], "steps: expected a number for a dataset on the hub"),
        (["x.jsonl", "learning_rate=1"], "unknown key 'learning_rate'"),
        (["x.jsonl"], "x.jsonl: expected a file, folder or glob"),
    ],
)
def test_wrong_arguments_end_in_one_line(tmp_path, monkeypatch, capsys, given, message):
    monkeypatch.chdir(tmp_path)
    assert run_command(lambda _: finetune.main(given)) in (1, 2)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_rows_of_another_kind_say_what_a_row_is(tmp_path, base, capsys):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a text"}\n')
    assert run_command(lambda _: finetune.main([str(path), *KEYS, f"model={base}"])) == 1
    assert '{"messages": [{"role": "user"' in capsys.readouterr().err


def test_a_run_from_the_command_line_takes_the_keys(configured):
    config = configured("run", steps=1, lora_targets=["q_proj", "v_proj"])
    assert main(arguments(config)) == 0
    given = json.loads((checkpoint_folder(config, 1) / ADAPTER_CONFIG).read_text())
    assert given["target_modules"] == ["q_proj", "v_proj"]
