"""`python -m smollm2.export`: files, folders and repositories, and what it refuses. The hub is a stand-in."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import torch
from in_process import printed

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM, load_tokenizer
from smollm2.errors import LoadError, UsageError
from smollm2.export import main
from smollm2.pretrained.tokenizer import train_tokenizer

TEXT = "A text to learn from. 12 words!"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
FILES = [
    "README.md", "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json",
    "tokenizer.json", "tokenizer_config.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a model, with a temperature in its generation_config.json."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = train_tokenizer([TEXT] * 9, 270)
    tokenizer.chat_template = TEMPLATE
    model = SmolLM2ForCausalLM(SmolLM2Config.preset("tiny", vocab_size=270), "torch")
    model.save_pretrained(folder, tokenizer=tokenizer)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.2, "eos_token_id": [0, 2]}))
    return folder


@pytest.fixture
def run_folder(source, tmp_path):
    """The folder of a run, as train.run leaves it."""
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-000020"
    checkpoint.parent.mkdir(parents=True)
    model = SmolLM2ForCausalLM.from_pretrained(source)
    model.save_pretrained(checkpoint, load_tokenizer(source))
    secret = str(tmp_path / "secret" / "notes.txt")
    config = {
        "model": "smollm2-135m-instruct", "data": "mixture", "lr": 0.001, "output_dir": str(run),
        "dataset": "HuggingFaceTB/smollm-corpus", "dataset_config": "cosmopedia-v2", "dataset_split": "train",
        "paths": [], "mixture": [{"weight": 3}, {"weight": 1, "data": "local", "paths": [secret]}],
    }  # fmt: skip
    record = {"config": config, "step": 20, "tokens": 12345}
    (checkpoint / "run.json").write_text(json.dumps(record))
    (checkpoint / "manifest.json").write_text('{"files": {}}')
    lines = [
        {"step": 10, "held_out_loss": 3.5, "loss": 3.9},
        {"step": 20, "loss": 2.5},
        {"step": 30, "loss": 1},
    ]
    journal = "\n".join(map(json.dumps, lines)) + '\n{"step": 4'
    (run / "metrics.jsonl").write_text(journal)
    (run / "training_metrics.png").write_bytes(b"a picture")
    return run


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for HfApi with its signatures, and a token."""
    api = create_autospec(huggingface_hub.HfApi, instance=True)
    api.create_repo.return_value = huggingface_hub.RepoUrl("https://huggingface.co/me/model")
    api.repo_info.return_value.private = False
    uploaded = {}

    def upload(*, folder_path, allow_patterns, **_):
        there = {path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()}
        uploaded.update({name: there[name] for name in allow_patterns or there})

    api.upload_folder.side_effect = upload
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    api.uploaded = uploaded
    return api


def test_a_folder_is_what_the_auto_classes_load(source, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    out = printed(main, "--model", source, "--folder", tmp_path / "out", "--dtype", "bf16")
    assert out.endswith("MB, bf16; its card: README.md\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    ours, before = (SmolLM2ForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", source))
    assert ours.dtype == torch.bfloat16 and ours.config == before.config
    assert torch.equal(ours.model.norm.weight, before.model.norm.weight.bfloat16())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(theirs.lm_head.weight, ours.lm_head.weight)
    assert theirs.generation_config.temperature == 0.2 and theirs.generation_config.eos_token_id == [0, 2]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(TEXT)["input_ids"] == load_tokenizer(tmp_path / "out").encode(TEXT)
    assert tokenizer.chat_template == TEMPLATE == load_tokenizer(tmp_path / "out").chat_template


def test_a_gguf_file_replaces_another_only_by_force(source, tmp_path):
    pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
    from smollm2.pretrained.gguf import open_gguf

    path = tmp_path / "new folder" / "model.gguf"
    assert "model.gguf: 0." in printed(main, "--model", source, "--gguf", path, "--type", "q8_0")
    written = path.read_bytes()
    with pytest.raises(UsageError, match="model.gguf exists; name another file, or replace it with --force"):
        main(["--model", str(source), "--gguf", str(path)])
    assert path.read_bytes() == written
    printed(main, "--model", source, "--gguf", path, "--force", "--name", "a name")
    assert path.read_bytes() != written and open_gguf(path)._metadata("general.name", str) == "a name"
    assert [one.name for one in path.parent.iterdir()] == ["model.gguf"]


def test_a_folder_with_files_of_another_model_is_refused(source, tmp_path):
    arguments = ["--model", str(source), "--folder", str(tmp_path)]
    (tmp_path / ".gitattributes").touch()
    printed(main, *arguments)
    with pytest.raises(UsageError, match="is not empty; name another, or replace its files with --force"):
        main(arguments)
    printed(main, *arguments, "--force")
    (tmp_path / "chat_template.jinja").touch()
    with pytest.raises(UsageError, match="holds other files, such as chat_template.jinja; name a new folder"):
        main([*arguments, "--force"])


