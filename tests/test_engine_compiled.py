"""The library of the compiled decode step: whose code runs, where it is found, and how it is made.

What the step computes is told by test_decode_step_cpp.py. Here nothing compiles it: a compiler is given a
source of one line.
"""

import ctypes
import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from generation_cases import tiny_model

from smollm2.compile import main
from smollm2.engine import compiled, library, native
from smollm2.engine.compiled import CompiledEngine
from smollm2.engine.digest import digest
from smollm2.engine.eager import Engine
from smollm2.engine.library import library_name
from smollm2.engine.native import build_library, find_library
from smollm2.engine.quantized import QuantizedEngine
from smollm2.engine.select import default_engine, select_engine
from smollm2.errors import LoadError, UsageError
from smollm2.pretrained import trust
from smollm2.pretrained.cache import cache_folder

TINY = """extern "C" int smollm2_decode_step(const void*, const void*) { return 7; }
extern "C" void smollm2_digest(const char*, long, unsigned*) {}
"""


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and an installation without the library."""
    monkeypatch.setattr(native, "_installed", lambda: tmp_path / "installation" / library_name("AVX2"))
    monkeypatch.setenv("SMOLLM2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source that is compiled in an instant."""
    monkeypatch.setattr(library, "SOURCE", tmp_path / "tiny.cpp")
    library.SOURCE.write_text(TINY)
    try:
        library.compiler()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return library.SOURCE


