"""The committed certificate: it is that of this source, notices when the source changes, and its figures can
be made again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from kernels.certify import __main__ as certify  # noqa: E402
from kernels.certify.__main__ import VERSIONS  # noqa: E402

pytestmark = pytest.mark.skipif(
    triton.__version__.partition("+")[0] not in VERSIONS,
    reason=f"the certificate is of {VERSIONS}, this is triton {triton.__version__}",
)


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in that folder without Triton's interpreter."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True
    )


def check(project_root: Path, folder: Path, *edits: tuple[str, str, str]) -> subprocess.CompletedProcess[str]:
    """`--check` in `folder`, on a copy of the package with the edits (file, old text, new text)."""
    kernels = folder / "kernels"
    if not kernels.exists():
        shutil.copytree(project_root / "kernels", kernels, ignore=shutil.ignore_patterns("__pycache__"))
    for file, old, new in edits:
        text = (kernels / file).read_text()
        assert old in text, f"{file} no longer holds {old!r}"
        (kernels / file).write_text(text.replace(old, new, 1))
    return run(folder, "-m", "kernels.certify", "--check")


def test_committed_table_is_up_to_date_and_text_above_a_kernel_changes_nothing(project_root, tmp_path):
    done = check(project_root, tmp_path, ("swiglu.py", "@triton.jit(", "# one line more\n\n\n@triton.jit("))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_change_is_named(project_root, tmp_path):
    """In a kernel, in its configuration, in the table: a line for each, and none for what did not change."""
    certificate = certify.load()
    chosen = {"target": "sm_90", "dtype": "bfloat16", "op": "attention"}
    rows = [row for row in certificate["rows"] if chosen.items() <= row.items()]
    rows[0]["figures"]["3.6.0"]["spill_bytes"] = 4
    rows[1]["figures"]["3.7.1"]["spill_bytes"] = 8
    del rows[2]["figures"]["3.6.0"]
    edits = [
        ("rms_norm.py", "dx += tl.load", "dx += 1.0 * tl.load"),
        ("launch_config.py", "LaunchConfig(4, 512, num_warps=4)", "LaunchConfig(4, 512, num_warps=8)"),
        (certify.TABLE_FILE.name, "# Certificate", "# A certificate"),
        (certify.JSON_FILE.name, certify.JSON_FILE.read_text(), certify.dump(certificate)),
    ]
    done = check(project_root, tmp_path, *edits)
    assert done.returncode == 1, done.stdout + done.stderr
    named = {
        "_rms_norm_bwd_dx_kernel", "_swiglu_fwd_kernel", certify.TABLE_FILE.name,
        "Triton 3.6.0: spills 4 bytes", "Triton 3.7.1: spills 8 bytes", "no figures of Triton 3.6.0: ",
    }  # fmt: skip
    assert [text for text in named if text not in done.stdout] == []
    assert "_rope_kernel" not in done.stdout and "_rms_norm_fwd_kernel" not in done.stdout


def test_rows_compiled_again_give_the_committed_figures(project_root):
    """One row of an NVIDIA target, one of an AMD target."""
    script = """
import json, triton
from kernels.certify import __main__ as certify
from kernels.certify.cases import record
from kernels.certify.measure import measure
from kernels.certify.targets import TARGETS
version = triton.__version__.partition("+")[0]
committed = {row["key"]: row["figures"][version] for row in certify.load()["rows"]}
for target in ("sm_90", "gfx942"):
    launch = next(launch for launch in record(TARGETS[target]) if launch.kernel == "_swiglu_bwd_kernel")
    figures = measure(launch)
    print(json.dumps([figures, committed[launch.key]]))
"""
    done = run(project_root, "-c", script)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        made, committed = json.loads(line)
        assert made == committed
