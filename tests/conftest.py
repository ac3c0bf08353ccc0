"""What every test shares: an offline hub, Triton's interpreter (right in bf16) where there is no GPU,
NaN-filled buffers, seeded noise, the library of the compiled decode step.

The environment is set at import, before any test module imports `kernels`: Triton decides at decoration time
whether a kernel is compiled or interpreted.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests fork and run subprocesses
# The tests are many small operations: more threads wait for each other, and for ever so long when the machine
# is busy otherwise.
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(4, (os.cpu_count() or 1) // 2))))

# A test that runs pytest in a process of its own does not run a worker of pytest-xdist, whatever process it
# is in itself: pytest-benchmark would time nothing there.
for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
    del os.environ[name]

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import interpreter

    interpreter.install()


# Files that take a minute or more by themselves: begun first, so that no process is left alone with one.
LONG = (
    "bench_gpu_command",
    "planted_faults",
    "bench_suites_collect",
    "parity_real_weights",
    "verify_resume_command",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.stem.endswith(LONG))


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The folder that holds pyproject.toml."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with a fixed seed; what a test draws does not depend on the tests before it."""
    return torch.Generator().manual_seed(1234)


@pytest.fixture(autouse=True)
def _seed_global_generator() -> Iterator[None]:
    """Every test starts from the same global generator and leaves the outside one untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        yield


@pytest.fixture(scope="session")
def step_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled decode step: that of the installation, or one made now (ten seconds)."""
    from smollm2.engine import library, native

    installed = native._installed()
    if installed.is_file():
        return installed
    path = tmp_path_factory.mktemp("step") / installed.name
    try:
        library.compile_library(native.capability(), path)
    except FileNotFoundError as error:
        pytest.skip(f"the decode step is not compiled here: {error}")
    return path


@pytest.fixture
def installed_step(step_library: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The installation has the compiled decode step, whatever it has here, and whatever the cache is."""
    from smollm2.engine import native

    monkeypatch.setattr(native, "_installed", lambda: step_library)
    return step_library


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills every floating-point `torch.empty`, `empty_like`, `empty_strided`, `new_empty` with NaN: a missed
    store shows.
    """

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            buffer = allocate(*args, **kwargs)
            if buffer.is_floating_point() and not buffer.is_meta:
                with torch.no_grad():
                    buffer.fill_(float("nan"))
            return buffer

        return allocate_poisoned

    with torch.device("cpu"):
        # torch remembers, from the first time on, which functions a `with torch.device(...)` concerns: not
        # ours
        torch.empty(0)
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
