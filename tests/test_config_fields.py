"""A config.json that asks for another architecture, contradicts itself or is no sound JSON is refused with
the name of the field; values that change nothing are accepted.
"""

import json
import os

import pytest
import torch

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.errors import LoadError, UsageError
from smollm2.json_file import SIZE_LIMIT, read_json

TINY = SmolLM2Config.preset("tiny")  # head_dim 32, 512 positions
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LONG = dict(rope_type="longrope", short_factor=[1.0] * 16, long_factor=[2.0] * 16)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("rope_scaling", {kind: name, "factor": 2.0})
          for name in ("linear", "dynamic", "yarn", "su", "ntk") for kind in ("type", "rope_type")),
        *((name, scaling) for name in ("rope_scaling", "rope_parameters") for scaling in (LLAMA3, LONG)),
        ("rope_scaling", {"factor": 4.0}),  # without a type
        ("rope_scaling", {"type": "default", "rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"type": "dynamic", "factor": 1.0}),
        ("rope_scaling", [8.0]),
        ("rope_parameters", {"rope_type": "linear", "factor": 8.0}),
        ("rope_parameters", {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}, "sliding_attention": LLAMA3}),
        ("partial_rotary_factor", 0.25), ("rope_interleaved", True), ("no_rope_layers", [1, 0]),
        ("attention_bias", True), ("mlp_bias", True), ("hidden_act", "gelu"), ("tie_word_embeddings", False),
        ("sliding_window", 128), ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("logits_scaling", 8.0), ("final_logit_softcapping", 30.0), ("attn_logit_softcapping", 50.0),
        ("embedding_multiplier", 12.0), ("residual_multiplier", 0.22), ("attention_multiplier", 0.0078125),
        ("query_pre_attn_scalar", 256), ("qk_norm", True),
        ("rotary_dim", 16), ("rotary_percentage", 0.25), ("rope_local_base_freq", 5000.0),
        ("use_mrope", True), ("position_embedding_type", "learned"), ("dual_chunk_attention_config", {}),
        ("is_causal", False), ("use_bidirectional_attention", True), ("add_cross_attention", True),
        ("activation_function", "gelu"), ("lm_head_multiplier", 0.5), ("scale_embedding", True),
        ("attn_bias", True), ("use_qkv_bias", True), ("lm_head_bias", True),
        ("pretraining_tp", 2), ("num_local_experts", 8),
        ("quantization_config", {"quant_method": "awq"}),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name(field, value):
    with pytest.raises(LoadError, match=f"config: {field}"):
        SmolLM2Config.from_dict({**TINY.to_dict(), field: value})


@pytest.mark.parametrize(
    "fields",
    [
        dict(rope_scaling=None, sliding_window=None, quantization_config=None, layer_types=None),
        dict(attention_bias=None, hidden_act=None, tie_word_embeddings=None),
        dict(rope_scaling={"rope_type": "default"}), dict(rope_scaling={"type": "linear", "factor": 1.0}),
        dict(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": TINY.rope_theta}}),
        dict(rope_interleaved=False, pretraining_tp=1, hidden_act="swish", partial_rotary_factor=1.0),
        dict(sliding_window=4096), dict(sliding_window=128, use_sliding_window=False),
        dict(layer_types=["full_attention"] * 2, no_rope_layers=[1, 1], num_local_experts=0),
        dict(logits_scaling=1.0, final_logit_softcapping=None, attention_multiplier=32**-0.5),
        dict(query_pre_attn_scalar=32, n_kv_heads=1, a_field_of_tomorrow={"x": [1]}, use_cache=True),
    ],
)  # fmt: skip
def test_values_that_change_nothing_are_accepted(fields):
    assert SmolLM2Config.from_dict({**TINY.to_dict(), **fields}) == TINY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rope_theta=10000.0), "rope_theta is 10000.0 and 100000.0 in one file"),
        (dict(rope_scaling={"rope_theta": 5e5}), "rope_theta is 100000.0 and 100000.0 and 500000.0"),
        (dict(rotary_emb_base=10000), "rotary_emb_base must be 100000.0 for SmolLM2, got 10000"),
        (dict(num_kv_heads=3), "num_kv_heads must be 1"),
        (dict(hidden_size=100, head_dim=None), r"head_dim missing; hidden_size \(100\) must then be"),
        (dict(hidden_size="576"), "hidden_size must be a positive integer, got '576'"),
        (dict(num_attention_heads=0, head_dim=None), "num_attention_heads must be a positive integer, got 0"),
        (dict(num_hidden_layers=2**40), "num_hidden_layers must be at most 262144"),
        (dict(vocab_size=2**31), "vocab_size must be at most 2147483647"),
        (dict(hidden_size=10**400), "hidden_size must be at most 262144, got 1000"),
        (dict(rms_norm_eps=10**400), "rms_norm_eps must be a positive number below 1, got 1000"),
        (dict(rms_norm_eps=1e-300), "rms_norm_eps must be a positive number"),
        (dict(rms_norm_eps=1e5), "rms_norm_eps must be a positive number below 1, got 100000.0"),
        (dict(attention_dropout="none"), r"attention_dropout must be in \[0, 1\), got 'none'"),
        (dict(eos_token_id=[2, "<|im_end|>"]), "eos_token_id must be a token id, got '<|im_end|>'"),
        (dict(bos_token_id=2**31), "bos_token_id must be a token id, got 2147483648"),
    ],
)  # fmt: skip
def test_contradictions_and_absurd_values_are_refused(tmp_path, changes, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**TINY.to_dict(), **changes}))
    with pytest.raises(LoadError, match=rf"config\.json: config: {message}") as caught:
        SmolLM2Config.from_file(path)
    assert len(str(caught.value)) < 400


