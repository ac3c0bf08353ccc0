"""The model under torch.compile: one compilation serves every training step."""

import pytest
import torch

from bench.step import TrainingStep
from bench.train_step import build
from smollm2 import SmolLM2ForCausalLM
from smollm2.config import SmolLM2Config

CONFIG = SmolLM2Config.preset("tiny", num_hidden_layers=2)


@pytest.fixture
def ids():
    return torch.randint(CONFIG.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("loss", ["torch", "torch,all-logits"])
def test_a_second_step_and_new_weights_compile_nothing(loss, ids):
    """The first step made the rotary tables and the second found them: once that compiled the model twice."""
    torch.compiler.reset()
    model = build(CONFIG, loss, torch.device("cpu"))
    first = {name: value.clone() for name, value in model.state_dict().items()}
    step = TrainingStep(model, torch.compile(model, backend="eager"))
    losses = [step(ids)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses += [step(ids) for _ in range(2)]
        model.load_state_dict(first)
        again = TrainingStep(model, step._forward)
        assert [again(ids) for _ in range(3)] == losses
    torch.compiler.reset()


def test_the_rotary_tables_are_there_before_the_first_step():
    model = SmolLM2ForCausalLM(CONFIG, "torch")
    tables = model.model._rotary[torch.device("cpu")]
    assert model.pack() and model.model.rotary(torch.device("cpu")) is tables
    with torch.device("meta"):
        empty = SmolLM2ForCausalLM(CONFIG, "torch")
    assert not empty.model._rotary
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty.model._rotary[torch.device("cpu")][0], tables[0])


@pytest.mark.parametrize("length", [CONFIG.head_dim // 2, CONFIG.head_dim // 2 + 1])
def test_any_first_length_is_one_graph_of_dynamic_sizes(length):
    """A length that is also the width of the rotary tables: once the compiler took both for one size."""
    torch.compiler.reset()
    model = SmolLM2ForCausalLM(CONFIG, "torch")
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for tokens in (length, length + 3):
        ids = torch.randint(CONFIG.vocab_size, (2, tokens))
        torch.testing.assert_close(compiled(ids, labels=ids).loss, model(ids, labels=ids).loss)
    torch.compiler.reset()
