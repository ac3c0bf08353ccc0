"""The wheel: what lies beside each other in a checkout lies under one name in site-packages.

`kernels`, `train` and `bench` are names that others use too; Hugging Face's `kernels` is one. So the wheel
has smollm2.kernels, smollm2.train and smollm2.bench, and every mention of their modules is rewritten on the
way, as vendored packages are. A checkout, also one installed with `pip install -e`, keeps its folders and
names.

Where there is a C++ compiler, the decode step of a CPU is compiled into the package. Without one, or if it
fails, the installation is the same but for that.
"""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HOME, MOVED = "smollm2", ("kernels", "train", "bench")


def modules(root: Path) -> list[str]:
    """The dotted names of everything that moves, the longest first."""
    files = [path.relative_to(root).with_suffix("") for name in MOVED for path in (root / name).rglob("*.py")]
    names = {".".join(file.parts).removesuffix(".__init__").removesuffix(".__main__") for file in files}
    return sorted(names - set(MOVED), key=lambda name: (-len(name), name))


def renamed(text: str, names: list[str]) -> str:
    """The text with the names that the moved modules have in the wheel, but for those of files."""
    whole = "|".join(map(re.escape, names))
    return re.sub(rf"(?<![\w./])({whole})(?![\w/]|\.(py|json|md)\b)", rf"{HOME}.\1", text)


def rewritten(source: str, names: list[str]) -> str:
    """The same for the source of a module, with its imports."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        line = lines[node.lineno - 1] if isinstance(node, ast.Import | ast.ImportFrom) else ""
        if isinstance(node, ast.ImportFrom) and node.module in MOVED:
            line = re.sub(rf"\bfrom {node.module}\b", f"from {HOME}.{node.module}", line)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MOVED:
                    line = re.sub(rf"\bimport {alias.name}\b", f"from {HOME} import {alias.name}", line)
        if line:
            lines[node.lineno - 1] = line
    return renamed("".join(lines), names)


def compile_step(folder: Path) -> None:
    """Compiles smollm2/engine/decode_step.cpp into `folder`, for every instruction set of FLAGS that fits."""
    spec = importlib.util.spec_from_file_location("library", Path(HOME, "engine", "library.py"))
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    wanted = {folder / library.library_name(name): name for name in library.capabilities()}
    for path in set(folder.glob("decode_step-*.library")) - wanted.keys():
        path.unlink()  # of an earlier source

    def make(path: Path) -> None:
        unfinished, ready = path.with_suffix(".tmp"), Path(HOME, "engine", path.name)
        if ready.exists():  # by an editable install
            shutil.copy(ready, unfinished)
        else:
            library.compile_library(wanted[path], unfinished)
        unfinished.replace(path)

    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(make, [path for path in wanted if not path.exists()]))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        print(f"warning: the decode step of a CPU is not compiled: {said}", file=sys.stderr)


class BuildWheel(build_py):
    """Builds as ever, then moves and rewrites; an editable install reads the checkout itself."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)  # what an earlier build left would go in
        super().run()
        if self.editable_mode:
            compile_step(Path(HOME, "engine"))
            return
        root = Path(self.build_lib)
        names = modules(root)
        for name in MOVED:
            shutil.rmtree(root / HOME / name, ignore_errors=True)
            shutil.move(root / name, root / HOME / name)
        for suffix, change in ((".py", rewritten), (".md", renamed)):
            for file in (root / HOME).rglob(f"*{suffix}"):
                file.write_text(change(file.read_text(encoding="utf-8"), names), encoding="utf-8")
        compile_step(root / HOME / "engine")


class Binary(Distribution):
    """A package for one kind of machine."""

    def has_ext_modules(self) -> bool:
        return True


class TagWheel(bdist_wheel):
    """Its wheel serves every Python, of which the library knows nothing."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(distclass=Binary, cmdclass={"build_py": BuildWheel, "bdist_wheel": TagWheel})
