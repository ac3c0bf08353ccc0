"""The compiled decode step: in fp32 the tokens of the eager one; a package is found by what it depends on."""

import shutil

import pytest
import torch
from generation_cases import alone, tiny_model
from generation_cases import random_ids as ids

from smollm2 import generate
from smollm2.compile import main
from smollm2.engine.compiled import CompiledEngine, build_package, find_package, package_path, step_weights
from smollm2.engine.eager import Engine
from smollm2.engine.eager_step import Weights, linear
from smollm2.engine.exported_step import DecodeStep
from smollm2.engine.quantized import QuantizedEngine, dequantize
from smollm2.engine.select import select_engine
from smollm2.errors import UsageError
from smollm2.generation.batch import generate_many


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder of its own for the whole module: one compilation serves all tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("SMOLLM2_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def compiled(model, cache):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    return select_engine(model, compiled=True)


def eager_step(engine, prompt, token):
    """One more token: (logits [V], its keys and values [layers, 2, K, D], what DecodeStep takes)."""
    length = prompt.shape[1]
    cache = engine.allocate(1, length + 1)
    engine.prefill(prompt, torch.tensor([length]), cache)
    old = [[layer[0, :length].clone() for layer in tensor] for tensor in (cache.keys, cache.values)]
    logits = engine.decode(torch.tensor([[token]]), cache)[0, 0]
    new = torch.stack((cache.keys[:, 0, length], cache.values[:, 0, length]), 1)
    return logits, new, (torch.tensor([token]), torch.tensor([length]), step_weights(engine), *old)


@pytest.mark.parametrize("length", [2, 17, 300])
@torch.inference_mode()
def test_the_step_is_the_eager_step(model, length):
    logits, new, arguments = eager_step(Engine(model), ids(1, length), 7)
    ours, ours_new = DecodeStep(model.config, torch.float32)(*arguments)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours_new, new, rtol=1e-5, atol=1e-4)


@torch.inference_mode()
def test_the_int8_step_is_the_step_with_the_dequantised_weights(model):
    engine = QuantizedEngine(model, "int8")
    *_, arguments = eager_step(engine, ids(1, 9), 7)
    engine.few = Weights(engine.layers, engine.head, linear).changed(dequantize)
    step, plain = (
        DecodeStep(model.config, torch.float32),
        (*arguments[:2], step_weights(engine), *arguments[3:]),
    )
    torch.testing.assert_close(step(*arguments)[0], step(*plain)[0], rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [dict(temperature=0.0), dict(temperature=0.9, top_p=0.9, repetition_penalty=1.2)]
)
@pytest.mark.parametrize("length", [1, 2, 40])
def test_compiled_is_eager(model, compiled, options, length):
    prompt = ids(1, length)
    ours, expected = (
        generate(model, prompt, max_new_tokens=30, seed=3, eos_token_id=[], engine=engine, **options)
        for engine in (compiled, Engine(model))
    )
    assert torch.equal(ours, expected)


@pytest.mark.slow
def test_a_batch_on_the_compiled_engine_is_its_rows(model, compiled):
    """Batches run eagerly; when one row is left, the compiled step takes over in the middle of its text."""
    prompts = [row.tolist() for row in ids(3, 12)]
    together = dict(generate_many(model, prompts, max_new_tokens=[5, 30, 9], slots=3, engine=compiled))
    for index, (prompt, budget) in enumerate(zip(prompts, (5, 30, 9), strict=True)):
        assert together[index] == alone(model, prompt, new=budget)


@pytest.mark.slow
def test_a_package_is_used_by_itself_from_then_on(model, compiled, cache):
    assert isinstance(compiled, CompiledEngine) and "loaded in" in str(compiled)
    path = package_path(Engine(model))
    assert find_package(Engine(model)) == path and cache in path.parents
    assert isinstance(select_engine(model), CompiledEngine)
    assert type(select_engine(model, compiled=False)) is Engine


def test_the_name_of_a_package_holds_what_it_depends_on(model, cache, monkeypatch):
    here = package_path(Engine(model))
    assert package_path(QuantizedEngine(model, "int8")) != here
    assert package_path(Engine(tiny_model(rms_norm_eps=1e-6))) != here
    assert package_path(Engine(tiny_model(pad_token_id=3))) == here, "the sizes are the same"
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert package_path(Engine(model)) != here


def test_no_compiler_is_said_before_any_work(model, cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    small = tiny_model(hidden_size=32, num_attention_heads=1, num_key_value_heads=1)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, 'no-such-compiler' was not found"):
        build_package(Engine(small))


def test_int4_is_refused_where_it_is_asked_for(model, capsys):
    """The step takes no int4: --help does not offer it, and the function says so."""
    with pytest.raises(UsageError, match="argument --quantize: invalid choice: 'int4'"):
        main(["--quantize", "int4"])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--quantize {none,int8}" in capsys.readouterr().out
    with pytest.raises(UsageError, match="plain or int8 weights, got int4"):
        build_package(QuantizedEngine(model, "int4"))


@pytest.mark.slow
def test_the_command_compiles_once(model, compiled, cache, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    assert main(["--model", str(tmp_path), "--dtype", "fp32"]) == 0
    assert "is there already; --fresh makes it anew" in capsys.readouterr().err