def test_absent_fields_have_the_values_that_transformers_gives_them():
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    given = {name: getattr(TINY, name) for name in sizes}
    ours, theirs = SmolLM2Config.from_dict(given), transformers.LlamaConfig(**given)
    for name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("preset", ["tiny", "360M"])
def test_the_shapes_of_a_configuration_are_those_of_its_model(preset):
    config = SmolLM2Config.preset(preset, num_hidden_layers=2)
    with torch.device("meta"):
        model = SmolLM2ForCausalLM(config, "torch")
    assert config.parameter_shapes() == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert config.num_parameters() == model.num_parameters()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": NaN}', "NaN is not JSON"), (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1, "a": 2}', "'a' is given twice: 1 and 2"), (b'{"b": [{"a": 1, "a": 2}]}', "given twice"),
        (b"[" * 100_000, "nested too deeply"), (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "integer string conversion"),
        (b'{"a": "\xff"}', "invalid start byte"),
        (b"[1]", "expected a JSON object, got list"), (b"", "Expecting value"),
        (b" " * (SIZE_LIMIT + 1), f"expected at most {SIZE_LIMIT} bytes, got {SIZE_LIMIT + 1}"),
    ],
    ids=range(11),
)  # fmt: skip
def test_what_is_no_sound_json_is_refused_by_file(tmp_path, content, message):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=rf"some\.json: .*{message}"):
        read_json(path)


def test_a_name_given_twice_alike_is_no_contradiction(tmp_path):
    (tmp_path / "some.json").write_text('{"a": [1], "a": [1]}')
    assert read_json(tmp_path / "some.json") == {"a": [1]}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes, which Windows does not have")
def test_a_pipe_or_a_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", tmp_path):
        with pytest.raises(LoadError, match="a folder, a pipe or a device"):
            read_json(path)


def test_a_size_beyond_its_limit_is_refused_in_code_too():
    with pytest.raises(UsageError, match="num_hidden_layers must be at most 262144, got 1000000"):
        TINY.replace(num_hidden_layers=10**6)
