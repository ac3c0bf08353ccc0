"""What programs around a model do: lists for ids, torch.autocast, assigned weights, contexts beyond the first
rotary tables.
"""

from __future__ import annotations

import copy

import numpy
import pytest
import torch
from generation_cases import GREEDY, looped, prompts, random_ids, tiny_model

from smollm2 import SmolLM2Config, generate, layers
from smollm2.engine.compiled import CompiledEngine
from smollm2.engine.eager import Engine
from smollm2.engine.loops import DecodeLoops
from smollm2.errors import UsageError
from smollm2.generation.speculative import PromptLookup, speculative_steps
from smollm2.layers import rotary_tables

ROWS = [[5, 6, 7], [8, 9, 10]]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "ids",
    [
        ROWS, tuple(map(tuple, ROWS)), numpy.array(ROWS), numpy.array(ROWS, dtype=numpy.uint8),
        torch.tensor(ROWS, dtype=torch.int32), torch.tensor(ROWS, dtype=torch.int16),
    ],
)  # fmt: skip
def test_ids_of_any_integer_kind_are_those_of_a_tensor(ids):
    model, tensor = tiny_model(), torch.tensor(ROWS)
    options = dict(max_new_tokens=4, eos_token_id=[])
    assert torch.equal(generate(model, ids, **options), generate(model, tensor, **options))
    assert torch.equal(model(ids).logits, model(tensor).logits)
    assert torch.equal(model(ids, labels=ids).loss, model(tensor, labels=tensor).loss)
    starts = [[0, 0, 2], [0, 1, 1]]
    expected = model(tensor, doc_start=torch.tensor(starts, dtype=torch.int32)).logits
    assert torch.equal(model(ids, doc_start=starts).logits, expected)
    first = next(speculative_steps(model, ids[:1], draft=PromptLookup(), max_new_tokens=4))
    assert first == generate(model, tensor[:1], **options)[0, 3:4].tolist()
    masked = generate(model, ids, [[1, 1, 0], [1, 1, 1]], **options)
    assert torch.equal(masked, generate(model, tensor, torch.tensor([[1, 1, 0], [1, 1, 1]]), **options))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5, 6, 7], r"integer ids of shape \[B, T\], got torch.int64 \[3\]"),
        ([[5, 6], [7]], "as lists of one length, got list"),
        ([[1.5, 2.0]], r"got torch.float32 \[1, 2\]"),
        ([[True, False]], r"got torch.bool \[1, 2\]"),
        (torch.ones(1, 2, dtype=torch.complex64), "got torch.complex64"),
        ([["a"]], "got list"),
        ("text", "got str"),
        (None, "got NoneType"),
        ({"input_ids": ROWS}, "got dict"),
        ([[1 << 70]], "got list"),
        ([[[5]]], r"got torch.int64 \[1, 1, 1\]"),
        ([[5, 512]], r"ids in \[0, 512\), got 512"),
        ([[-1]], "got -1"),
    ],
)
def test_other_ids_are_refused_in_one_line(ids, message):
    model = tiny_model()
    for call in (lambda: generate(model, ids, max_new_tokens=1), lambda: model(ids)):
        with pytest.raises(UsageError, match=message) as refusal:
            call()
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_made_in_inference_mode_generates(dtype):
    with torch.inference_mode():
        model = tiny_model().to(dtype)
        ours = generate(model, ROWS, max_new_tokens=3)
    assert torch.equal(ours, generate(tiny_model().to(dtype), ROWS, max_new_tokens=3))
    assert torch.equal(ours, generate(model, ROWS, max_new_tokens=3))


@pytest.mark.parametrize("ids", [[], [[]], [[], []], torch.zeros(1, 0, dtype=torch.int64)])
def test_no_ids_are_refused_in_one_line(ids):
    with pytest.raises(UsageError, match="shape \\[B, T\\]|at least one token"):
        generate(tiny_model(), ids, max_new_tokens=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast_is_its_dtype_as_compute_dtype(dtype, backward_inside):
    model, ids = tiny_model(), random_ids(2, 33)
    twin = copy.deepcopy(model)
    twin.compute_dtype = dtype
    expected = twin(ids, labels=ids).loss
    expected.backward()
    with torch.autocast("cpu", dtype):
        loss = model(ids, labels=ids).loss
        logits = model(ids).logits
        if backward_inside:
            loss.backward()
        with torch.autocast("cpu", enabled=False):
            full = model(ids).logits
    if not backward_inside:
        loss.backward()
    assert torch.equal(loss, expected) and torch.equal(logits, twin(ids).logits)
    assert torch.equal(full, copy.deepcopy(model)(ids).logits)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0.1, atol=1e-2)


