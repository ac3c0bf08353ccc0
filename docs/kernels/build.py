"""`make docs`: runs the code of the kernel pages and writes what it prints into them.

    python docs/kernels/build.py [--check] [PAGE ...]     PAGE: a name without .md; all pages without one

A page is its own source. Its blocks run from top to bottom in one namespace:

    ```python           shown, and run; what it prints stands in the ```text block right below
    <!-- run            hidden, and run; what it prints is Markdown, and stands between this and <!-- end -->
    -->

So every number on a page was computed by the code above it. --check writes nothing, and prints where a page
or a picture differs; pictures are compared only where matplotlib is the version of constraints.txt.

cog and markdown-code-runner do something similar. The first keeps its code in comments, so that what a reader
sees would be a copy of it; the second cannot fence what was printed; neither shows a difference.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is imported
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

BLOCK = re.compile(
    r"^```python\n(?P<shown>.*?)^```\n(?:\n?```text\n.*?^```\n)?"
    r"|^<!-- run\n(?P<hidden>.*?)^-->\n.*?^<!-- end -->\n",
    re.MULTILINE | re.DOTALL,
)


def built(page: Path) -> str:
    """The text that the page should have. Raises what its code raises, with the line of the block."""
    names: dict[str, Any] = {"__name__": page.stem}
    text = page.read_text(encoding="utf-8")

    def run(block: re.Match[str]) -> str:
        shown, hidden = block["shown"], block["hidden"]
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(shown or hidden, page.name, "exec"), names)
        except Exception as error:
            error.add_note(f"in the block at line {text.count(chr(10), 0, block.start()) + 1} of {page.name}")
            raise
        out = printed.getvalue()
        if shown is None:
            return f"<!-- run\n{hidden}-->\n{out}<!-- end -->\n"
        return f"```python\n{shown}```\n" + (f"\n```text\n{out}```\n" if out else "")

    return BLOCK.sub(run, text)


def build(page: Path, check: bool) -> list[str]:
    """Builds a page and its pictures, and writes them unless they are only checked -> what differed, in
    lines.
    """
    import pictures

    files = {page: built(page), **{FOLDER / name: drawn for name, drawn in pictures.drawn()}}
    lines = []
    for path, text in files.items():
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if text == before:
            continue
        lines.append(f"{page.stem}: {path.name} differs from what its code prints or draws")
        if path == page:
            parts = before.splitlines(), text.splitlines()
            lines += difflib.unified_diff(*parts, "committed", "computed", lineterm="", n=1)
        if not check:
            path.write_text(text, encoding="utf-8")
    return lines


def main(argv: Sequence[str]) -> int:
    every = {page.stem: page for page in sorted(FOLDER.glob("*.md")) if page.stem != "README"}
    parser = argparse.ArgumentParser(prog="python docs/kernels/build.py")
    parser.add_argument("page", nargs="*", metavar="PAGE", help=f"one of {', '.join(every)}")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where something differs")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.page if name not in every]:
        parser.error(f"expected pages out of {', '.join(every)}, got {unknown[0]}")
    found = {name: build(every[name], options.check) for name in options.page or every}
    for lines in found.values():
        print("\n".join(lines), end="\n" if lines else "")
    print(f"{len(found)} pages, {sum(map(bool, found.values()))} of them changed")
    return int(options.check and any(found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