@pytest.fixture
def compilations(monkeypatch):
    """Instead of a compiler: what it was asked for; every library holds its number."""
    made = []

    def compile_library(capability, path):
        made.append(capability)
        path.write_bytes(b"code %d" % len(made))

    monkeypatch.setattr(native, "compile_library", compile_library)
    monkeypatch.setattr(native, "_loaded", functions)
    monkeypatch.setenv("CXX", "sh")
    return made


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A file that has the name and the digest of the library; and no eye on its code."""
    monkeypatch.setenv("SMOLLM2_CACHE", str(tmp_path / "link" / "cache"))
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    path = native._in_cache()
    path.parent.mkdir(parents=True)
    write_library(path, b"code")
    for folder in (path.parent, cache_folder()):
        folder.chmod(0o755)  # as an earlier version made them
    loaded = []
    monkeypatch.setattr(native, "_loaded", lambda code: loaded.append(code) or functions(code))
    return path, loaded


def functions(code: bytes) -> SimpleNamespace:
    """A library that was loaded, by which it can be told."""
    return SimpleNamespace(smollm2_decode_step=code)


def write_library(path: Path, code: bytes) -> None:
    path.write_bytes(code)
    path.chmod(0o644)
    path.with_suffix(".sha256").write_text(f"{hashlib.sha256(code).hexdigest()}  {path.name}\n")


def install(code: bytes = b"installed") -> Path:
    path = native._installed()
    path.parent.mkdir()
    path.write_bytes(code)
    return path


def test_a_source_is_compiled_found_and_loaded(model, source, capsys):
    assert find_library() is None and type(select_engine(model)) is Engine
    engine = select_engine(model, compiled=True)
    path = find_library()
    assert isinstance(engine, CompiledEngine) and str(engine) == f"compiled ({path.name})"
    assert capsys.readouterr().err.startswith(f"compiling the decode step into {path} (ten seconds, once)\n")
    assert isinstance(select_engine(model), CompiledEngine)
    assert isinstance(default_engine(model), CompiledEngine)
    assert type(select_engine(model, compiled=False)) is Engine
    assert select_engine(model, quantize="int8").name == "compiled int8"
    assert type(select_engine(model, quantize="int4")) is QuantizedEngine
    assert native.load_library(path).smollm2_decode_step(None, None) == 7
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}


def test_the_library_in_the_cache_comes_before_that_of_the_installation(model, compilations):
    installed = install()
    assert find_library() == installed
    assert select_engine(model, compiled=True)._step == b"installed" and not compilations
    assert find_library() == installed
    made = build_library()
    assert find_library() == made and select_engine(model)._step == b"code 1"
    made.write_bytes(b"damaged")
    assert find_library() == installed


def test_the_name_of_a_library_holds_what_it_depends_on(source, monkeypatch):
    names = {library_name(capability) for capability in ("AVX512", "AVX2", "DEFAULT")}
    source.write_text(TINY.replace("7", "8"))
    names |= {library_name("AVX2")}
    monkeypatch.setattr(library, "COMMON", ["-O1"])
    names |= {library_name("AVX2")}
    assert len(names) == 5 and all(name.startswith("decode_step-") for name in names)


def test_an_unknown_instruction_set_gets_no_flags(monkeypatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "SVE256")
    assert native.capability() == "DEFAULT" and "default" in native._in_cache().name


def test_no_compiler_is_said_before_any_work(model, cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    message = r"compile: needs a C\+\+ compiler, 'no-such-compiler' was not found; install one, or name it in"
    with pytest.raises(UsageError, match=message):
        select_engine(model, compiled=True)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler, 'g\+\+' was not found"):
        main([])
    assert not cache.exists()
    assert type(select_engine(model)) is Engine, "and the eager step serves"


def test_what_a_compiler_complains_of_is_said_in_one_line(source, cache):
    source.write_text("#warning careful\nint f() { return nothing; }\n")
    with pytest.raises(UsageError, match=r"^compile: \S+: .*tiny.cpp:2:.* error: .*nothing.*$"):
        build_library()
    assert not [*cache.iterdir()]


@pytest.mark.skipif(shutil.which("false") is None, reason="needs the command false")
def test_a_compiler_that_fails_without_a_word(source, cache, monkeypatch):
    monkeypatch.setenv("CXX", "false --option")
    with pytest.raises(UsageError, match=r"^compile: false: $"):
        build_library()
    assert not [*cache.iterdir()]


def test_options_in_cxx_reach_the_compiler(source, monkeypatch):
    source.write_text(TINY.replace("7", "ANSWER"))
    monkeypatch.setenv("CXX", f"{library.compiler()[0]} -DANSWER=9")
    assert native.load_library(build_library()).smollm2_decode_step(None, None) == 9


def test_the_command_compiles_once_and_anew_where_that_is_asked_for(compilations, capsys):
    assert main([]) == 0
    path = find_library()
    said = capsys.readouterr().err.splitlines()
    assert said == [f"compiling the decode step into {path} (ten seconds, once)", "compiled in 0 s"]
    assert main([]) == 0 and path.read_bytes() == b"code 1"
    assert capsys.readouterr().err == f"{path} already exists; --fresh rebuilds it\n"
    assert main(["--fresh"]) == 0 and find_library() == path and path.read_bytes() == b"code 2"
    assert compilations == [native.capability()] * 2


def test_a_cache_that_cannot_be_written_is_named(cache, compilations):
    cache.write_text("a file")
    with pytest.raises(LoadError, match="cannot be written .*; SMOLLM2_CACHE names another folder"):
        build_library()


def test_a_whole_library_of_ones_own_is_loaded(model, planted):
    path, loaded = planted
    assert isinstance(select_engine(model), CompiledEngine) and loaded == [b"code"]
    path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.symlink_to(path.parent.with_name("elsewhere"))
    assert find_library() == path


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
    path.with_suffix(".sha256").write_text(line.replace("decode_step", "decode_stop"))


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


DAMAGE = [
    without_a_digest, empty, truncated, flipped, of_another_name, digest_of_bytes, a_pipe, a_pipe_as_digest,
    a_folder, to_nowhere,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_not_loaded_and_the_step_runs_without_it(model, planted, damage, caplog):
    path, loaded = planted
    damage(path)
    assert type(select_engine(model)) is Engine and loaded == []
    assert len(caplog.records) == 1 and f"{path}: damaged or incomplete library" in caplog.text
    assert "--compile rebuilds it; not used until then" in caplog.text


def test_instead_of_a_damaged_library_that_of_the_installation_is_loaded(model, planted, caplog):
    path, loaded = planted
    flipped(path)
    install()
    assert isinstance(default_engine(model), CompiledEngine) and loaded == [b"installed"]
    assert len(caplog.records) == 1 and f"{path}: damaged or incomplete library" in caplog.text


@pytest.mark.parametrize("damage", [truncated, without_a_digest])
def test_a_damaged_library_is_compiled_anew_where_that_is_asked_for(model, compilations, damage, caplog):
    path = build_library()
    damage(path)
    assert select_engine(model, compiled=True)._step == b"code 2"
    assert caplog.text.count("damaged or incomplete library") == 1
    assert sorted(path.parent.iterdir()) == sorted([path, path.with_suffix(".sha256")])


@pytest.mark.parametrize("place", ["cache", "compiled", "library"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_may_write_to_is_not_run(model, compilations, planted, place, mode, caplog):
    path, loaded = planted
    target = {"library": path, "compiled": path.parent, "cache": path.parent.parent}[place]
    target.chmod(target.stat().st_mode | mode)
    assert type(select_engine(model)) is Engine and loaded == []
    assert len(caplog.records) == 1 and f"chmod go-w {target}" in caplog.text
    if place != "library":
        with pytest.raises(LoadError, match="others may write to it"):
            build_library()
        assert not compilations


def test_a_folder_like_tmp_is_sound_if_what_lies_in_it_is(planted):
    path, _ = planted
    path.parent.parent.chmod(0o1777)
    assert find_library() == path
    path.chmod(0o646)
    assert find_library() is None


def test_what_belongs_to_others_is_not_run(model, planted, monkeypatch, caplog):
    path, loaded = planted
    monkeypatch.setattr(trust, "_trusted", lambda: {os.getuid() + 1})
    assert type(select_engine(model)) is Engine and loaded == []
    assert f"{path.parent.parent}: belongs to another user (uid {os.getuid()})" in caplog.text


@pytest.mark.parametrize("name", ["cache", "compiled", "library"])
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_each_place_is_asked_whose_it_is(model, planted, name, caplog):
    path, loaded = planted
    target = {"library": path, "compiled": path.parent, "cache": path.parent.parent}[name]
    os.chown(target, 12345, -1)
    assert type(select_engine(model)) is Engine and loaded == []
    assert f"{target}: belongs to another user (uid 12345)" in caplog.text


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_a_link_of_somebody_else_is_not_followed(planted, caplog):
    path, _ = planted
    path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.symlink_to(path.parent.with_name("elsewhere"))
    os.chown(path.parent, 12345, -1, follow_symlinks=False)
    assert find_library() is None and "belongs to another user" in caplog.text


def test_a_system_without_user_ids_is_not_asked(planted, monkeypatch):
    path, _ = planted
    path.chmod(0o666)
    monkeypatch.delattr(os, "getuid")
    assert find_library() == path


def test_between_a_look_and_the_loading_a_library_is_verified_again(model, planted):
    path, loaded = planted
    assert find_library() == path
    flipped(path)
    with pytest.raises(LoadError, match="damaged or incomplete library"):
        CompiledEngine(Engine(model), path)
    assert loaded == []


@pytest.mark.parametrize("place", ["cache", "installation"])
def test_a_library_that_cannot_be_loaded_is_said_where_it_was_asked_for(model, place, caplog):
    """One for another system, say. Nor do digests of weights need it."""
    if place == "cache":
        path = native._in_cache()
        path.parent.mkdir(parents=True, mode=0o700)
        path.parent.parent.chmod(0o700)
        write_library(path, b"no library")
    else:
        path = install(b"no library")
    assert type(select_engine(model)) is Engine
    assert len(caplog.records) == 1 and f"{path}: cannot be loaded (" in caplog.text
    with pytest.raises(LoadError, match=r"cannot be loaded \(.*\); --compile rebuilds it"):
        select_engine(model, compiled=True)
    assert digest(model) == digest(model) and type(select_engine(model, quantize="int8")) is QuantizedEngine


def test_what_a_killed_compilation_left_is_removed(planted):
    path, _ = planted
    for name in (".making-abc", "tmpabc"):
        (path.parent / name).mkdir()
    assert find_library() == path
    assert sorted(path.parent.iterdir()) == sorted([path, path.with_suffix(".sha256")])


def test_without_a_home_folder_only_the_installation_is_asked_and_nothing_is_said(model, monkeypatch, caplog):
    for name in ("SMOLLM2_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown_user)
    monkeypatch.setattr(native, "_loaded", functions)
    assert type(select_engine(model)) is Engine and not caplog.text
    with pytest.raises(LoadError, match="no home folder"):
        select_engine(model, compiled=True)
    install()
    assert select_engine(model)._step == b"installed" and not caplog.text


def unknown_user() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("umask", [0o002, 0o000, 0o077])
def test_a_library_is_found_whatever_the_umask(compilations, umask):
    before = os.umask(umask)
    try:
        made = build_library()
    finally:
        os.umask(before)
    assert find_library() == made


def test_the_structures_are_those_of_the_source():
    """ctypes and C++ declare them apart."""
    text = (Path(compiled.__file__).with_name("decode_step.cpp")).read_text(encoding="utf-8")
    for structure in (compiled._Matrix, compiled._Layer, compiled._Model, compiled._Step):
        name = structure.__name__.removeprefix("_")
        body = text.split(f"struct {name} {{")[1].split("};")[0]
        lines = [line.split("//")[0] for line in body.splitlines()]
        declared = [
            word.strip().split(" ")[-1].lstrip("*")
            for line in " ".join(lines).split(";")
            for word in line.split(",")
            if word.strip()
        ]
        assert [field[0] for field in structure._fields_] == declared
    assert ctypes.sizeof(compiled._Matrix) == 16
    assert f"MAX_TOKENS = {compiled.MAX_TOKENS};" in text
    assert "enum Kind : int64_t { FP32, BF16, FP16, INT8 };" in text
