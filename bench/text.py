"""What a training run reads without a download: the Python files of this installation, of which a few
packages are held out whole.

Its tokens can be made ahead, by train.prepare, on processors that other work leaves free.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch

from bench.record import python

HELD_OUT = ("jinja2", "lineax", "optax", "patsy")  # those that are there; jinja2 comes with torch
FASTEST = 500_000  # tokens per second that are prepared for a run, which tokenises what it lacks
# The recipe, and where a tokenizer is learned, one of as many entries as SmolLM2's: a smaller one would make
# another model.
FULL = ("smollm2_135m.yaml", "vocab_size=49152", "tokenizer_documents=2000")
TINY = ("tiny.yaml", "vocab_size=300", "tokenizer_documents=20")


def globs(tiny: bool) -> tuple[list[str], list[str]]:
    """What `paths` and `validation_paths` of train.run take: the files to train on, and those among them that
    are held out.
    """
    library = Path(sysconfig.get_path("stdlib"))
    if tiny:
        return [f"{library}/json/*.py"], [f"{library}/html/*.py"]
    # The second one is not that of a virtual environment.
    names = [library, library / "site-packages", Path(torch.__file__).parent.parent]
    names += [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    folders = {name.resolve() for name in names}  # one may be a link to another
    outer = [folder for folder in folders if folders.isdisjoint(folder.parents)]
    return _python(outer), _python([folder / name for folder in folders for name in HELD_OUT])


def _python(folders: list[Path]) -> list[str]:
    """Globs of the folders that hold Python files: train.run refuses one that matches none."""
    return [f"{folder}/**/*.py" for folder in sorted(folders) if next(folder.rglob("*.py"), None)]


def tokenizer_source(name: str) -> str:
    """A tokenizer as train.run takes it from any folder: paths are absolute, and a tokenizer.json stands for
    its folder.
    """
    path = Path(name).expanduser()
    if name == "train" or not path.exists():
        return name
    return str((path.parent if path.name == "tokenizer.json" else path).resolve())


def configuration(tiny: bool, tokenizer: str, folder: Path) -> list[str]:
    """The arguments that train.run and train.prepare must share to mean the same tokens. folder: for the
    token cache.
    """
    paths, held_out = globs(tiny)
    keys = [*(TINY if tiny else FULL), f"tokenizer={tokenizer_source(tokenizer)}", f"token_cache={folder}"]
    keys += ["data=local", f"paths=[{','.join(paths)}]"]
    return keys + ([f"validation_paths=[{','.join(held_out)}]"] if held_out else [])


def preparation(tiny: bool, tokenizer: str, folder: Path, *, workers: int, seconds: float) -> list[str]:
    """The command that fills the token cache with what a run reads in so many seconds."""
    keys = (*configuration(tiny, tokenizer, folder), f"workers={workers}")
    return python("train.prepare", *keys, "--tokens", max(1, int(FASTEST * seconds)))