@pytest.mark.parametrize("cast", [torch.Tensor.float, torch.Tensor.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_generation_inside_autocast_is_that_outside(cast, batch):
    model, ids = tiny_model(), random_ids(batch, 6)
    model.to(cast(torch.zeros(1)).dtype)
    options = dict(max_new_tokens=8, eos_token_id=[], temperature=0.7)
    expected = generate(model, ids, **options)
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        assert torch.equal(generate(model, ids, **options), expected)
        with pytest.raises(UsageError, match="torch.autocast: expected none .*compute_dtype=torch.bfloat16"):
            model.model(ids)


def test_a_compute_dtype_comes_before_that_of_autocast():
    model, ids = tiny_model(), random_ids(1, 9)
    model.compute_dtype = torch.bfloat16
    expected = model(ids).logits
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(model(ids).logits, expected)


def other_state(names: slice = slice(None)) -> dict[str, torch.Tensor]:
    return dict(list(tiny_model(seed=7).state_dict().items())[names])


@pytest.mark.parametrize(
    "load",
    [
        lambda model: model.load_state_dict(other_state(), assign=True),
        lambda model: model.load_state_dict(other_state(), strict=False, assign=True),
        lambda model: model.load_state_dict(state_dict=other_state(slice(-1)), strict=False, assign=True),
        lambda model: model.load_state_dict(other_state(slice(-1, None)), strict=False, assign=True),
        lambda model: model.to_empty(device="cpu").load_state_dict(other_state()),
        lambda model: copy.deepcopy(model.to("meta")).load_state_dict(other_state(), assign=True),
    ],
)
def test_the_head_stays_tied(load):
    """Assigned as a whole, without the head (as files have it), as the head alone, over memory of its own."""
    model, expected = tiny_model(), tiny_model(seed=7).lm_head.weight
    result = load(model)
    assert not result.unexpected_keys
    if model.device.type != "meta":
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, expected)
        assert model.num_parameters() == model.config.num_parameters()


def test_a_head_that_was_untied_is_left_so():
    model = tiny_model()
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    state = model.state_dict()
    model.float().load_state_dict(state, assign=True)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_rotary_tables_are_as_long_as_what_is_used(monkeypatch):
    """A config may claim any number of positions. Values do not depend on how the tables grew."""
    claimed = tiny_model(max_position_embeddings=30_000_000)
    assert len(claimed.model.rotary(CPU)[0]) == layers.ROTARY_POSITIONS
    monkeypatch.setattr(layers, "ROTARY_POSITIONS", 8)
    model, whole = tiny_model(max_position_embeddings=30_000_000), tiny_model(max_position_embeddings=512)
    ids, mask = prompts((30, 11))
    options = dict(max_new_tokens=40, eos_token_id=[])
    assert len(model.model.rotary(CPU)[0]) == 8
    assert torch.equal(model(ids).logits, whole(ids).logits)
    assert len(model.model.rotary(CPU)[0]) == 32
    assert torch.equal(generate(model, ids, mask, **options), generate(whole, ids, mask, **options))
    tables = model.model.rotary(CPU)
    assert len(tables[0]) == 128 and model.model.rotary(CPU, 100) is tables
    for table, full in zip(tables, rotary_tables(whole.config, CPU), strict=True):
        assert torch.equal(table, full[:128])
    shrunk = tiny_model(max_position_embeddings=100)
    assert len(shrunk.model.rotary(CPU, 90)[0]) == 100, "never longer than the config"
    with pytest.raises(UsageError, match="at most 100 positions, got 101"):
        shrunk(random_ids(1, 101))


@pytest.mark.parametrize("head_dim", [32, 6, 10, 64])
def test_a_longer_table_begins_as_a_shorter_one(head_dim):
    config = SmolLM2Config.preset("tiny", head_dim=head_dim, max_position_embeddings=3000)
    longest = rotary_tables(config, CPU)
    for positions in (1, 7, 64, 1000, 2048):
        for table, long in zip(rotary_tables(config, CPU, positions), longest, strict=True):
            assert torch.equal(table, long[:positions])


def test_loops_and_the_compiled_step_have_tables_for_all_they_reach(monkeypatch, installed_step):
    monkeypatch.setattr(layers, "ROTARY_POSITIONS", 8)
    model, whole = tiny_model(), tiny_model()
    whole.model.rotary(CPU, 512)
    ids, mask = prompts((20, 5))
    options = dict(params=GREEDY, max_new_tokens=90)
    found = [looped(DecodeLoops(Engine(one), 4), ids, mask, [0, 1], **options) for one in (model, whole)]
    assert found[0] == found[1]
    engines = CompiledEngine(Engine(tiny_model()), installed_step), Engine(whole)
    options = dict(max_new_tokens=90, eos_token_id=[])
    texts = [generate(engine.model, ids, mask, engine=engine, **options) for engine in engines]
    assert torch.equal(*texts)