def test_the_card_of_a_run_says_what_it_learned_from_and_no_folder_of_this_machine(run_folder, tmp_path):
    scores = tmp_path / "scores.json"
    found = {"arc": {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.012, "sample_len": 9}}
    found["piqa"] = {"acc": 0.5, "acc_stderr": 0.1, "examples": 4}
    scores.write_text(json.dumps({"results": found}))
    arguments = "--folder", tmp_path / "out", "--scores", scores, "--language", "en", "--name", "me/pirate"
    printed(main, "--model", run_folder, *arguments)
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and data["license"] == "apache-2.0"
    assert data["datasets"] == ["HuggingFaceTB/smollm-corpus"] and data["language"] == ["en"]
    assert data["pipeline_tag"] == "text-generation" and "conversational" in data["tags"]
    assert data["model-index"][0]["results"][0]["metrics"] == [{"type": "acc", "value": 0.25}]
    for line in (
        "# pirate",
        "- HuggingFaceTB/smollm-corpus, cosmopedia-v2, split train, weight 3",
        "- files: notes.txt, weight 1",
        "| held-out loss, nats per token | 3.5 |",
        "| training loss, nats per token | 2.5 |",
        "| tokens | 12,345 |",
        "lr: 0.001",
        "| arc | acc | 0.2500 ± 0.0120 |",
        "| piqa | acc | 0.5000 ± 0.1000 |",
        "![Loss, documents, throughput](training_metrics.png)",
    ):
        assert line in card.content.splitlines(), line
    assert str(tmp_path) not in card.content
    assert (tmp_path / "out" / "training_metrics.png").read_bytes() == b"a picture"


def test_a_model_from_scratch_has_neither_base_nor_license(run_folder, tmp_path, capsys):
    path = run_folder / "checkpoints" / "step-000020" / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "config": {"model": "tiny", "data": "embedded"}}))
    (run_folder / "training_metrics.png").unlink()
    printed(main, "--model", run_folder, "--folder", tmp_path / "out")
    assert "no training_metrics.png in the run: python -m train.plot" in capsys.readouterr().err
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model is None and card.data.license is None and card.data.datasets is None
    assert "trained from scratch" in card.content and "- Python's own documentation" in card.content
    path.write_text(json.dumps({"step": 3}))
    with pytest.raises(LoadError, match=r"run.json: expected config, step and tokens of a run"):
        main(["--model", str(run_folder), "--folder", str(tmp_path / "other")])


def test_what_is_uploaded_is_what_a_folder_holds(source, tmp_path, hub):
    (tmp_path / ".git").mkdir()
    out = printed(main, "--model", source, "--push-to-hub", "me/model", "--folder", tmp_path)
    assert out.endswith("https://huggingface.co/me/model\n")
    hub.create_repo.assert_called_once_with("me/model", private=None, exist_ok=True)
    assert sorted(hub.uploaded) == FILES
    assert hub.uploaded == {name: (tmp_path / name).read_bytes() for name in FILES}
    assert b'from_pretrained("me/model")' in hub.uploaded["README.md"]


def test_nothing_is_uploaded_to_a_public_repository_that_was_to_be_private(source, hub):
    arguments = ["--model", str(source), "--push-to-hub", "me/model", "--private"]
    with pytest.raises(UsageError, match="me/model: expected a private repository, got one that is public"):
        main(arguments)
    assert not hub.upload_folder.called
    hub.repo_info.return_value.private = True
    assert printed(main, *arguments) == "https://huggingface.co/me/model\n"
    hub.create_repo.assert_called_with("me/model", private=True, exist_ok=True)


def test_a_hub_that_fails_is_one_line(source, hub, monkeypatch):
    arguments = ["--model", str(source), "--push-to-hub", "me/model"]
    hub.upload_folder.side_effect = OSError("the line is cut\nat byte 9")
    with pytest.raises(LoadError, match=r"me/model: not uploaded \(OSError: the line is cut\)$"):
        main(arguments)
    refusal = OSError("no")
    refusal.response = type("Response", (), {"status_code": 403})
    hub.create_repo.side_effect = refusal
    with pytest.raises(LoadError, match=r"me/model: not uploaded \(the token does not allow it\)$"):
        main(arguments)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(
        LoadError, match="uploading needs a token of the hub that may write; run `hf auth login`"
    ):
        main(arguments)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match="me/model: cannot be uploaded offline; unset HF_HUB_OFFLINE"):
        main(arguments)


def test_a_model_uploads_itself(source, hub):
    model = SmolLM2ForCausalLM.from_pretrained(source)
    assert (
        model.push_to_hub("me/model", load_tokenizer(source), private=False)
        == "https://huggingface.co/me/model"
    )
    assert sorted(hub.uploaded) == FILES


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "expected either --gguf FILE, or --folder DIR or --push-to-hub user/name or both"),
        (["--gguf", "a.gguf", "--folder", "b"], "expected either --gguf FILE, or"),
        (["--gguf", "a.bin"], "--gguf: expected a name that ends in .gguf, got a.bin"),
        (["--gguf", "a.gguf", "--dtype", "bf16"], "--dtype: belongs to --folder and --push-to-hub, which"),
        (["--folder", "a", "--type", "f16"], "--type: belongs to --gguf, which is not given"),
        (["--folder", "a", "--private"], "--private: belongs to --push-to-hub, which is not given"),
        (["--gguf", "a.gguf", "--type", "q5_0"], "argument --type: invalid choice: 'q5_0'"),
        (["--push-to-hub", "a/b/c"], "repository: expected user/name, got 'a/b/c'"),
    ],
)
def test_wrong_usage_is_one_line(flags, message):
    with pytest.raises(UsageError, match=message):
        main(flags)
