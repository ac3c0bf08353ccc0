"""Each released size has exactly the parameters of transformers' Llama built from the same configuration."""

from __future__ import annotations

import pytest
import torch

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")


@pytest.mark.parametrize(
    ("preset", "expected"), [("135M", 134_515_008), ("360M", 361_821_120), ("1.7B", 1_711_376_384)]
)
def test_parameters_are_those_of_transformers(preset, expected):
    config = SmolLM2Config.preset(preset)
    with torch.device("meta"):
        ours = SmolLM2ForCausalLM(config, backend="torch")
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_dict()))
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    counted = sum(parameter.numel() for parameter in theirs.parameters())
    assert expected == config.num_parameters() == ours.num_parameters() == counted
    assert f"{expected:,} parameters" in repr(ours)
