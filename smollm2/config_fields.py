"""The fields of a Hugging Face config.json that decide what a Llama model computes.

This project implements one architecture. A field that asks for another one is refused with its name: a model
that ignores it answers in fluent nonsense.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

from smollm2.errors import LoadError

ARCHITECTURE = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, tie_word_embeddings=True)
# What transformers' LlamaConfig takes for a field that is absent. There a missing tie_word_embeddings means
# False; here it means True, for a file without a head of its own can mean nothing else.
FORMAT_DEFAULTS = dict(
    max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=10000.0, initializer_range=0.02
)

# Fields that change the mathematics, and the values that change nothing. An absent field and null change
# nothing either. Some are fields of other architectures, found in the files of models derived from Llama.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **{name: (value,) for name, value in ARCHITECTURE.items()},
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), ("silu", "swish")),
    "qkv_bias": (False,), "use_bias": (False,), "use_qkv_bias": (False,), "attn_bias": (False,),
    "lm_head_bias": (False,), "pretraining_tp": (0, 1), "quantization_config": (),
    "use_parallel_residual": (False,), "parallel_attn": (False,), "clip_qkv": (0,), "alibi": (False,),
    # rotary embeddings
    "partial_rotary_factor": (1,), "rotary_pct": (1,), "rope_interleaved": (False,),
    "rope_interleave": (False,), "rope_type": ("default",), "rope_scaling_type": ("default",),
    "rope_scaling_factor": (1,), "rope_ratio": (1,), "no_rope_layer_interval": (0,),
    "rotary_percentage": (1,), "use_mrope": (False,), "position_embedding_type": ("rope", "rotary"),
    # attention over other positions than all earlier ones
    "use_sliding_window": (False,), "attention_chunk_size": (0,), "is_causal": (True,),
    "use_bidirectional_attention": (False,), "add_cross_attention": (False,),
    "dual_chunk_attention_config": (),
    # scales, caps and norms of activations
    "logits_scaling": (1,), "logit_scale": (1,), "embedding_multiplier": (1,), "embedding_scale": (1,),
    "residual_multiplier": (1,), "residual_scale": (1,), "scale_emb": (1,), "scale_depth": (1,),
    "lm_head_multiplier": (1,), "scale_embedding": (False,), "scale_embeddings": (False,),
    "final_logit_softcapping": (0,), "attn_logit_softcapping": (0,), "attn_temperature_tuning": (False,),
    "qk_norm": (False,), "use_qk_norm": (False,), "qk_layernorm": (False,),
    # mixtures of experts, layers beside the common ones
    "num_local_experts": (0,), "num_experts": (0,), "n_routed_experts": (0,), "n_shared_experts": (0,),
    "num_experts_per_tok": (0,), "num_nextn_predict_layers": (0,), "num_kv_shared_layers": (0,),
}  # fmt: skip
# The same for the fields inside rope_parameters and rope_scaling, beside the type.
NEUTRAL_ROPE: dict[str, tuple[Any, ...]] = {
    "factor": (1,), "partial_rotary_factor": (1,), "attention_factor": (1,), "mscale": (1,),
    "mscale_all_dim": (0, 1), "low_freq_factor": (), "high_freq_factor": (), "short_factor": (),
    "long_factor": (), "beta_fast": (), "beta_slow": (), "mrope_section": (),
}  # fmt: skip
# Names that other programs give to fields; transformers does not read them.
OTHER_NAMES = {
    "rope_base": "rope_theta", "rotary_base": "rope_theta", "rotary_emb_base": "rope_theta",
    "rope_local_base_freq": "rope_theta", "rotary_dim": "head_dim",
    "norm_eps": "rms_norm_eps", "num_kv_heads": "num_key_value_heads", "n_kv_heads": "num_key_value_heads",
    "head_size": "head_dim", "v_head_dim": "head_dim", "query_pre_attn_scalar": "head_dim",
}  # fmt: skip


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_mathematics(data: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Raises LoadError for a field of a config.json that asks for something else than this architecture.

    fields: those of SmolLM2Config that were read from it, complete.
    """
    _check_neutral(data, NEUTRAL)
    _check_neutral(data, {other: (fields[name],) for other, name in OTHER_NAMES.items()})
    window, context = data.get("sliding_window"), fields["max_position_embeddings"]
    unlimited = data.get("use_sliding_window") is False or (is_number(window) and window >= context)
    _check_neutral(data, {"sliding_window": (0, window) if unlimited else (0,)})
    multiplier, scale = data.get("attention_multiplier"), fields["head_dim"] ** -0.5
    if not (is_number(multiplier) and 0.999999 * scale < multiplier < 1.000001 * scale):
        _check_neutral(data, {"attention_multiplier": (scale,)})
    for name, wanted in (("layer_types", "full_attention"), ("no_rope_layers", 1)):
        layers = data.get(name) or ()
        if not (isinstance(layers, Collection) and all(layer == wanted for layer in layers)):
            raise LoadError(f"config: {name} must be {wanted!r} for every layer, got {layers!r:.60}")


def rope_theta(data: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` of a config.json, if it has one. Raises LoadError unless all that the file says about
    rotary embeddings agrees and asks for plain ones.
    """
    found = [] if data.get("rope_theta") is None else [data["rope_theta"]]
    for name in ("rope_parameters", "rope_scaling"):
        given = {} if data.get(name) is None else data[name]
        if not isinstance(given, dict):
            raise LoadError(f"config: {name} must be an object, got {given!r:.60}")
        # models with several kinds of layers have an object for each kind
        for part in [given, *(value for value in given.values() if isinstance(value, dict))]:
            for kind in (part.get("rope_type"), part.get("type")):
                linear_by_one = kind == "linear" and part.get("factor") == 1
                if kind not in (None, "default") and not linear_by_one:
                    hint = "SmolLM2 uses plain rotary embeddings"
                    raise LoadError(f"config: {name}: rope scaling {kind!r:.60} is not supported; {hint}")
            _check_neutral(part, NEUTRAL_ROPE, f"{name}.")
            if part.get("rope_theta") is not None:
                found.append(part["rope_theta"])
    if any(theta != found[0] for theta in found):
        given_twice = " and ".join(f"{theta!r:.40}" for theta in found)
        raise LoadError(f"config: rope_theta is {given_twice} in one file; keep the right one")
    return {"rope_theta": found[0]} if found else {}


def _check_neutral(data: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], where: str = "") -> None:
    """Raises LoadError for a field that has none of its neutral values."""
    for name, values in neutral.items():
        if data.get(name) is not None and data[name] not in values:
            expected = " or ".join(map(repr, values)) or "null"
            raise LoadError(f"config: {where}{name} must be {expected} for SmolLM2, got {data[name]!r:.60}")
