"""The switch: names, replacements, messages."""

import dataclasses
import runpy
import sys

import pytest

from kernels import TORCH, select_backend, with_ops
from kernels.types import OPS


def test_auto_on_cpu_is_torch_and_says_why():
    backend = select_backend("auto", "cpu")
    assert backend.name == "torch"
    assert "cpu" in backend.why


def test_explicit_triton_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError) as error:
        select_backend("triton", "cpu")
    message = "needs a CUDA, ROCm or XPU device (or TRITON_INTERPRET=1), got cpu; use 'torch' or 'auto'"
    assert str(error.value) == f"backend 'triton' {message}"


def test_triton_not_installed_is_said(monkeypatch):
    monkeypatch.setattr("kernels.backend.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed"):
        select_backend("triton", "cuda")


def test_the_certificate_without_triton_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "kernels.certify.__main__", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("kernels.certify", run_name="__main__")
    expected = "kernels.certify needs triton, which is not installed: pip install triton\n"
    assert (ended.value.code, capsys.readouterr().err) == (2, expected)


@pytest.mark.parametrize(
    "name", ["cuda", "", "torch,attention", "torch,atention=torch", "torch,attention=numpy"]
)
def test_unknown_names_are_refused_with_what_is_known(name):
    with pytest.raises(ValueError, match="known are|operations are"):
        select_backend(name, "cpu")


def test_a_single_operation_is_replaced():
    marked = dataclasses.replace(TORCH, name="marked", attention=lambda *args, **kwargs: "marked")
    mixed = with_ops(TORCH, attention=marked)
    assert mixed.name == "torch,attention=marked"
    assert mixed.attention() == "marked"
    assert all(getattr(mixed, op) is getattr(TORCH, op) for op in OPS if op != "attention")


def test_a_backend_passes_through():
    assert select_backend(TORCH, "meta") is TORCH
