"""Broken folders and full disks: one LoadError that names the file and the fault; nothing half-written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.errors import LoadError
from smollm2.pretrained.files import EMBEDDING, HEAD, write_files
from smollm2.pretrained.load import load_model, save_model

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    save_model(SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"), backend="torch"), tmp_path / "model")
    return tmp_path / "model"


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({UP: t[UP].T}), f"{UP}: expected shape [256, 96], got [96, 256]"),
        (lambda t: t.pop(UP), f"1 tensors missing: {UP}"),
        (
            lambda t: [t.pop(name) for name in list(t) if "layers.1" in name],
            "9 tensors missing: model.layers.1.input_layernorm.weight, ",
        ),
        (
            lambda t: t.update({"x.layers.2": t[UP].clone()}),
            "1 tensors that this model does not have: x.layers.2",
        ),
        *(
            (lambda t, x=x: t.update({"x": x}), "1 tensors that this model does not have: x")
            for x in (torch.empty(0), torch.ones(2).to(torch.float8_e4m3fn), torch.ones(2, dtype=torch.bool))
        ),
        (
            lambda t: t.update({UP: t[UP].to(torch.int8)}),
            f"{UP}: expected float32, bfloat16 or float16 weights, got torch.int8",
        ),
        (lambda t: t.update({HEAD: t[EMBEDDING] + 1}), f"{HEAD} differs from {EMBEDDING}"),
        (lambda t: t.update({HEAD: torch.ones(2, 2)}), f"{HEAD} differs from {EMBEDDING}"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(LoadError, match=re.escape(message)) as caught:
        load_model(folder, "torch")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 5, 100, 20000, -4])
def test_a_truncated_file_is_reported(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(LoadError, match=r"model\.safetensors: not a safetensors file: truncated or corrupt"):
        load_model(folder, "torch")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "config.json",
            None,
            "expected a model folder with config.json and model.safetensors, found no config",
        ),
        ("config.json", "{", r"config\.json: not a readable JSON file"),
        ("config.json", '{"model_type": "gpt2"}', r"config\.json: config: model_type must be 'llama'"),
        ("generation_config.json", "[]", r"generation_config\.json: expected a JSON object, got list"),
        ("model.safetensors", None, r"expected model\.safetensors or .*\.index\.json, found neither$"),
        (
            "model.safetensors",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "a Git LFS pointer; run git lfs pull",
        ),
    ],
)
def test_missing_and_broken_files_are_named(folder, name, content, message):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(LoadError, match=message):
        load_model(folder, "torch")


def test_a_pickled_checkpoint_is_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(LoadError, match="pytorch_model.bin is not read: convert it to safetensors"):
        load_model(folder, "torch")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {"weight_map": {UP: "model-1.safetensors"}},
            "model-1.safetensors: no such file, but model.safetensors.index.json names it",
        ),
        ({"weight_map": {UP: "../model.safetensors"}}, "no such file"),
        ({"weight_map": {UP: "/etc/passwd"}}, "expected names of files beside it, got '/etc/passwd'"),
        ({"weight_map": {UP: ["shard.safetensors"]}}, "got ['shard.safetensors']: no such file"),
        ({"weight_map": {UP: "x" * 5000}}, "no such file, but model.safetensors.index.json names it"),
        (
            {"weight_map": {UP: "shard.safetensors", "other": "shard.safetensors"}},
            "names tensors that no shard holds: other",
        ),
        ({"weight_map": {}}, "expected a weight_map from tensor names to files, got {}"),
        ({}, "expected a weight_map from tensor names to files, got None"),
    ],
)
def test_a_broken_index_of_shards(folder, index, message):
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LoadError, match=re.escape(message)):
        load_model(folder, "torch")


def test_a_header_larger_than_any_model_needs_is_not_read(folder, monkeypatch):
    monkeypatch.setattr("smollm2.pretrained.files.HEADER_LIMIT", 1000)
    with pytest.raises(LoadError, match="corrupt .expected a header of at most 1000 bytes, got "):
        load_model(folder, "torch")


def test_shards_that_contradict_each_other_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    other = load_file(folder / "a.safetensors")[UP] + 1
    save_file({UP: other}, folder / "b.safetensors")
    index = {"weight_map": {UP: "a.safetensors", EMBEDDING: "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LoadError, match=f"b.safetensors: {UP} differs from the tensor of that name in"):
        load_model(folder, "torch")


@pytest.mark.parametrize("layers", [21, 20_000, 2**18])
def test_layers_that_the_file_does_not_have_are_refused_before_they_are_built(folder, layers, monkeypatch):
    config = {**json.loads((folder / "config.json").read_text()), "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(SmolLM2ForCausalLM, "__init__", None)  # a call would raise another error
    with pytest.raises(LoadError, match=f"num_hidden_layers is {layers}, but the file has .* 20 tensors"):
        load_model(folder, "torch")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_that_is_none_is_refused_and_its_tensor_named(folder, value, dtype):
    change_tensors(folder, lambda tensors: tensors[UP].view(-1)[-1:].fill_(value))
    change_tensors(folder, lambda tensors: tensors.update({UP: tensors[UP].to(dtype)}))
    with pytest.raises(LoadError, match=f"1 tensors hold NaN or inf: {UP}; the file is damaged, or"):
        load_model(folder, "torch")


def test_absurd_weights_are_said_in_one_line(folder, caplog):
    load_model(folder, "torch")
    assert caplog.text == ""
    change_tensors(folder, lambda tensors: tensors[UP].view(-1)[-1:].fill_(-1e9))
    load_model(folder, "torch")
    assert f"weights as large as 1e+09 in {UP}; the file is probably damaged" in caplog.text


@pytest.mark.parametrize(
    "ids", ['{"eos_token_id": "</s>"}', '{"eos_token_id": [2, null]}', '{"bos_token_id": [[1]]}']
)
def test_ids_of_a_generation_config_that_are_none_are_refused(folder, ids):
    (folder / "generation_config.json").write_text(ids)
    with pytest.raises(LoadError, match=r"generation_config\.json: config: .os_token_id must be a token id"):
        load_model(folder, "torch")


def test_an_untied_model_is_not_saved_as_if_it_were_tied(tmp_path):
    model = SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"), backend="torch")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(LoadError, match="no longer tied"):
        save_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


FULL_DISK = """
import resource, sys
from smollm2 import SmolLM2ForCausalLM
model = SmolLM2ForCausalLM.from_pretrained(sys.argv[1])
model.model.norm.weight.data.fill_(7)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))  # as a disk with 64 KiB left
for folder in sys.argv[1:]:
    try:
        model.save_pretrained(folder)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module, which Windows does not have")
def test_a_full_disk_leaves_the_old_model_whole(folder, project_root):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    folders = [folder, folder.parent / "new"]
    command = [sys.executable, "-c", FULL_DISK, *map(str, folders)]
    result = subprocess.run(command, cwd=project_root, stdout=subprocess.PIPE, text=True, timeout=600)
    lines = result.stdout.splitlines()
    assert len(lines) == len(folders), result.stdout
    for line, target in zip(lines, folders, strict=True):
        problem = rf"LoadError: {target}: cannot write .*model\.safetensors.*: .*File too large"
        assert re.search(problem + ".*nothing half-written is left", line)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list((folder.parent / "new").iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LoadError, match=r"file/model: cannot write a\.txt: Not a directory"):
        write_files(tmp_path / "file" / "model", {"a.txt": lambda path: path.write_text("a")})


def test_a_writer_that_fails_leaves_every_file_as_it_was(tmp_path):
    (tmp_path / "a.txt").write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(LoadError, match="cannot write a.txt, b.txt: No space left on device"):
        write_files(tmp_path, {"a.txt": lambda path: path.write_text("new"), "b.txt": fail})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old"}
