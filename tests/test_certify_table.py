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


@pytest.fixture
def copy(tmp_path: Path, project_root: Path) -> Path:
    """A folder with a copy of the package and its certificate."""
    shutil.copytree(
        project_root / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path


def edit(folder: Path, file: str, old: str, new: str) -> None:
    path = folder / "kernels" / file
    text = path.read_text()
    assert text.count(old) >= 1, f"{file} no longer holds {old!r}"
    path.write_text(text.replace(old, new, 1))


def test_committed_table_is_up_to_date(project_root: Path) -> None:
    done = run(project_root, "-m", "kernels.certify", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_text_above_a_kernel_changes_nothing(copy: Path) -> None:
    edit(copy, "swiglu.py", "@triton.jit(", "# one line more\n\n\n@triton.jit(")
    done = run(copy, "-m", "kernels.certify", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        ("swiglu.py", "silu = wide * sigmoid", "silu = sigmoid * wide", "_swiglu_bwd_kernel"),
        ("launch_config.py", "Launch(4, 512, num_warps=4)", "Launch(4, 512, num_warps=8)", "_swiglu_fwd_kernel"),
        ("CERTIFICATE.md", "# Certificate", "# A certificate", "CERTIFICATE.md"),
    ],
)  # fmt: skip
def test_change_makes_the_table_stale(copy: Path, file: str, old: str, new: str, named: str) -> None:
    edit(copy, file, old, new)
    done = run(copy, "-m", "kernels.certify", "--check")
    assert done.returncode == 1, done.stdout + done.stderr
    assert named in done.stdout
    assert "_rope_kernel" not in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('figures["3.6.0"]["spill_bytes"] = 4', "Triton 3.6.0: spills 4 bytes"),
        ('figures["3.7.1"]["spill_bytes"] = 4', "Triton 3.7.1: spills 4 bytes"),
        ('del figures["3.6.0"]', "no figures of Triton 3.6.0: "),
    ],
)
def test_a_fault_planted_in_the_committed_table_fails(copy: Path, change: str, message: str) -> None:
    script = f"""
from kernels.certify import __main__ as certify
certificate = certify.load()
figures = next(row["figures"] for row in certificate["rows"] if row["target"] == "sm_90" and row["dtype"] == "bfloat16")
{change}
certify.JSON_FILE.write_text(certify.dump(certificate))
certify.TABLE_FILE.write_text(certify.page(certificate))
"""
    assert run(copy, "-c", script).returncode == 0
    done = run(copy, "-m", "kernels.certify", "--check")
    assert done.returncode == 1
    assert message in done.stdout


def test_rows_compiled_again_give_the_committed_figures(project_root: Path) -> None:
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
