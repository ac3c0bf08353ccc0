"""The shape of a model, a frozen record with Hugging Face's field names; the released ones are presets."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smollm2.errors import LoadError, UsageError

# The first five are required in a config.json.
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
ARCHITECTURE = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, tie_word_embeddings=True)


@dataclass(frozen=True)
class SmolLM2Config:
    """Hyper-parameters of a SmolLM2 model; the defaults are SmolLM2-135M as released.

    Field names are those of `transformers.LlamaConfig`, so that `config.json` is exchanged without
    translation. `eos_token_id` may be one id or several. Source: HuggingFaceTB/SmolLM2-135M, config.json.
    """

    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    head_dim: int = 64
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    rope_theta: float = 100000.0
    initializer_range: float = 1 / 24  # 1 / sqrt(576)
    attention_dropout: float = 0.0
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 0
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"config: {name} must be a positive integer, got {value!r}")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (is_number and 0 < value < math.inf):
                raise UsageError(f"config: {name} must be a positive number, got {value!r}")
        if not 0.0 <= self.attention_dropout < 1.0:
            raise UsageError(f"config: attention_dropout must be in [0, 1), got {self.attention_dropout!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"config: num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise UsageError(f"config: head_dim must be even for rotary embeddings, got {self.head_dim}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> SmolLM2Config:
        """A released size ("135M", "360M", "1.7B") or "tiny" (for tests), with single fields replaced."""
        if name not in PRESETS:
            raise UsageError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SmolLM2Config:
        """From the content of a Hugging Face `config.json`; refuses what this architecture does not have.

        Both spellings of rotary parameters are understood: `rope_theta` at the top (transformers 4) and
        `rope_parameters: {rope_theta, rope_type}` (transformers 5).
        """
        model_type = data.get("model_type", "llama")
        if model_type != "llama":
            expected = "must be 'llama' (SmolLM2 uses the Llama architecture)"
            raise LoadError(f"config: model_type {expected}, got {model_type!r}")
        # In transformers' LlamaConfig a missing tie_word_embeddings means False; SmolLM2 always writes it.
        for name, wanted in ARCHITECTURE.items():
            if data.get(name, wanted) != wanted:
                raise LoadError(f"config: {name} must be {wanted!r} for SmolLM2, got {data[name]!r}")
        rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            hint = "SmolLM2 uses plain rotary embeddings"
            raise LoadError(f"config: rope scaling {rope_type!r} is not supported; {hint}")
        names = [field.name for field in dataclasses.fields(cls)]
        fields = {name: data[name] for name in names if data.get(name) is not None}
        if rope.get("rope_theta") is not None:
            fields["rope_theta"] = rope["rope_theta"]
        missing = [name for name in SIZES[:5] if name not in fields]
        if missing:
            raise LoadError(f"config: {', '.join(missing)} missing")
        fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
        fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
        fields.setdefault("rope_theta", 10000.0)  # the default of the format, not of SmolLM2
        for name in ("bos_token_id", "eos_token_id"):
            fields.setdefault(name, data.get(name))
        if isinstance(fields["eos_token_id"], list):
            fields["eos_token_id"] = tuple(fields["eos_token_id"])
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` that transformers (4 and 5) reads as a `LlamaForCausalLM`."""
        data = dataclasses.asdict(self)
        if isinstance(self.eos_token_id, tuple):
            data["eos_token_id"] = list(self.eos_token_id)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **ARCHITECTURE,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            **data,
        }

    @classmethod
    def from_file(cls, path: str | Path) -> SmolLM2Config:
        """From a `config.json` on disk."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise LoadError(f"{path}: no such file") from None
        except (ValueError, OSError) as error:
            raise LoadError(f"{path}: not a readable JSON file ({error})") from None
        if not isinstance(data, dict):
            raise LoadError(f"{path}: expected a JSON object, got {type(data).__name__}")
        try:
            return cls.from_dict(data)
        except (ValueError, RuntimeError) as error:
            raise LoadError(f"{path}: {error}") from None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a text; empty if none is known."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def check_ids(self, name: str, low: int, high: int) -> None:
        """Raises UsageError unless ids from low to high are all in the vocabulary."""
        if low < 0 or high >= self.vocab_size:
            found = low if low < 0 else high
            raise UsageError(f"{name}: expected ids in [0, {self.vocab_size}), got {found}")

    def replace(self, **changes: Any) -> SmolLM2Config:
        """A copy with single fields replaced, validated again."""
        return dataclasses.replace(self, **changes)

    def num_parameters(self) -> int:
        """Parameters of the model with its head tied to the embedding, counted once."""
        heads = (2 * self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        layer = self.hidden_size * (heads + 3 * self.intermediate_size + 2)
        return self.hidden_size * (self.vocab_size + 1) + self.num_hidden_layers * layer


PRESETS: dict[str, dict[str, Any]] = {
    "135M": {},
    "360M": dict(
        hidden_size=960, intermediate_size=2560, num_hidden_layers=32,
        num_attention_heads=15, num_key_value_heads=5, initializer_range=0.02,
    ),
    "1.7B": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
        num_key_value_heads=32, rope_theta=130000.0, initializer_range=0.02,
    ),
    "tiny": dict(
        vocab_size=512, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512, initializer_range=96**-0.5,
    ),
}  # fmt: skip
