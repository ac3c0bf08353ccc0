"""Which engine is chosen, why, and what is refused."""

import copy
import pickle

import pytest
import torch
from generation_cases import tiny_model

from kernels import TORCH, select_backend
from smollm2 import generate
from smollm2.engine import native
from smollm2.engine.compiled import CompiledEngine
from smollm2.engine.eager import Engine
from smollm2.engine.loops import CapturedEngine
from smollm2.engine.quantized import QuantizedEngine
from smollm2.engine.select import default_engine, select_engine
from smollm2.errors import UsageError


@pytest.fixture
def model(monkeypatch, tmp_path):
    monkeypatch.setenv("SMOLLM2_CACHE", str(tmp_path))
    return tiny_model()


def prompt():
    return torch.arange(1, 12)[None]


def test_the_compiled_step_is_the_default_where_it_is_installed(model, installed_step):
    for engine in (select_engine(model), default_engine(model)):
        assert isinstance(engine, CompiledEngine) and str(engine) == f"compiled ({installed_step.name})"


def test_elsewhere_eager_is_and_says_what_would_be_faster(model, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_installed", lambda: tmp_path / "not installed")
    engine = select_engine(model)
    assert type(engine) is Engine and "--compile builds one" in str(engine)
    assert type(default_engine(model)) is Engine


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_weights_give_nearly_the_same_logits(model, kind):
    engine = select_engine(model, quantize=kind, compiled=False)
    assert isinstance(engine, QuantizedEngine) and engine.name == kind
    logits = []
    with torch.inference_mode():
        for each in (engine, Engine(model)):
            cache = each.allocate(1, 12)
            each.prefill(prompt(), torch.tensor([11]), cache)
            logits.append(each.decode(torch.tensor([[3]]), cache)[0, 0])
    error = (logits[0] - logits[1]).norm() / logits[1].norm()
    assert 0 < error < {"int8": 0.03, "int4": 0.4}[kind]


def test_the_captured_engine_gives_the_same_tokens(model):
    """Its loop runs uncaptured on the CPU."""
    ours, expected = (
        generate(model, prompt(), max_new_tokens=20, eos_token_id=[], engine=kind(model))
        for kind in (CapturedEngine, Engine)
    )
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(quantize="int2"), "quantize: expected one of none, int8, int4, got 'int2'"),
        (dict(quantize="int4", compiled=True), "plain or int8 weights, got int4"),
    ],
)
def test_what_cannot_be_is_named(model, options, message):
    with pytest.raises(UsageError, match=message):
        select_engine(model, **options)


def test_other_devices_are_refused_by_name(model):
    meta = copy.deepcopy(model).to("meta")
    with pytest.raises(UsageError, match="quantize=int8 runs on the CPU only, .*meta"):
        select_engine(meta, quantize="int8")
    with pytest.raises(UsageError, match="compiled step is for the CPU, the device is meta"):
        select_engine(meta, compiled=True)


def test_a_replaced_decode_layer_is_not_compiled_away(model, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="triton is not installed")
    model.backend = select_backend("torch,decode_layer=triton")
    assert model.backend.decode_layer is not TORCH.decode_layer
    with pytest.raises(UsageError, match="replaces backend torch, got torch,decode_layer=triton"):
        select_engine(model, compiled=True)


def test_a_copy_of_the_model_has_no_engine(model):
    model.engine = CapturedEngine(model)
    assert copy.deepcopy(model).engine is None
    assert pickle.loads(pickle.dumps(model.state_dict())).keys() == model.state_dict().keys()
