"""What a benchmark says of the libraries beside it: the version and the reason of each that was not
measured.
"""

import sys
import types

import pytest
import torch

from bench import kernels, ops, record
from bench.peers import choice
from bench.peers import status as peers
from bench.peers import transformers as llama
from bench.step_peers import ours
from kernels import TORCH
from smollm2.config import SmolLM2Config

CPU = torch.device("cpu")
TINY = SmolLM2Config.preset("tiny", num_hidden_layers=1)
IDS = torch.arange(16)[None]


def installed(monkeypatch, **versions):
    """Makes `bench.peers.status` see exactly these libraries; names with _ for -."""

    def version(name):
        if name.replace("-", "_") not in versions:
            raise peers.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    monkeypatch.setattr(peers, "version", version)


def test_a_peer_that_is_absent_is_named_with_the_way_to_install_it(monkeypatch):
    installed(monkeypatch)
    with pytest.raises(
        peers.NotInstalled, match="flash-attn is not installed; pip install flash-attn"
    ) as raised:
        peers.require("flash-attn")
    assert isinstance(raised.value, ModuleNotFoundError) and raised.value.name == "flash-attn"
    found = peers.peer_status({"flash-attn": [str(raised.value)], "litgpt": []})
    assert found["flash-attn"] == {
        "version": None,
        "used": False,
        "why": "not installed; pip install flash-attn --no-build-isolation",
    }
    assert peers.not_measured(found) == [
        "not measured: flash-attn: not installed; pip install flash-attn --no-build-isolation",
        "not measured: litgpt: not installed; python -m bench.litgpt_peer setup",
    ]


def test_a_peer_for_gpus_is_named_with_its_version_on_a_cpu(monkeypatch):
    installed(monkeypatch, liger_kernel="0.8.5")
    with pytest.raises(peers.Unavailable, match="liger-kernel 0.8.5: needs a GPU") as raised:
        peers.require("liger-kernel", CPU)
    found = peers.peer_status({"liger-kernel": [f"not available: {raised.value}"]})
    assert peers.not_measured(found) == ["not measured: liger-kernel 0.8.5: needs a GPU"]
    assert peers.require("liger-kernel") == "0.8.5"


def test_one_measured_variant_is_enough_and_the_first_reason_counts(monkeypatch):
    installed(monkeypatch, transformers="5.0", quack_kernels="0.6")
    found = peers.peer_status(
        {
            "transformers": ["RuntimeError: no compiler", ""],
            "quack-kernels": ["RuntimeError: no sm_90", "other"],
        }
    )
    assert found["transformers"] == {"version": "5.0", "used": True, "why": None}
    assert found["quack-kernels"]["why"] == "RuntimeError: no sm_90"
    assert peers.peer_status({"transformers": []})["transformers"]["why"] == peers.NOT_ASKED
    assert peers.peer_status({"litgpt": [""]}, {"litgpt": "0.5"})["litgpt"]["version"] == "0.5"


def test_variants_belong_to_their_libraries(monkeypatch):
    installed(monkeypatch, transformers="5.0", llama_cpp_python="0.3")
    rows = {
        "ours fp32": {},
        "ours+compile fp32": {"failed": "no compiler"},
        "transformers bf16+compile bf16": {"step_ms": 1.0},
    }
    found = choice.step_status(rows)
    assert found["transformers"]["used"] and found["torch.compile"]["why"] == "no compiler"
    assert set(found) == {"transformers", "liger-kernel", "litgpt", "torch.compile"}
    found = choice.variants_status(
        [
            ("eager bf16", ""),
            ("transformers+static bf16", ""),
            ("llama.cpp F16", "llama-cpp-python 0.3: measured"),
        ],
        choice.OF_GENERATION,
    )
    assert found["transformers"]["used"] and found["llama-cpp-python"]["why"] == "measured"
    rows = [
        {"variant": "liger", "us": 1.0},
        {"variant": "flash", "failed": "no kernel"},
        {"variant": "triton"},
    ]
    found = kernels.kernel_status(rows)
    assert found["liger-kernel"]["used"] and found["torch flash attention"]["why"] == "no kernel"


def test_a_figure_has_the_versions_of_the_libraries_that_are_here(monkeypatch):
    def version(name):
        if name == "flash-attn":
            raise record.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(record, "version", version)
    found = record.provenance(CPU)["versions"]
    assert {name: found.get(name) for name in ("transformers", "liger-kernel", "litgpt", "quack-kernels",
        "flash-attn")} == {
        "transformers": "1.0", "liger-kernel": "1.0", "litgpt": "1.0", "quack-kernels": "1.0",
        "flash-attn": None,
    }  # fmt: skip


# Liger-Kernel on transformers


