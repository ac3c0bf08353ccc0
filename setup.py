"""The wheel: what lies beside each other in a checkout lies under one name in site-packages.

`kernels`, `train` and `bench` are names that others use too; Hugging Face's `kernels` is one. So the wheel
has smollm2.kernels, smollm2.train and smollm2.bench, and every mention of their modules is rewritten on the
way, as vendored packages are. A checkout, also one installed with `pip install -e`, keeps its folders and
names.
"""

import ast
import re
import shutil
from pathlib import Path

from setuptools import setup
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


class BuildWheel(build_py):
    """Builds as ever, then moves and rewrites; an editable install reads the checkout itself."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)  # what an earlier build left would go in
        super().run()
        if self.editable_mode:
            return
        root = Path(self.build_lib)
        names = modules(root)
        for name in MOVED:
            shutil.rmtree(root / HOME / name, ignore_errors=True)
            shutil.move(root / name, root / HOME / name)
        for suffix, change in ((".py", rewritten), (".md", renamed)):
            for file in (root / HOME).rglob(f"*{suffix}"):
                file.write_text(change(file.read_text(encoding="utf-8"), names), encoding="utf-8")


setup(cmdclass={"build_py": BuildWheel})
