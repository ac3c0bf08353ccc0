"""The compiled decode step: in fp32 the tokens of the eager one; a package is found by what it depends on."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from generation_cases import alone, tiny_model
from generation_cases import random_ids as ids

from smollm2 import generate
from smollm2.compile import main
from smollm2.engine.compiled import (
    CompiledEngine,
    _sound_inductor_cache,
    build_package,
    find_package,
    package_path,
    step_weights,
)
from smollm2.engine.eager import Engine
from smollm2.engine.eager_step import Weights, linear
from smollm2.engine.exported_step import DecodeStep
from smollm2.engine.quantized import QuantizedEngine, dequantize
from smollm2.engine.select import select_engine
from smollm2.errors import LoadError, UsageError
from smollm2.generation.batch import generate_many
from smollm2.pretrained import trust
from smollm2.pretrained.cache import cache_folder


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder of its own for the whole module: one compilation serves all tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("SMOLLM2_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def compiled(model, cache):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    return select_engine(model, compiled=True)


def eager_step(engine, prompt, token):
    """One more token: (logits [V], its keys and values [layers, 2, K, D], what DecodeStep takes)."""
    length = prompt.shape[1]
    cache = engine.allocate(1, length + 1)
    engine.prefill(prompt, torch.tensor([length]), cache)
    old = [[layer[0, :length].clone() for layer in tensor] for tensor in (cache.keys, cache.values)]
    logits = engine.decode(torch.tensor([[token]]), cache)[0, 0]
    new = torch.stack((cache.keys[:, 0, length], cache.values[:, 0, length]), 1)
    return logits, new, (torch.tensor([token]), torch.tensor([length]), step_weights(engine), *old)


@pytest.mark.parametrize("length", [2, 17, 300])
@torch.inference_mode()
def test_the_step_is_the_eager_step(model, length):
    logits, new, arguments = eager_step(Engine(model), ids(1, length), 7)
    ours, ours_new = DecodeStep(model.config, torch.float32)(*arguments)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours_new, new, rtol=1e-5, atol=1e-4)


@torch.inference_mode()
def test_the_int8_step_is_the_step_with_the_dequantised_weights(model):
    engine = QuantizedEngine(model, "int8")
    *_, arguments = eager_step(engine, ids(1, 9), 7)
    engine.few = Weights(engine.layers, engine.head, linear).changed(dequantize)
    step, plain = (
        DecodeStep(model.config, torch.float32),
        (*arguments[:2], step_weights(engine), *arguments[3:]),
    )
    torch.testing.assert_close(step(*arguments)[0], step(*plain)[0], rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [dict(temperature=0.0), dict(temperature=0.9, top_p=0.9, repetition_penalty=1.2)]
)
@pytest.mark.parametrize("length", [1, 2, 40])
def test_compiled_is_eager(model, compiled, options, length):
    prompt = ids(1, length)
    ours, expected = (
        generate(model, prompt, max_new_tokens=30, seed=3, eos_token_id=[], engine=engine, **options)
        for engine in (compiled, Engine(model))
    )
    assert torch.equal(ours, expected)


@pytest.mark.slow
def test_a_batch_on_the_compiled_engine_is_its_rows(model, compiled):
    """Batches run eagerly; when one row is left, the compiled step takes over in the middle of its text."""
    prompts = [row.tolist() for row in ids(3, 12)]
    together = dict(generate_many(model, prompts, max_new_tokens=[5, 30, 9], slots=3, engine=compiled))
    for index, (prompt, budget) in enumerate(zip(prompts, (5, 30, 9), strict=True)):
        assert together[index] == alone(model, prompt, new=budget)


@pytest.mark.slow
def test_a_package_is_used_by_itself_from_then_on(model, compiled, cache):
    assert isinstance(compiled, CompiledEngine) and "loaded in" in str(compiled)
    path = package_path(Engine(model))
    assert find_package(Engine(model)) == path and cache in path.parents
    assert isinstance(select_engine(model), CompiledEngine)
    assert type(select_engine(model, compiled=False)) is Engine


def test_the_name_of_a_package_holds_what_it_depends_on(model, cache, monkeypatch):
    here = package_path(Engine(model))
    assert package_path(QuantizedEngine(model, "int8")) != here
    assert package_path(Engine(tiny_model(rms_norm_eps=1e-6))) != here
    assert package_path(Engine(tiny_model(pad_token_id=3))) == here, "the sizes are the same"
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert package_path(Engine(model)) != here


def test_no_compiler_is_said_before_any_work(model, cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    small = tiny_model(hidden_size=32, num_attention_heads=1, num_key_value_heads=1)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, 'no-such-compiler' was not found"):
        build_package(Engine(small))


def test_int4_is_refused_where_it_is_asked_for(model, capsys):
    """The step takes no int4: --help does not offer it, and the function says so."""
    with pytest.raises(UsageError, match="argument --quantize: invalid choice: 'int4'"):
        main(["--quantize", "int4"])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--quantize {none,int8}" in capsys.readouterr().out
    with pytest.raises(UsageError, match="plain or int8 weights, got int4"):
        build_package(QuantizedEngine(model, "int4"))


@pytest.mark.slow
def test_the_command_compiles_once(model, compiled, cache, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    assert main(["--model", str(tmp_path), "--dtype", "fp32"]) == 0
    assert "is there already; --fresh makes it anew" in capsys.readouterr().err


@pytest.fixture
def planted(model, tmp_path, monkeypatch):
    """A file that has the name and the digest of the package of this model's step; and no eye on its code."""
    monkeypatch.setenv("SMOLLM2_CACHE", str(tmp_path / "link" / "cache"))
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    path = package_path(Engine(model))
    path.parent.mkdir(parents=True)
    write_package(path, b"code")
    for folder in (path.parent, cache_folder()):
        folder.chmod(0o755)  # as an earlier version made them
    loaded = []
    monkeypatch.setattr(
        torch._C._aoti, "AOTIModelPackageLoader", lambda file, *_: loaded.append(content(file))
    )
    return path, loaded


