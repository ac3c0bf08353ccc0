"""The pages of docs/kernels say what their code prints today: each is built again and compared, and the
answers of its exercises are asserted on the way.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "kernels"
PAGES = sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "README")

pytest.importorskip("triton", reason="the pages run kernels, and triton is not installed")
pytest.importorskip("matplotlib", reason="the pages draw, and matplotlib is not installed")


def run(*arguments: str, build: Path = FOLDER / "build.py") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(build), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checked(request: pytest.FixtureRequest) -> str:
    """What --check prints of the pages of this session, all in one process."""
    items = [item for item in request.session.items if item.module is request.module]
    asked = [item.callspec.params["page"] for item in items if hasattr(item, "callspec")]
    done = run("--check", *asked)
    assert done.returncode in (0, 1) and done.stdout, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_the_page_is_what_its_code_prints(page, checked):
    assert f"{page}: " not in checked and "Traceback" not in checked, checked


def test_every_page_has_its_parts_and_the_index_names_it():
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    parts = [
        "owns",
        "The launch",
        "Bytes and FLOPs",
        "Step by step",
        "off by one",
        "Registers",
        "roof",
        "Exercises",
    ]
    for page in PAGES:
        text = (FOLDER / f"{page}.md").read_text(encoding="utf-8")
        headings = re.findall("^## (.*)$", text, re.MULTILINE)
        assert [part for part in parts if not any(part in heading for heading in headings)] == [], page
        answers = re.findall("<details>.*?</details>", text, re.DOTALL)
        assert len(answers) >= 3 and all("\nassert " in answer for answer in answers), page
        assert f"({page}.md)" in index
        for picture in re.findall(r"\]\(([\w-]+\.svg)\)", text):
            assert (FOLDER / picture).stat().st_size < 60_000, picture


def test_a_page_that_differs_is_shown_and_only_then_written(tmp_path):
    """With a builder of its own, beside a page that was never built."""
    folder = tmp_path / "docs" / "kernels"
    folder.mkdir(parents=True)
    (folder / "pictures.py").write_text("def drawn():\n    return []\n", encoding="utf-8")
    (folder / "build.py").write_bytes((FOLDER / "build.py").read_bytes())
    page = folder / "one.md"
    page.write_text(
        "```python\nprint(6 * 7)\n```\n\n<!-- run\nprint('| a |')\n-->\nold\n<!-- end -->\n", encoding="utf-8"
    )
    before = page.read_text(encoding="utf-8")
    done = run("--check", build=folder / "build.py")
    assert done.returncode == 1 and "+42" in done.stdout and "-old" in done.stdout, done.stdout + done.stderr
    assert page.read_text(encoding="utf-8") == before
    assert run(build=folder / "build.py").returncode == 0
    assert "```text\n42\n```\n" in page.read_text(encoding="utf-8")
    assert run("--check", build=folder / "build.py").returncode == 0
    page.write_text("```python\nassert 1 == 2\n```\n", encoding="utf-8")
    done = run("--check", build=folder / "build.py")
    assert done.returncode == 1 and "in the block at line 1 of one.md" in done.stderr
