"""A run on a mixture: its keys, its refusals, an exact resume, what it logs and what --dry-run and
train.prepare say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_cases import TINY, checkpoint_folder, curve

from smollm2.errors import UsageError
from train import checkpoint, prepare
from train.command_line import parse
from train.config import RunConfig
from train.metrics import read_metrics
from train.run import train


@pytest.fixture
def files(tmp_path):
    """Two .jsonl files: 60 documents and 5."""
    found = {}
    for name, count in (("many", 60), ("few", 5)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(
            "".join(
                json.dumps({"text": f"{name} {index}. " * (3 + index % 4)}) + "\n" for index in range(count)
            ),
            encoding="utf-8",
        )
        found[name] = str(path)
    return found


def entries(files: dict[str, str], *weights: float) -> list[dict[str, Any]]:
    return [
        {"weight": weight, "data": "local", "paths": [path]}
        for weight, path in zip(weights, files.values(), strict=True)
    ]


def configured(tmp_path: Path, files: dict[str, str], name: str = "run", **changes: Any) -> RunConfig:
    return RunConfig(
        **{
            **TINY,
            "data": "mixture",
            "mixture": entries(files, 3, 1),
            "output_dir": str(tmp_path / name),
            **changes,
        }
    )


@pytest.mark.parametrize(
    "changes", [dict(), dict(workers=2, grad_accumulation=2, eval_every=3)], ids=["plain", "workers"]
)
def test_a_resumed_run_on_a_mixture_is_the_uninterrupted_one(tmp_path, files, changes):
    straight, parts = (configured(tmp_path, files, name, **changes) for name in ("straight", "parts"))
    train(straight)
    parts.steps, total = 3, parts.steps
    train(parts)
    parts.steps, parts.resume = total, "auto"
    train(parts)
    assert curve(parts) == curve(straight)
    ends = [checkpoint_folder(config, total) for config in (straight, parts)]
    for file in ("model.safetensors", checkpoint.MOMENTS):
        one, other = (load_file(end / file) for end in ends)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    records = [json.loads((end / checkpoint.RECORD).read_text(encoding="utf-8"))["data"] for end in ends]
    assert records[0] == records[1]
    states = [torch.load(end / checkpoint.STATE, weights_only=True)["unique"]["parts"] for end in ends]
    assert (
        all(torch.equal(one["digests"], other["digests"]) for one, other in zip(*states, strict=True))
        and len(states[0]) == 2
    )
    names = ("share/many", "share/few", "epochs/few", "unique_examples/few")
    logged = [
        [line[name] for name in names] for line in read_metrics(Path(parts.output_dir)) if "loss" in line
    ]
    assert logged == [
        [line[name] for name in names] for line in read_metrics(Path(straight.output_dir)) if "loss" in line
    ]
    assert logged[-1][:2] == [0.75, 0.25] and logged[-1][2] > 0.5


def test_a_resume_with_other_weights_or_files_is_refused_with_both(tmp_path, files):
    train(configured(tmp_path, files, steps=1))
    with pytest.raises(
        UsageError, match=r'the checkpoint was made with mixture=\[{"weight": 3, .* \(got \[{"weight": 2, '
    ):
        train(configured(tmp_path, files, steps=2, resume="auto", mixture=entries(files, 2, 1)))
    with pytest.raises(UsageError, match=r"data=mixture \(got embedded\)"):
        train(configured(tmp_path, files, steps=2, resume="auto", data="embedded", mixture=[]))
    Path(files["few"]).write_text('{"text": "something else, and longer than that"}\n' * 9, encoding="utf-8")
    with pytest.raises(
        UsageError,
        match=r"expected the data of the checkpoint \(mixture of 2 .*few: local 1 files .*\), got mixture of",
    ):
        train(configured(tmp_path, files, steps=2, resume="auto"))


BAD: list[tuple[Any, str]] = [
    ([], r"mixture: expected a list of sources for data=mixture, got an empty one"),
    ("many", r"mixture: expected a list, got 'many'"),
    (["many"], r"mixture: expected entries \{key: value, ...\}, got 'many'"),
    ([{"dataset": "a/b"}], r"mixture\[0\]: weight: expected a number, got None"),
    ([{"weight": 0}], r"mixture\[0\]: weight: expected a number above 0, got 0"),
    ([{"weight": -0.5}], r"mixture\[0\]: weight: expected a number above 0, got -0.5"),
    ([{"weight": "much"}], r"mixture\[0\]: weight: expected a number, got 'much'"),
    ([{"weight": 1, "data": "web"}], r"mixture\[0\]: data: expected one of embedded, local, hub, got 'web'"),
    (
        [{"weight": 1, "data": "mixture"}],
        r"mixture\[0\]: data: expected one of embedded, local, hub, got 'mixture'",
    ),
    (
        [{"weight": 1, "split": "train"}],
        r"mixture\[0\]: unknown key 'split'; expected weight, name, data, paths",
    ),
    (
        [{"weight": 1, "data": "local"}],
        r"mixture\[0\]: paths: expected files, folders or globs for data=local",
    ),
    ([{"weight": 1, "text_column": 3}], r"mixture\[0\]: text_column: expected text, got 3"),
    (
        [{"weight": 1}, {"weight": 2, "name": "b"}],
        r"mixture\[1\]: the same documents as mixture\[0\]; give one of them the weight of both",
    ),
    (
        [{"weight": 1}, {"weight": 2, "dataset_split": "test"}],
        r"mixture\[1\]: name: expected one that no other source has, got 'cosmopedia-v2'",
    ),
]


@pytest.mark.parametrize(("mixture", "message"), BAD)
def test_bad_mixtures_are_refused_before_anything_is_built(mixture, message):
    with pytest.raises(UsageError, match=message):
        RunConfig(data="mixture", mixture=mixture).validate()


def test_a_mixture_without_its_source_kind_is_refused():
    with pytest.raises(UsageError, match="mixture: only read with data=mixture, got data=embedded"):
        RunConfig(mixture=[{"weight": 1}]).validate()


def test_sources_take_what_they_do_not_say_from_the_run():
    config = RunConfig(
        data="mixture", dataset="some/corpus", text_column="content",
        mixture=[
            {"weight": 2},
            {"weight": 0.5, "name": "x", "dataset": "other/one", "dataset_config": "", "text_column": "body"},
        ],
    )  # fmt: skip
    first, second = config.mixture_parts()
    assert (first.name, first.config.dataset, first.config.text_column) == (
        "cosmopedia-v2",
        "some/corpus",
        "content",
    )
    assert (second.name, second.config.dataset, second.config.dataset_config, second.config.text_column) == (
        "x",
        "other/one",
        "",
        "body",
    )
    assert first.weight / second.weight == 4 and first.config.data == "hub" and first.config.mixture == []


def test_the_command_line_takes_a_mixture():
    config, _ = parse(
        [
            "data=mixture",
            "mixture=[{data: embedded, weight: 1}, {data: local, paths: [a.txt, b.txt], weight: 0.25, name: "
            "c}]",
        ]
    )
    assert config.mixture == [
        {"data": "embedded", "weight": 1},
        {"data": "local", "paths": ["a.txt", "b.txt"], "weight": 0.25, "name": "c"},
    ]
    for text in ("web", "[web", "[web]"):
        with pytest.raises(UsageError, match="mixture: expected a list of"):
            parse(["data=mixture", f"mixture={text}"])


def test_dry_run_says_the_shares_the_tokens_and_the_epochs(tmp_path, files, capsys):
    config = configured(tmp_path, files, steps=100, token_cache=str(tmp_path / "cache"))
    train(config, dry_run=True)
    out = capsys.readouterr().out
    assert "mixture of 2 (0.75 many: local 1 files" in out and not Path(config.output_dir).exists()
    lines = [line for line in out.splitlines() if " tokens of " in line and "%" in line]
    assert (
        len(lines) == 2
        and "many   75.00%  6,000 tokens of about" in lines[0]
        and "few    25.00%  2,000 tokens of about" in lines[1]
    )
    prepare.main(
        ["model=tiny", "data=mixture", f"mixture={json.dumps(config.mixture)}", "tokenizer=train",
         "vocab_size=300", "sequence_length=40",
         "validation_fraction=0.1", "workers=0", f"token_cache={config.token_cache}", "eval_batches=1"]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "60 documents" in out and "5 documents" in out
    train(config, dry_run=True)
    out = capsys.readouterr().out
    assert "about" not in next(line for line in out.splitlines() if "few    25.00%" in line), (
        "counted in the cache"
    )