def content(file: str) -> bytes:
    return Path(file).read_bytes()


def write_package(path: Path, code: bytes) -> None:
    path.write_bytes(code)
    path.chmod(0o644)
    path.with_suffix(".sha256").write_text(f"{hashlib.sha256(code).hexdigest()}  {path.name}\n")


def test_a_whole_package_of_ones_own_is_loaded(model, planted):
    path, loaded = planted
    assert isinstance(select_engine(model), CompiledEngine) and loaded == [b"code"]
    path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.symlink_to(path.parent.with_name("elsewhere"))
    assert find_package(Engine(model)) == path


def without_a_digest(path: Path) -> None:
    path.with_suffix(".sha256").unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    path.write_bytes(b"cod")


def flipped(path: Path) -> None:
    path.write_bytes(b"kode")


def of_another_name(path: Path) -> None:
    line = path.with_suffix(".sha256").read_text()
    path.with_suffix(".sha256").write_text(line.replace("threads", "thread"))


def digest_of_bytes(path: Path) -> None:
    path.with_suffix(".sha256").write_bytes(b"\xff" * 64)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_pipe_as_digest(path: Path) -> None:
    a_pipe(path.with_suffix(".sha256"))


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    "damage",
    [
        without_a_digest,
        empty,
        truncated,
        flipped,
        of_another_name,
        digest_of_bytes,
        a_pipe,
        a_pipe_as_digest,
        a_folder,
        to_nowhere,
    ],
)
def test_a_damaged_package_is_not_loaded_and_the_step_runs_without_it(model, planted, damage, caplog):
    path, loaded = planted
    damage(path)
    assert type(select_engine(model)) is Engine and loaded == []
    assert len(caplog.records) == 1 and f"{path}: not a whole package" in caplog.text
    assert "--compile makes it anew" in caplog.text


