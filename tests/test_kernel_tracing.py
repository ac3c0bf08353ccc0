"""kernels/tracing.py: on which GPU a launcher runs."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.tracing import on_their_gpu, traceable


@pytest.fixture
def entered(monkeypatch):
    """The GPUs that were made the current one, where number 0 was before."""
    found: list[int] = []

    @contextmanager
    def device(wanted: torch.device):
        found.append(wanted.index)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    return found


@pytest.mark.parametrize("place, expected", [("cuda:0", []), ("cuda:1", [1]), ("cpu", [])])
def test_a_launch_is_on_the_gpu_of_its_tensors(entered, place, expected):
    with FakeTensorMode():
        x = torch.empty(3, device=place)

    @on_their_gpu
    def launch(count: int, x: Tensor, *, times: int) -> tuple[int, Tensor, int]:
        return count, x, times

    assert launch(2, x, times=5) == (2, x, 5)
    assert entered == expected


def test_a_traced_launcher_keeps_its_schema_and_its_gpu(entered):
    def _tried_launcher(x: Tensor, scale: Tensor | None, count: int, dtype: torch.dtype) -> list[Tensor]:
        return [x]

    call = traceable(lambda x, *_: [torch.empty_like(x)])(_tried_launcher)
    schema = str(call.op._opoverload._schema)
    assert (
        schema
        == "smollm2::tried_launcher(Tensor x, Tensor? scale, SymInt count, ScalarType dtype) -> Tensor[]"
    )
    with FakeTensorMode():
        call(torch.empty(3, device="cuda:1"), None, 2, torch.float32)
    assert entered == [1]
