"""What the keys of a training run may be: the choices, the ranges, the types, and how a value is written."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from smollm2.errors import UsageError
from smollm2.lora import TARGETS

DATA_SOURCES = ("embedded", "local", "hub", "mixture")
# Keys whose value is one of a few.
CHOICES = {
    "data": DATA_SOURCES,
    "format": ("text", "chat"),
    "train_on": ("assistant", "all"),
    "optimizer": ("adamw", "adamw,torch", "muon"),
    "tracker": ("none", "tensorboard", "trackio", "wandb"),
    "schedule": ("constant", "wsd", "cosine"),
    "decay_shape": ("linear", "1-sqrt"),
    "weight_decay_on": ("matrices", "all"),
    "dtype": ("fp32", "bf16"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "sharding": ("none", "full", "hybrid"),
    "cuda_graph": ("auto", "true", "false"),
}
# Keys that a source of a mixture may have of its own, besides name and weight.
SOURCE_KEYS = tuple("data paths dataset dataset_config dataset_split dataset_revision text_column".split())
# Keys that replace single fields of a preset; only for a model that starts from scratch.
SHAPE_KEYS = tuple(
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rope_theta".split()
)


def _choice(options: tuple[str, ...]) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {', '.join(options)}", lambda value: value in options


_TEXTS = (
    "model tokenizer dataset dataset_split text_column token_cache backend output_dir resume tracker_project"
)
_ABOVE_0 = (
    "lora_alpha steps batch_size grad_accumulation lr muon_lr eps max_skipped_steps log_every eval_batches "
    "tokenizer_documents sample_tokens"
)
_AT_LEAST_0 = (
    "workers epochs warmup_steps weight_decay muon_weight_decay grad_clip min_lr eval_every sample_every "
    "lora_rank sample_temperature checkpoint_every keep_checkpoints keep_every spike_zscore"
)
# keys, what is expected of their values, and whether a value is that
RULES: list[tuple[Sequence[str], str, Callable[[Any], bool]]] = [
    *(([name], *_choice(options)) for name, options in CHOICES.items()),
    (_TEXTS.split(), "some text", lambda value: value.strip() != ""),
    ([*SHAPE_KEYS, *_ABOVE_0.split()], "a number above 0", lambda value: value > 0),
    (_AT_LEAST_0.split(), "a number of at least 0", lambda value: value >= 0),
    (["seed"], "an integer of at least 0 and below 2**63", lambda value: 0 <= value < 1 << 63),
    (["sequence_length"], "an integer of at least 2 (a token and its successor)", lambda value: value >= 2),
    (
        ["vocab_size"],
        "an integer of at least 259 (256 bytes and 3 special tokens)",
        lambda value: value >= 259,
    ),
    (
        ["attention_dropout", "lora_dropout", "muon_momentum"],
        "a number in [0, 1)",
        lambda value: 0 <= value < 1,
    ),
    (
        ["lora_targets"],
        f"some of {', '.join(TARGETS)}, each once",
        lambda value: set(value) <= set(TARGETS) and len(set(value)) == len(value),
    ),
    (["decay_fraction"], "a number in (0, 1]", lambda value: 0 < value <= 1),
    (["validation_fraction"], "a number in [0, 0.5]", lambda value: 0 <= value <= 0.5),
    (
        ["betas"],
        "two numbers in [0, 1), as [0.9,0.95]",
        lambda value: len(value) == 2 and 0 <= min(value) <= max(value) < 1,
    ),
]

_TYPE_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raises UsageError if a value is not of the key's type. An integer is a number; nothing but true and
    false is a bool.
    """
    if isinstance(hint, types.UnionType):
        if value is None:
            return
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise UsageError(f"{name}: expected entries {{key: value, ...}}, got {value!r}")
        return
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        if not isinstance(value, list):
            raise UsageError(f"{name}: expected a list, got {value!r}")
        for entry in value:
            check_type(name, entry, item)
        return
    accepted = (int, float) if hint is float else (hint,)
    if type(value) not in accepted or (hint is float and not math.isfinite(value)):
        raise UsageError(f"{name}: expected {_TYPE_NAMES[hint]}, got {value!r}")


def format_value(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, list):
        return "[" + ",".join(map(format_value, value)) + "]"
    if value is None or isinstance(value, (bool, dict)):
        return json.dumps(value)
    return str(value)
