"""The doctor passes a right implementation and names the broken property of a wrong one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import TORCH, Backend, reference
from kernels.eager.linear import mlp
from kernels.eager.pointwise import rope_cache
from smollm2 import SmolLM2Config, SmolLM2ForCausalLM, doctor

CPU = torch.device("cpu")


def tiny(backend: Backend = TORCH) -> SmolLM2ForCausalLM:
    torch.manual_seed(0)
    return SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"), backend)


def failures(model: SmolLM2ForCausalLM) -> set[str]:
    return {name for name, check in doctor.MODEL_CHECKS.items() if check(model).passed is False}


def planted(**operations: Callable[..., Any]) -> Backend:
    """The reference with operations replaced; rotation and SwiGLU in all forms that the switch has."""
    if swiglu := operations.get("swiglu"):
        operations["mlp"] = partial(mlp, swiglu=swiglu)
    if rope := operations.get("rope"):

        def rope_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = qkv.split((qkv.shape[2] - 2 * key_heads, key_heads, key_heads), dim=2)
            return *rope(q, k, cos, sin), v

        operations |= {"rope_qkv": rope_qkv, "rope_cache": partial(rope_cache, rope_qkv=rope_qkv)}
    return dataclasses.replace(TORCH, name="planted", **operations)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def bidirectional(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None = None, **_: Any) -> Tensor:
    """The bug that this project began with: scaled dot product attention without a causal mask."""
    return sdpa(q, k, v)


def one_too_far(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None = None, **_: Any) -> Tensor:
    """Every query also sees the next key: an off-by-one in a mask."""
    return sdpa(
        q, k, v, torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1] + 1)
    )


def ignores_documents(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None = None, **options: Any
) -> Tensor:
    return reference.attention(q, k, v, None, **options)


def ignores_lengths(q: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor) -> Tensor:
    return reference.decode_attention(q, key_cache, value_cache, torch.full_like(lengths, key_cache.shape[1]))


def no_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q, k


def without_sine(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """A complex table cast to a real dtype loses its imaginary part without a word."""
    return reference.rope(q, k, cos, torch.zeros_like(sin))


def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates neighbours instead of halves: a right rotation, for other weights."""

    def regrouped(x: Tensor, sizes: tuple[int, int]) -> Tensor:
        return x.unflatten(-1, sizes).transpose(-1, -2).flatten(-2)

    q, k = reference.rope(regrouped(q, (-1, 2)), regrouped(k, (-1, 2)), cos, sin)
    return regrouped(q, (2, -1)), regrouped(k, (2, -1))


def dead_gate(packed: Tensor) -> Tensor:
    gate, up = packed.chunk(2, dim=-1)
    return reference.swiglu(gate.detach(), up)


def infinite(packed: Tensor) -> Tensor:
    return reference.swiglu(packed) / 0.0


def test_the_reference_passes_every_check():
    findings = {name: check(tiny()) for name, check in doctor.MODEL_CHECKS.items()}
    assert {name: finding for name, finding in findings.items() if finding.passed is False} == {}
    assert doctor.check_head_stays_tied(tiny()).passed
    assert doctor.check_causality(tiny()) == doctor.Finding("0", "<= 0", True)


@pytest.mark.parametrize(
    ("backend", "named"),
    [
        (planted(attention=bidirectional), "causality"),
        (planted(attention=one_too_far), "causality"),
        (planted(attention=ignores_documents), "documents"),
        (planted(decode_attention=ignores_lengths), "cached = uncached"),
        (planted(rope=no_rotation), "rotary shift"),
        (planted(rope=without_sine), "rotary shift"),
        (planted(swiglu=dead_gate), "gradients"),
        (planted(swiglu=infinite), "gradients"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_planted_bug_fails_the_check_that_names_it(backend, named):
    assert named in failures(tiny(backend))


def test_a_right_rotation_of_the_wrong_layout_is_caught_by_transformers_alone():
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert failures(tiny(planted(rope=interleaved))) == {"transformers"}


def test_an_untied_head_is_caught():
    model = tiny()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert {"tied head", "parameter count"} <= failures(model)


def test_a_head_that_comes_untied_by_a_conversion_is_caught(monkeypatch):
    def to(self: SmolLM2ForCausalLM, *args: Any) -> SmolLM2ForCausalLM:
        self.lm_head.weight = torch.nn.Parameter(self.lm_head.weight.detach().clone())
        return self

    monkeypatch.setattr(SmolLM2ForCausalLM, "to", to)
    finding = doctor.check_head_stays_tied(tiny())
    assert (finding.figure, finding.passed) == ("two tensors after .to()", False)


def test_a_wrong_initialisation_is_caught_by_the_first_loss():
    model = tiny()
    assert doctor.check_first_loss(model).passed
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3)
    assert doctor.check_first_loss(model).passed is False


def test_nan_is_a_failure_and_not_a_pass():
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    assert {"causality", "documents", "cached = uncached", "gradients"} <= failures(model)


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 1e6])
def test_a_weight_that_no_training_gives_is_caught(value):
    model = SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"), TORCH)
    assert doctor.check_finite_weights(model).passed
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = value
    assert not doctor.check_finite_weights(model).passed


def test_a_check_that_raises_is_a_failed_row_and_the_rest_still_runs(monkeypatch):
    def broken(packed: Tensor) -> Tensor:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(doctor, "_fresh", lambda preset, device, backend: tiny(backend))
    rows = list(doctor.diagnose([(CPU, planted(swiglu=broken))]))
    by_check = {row.check: row.finding for row in rows if row.subject.startswith("fresh tiny")}
    figure = "RuntimeError: no kernel image is available"
    assert by_check["causality"] == doctor.Finding(figure, "no error", False)
    assert by_check["tied head"].passed and by_check["rotary shift"].passed


def test_a_backend_that_sees_the_future_makes_the_command_fail(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "resolve_backend", lambda name, device: planted(attention=bidirectional))
    monkeypatch.setattr(doctor, "_fresh", lambda preset, device, backend: tiny(backend))
    assert doctor.main(["--device", "cpu", "--backend", "planted"]) == 1
    table = capsys.readouterr().out.splitlines()
    assert any(line.startswith("causality") and "FAIL" in line and "planted on cpu" in line for line in table)
    assert "0 failed" not in table[-1]
