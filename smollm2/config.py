"""The shape of a model, a frozen record with Hugging Face's field names; the released ones are presets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smollm2.config_fields import ARCHITECTURE, FORMAT_DEFAULTS, check_mathematics, is_number, rope_theta
from smollm2.errors import LoadError, UsageError
from smollm2.json_file import read_json

# The first five are required in a config.json.
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
# Ids and positions are int32. No model comes near the limit of the other sizes, and the number of bytes in a
# matrix of two of them fits into an int64.
SIZE_LIMITS = {**dict.fromkeys(SIZES, 2**18), "vocab_size": 2**31 - 1, "max_position_embeddings": 2**31 - 1}


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
        _check_sizes({name: getattr(self, name) for name in SIZES})
        for name, limit in (("rms_norm_eps", 1), ("rope_theta", 1e37), ("initializer_range", 1e37)):
            value = getattr(self, name)
            # beyond these limits lie zero and infinity in fp32, in which the numbers are used
            if not (is_number(value) and 1e-37 < value < limit):
                raise UsageError(f"config: {name} must be a positive number below {limit}, got {value!r:.40}")
        if not (is_number(self.attention_dropout) and 0.0 <= self.attention_dropout < 1.0):
            raise UsageError(
                f"config: attention_dropout must be in [0, 1), got {self.attention_dropout!r:.40}"
            )
        ids = [("bos_token_id", self.bos_token_id), ("pad_token_id", self.pad_token_id)]
        given = [(name, value) for name, value in ids if value is not None]
        for name, value in [*given, *(("eos_token_id", token_id) for token_id in self.eos_token_ids)]:
            # some files have -1 for an id that the model does not use
            is_id = isinstance(value, int) and not isinstance(value, bool) and -1 <= value < 2**31
            if not is_id:
                raise UsageError(f"config: {name} must be a token id, got {value!r:.40}")
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
        """From the content of a Hugging Face `config.json`. Raises LoadError, naming the field, for what this
        architecture does not have and for a file that contradicts itself.

        Both spellings of rotary parameters are understood: `rope_theta` at the top (transformers 4) and
        `rope_parameters: {rope_theta, rope_type}` (transformers 5). Fields that are not known are ignored.
        """
        model_type = data.get("model_type", "llama")
        if model_type != "llama":
            expected = "must be 'llama' (SmolLM2 uses the Llama architecture)"
            raise LoadError(f"config: model_type {expected}, got {model_type!r:.60}")
        names = [field.name for field in dataclasses.fields(cls)]
        fields = {name: data[name] for name in names if data.get(name) is not None}
        fields |= rope_theta(data)
        missing = [name for name in SIZES[:5] if name not in fields]
        if missing:
            raise LoadError(f"config: {', '.join(missing)} missing")
        _check_sizes({name: fields[name] for name in SIZES if name in fields})
        fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
        if "head_dim" not in fields:
            hidden_size, heads = fields["hidden_size"], fields["num_attention_heads"]
            if hidden_size % heads:
                expected = f"hidden_size ({hidden_size}) must then be a multiple of num_attention_heads"
                raise LoadError(f"config: head_dim missing; {expected} ({heads})")
            fields["head_dim"] = hidden_size // heads
        fields = {**FORMAT_DEFAULTS, "bos_token_id": None, "eos_token_id": None, **fields}
        check_mathematics(data, fields)
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
        """From a `config.json` on disk. Raises LoadError, naming the file and the field."""
        data = read_json(Path(path))
        try:
            return cls.from_dict(data)
        except (LoadError, UsageError) as error:
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

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The name of every parameter and its shape; the head, which is the embedding, is not among them."""
        hidden, inner = self.hidden_size, self.intermediate_size
        heads, kv_heads = (n * self.head_dim for n in (self.num_attention_heads, self.num_key_value_heads))
        layer = {
            "input_layernorm": (hidden,), "self_attn.q_proj": (heads, hidden),
            "self_attn.k_proj": (kv_heads, hidden), "self_attn.v_proj": (kv_heads, hidden),
            "self_attn.o_proj": (hidden, heads), "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }  # fmt: skip
        shapes = {"embed_tokens": (self.vocab_size, hidden), "norm": (hidden,)}
        for index in range(self.num_hidden_layers):
            shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
        return {f"model.{name}.weight": shape for name, shape in shapes.items()}

    def num_parameters(self) -> int:
        """Parameters of the model with its head tied to the embedding, counted once."""
        return sum(map(math.prod, self.parameter_shapes().values()))


def _check_sizes(sizes: dict[str, Any]) -> None:
    """Raises UsageError unless every size is a positive integer within its limit."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"config: {name} must be a positive integer, got {value!r:.40}")
        if value > SIZE_LIMITS[name]:
            raise UsageError(f"config: {name} must be at most {SIZE_LIMITS[name]}, got {value!r:.40}")


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
