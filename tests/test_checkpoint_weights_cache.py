"""The cache: converted once, mapped and not copied, made anew when its source changes or it is damaged."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.engine.quantized import quantize_rows, quantized_layers
from smollm2.pretrained.cache import cached
from smollm2.pretrained.files import map_safetensors, weight_files, write_safetensors
from smollm2.pretrained.load import load_model, origin, save_model
from smollm2.pretrained.source import resolve

needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="needs the package gguf: pip install gguf"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMOLLM2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf_file(tmp_path):
    import gguf_files

    gguf_files.write_gguf(tmp_path / "model.gguf", kind="Q8_0")
    return tmp_path / "model.gguf"


@pytest.fixture
def folder(tmp_path):
    save_model(SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"), backend="torch"), tmp_path / "saved")
    return tmp_path / "saved"


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def is_mapped_from(model: SmolLM2ForCausalLM, path: Path) -> bool:
    """Whether every parameter and every packed buffer lies in one memory map as large as the file."""
    tensors = [*model.parameters(), *(weight for layer in model.pack() for weight in layer)]
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    return len(storages) == 1 and tensors[0].untyped_storage().nbytes() == path.stat().st_size


def test_a_folder_written_here_is_mapped_and_packed_without_a_copy(folder):
    assert is_mapped_from(load_model(folder, "torch"), folder / "model.safetensors")


def test_a_file_in_another_order_is_packed_by_a_copy_and_gives_the_same_model(folder):
    expected = load_model(folder, "torch")
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})
    loaded = load_model(folder, "torch")
    assert not is_mapped_from(loaded, folder / "model.safetensors")
    ids = torch.arange(12).view(1, 12)
    assert torch.equal(loaded(ids).logits, expected(ids).logits)
    assert all(map(torch.equal, loaded.parameters(), expected.parameters()))


def test_the_writer_gives_what_safetensors_reads(tmp_path):
    tensors = {
        "z": torch.randint(-128, 128, (3, 5), dtype=torch.int8), "empty": torch.empty(0, 4),
        "a": torch.randn(7, dtype=torch.float64), "half": torch.randn(4, 3).t().half(),
        "b": torch.randn(5, 2).bfloat16(), "bytes": torch.arange(9, dtype=torch.uint8),
    }  # fmt: skip
    write_safetensors(tmp_path / "x.safetensors", tensors)
    theirs, ours = load_file(tmp_path / "x.safetensors"), map_safetensors(tmp_path / "x.safetensors")
    assert set(theirs) == set(ours) == set(tensors)
    for name, tensor in tensors.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor) and torch.equal(theirs[name], tensor), name
    assert next(iter(ours.values())).data_ptr() % 64 == 0


def test_a_map_is_private_to_the_process(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(4)})
    map_safetensors(tmp_path / "x.safetensors")["a"].fill_(1)
    assert map_safetensors(tmp_path / "x.safetensors")["a"].tolist() == [0.0] * 4


def test_dtypes_that_are_not_mapped_are_read_by_safetensors(tmp_path):
    save_file({"a": torch.arange(5)}, tmp_path / "x.safetensors")
    assert map_safetensors(tmp_path / "x.safetensors")["a"].tolist() == [0, 1, 2, 3, 4]


@needs_gguf
def test_another_dtype_is_converted_once_and_then_mapped(gguf_file, cache, caplog):
    original = load_model(gguf_file, "torch")
    assert is_mapped_from(original, resolve(gguf_file) / "model.safetensors")
    first = load_model(gguf_file, "torch", dtype="bf16")
    (converted,) = cache.glob("bfloat16-*")
    caplog.clear()
    second = load_model(gguf_file, "torch", dtype="bf16")
    assert caplog.text == "" and len(entries(cache)) == 2
    for model in (first, second):
        assert is_mapped_from(model, converted / "model.safetensors")
        assert all(map(torch.equal, model.parameters(), (wide.bfloat16() for wide in original.parameters())))


@pytest.mark.parametrize("pattern", ["model-0000{}-of-00002", "shard_{}", "pytorch_model-0000{}-of-00002"])
def test_what_is_made_of_shards_is_made_anew_when_one_changes(pattern, tmp_path, cache):
    """Whatever the shards are called: the index says what is read."""
    folder, first, second = tmp_path / "model", *(f"{pattern.format(i)}.safetensors" for i in (1, 2))
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"), backend="torch")
        save_model(model, folder)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = {first: sorted(tensors)[::2], second: sorted(tensors)[1::2]}
        for file, members in names.items():
            write_safetensors(folder / file, {name: tensors[name] for name in members})
        index = folder / "model.safetensors.index.json"
        if seed == 0:  # the same index for the second weights
            index.write_text(json.dumps({"weight_map": {n: file for file in names for n in names[file]}}))
        assert weight_files(folder) == [index, *sorted((folder / first, folder / second))]
        head = quantized_layers(load_model(folder, "torch"), "int8")[1]
        assert torch.equal(head.values, quantize_rows(model.lm_head.weight.detach()).values)


def test_a_local_folder_is_converted_in_memory_alone(folder, cache):
    assert load_model(folder, "torch", dtype="bf16").lm_head.weight.dtype == torch.bfloat16
    assert not cache.exists()


@needs_gguf
@pytest.mark.parametrize("damage", ["shorten", "remove", "manifest"])
def test_a_damaged_entry_is_made_anew(damage, gguf_file, cache, caplog):
    expected = load_model(gguf_file, "torch")
    entry = resolve(gguf_file)
    target = entry / ("manifest.json" if damage == "manifest" else "model.safetensors")
    whole = target.read_bytes()
    target.unlink()  # and not in place: the model above has it mapped
    if damage != "remove":
        target.write_bytes(whole[: len(whole) // 2])
    loaded = load_model(gguf_file, "torch")
    assert "is damaged: made anew" in caplog.text
    assert all(map(torch.equal, loaded.parameters(), expected.parameters()))
    assert entries(cache) == [entry.name] and target.read_bytes() == whole


@needs_gguf
def test_what_was_made_of_a_file_before_it_changed_is_removed(gguf_file, tmp_path, cache):
    import gguf_files

    gguf_files.write_gguf(tmp_path / "other.gguf", kind="Q8_0")
    for path in (gguf_file, tmp_path / "other.gguf"):
        load_model(path, "torch", dtype="bf16")
    before = entries(cache)
    assert len(before) == 4
    gguf_files.write_gguf(gguf_file, gguf_files.random_weights(seed=1), "Q8_0")
    load_model(gguf_file, "torch", dtype="bf16")
    after = entries(cache)
    assert len(after) == 4, "an entry and its conversion for each of the two files"
    assert len(set(before) & set(after)) == 2, "those of the other file stay"


def test_what_a_killed_process_left_is_removed_after_an_hour(tmp_path, cache):
    old, young = cache / ".making-old", cache / ".making-young"
    for left in (old, young):
        left.mkdir(parents=True)
    os.utime(old, (time.time() - 4000,) * 2)
    (tmp_path / "source").write_text("x")
    assert cached([tmp_path / "source"], "thing", lambda: lambda folder: folder.mkdir()) is not None
    assert young.exists() and not old.exists()


def test_a_cache_that_cannot_be_written_is_said_and_is_none(tmp_path, monkeypatch, caplog):
    (tmp_path / "source").write_text("x")
    monkeypatch.setenv("SMOLLM2_CACHE", str(tmp_path / "source"))
    assert cached([tmp_path / "source"], "thing", lambda: lambda folder: folder.mkdir()) is None
    assert "cannot be written" in caplog.text and "SMOLLM2_CACHE" in caplog.text


@needs_gguf
@pytest.mark.slow
def test_processes_that_start_together_share_one_entry(gguf_file, cache, project_root):
    code = (
        "import sys; from smollm2.pretrained.load import load_model; "
        "print(load_model(sys.argv[1], 'torch', dtype='bf16').lm_head.weight.sum().item())"
    )
    command = [sys.executable, "-c", code, str(gguf_file)]
    options = dict(cwd=project_root, stdout=subprocess.PIPE, text=True)
    started = [subprocess.Popen(command, **options) for _ in range(2)]
    answers = {process.communicate(timeout=600)[0] for process in started}
    assert all(process.returncode == 0 for process in started)
    assert len(answers) == 1 and len(entries(cache)) == 2


def add_to_norm(model: SmolLM2ForCausalLM) -> None:
    with torch.no_grad():
        model.model.norm.weight.add_(1)


def step(model: SmolLM2ForCausalLM) -> None:
    ids = torch.arange(8).view(1, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()(ids, labels=ids).loss.backward()
    optimizer.step()


def assign_others(model: SmolLM2ForCausalLM) -> None:
    others = SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"), backend="torch").state_dict()
    model.load_state_dict(others, assign=True)


@pytest.mark.parametrize("change", [add_to_norm, step, assign_others])
def test_a_model_has_an_origin_until_it_is_changed(folder, change):
    assert origin(SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"), backend="torch")) is None
    model = load_model(folder, "torch")
    model(torch.arange(8).view(1, 8))
    assert origin(model) == folder
    change(model)
    assert origin(model) is None


def test_a_start_imports_nothing_slow_that_it_does_not_need(folder, project_root):
    """torch._dynamo takes a second, and a single operation on the meta device imports it."""
    code = (
        "import json, sys; from smollm2.pretrained.load import load_model; load_model(sys.argv[1], 'torch'); "
        "slow = ('torch._dynamo', 'transformers', 'gguf', 'triton', 'huggingface_hub'); "
        "print(json.dumps([name for name in slow if name in sys.modules]))"
    )
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, cwd=project_root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
