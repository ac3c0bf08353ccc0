"""The cache: converted once, mapped and not copied, made anew when its source changes or it is damaged."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.engine.quantized import quantize_rows, quantized_layers
from smollm2.pretrained import cache as cache_module
from smollm2.pretrained.cache import cached, unfinished
from smollm2.pretrained.files import (
    json_writer,
    map_safetensors,
    weight_files,
    write_files,
    write_safetensors,
)
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


def make(folder: Path, text: str = "x") -> Path | None:
    """An entry `thing` of the cache, made of the file folder/source."""
    source = folder / "source"
    if not source.exists():
        source.write_text(text)

    def write(entry: Path) -> None:
        write_files(entry, {"a.json": json_writer({"a": 1}), "b.json": json_writer({"b": 2})})

    return cached([source], "thing", lambda: write)


def test_what_a_killed_process_left_is_removed_at_the_next_start_and_what_a_living_one_makes_is_not(
    tmp_path, cache
):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        with suppress(BaseException), unfinished(cache):
            os.write(write, b"made")
            signal.pause()
        os._exit(1)  # not back into pytest
    os.read(read, 4)
    (left,) = cache.iterdir()
    entry = make(tmp_path)
    assert left.exists(), "its maker lives"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (cache / ".making-by-an-earlier-version").mkdir()
    with unfinished(cache) as living:
        assert make(tmp_path) == entry, "a start that finds all that it needs"
        assert sorted(cache.iterdir()) == sorted([living, entry])
    assert entries(cache) == [entry.name]


def test_a_folder_that_the_cache_makes_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("SMOLLM2_CACHE", str(tmp_path / "a" / "b"))
    before = os.umask(0)
    try:
        make(tmp_path)
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b")] == [0o700, 0o700]


def refuse_to_work() -> Callable[[Path], None]:
    raise AssertionError("made again")


@pytest.mark.parametrize(
    ("used", "is_made_anew"),
    [(("*",), True), (("a.json",), False), (("b.*",), True), (("manifest*",), False)],
)
def test_the_files_that_are_used_are_compared_by_their_content(used, is_made_anew, tmp_path, cache):
    path = make(tmp_path) / "b.json"
    status, text = path.stat(), path.read_text()
    path.write_text(text.replace("2", "3"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    if is_made_anew:
        with pytest.raises(AssertionError, match="made again"):
            cached([tmp_path / "source"], "thing", refuse_to_work, used)
        assert (make(tmp_path) / "b.json").read_text() == text
    else:
        assert cached([tmp_path / "source"], "thing", refuse_to_work, used) == path.parent


def test_a_source_that_was_overwritten_in_place_is_another_whatever_its_times_say(tmp_path, cache):
    make(tmp_path)
    source = tmp_path / "source"
    status = source.stat()
    with source.open("r+") as file:
        file.write("y")
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(AssertionError, match="made again"):
        cached([source], "thing", refuse_to_work)


def unlisted(entry: Path) -> None:
    (entry / "added.json").write_text("{}")


def without_a_line(entry: Path) -> None:
    recorded = json.loads((entry / "manifest.json").read_text())
    del recorded["b.json"]
    (entry / "manifest.json").write_text(json.dumps(recorded))


def exchanged(entry: Path) -> None:
    (entry / "a.json").rename(entry / "c")
    (entry / "b.json").rename(entry / "a.json")
    (entry / "c").rename(entry / "b.json")


def of_another_source(entry: Path) -> None:
    """Whole, and under a name that is not its own."""
    (entry.parent.parent / "other").mkdir()
    other = make(entry.parent.parent / "other", "y")
    shutil.rmtree(entry)
    other.rename(entry)


def as_a_file(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("no folder")


@pytest.mark.parametrize(
    "damage",
    [
        unlisted,
        without_a_line,
        exchanged,
        of_another_source,
        as_a_file,
        *(
            lambda entry, text=text: (entry / "manifest.json").write_bytes(text)
            for text in (b"", b"{}", b"[]", b"null", b"\xff", b"[" * 10_000)
        ),
    ],
)
def test_an_entry_that_differs_from_its_manifest_is_made_anew(damage, tmp_path, cache, caplog):
    entry = make(tmp_path)
    expected = {path.name: path.read_text() for path in entry.iterdir()}
    damage(entry)
    assert make(tmp_path) == entry and f"{entry} is damaged: made anew" in caplog.text
    assert {path.name: path.read_text() for path in entry.iterdir()} == expected
    caplog.clear()
    assert cached([tmp_path / "source"], "thing", refuse_to_work) == entry and not caplog.text


def test_processes_that_find_the_same_damage_use_what_the_first_made(tmp_path, cache, caplog):
    """The second one is at work while the first finishes: the entry that it finds is whole, and stays."""
    entry = make(tmp_path)
    (entry / "a.json").unlink()

    def prepare() -> Callable[[Path], None]:
        assert make(tmp_path) == entry
        return lambda folder: folder.mkdir()

    assert cached([tmp_path / "source"], "thing", prepare) == entry
    assert (entry / "a.json").exists() and caplog.text.count("made anew") == 1


def no_space(entry: Path) -> None:
    write_files(entry, {"a.json": lambda path: os.write(os.open("/dev/full", os.O_WRONLY), b"x")})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_said_once_and_leaves_nothing(tmp_path, cache, caplog):
    (tmp_path / "source").write_text("x")
    for _ in range(2):
        assert cached([tmp_path / "source"], "thing", lambda: no_space) is None
    assert caplog.text.count("the cache cannot be written (No space left on device)") == 1
    assert not cache.exists()


def test_a_user_without_a_home_folder_does_the_work_at_every_start(tmp_path, monkeypatch, caplog):
    for name in ("SMOLLM2_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown_user)
    cache_module._warn_once.cache_clear()
    assert [make(tmp_path), make(tmp_path)] == [None, None]
    assert caplog.text.count("cannot be written (this user has no home folder") == 1


def test_a_user_without_a_home_folder_loads_a_model(folder, monkeypatch):
    for name in ("SMOLLM2_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown_user)
    assert load_model(folder, "torch").num_parameters() > 0


def unknown_user() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_cache_that_cannot_be_written_is_said_before_any_work(tmp_path, monkeypatch, caplog):
    (tmp_path / "source").write_text("x")
    monkeypatch.setenv("SMOLLM2_CACHE", str(tmp_path / "source"))
    assert cached([tmp_path / "source"], "thing", refuse_to_work) is None
    assert "cannot be written" in caplog.text and "SMOLLM2_CACHE" in caplog.text


@needs_gguf
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_flipped_bits_are_found_and_healed(name, dtype, gguf_file, cache, caplog):
    """Damage that leaves size and time alone; in the conversion to bf16 too."""
    expected = load_model(gguf_file, "torch", dtype=dtype)
    for path in cache.glob(f"*/{name}"):
        status, content = path.stat(), bytearray(path.read_bytes())
        for index in (len(content) // 3, -3):
            content[index] ^= 0x40
        path.unlink()
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    loaded = load_model(gguf_file, "torch", dtype=dtype)
    assert "is damaged: made anew" in caplog.text
    assert loaded.config == expected.config
    assert all(map(torch.equal, loaded.parameters(), expected.parameters()))


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