@pytest.mark.parametrize("place", ["cache", "compiled", "package"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_may_write_to_is_not_run(model, planted, place, mode, caplog):
    path, loaded = planted
    target = {"package": path, "compiled": path.parent, "cache": path.parent.parent}[place]
    target.chmod(target.stat().st_mode | mode)
    assert type(select_engine(model)) is Engine and loaded == []
    assert len(caplog.records) == 1 and f"chmod go-w {target}" in caplog.text
    if place != "package":
        with pytest.raises(LoadError, match="others may write to it"):
            build_package(Engine(model))


def test_a_folder_like_tmp_is_sound_if_what_lies_in_it_is(model, planted):
    path, loaded = planted
    path.parent.parent.chmod(0o1777)
    assert find_package(Engine(model)) == path
    path.chmod(0o646)
    assert find_package(Engine(model)) is None


def test_what_belongs_to_others_is_not_run(model, planted, monkeypatch, caplog):
    path, loaded = planted
    monkeypatch.setattr(trust, "_trusted", lambda: {os.getuid() + 1})
    assert type(select_engine(model)) is Engine and loaded == []
    assert f"{path.parent.parent}: belongs to another user (uid {os.getuid()})" in caplog.text


@pytest.mark.parametrize("name", ["cache", "compiled", "package"])
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_each_place_is_asked_whose_it_is(model, planted, name, caplog):
    path, loaded = planted
    target = {"package": path, "compiled": path.parent, "cache": path.parent.parent}[name]
    os.chown(target, 12345, -1)
    assert type(select_engine(model)) is Engine and loaded == []
    assert f"{target}: belongs to another user (uid 12345)" in caplog.text


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_a_link_of_somebody_else_is_not_followed(model, planted, caplog):
    path, loaded = planted
    path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.symlink_to(path.parent.with_name("elsewhere"))
    os.chown(path.parent, 12345, -1, follow_symlinks=False)
    assert find_package(Engine(model)) is None and "belongs to another user" in caplog.text


def test_a_system_without_user_ids_is_not_asked(model, planted, monkeypatch):
    path, _ = planted
    path.chmod(0o666)
    monkeypatch.delattr(os, "getuid")
    assert find_package(Engine(model)) == path


def test_a_package_that_cannot_be_loaded_is_said_where_it_was_asked_for(model, planted, monkeypatch, caplog):
    path, _ = planted

    def refuse(*_: object) -> None:
        raise RuntimeError("Failed to load\nthe stack of C++ calls")

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", refuse)
    assert type(select_engine(model)) is Engine
    assert len(caplog.records) == 1 and "cannot be loaded (Failed to load)" in caplog.text
    with pytest.raises(LoadError, match=r"cannot be loaded \(Failed to load\)"):
        select_engine(model, compiled=True)


def test_what_a_killed_compilation_left_is_removed(model, planted):
    path, _ = planted
    for name in (".making-abc", "tmpabc"):
        (path.parent / name).mkdir()
    assert find_package(Engine(model)) == path
    assert sorted(path.parent.iterdir()) == sorted([path, path.with_suffix(".sha256")])


def test_without_a_home_folder_there_is_no_package_and_no_complaint(model, monkeypatch, caplog):
    for name in ("SMOLLM2_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown_user)
    assert type(select_engine(model)) is Engine and not caplog.text
    with pytest.raises(LoadError, match="no home folder"):
        select_engine(model, compiled=True)


def unknown_user() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize(("mode", "is_used"), [(0o755, True), (0o777, False)])
def test_inductors_own_cache_is_used_unless_others_may_write_to_it(mode, is_used, tmp_path, monkeypatch):
    usual, folder = tmp_path / "usual", tmp_path / "folder"
    usual.mkdir()
    folder.mkdir()
    usual.chmod(mode)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(usual))
    with _sound_inductor_cache(folder):
        used = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert used == usual if is_used else used.parent == folder


def test_a_package_is_found_after_a_umask_that_lets_the_group_write(model, tmp_path, monkeypatch):
    def compile_nothing(_, package_path):
        Path(package_path).write_bytes(b"code")
        return package_path

    monkeypatch.setenv("SMOLLM2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: None)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_nothing)
    before = os.umask(0o002)
    try:
        made = build_package(Engine(model))
    finally:
        os.umask(before)
    assert find_package(Engine(model)) == made


@pytest.mark.slow
def test_a_damaged_package_is_compiled_anew_where_that_is_asked_for(
    model, compiled, cache, caplog, monkeypatch
):
    path = package_path(Engine(model))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])

    def compile_again(_program: object, package_path: str) -> str:
        Path(package_path).write_bytes(whole)
        return package_path

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_again)
    assert isinstance(select_engine(model, compiled=True), CompiledEngine)
    assert caplog.text.count("not a whole package") == 1
    assert path.read_bytes() == whole
    assert sorted(path.parent.iterdir()) == sorted([path, path.with_suffix(".sha256")])
