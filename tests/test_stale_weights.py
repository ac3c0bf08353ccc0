"""Weights that change by any means while engines are held: what is derived from them never goes stale."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_cases import GREEDY, looped, tiny_model, tiny_tokenizer
from torch import Tensor

from smollm2 import SmolLM2ForCausalLM, generate
from smollm2.engine import eager_step, native
from smollm2.engine.compiled import CompiledEngine
from smollm2.engine.digest import digest
from smollm2.engine.eager import Engine
from smollm2.engine.loops import DecodeLoops
from smollm2.engine.quantized import QuantizedEngine, quantize_all, quantized_layers
from smollm2.errors import UsageError
from smollm2.generation.batch import generate_many
from smollm2.generation.speculative import DraftModel, speculative_steps
from smollm2.pretrained.load import load_model, origin, save_model
from smollm2.working_copies import WorkingCopies
from train.config import RunConfig
from train.evaluation import sample

IDS = torch.arange(1, 13).view(2, 6)


def fused(optimizer: type[torch.optim.Optimizer]) -> Callable[[SmolLM2ForCausalLM], None]:
    def write(model: SmolLM2ForCausalLM) -> None:
        steps: Any = optimizer(model.parameters(), lr=0.1, fused=True)  # type: ignore[call-arg]
        model(IDS, labels=IDS).loss.backward()
        steps.step()
        steps.zero_grad()

    return write


def by_vector(model: SmolLM2ForCausalLM) -> None:
    vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.nn.utils.vector_to_parameters(vector + 0.3 * torch.randn_like(vector), model.parameters())


def by_data(model: SmolLM2ForCausalLM) -> None:
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn_like(parameter))


def by_sign(model: SmolLM2ForCausalLM) -> None:
    model.model.layers[1].mlp.down_proj.weight.data.neg_()


def by_sign_of_columns(model: SmolLM2ForCausalLM) -> None:
    """Highest bits of words alone: in bfloat16, every fourth column has them."""
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, 3::4].neg_()  # type: ignore[union-attr]


def by_order(model: SmolLM2ForCausalLM) -> None:
    """The same numbers in other places."""
    weight = model.model.layers[0].self_attn.o_proj.weight.data
    weight.copy_(weight.flip(0))
    weight = model.model.layers[0].mlp.down_proj.weight.data
    weight.copy_(weight.roll(4, 1))


def by_address(model: SmolLM2ForCausalLM) -> None:
    """As a kernel writes that torch knows nothing of."""
    for parameter in model.parameters():
        memory = parameter.detach().view(torch.uint8).numpy()
        memory[...] = torch.randn(parameter.shape).to(parameter.dtype).view(torch.uint8).numpy()


def by_loading(assign: bool) -> Callable[[SmolLM2ForCausalLM], None]:
    def write(model: SmolLM2ForCausalLM) -> None:
        other = tiny_model(seed=5).to(model.dtype)
        model.load_state_dict(other.state_dict(), assign=assign)

    return write


def by_new_tie(model: SmolLM2ForCausalLM) -> None:
    model.model.embed_tokens.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.tie_weights()


def by_transposing(model: SmolLM2ForCausalLM) -> None:
    """A square matrix, at the address that it had."""
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.t()


WRITES = {
    "fused AdamW": fused(torch.optim.AdamW), "fused Adam": fused(torch.optim.Adam), "vector": by_vector,
    "data": by_data, "sign": by_sign, "columns": by_sign_of_columns,
    "order": by_order, "address": by_address, "load": by_loading(False),
    "load, assigned": by_loading(True), "tie": by_new_tie, "transposed": by_transposing,
}  # fmt: skip


ENGINES: dict[str, Callable[[SmolLM2ForCausalLM], Engine]] = {
    "eager": Engine, "int8": lambda model: QuantizedEngine(model, "int8"),
    "int4": lambda model: QuantizedEngine(model, "int4"),
    "compiled": lambda model: CompiledEngine(Engine(model), native._installed()),
    "compiled int8": lambda model: CompiledEngine(QuantizedEngine(model, "int8"), native._installed()),
}  # fmt: skip


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    """The name of an engine that can be made here."""
    if request.param.startswith("compiled"):
        request.getfixturevalue("installed_step")
    return request.param


def bf16_model() -> SmolLM2ForCausalLM:
    return tiny_model().bfloat16()


def decode_logits(engine: Engine) -> Tensor:
    cache = engine.allocate(2, 9)
    engine.prefill(IDS, torch.tensor([6, 6]), cache)
    rows = [engine.decode(IDS[:, :1], cache)]
    single = engine.allocate(1, 9)
    engine.prefill(IDS[:1], torch.tensor([6]), single)
    return torch.cat([*rows, engine.decode(IDS[:1, :1], single)])


@pytest.mark.parametrize("kind", ENGINES, indirect=True)
@pytest.mark.parametrize("write", WRITES)
def test_an_engine_decodes_with_the_weights_of_now(kind, write):
    model = bf16_model()
    engine = ENGINES[kind](model)
    before = decode_logits(engine)
    assert torch.equal(decode_logits(engine), before)
    WRITES[write](model)
    after, fresh = decode_logits(engine), decode_logits(ENGINES[kind](copy.deepcopy(model)))
    assert torch.equal(after, fresh) and not torch.equal(after, before)


@pytest.mark.parametrize("kind", ENGINES, indirect=True)
def test_an_engine_follows_its_model_to_another_dtype(kind):
    model = bf16_model()
    engine = ENGINES[kind](model)
    decode_logits(engine)
    model.float()
    WRITES["data"](model)
    expected = decode_logits(ENGINES[kind](copy.deepcopy(model)))
    assert torch.equal(decode_logits(engine), expected)


def test_a_quantised_engine_does_not_follow_its_model_off_the_cpu():
    model = bf16_model()
    engine = QuantizedEngine(model, "int8")
    model.to("meta")
    with pytest.raises(UsageError, match="quantize=int8 runs on the CPU only, the model is on meta"):
        engine.decode(IDS.to("meta"), engine.allocate(2, 9))


def many(model: SmolLM2ForCausalLM, engine: Engine) -> object:
    return sorted(generate_many(model, IDS.tolist(), max_new_tokens=6, engine=engine))


def looped_tokens(model: SmolLM2ForCausalLM, engine: Engine) -> object:
    loops = engine.__dict__.setdefault("kept_loops", DecodeLoops(engine))
    return looped(loops, IDS, torch.ones_like(IDS), [0, 1], params=GREEDY, max_new_tokens=6)


def drafted(model: SmolLM2ForCausalLM, engine: Engine) -> object:
    draft = DraftModel(engine)
    return list(speculative_steps(model, IDS[:1], draft=draft, max_new_tokens=6, engine=engine))


@pytest.mark.parametrize("use", [many, looped_tokens, drafted])
@pytest.mark.parametrize("kind", ["eager", "int8", "compiled"], indirect=True)
def test_every_loop_looks_at_the_weights(use, kind):
    model = bf16_model()
    engine = ENGINES[kind](model)
    before = use(model, engine)
    WRITES["fused AdamW"](model)
    twin = copy.deepcopy(model)
    assert use(model, engine) == use(twin, ENGINES[kind](twin)) != before


def test_samples_of_a_training_run_are_those_of_its_weights():
    """A bf16 model that is trained by the optimizer of train/ and sampled in turns."""
    model, tokenizer = tiny_model(vocab_size=tiny_tokenizer().vocab_size).bfloat16(), tiny_tokenizer()
    config = RunConfig(paths=["corpus.txt"], output_dir="run", sample_tokens=24)
    before = sample(model, tokenizer, config)
    fused(torch.optim.AdamW)(model)
    after = sample(model, tokenizer, config)
    assert after == sample(copy.deepcopy(model), tokenizer, config) != before


@pytest.mark.parametrize("write", ["data", "address", "vector", "fused AdamW", "load, assigned"])
def test_an_evaluation_reads_no_working_copy_of_before(write):
    """Weights swapped for an average and back, as training loops do around an evaluation."""
    model = tiny_model().train()
    model.compute_dtype = torch.bfloat16
    model.use_working_copies(WorkingCopies(model, torch.bfloat16))

    def losses() -> list[float]:
        twin = copy.deepcopy(model)
        assert twin.working_copies is None and model.working_copies is not None
        return [one(IDS, labels=IDS).loss.item() for one in (model, twin)]

    model.working_copies.refresh()
    (before, _), kept = losses(), [parameter.detach().clone() for parameter in model.parameters()]
    WRITES[write](model)
    model.eval()
    ours, expected = losses()
    assert ours == expected != before
    for parameter, value in zip(model.parameters(), kept, strict=True):
        parameter.data.copy_(value)
    model.train()
    assert losses() == [before, before]


def test_weights_are_looked_at_once_a_batch_and_not_at_every_token(monkeypatch):
    calls: list[object] = []
    monkeypatch.setattr(eager_step, "digest", lambda model: calls.append(model) or digest(model))
    monkeypatch.setattr(eager_step, "onednn", lambda dtype: True)
    monkeypatch.setattr(eager_step, "pack", lambda matrix: matrix)
    model = bf16_model()
    engine = Engine(model)
    for _ in range(2):
        calls.clear()
        prompts = [[1 + index] * 5 for index in range(7)]
        assert len(dict(generate_many(model, prompts, max_new_tokens=9, slots=2, engine=engine))) == 7
        assert len(calls) == 1
    calls.clear()
    generate(model, IDS[:1], max_new_tokens=9, eos_token_id=[], engine=engine)
    assert len(calls) == 1
    calls.clear()
    generate(model, IDS[:1], max_new_tokens=1, eos_token_id=[], engine=engine)
    assert not calls, "no step, no look"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_digest_tells_every_number_and_its_place(dtype):
    model = tiny_model(hidden_size=90, intermediate_size=130, vocab_size=511).to(dtype)
    found = {digest(model)}
    for parameter in model.parameters():
        for place in (0, -1, parameter.numel() // 2):
            values = parameter.data.view(-1)
            kept = values[place].clone()
            values[place] = kept + 0.5
            found.add(digest(model))
            values[place] = kept
    assert len(found) == 1 + 3 * len(list(model.parameters()))
    assert digest(model) in found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMOLLM2_CACHE", str(tmp_path / "cache"))
    save_model(bf16_model(), tmp_path / "model")
    return tmp_path / "model"


def has_head_of(folder: Path, quantised: tuple[Any, Any]) -> bool:
    model = load_model(folder, "torch")
    want = quantize_all(model.pack(), model.lm_head.weight.detach(), "int8")["head.values"]
    return torch.equal(quantised[1].values, want)


@pytest.mark.parametrize("write", WRITES)
def test_a_changed_model_has_no_origin_and_leaves_the_cache_alone(write, folder, tmp_path):
    model = load_model(folder, "torch")
    assert origin(model) == folder
    WRITES[write](model)
    assert origin(model) is None
    quantized_layers(model, "int8")
    assert not (tmp_path / "cache").exists()
    assert has_head_of(folder, quantized_layers(load_model(folder, "torch"), "int8"))


def test_a_changed_folder_is_no_origin_of_an_older_model(folder, tmp_path):
    """Else its entry of the cache would hold the weights that the folder had before."""
    model = load_model(folder, "torch")
    save_model(tiny_model(seed=3).bfloat16(), folder)
    assert origin(model) is None
    quantized_layers(model, "int8")
    assert not (tmp_path / "cache").exists()
    (folder / "model.safetensors").unlink()
    assert origin(model) is None