@pytest.fixture
def liger(monkeypatch):
    """Liger-Kernel as far as it is used here: it replaces three names of transformers' module, and the
    model's forward.
    """
    modeling = pytest.importorskip(
        "transformers.models.llama.modeling_llama", reason="Liger-Kernel patches transformers"
    )
    calls = []
    plain = modeling.apply_rotary_pos_emb

    def rotary(q, k, cos, sin, *rest):
        calls.append("rotary")
        return plain(q, k, cos, sin, *rest)

    def apply_liger_kernel_to_llama(model):
        modeling.apply_rotary_pos_emb, modeling.LlamaRMSNorm, modeling.LlamaMLP = rotary, object, object
        calls.append(type(model).__name__)

    module = types.ModuleType("liger_kernel.transformers")
    module.apply_liger_kernel_to_llama = apply_liger_kernel_to_llama
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    installed(monkeypatch, liger_kernel="0.8.5")
    return calls


def test_liger_changes_its_own_model_and_not_the_plain_one(liger):
    from transformers.models.llama import modeling_llama

    before = {name: getattr(modeling_llama, name) for name in llama.LIGER_GLOBALS}
    weights = ours(TINY, torch.float32).state_dict()
    plain, changed = (llama.transformers_llama(TINY, weights) for _ in range(2))
    forward = llama.with_liger(changed)
    assert all(getattr(modeling_llama, name) is value for name, value in before.items())
    loss = forward(IDS, labels=IDS, use_cache=False).loss
    assert liger == ["LlamaForCausalLM", "rotary"]  # one layer
    assert plain(IDS, labels=IDS, use_cache=False).loss == loss and len(liger) == 2
    assert all(getattr(modeling_llama, name) is value for name, value in before.items())


def test_what_liger_replaced_is_restored_when_its_forward_raises(liger):
    from transformers.models.llama import modeling_llama

    before = modeling_llama.apply_rotary_pos_emb
    forward = llama.with_liger(llama.transformers_llama(TINY, ours(TINY, torch.float32).state_dict()))
    with pytest.raises(TypeError):
        forward(IDS, input_ids=IDS)
    assert modeling_llama.apply_rotary_pos_emb is before


def test_a_step_of_liger_is_refused_on_a_cpu(liger):
    with pytest.raises(peers.Unavailable, match="liger-kernel 0.8.5: needs a GPU"):
        choice.peer_step("liger", TINY, ours(TINY, torch.float32).state_dict(), IDS, False, "eager")


# operations


def shapes():
    return ops.Shapes(SmolLM2Config.preset("135M"), 1, 16, torch.float32, CPU)


@pytest.fixture(scope="module")
def attention_rows():
    """(row of the variant) of attention and decode attention, 9 heads over 3, with FlexAttention under a
    compiler that makes no kernel.
    """
    cases = {case.op: case for case in ops.cases(shapes(), TORCH, "aot_eager")}
    return {
        (case.op, row["variant"]): row
        for case in (cases["attention"], cases["decode_attention"])
        for row in kernels.measure(case, shapes(), 1e10, 1e10, tiny=True)
    }


def test_of_torchs_attention_the_kernels_of_a_cpu_are_measured_and_the_others_named(attention_rows):
    for variant in ("reference", "math", "flash"):
        assert (
            attention_rows["attention", variant]["us"] > 0
            and attention_rows["attention", variant]["error"] < 1e-5
        )
    for variant, name in (("cudnn", "torch cuDNN attention"), ("flex", "torch FlexAttention")):
        assert f"{name} {torch.__version__}: needs a GPU" in attention_rows["attention", variant]["failed"]
    found = kernels.kernel_status(list(attention_rows.values()))
    assert found["torch flash attention"]["used"] and found["torch cuDNN attention"]["why"] == "needs a GPU"


def test_flex_attention_decodes_on_a_cpu_and_its_decode_kernel_does_not(attention_rows):
    assert attention_rows["decode_attention", "flex"]["error"] < 1e-5
    assert (
        "its decode kernel is one of Triton's" in attention_rows["decode_attention", "flex decode"]["failed"]
    )


def test_flex_attention_is_causal():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 16, heads, 64, generator=generator) for heads in (9, 3, 3))
    flex = ops.FlexAttention(lambda function: torch.compile(function, backend="aot_eager"))
    torch.testing.assert_close(flex(q, k, v, causal=True), TORCH.attention(q, k, v))


def test_libraries_for_gpus_say_so_in_the_row_of_every_operation(monkeypatch):
    installed(monkeypatch, liger_kernel="0.8.5")
    for case in ops.cases(shapes(), TORCH, "eager"):
        for variant in {"liger", "quack", "flash-attn"} & case.variants.keys():
            with pytest.raises(
                peers.Unavailable, match="liger-kernel 0.8.5: needs a GPU|is not installed; pip install"
            ):
                case.variants[variant](*case.inputs(0))
