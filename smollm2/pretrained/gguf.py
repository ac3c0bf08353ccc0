"""Reads a GGUF file of the llama architecture: configuration, weights under Hugging Face's names, tokenizer.

    file = open_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")
    file.config, file.tensors(), file.tokenizer()

GGUF is llama.cpp's format: typed metadata, then tensors, quantised in blocks along their rows. Parsing and
dequantisation are those of the `gguf` package (llama.cpp's own Python side); this file translates names and
undoes the one change of layout: llama.cpp rotates neighbouring pairs of a head (0, 1), (2, 3), ... where
Hugging Face rotates halves (0, D/2), (1, D/2 + 1), ..., so its converter permutes the rows of the q and k
projections. Source: ggml/docs/gguf.md and convert_hf_to_gguf.py of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from smollm2.config import SmolLM2Config
from smollm2.errors import LoadError, UsageError
from smollm2.pretrained.files import abbreviate, check_numbers

# GGUF's name of a tensor outside the layers, and of one inside (after "blk.N."), to Hugging Face's.
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Metadata after "llama." that change the mathematics in ways which are not implemented, and the values that
# change nothing: in llama.cpp a factor of zero stands for none.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.factor": (0, 1), "rope.scale_linear": (0, 1), "rope.scaling.attn_factor": (1,),
    "rope.scaling.alpha": (0,), "rope.scaling.yarn_ext_factor": (0, -1),
    "rope.scaling.yarn_attn_factor": (1,), "rope.scaling.yarn_log_multiplier": (0,),
    "rope.scaling.yarn_beta_fast": (), "rope.scaling.yarn_beta_slow": (), "rope.dimension_sections": (),
    "attention.causal": (True,), "attention.clamp_kqv": (0,), "attention.max_alibi_bias": (0,),
    "attention.output_scale": (1,), "attention.shared_kv_layers": (0,), "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,), "logit_scale": (0, 1), "embedding_scale": (0, 1),
    "residual_scale": (0, 1), "use_parallel_residual": (False,), "expert_count": (0,),
    "expert_used_count": (0,), "nextn_predict_layers": (0,), "swiglu_clamp_exp": (),
}  # fmt: skip
# The largest models have a thousand tensors, and vocabularies of 260 thousand tokens with as many merges.
FIELDS_LIMIT, ENTRIES_LIMIT = 2**17, 2**21


def tensor_names(layers: int) -> dict[str, str]:
    """GGUF's name of every tensor of a model with so many layers -> Hugging Face's. The head is not among
    them.
    """
    inner = {f"blk.{n}.{a}": f"model.layers.{n}.{b}" for n in range(layers) for a, b in _LAYER_NAMES.items()}
    return {f"{a}.weight": f"{b}.weight" for a, b in (_OUTER_NAMES | inner).items()}


@dataclass(frozen=True)
class GGUFTokenizer:
    """What a GGUF file says about its tokenizer.

    Token types: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    """

    model: str  # "gpt2" is byte-level BPE
    pre: str  # names the pre-tokenizer, for example "smollm"
    tokens: list[str]
    merges: list[str]  # "left right", most frequent first
    token_types: list[int]
    special_ids: dict[str, int]  # of "bos_token", "eos_token", "unk_token", "pad_token", ..., where named
    chat_template: str | None


def open_gguf(path: str | Path) -> GGUFFile:
    """Opens a GGUF file, memory-mapped. Raises LoadError if it is missing, damaged or of another kind."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise LoadError(f"{path}: not readable (it is a folder, a pipe or a device)")
        with path.open("rb") as stream:
            magic = stream.read(4)
    except FileNotFoundError:
        raise LoadError(f"{path}: no such file") from None
    except OSError as error:
        raise LoadError(f"{path}: not readable ({error.strerror})") from None
    if magic != b"GGUF":
        expected = "expected it to begin with b'GGUF'"
        raise LoadError(f"{path}: not a GGUF file: {expected}, got {magic!r}; download it again")
    try:
        import numpy as np
        from gguf import GGUFReader, GGUFValueType
    except ImportError:
        hint = "install it with: pip install gguf"
        raise LoadError(f"{path}: reading GGUF needs the package gguf; {hint}") from None

    class CheckedReader(GGUFReader):
        """GGUFReader itself believes every count, cuts a read at the end of the file and needs 10 us for
        each entry of an array: here arrays are read at once, and counts and lengths are compared first.
        """

        _fields, _entries = 0, 0

        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **kwargs: Any) -> Any:
            self._fields += 1
            if self._fields > FIELDS_LIMIT:
                raise ValueError(f"its header claims more than {FIELDS_LIMIT} fields")
            values = super()._get(offset, dtype, count, *args, **kwargs)
            if len(values) < count:
                end = len(self.data)
                raise ValueError(f"the file ends at byte {end}, data is expected at byte {int(offset)}")
            return values

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, begin = GGUFValueType(self._get(orig_offs, np.uint32)[0]), orig_offs + 12
            count = int(self._get(orig_offs + 4, np.uint64)[0])
            self._entries += count
            if self._entries > ENTRIES_LIMIT:
                raise ValueError(f"its header claims more than {ENTRIES_LIMIT} entries of arrays")
            if kind == GGUFValueType.ARRAY:
                raise ValueError("an array of arrays")
            if kind != GGUFValueType.STRING:
                values = self._get(begin, self.gguf_scalar_to_np[kind], count)
                return 12 + values.nbytes, [values], [0], [GGUFValueType.ARRAY, kind]
            order: Literal["little", "big"] = "big" if self.endianess else "little"
            strings, data, end = [], self.data.data, begin
            for _ in range(count):
                length = int.from_bytes(data[end : end + 8], order)
                strings.append(data[end + 8 : end + 8 + length])
                end += 8 + length
                if end > len(data):
                    raise ValueError(f"the file ends at byte {len(data)}, a string is expected at byte {end}")
            return end - orig_offs, strings, list(range(count)), [GGUFValueType.ARRAY, kind]

    try:
        reader = CheckedReader(path)
        _check_offsets(reader)
    except Exception as error:  # corrupt bytes surface as whatever numpy or gguf trip over first
        raise LoadError(f"{path}: truncated or corrupt GGUF file ({error}); download it again") from error
    return GGUFFile(path, reader)


def _check_offsets(reader: Any) -> None:
    """Raises ValueError unless each tensor begins where the one before it ends, up to the alignment, which
    llama.cpp requires too, and the file ends with the last.
    """
    end, begin, alignment = 0, int(reader.data_offset), int(reader.alignment)
    for tensor in reader.tensors:
        if tensor.data_offset != begin:
            raise ValueError(f"{tensor.name} begins at byte {tensor.data_offset}, not at {begin}")
        end = begin + int(tensor.n_bytes)
        begin = -(-end // alignment) * alignment
    if len(reader.data) > begin:
        raise ValueError(f"its last tensor ends at byte {end}, the file at {len(reader.data)}")


class GGUFFile:
    """An open GGUF file. What it returns is checked against what a file of this architecture must hold."""

    def __init__(self, path: Path, reader: Any) -> None:
        self.path = path
        self._reader = reader
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        architecture = self._metadata("general.architecture", str)
        if architecture != "llama":
            expected = "expected general.architecture 'llama' (that of SmolLM2)"
            raise LoadError(f"{path}: {expected}, got {architecture!r}")

    @cached_property
    def config(self) -> SmolLM2Config:
        """The configuration that the metadata describe; the rows of the embedding are the vocabulary."""
        scaling = self._metadata("llama.rope.scaling.type", str, default="none")
        linear_by_one = scaling == "linear" and self._metadata("llama.rope.scaling.factor", float, None) == 1
        if scaling != "none" and not linear_by_one:
            hint = "SmolLM2 uses plain rotary embeddings"
            raise LoadError(f"{self.path}: rope scaling {scaling!r} is not supported; {hint}")
        hidden_size = self._metadata("llama.embedding_length", int)
        heads = self._metadata("llama.attention.head_count", int)
        head_dim = self._metadata("llama.attention.key_length", int, default=hidden_size // max(heads, 1))
        ids = {
            f"{role}_token_id": self._metadata(f"tokenizer.ggml.{name}_token_id", int, default=None)
            for role, name in (("bos", "bos"), ("pad", "padding"))
        }
        # what llama.cpp stops at: the end of the text, of the turn, of a message that calls a tool
        keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
        found = (self._metadata(key, int, default=None) for key in keys)
        ends = tuple(dict.fromkeys(end for end in found if end is not None))
        ids["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
        try:
            config = SmolLM2Config(
                vocab_size=int(self._tensor("token_embd.weight").shape[-1]),
                hidden_size=hidden_size,
                intermediate_size=self._metadata("llama.feed_forward_length", int),
                num_hidden_layers=self._metadata("llama.block_count", int),
                num_attention_heads=heads,
                num_key_value_heads=self._metadata("llama.attention.head_count_kv", int, default=heads),
                head_dim=head_dim,
                max_position_embeddings=self._metadata("llama.context_length", int),
                rms_norm_eps=_shortest_float(self._metadata("llama.attention.layer_norm_rms_epsilon", float)),
                rope_theta=_shortest_float(self._metadata("llama.rope.freq_base", float, default=10000.0)),
                initializer_range=max(hidden_size, 1) ** -0.5,
                **ids,
            )
        except UsageError as error:
            raise LoadError(f"{self.path}: {error}") from None
        rotated = self._metadata("llama.rope.dimension_count", int, default=head_dim)
        if rotated != head_dim:
            expected = f"expected rotary embeddings over the whole head ({head_dim})"
            raise LoadError(f"{self.path}: {expected}, got {rotated} dimensions")
        self._check_neutral(config)
        return config

    def _check_neutral(self, config: SmolLM2Config) -> None:
        """Raises LoadError for metadata that ask for something else than this architecture."""
        window = self._metadata("llama.attention.sliding_window", int, default=0)
        unlimited = (window,) if window >= config.max_position_embeddings else (0,)
        scale = self._metadata("llama.attention.scale", float, default=0.0)
        same_scale = abs(scale - config.head_dim**-0.5) < 1e-6 * config.head_dim**-0.5
        neutral = {
            **_NEUTRAL,
            "attention.sliding_window": unlimited,
            "attention.scale": (0, scale) if same_scale else (0,),
            "attention.value_length": (config.head_dim,),
        }
        for key, values in {
            **{f"llama.{key}": v for key, v in neutral.items()},
            "split.count": (0, 1),
        }.items():
            value = self._metadata(key, object, default=None)
            if value is not None and value not in values:
                expected = " or ".join(map(repr, values)) or "absent"
                raise LoadError(
                    f"{self.path}: metadata {key} must be {expected} for SmolLM2, got {value!r:.60}"
                )

    def tensors(self) -> dict[str, Tensor]:
        """Every weight, dequantised, under Hugging Face's names.

        fp32, which holds each quantised value exactly; bf16 where all matrices are BF16 and that loses
        nothing of the norms (GGUF keeps vectors in F32 whatever the matrices are).
        Raises LoadError for missing, unexpected and unsupported tensors, wrong shapes, NaN and inf, and for
        an output matrix that is not the embedding.
        """
        names = self._names()
        gguf_names = {hf_name: name for name, hf_name in names.items()}
        missing = [name for name in names if name not in self._tensors]
        if missing:
            raise LoadError(f"{self.path}: tensors missing: {abbreviate(missing)}; the file is incomplete")
        unexpected = [name for name in self._tensors if name not in names and name != "output.weight"]
        if unexpected:
            raise LoadError(f"{self.path}: tensors that SmolLM2 does not have: {abbreviate(unexpected)}")
        for name, shape in self.config.parameter_shapes().items():
            found = tuple(self._tensors[gguf_names[name]].shape.tolist()[::-1])
            if found != shape:
                raise LoadError(f"{self.path}: {name}: expected shape {list(shape)}, got {list(found)}")
        tensors = {hf_name: self._dequantise(name) for name, hf_name in names.items()}
        embedding = tensors["model.embed_tokens.weight"]
        if "output.weight" in self._tensors and not torch.equal(self._dequantise("output.weight"), embedding):
            hint = "SmolLM2's head is tied to its embedding"
            raise LoadError(f"{self.path}: output.weight differs from token_embd.weight; {hint}")
        heads_of = {"q": self.config.num_attention_heads, "k": self.config.num_key_value_heads}
        for layer in range(self.config.num_hidden_layers):
            for projection, heads in heads_of.items():
                name = f"model.layers.{layer}.self_attn.{projection}_proj.weight"
                tensors[name] = self._rotate_half_rows(tensors[name], heads)
        check_numbers(tensors, self.path)
        return self._narrowed(tensors)

    def tokenizer(self) -> GGUFTokenizer:
        """The parts of the tokenizer, as stored. Raises LoadError if any is missing or does not fit."""
        prefix = "tokenizer.ggml."
        tokens = self._list(prefix + "tokens", str)
        names = dict(bos_token="bos", eos_token="eos", unk_token="unknown", pad_token="padding")
        names |= dict(eot_token="eot", eom_token="eom")
        keys = {role: f"{prefix}{name}_token_id" for role, name in names.items()}
        ids = {role: self._metadata(key, int, default=None) for role, key in keys.items()}
        count = len(tokens)
        for role, token_id in ids.items():
            if token_id is not None and not 0 <= token_id < count:
                raise LoadError(f"{self.path}: {role} must be an id below {count}, got {token_id}")
        types = self._list(prefix + "token_type", int, default=[1] * count)
        if len(types) != count:
            raise LoadError(f"{self.path}: expected a type for each of {count} tokens, got {len(types)}")
        return GGUFTokenizer(
            model=self._metadata(prefix + "model", str),
            pre=self._metadata(prefix + "pre", str, default="default"),
            tokens=tokens,
            merges=self._list(prefix + "merges", str, default=[]),
            token_types=types,
            special_ids={role: token_id for role, token_id in ids.items() if token_id is not None},
            chat_template=self._metadata("tokenizer.chat_template", str, default=None),
        )

    _required = object()

    def _metadata(self, key: str, kind: type, default: Any = _required) -> Any:
        """The value of a metadata key, checked for its type."""
        field = self._reader.get_field(key)
        if field is None:
            if default is self._required:
                raise LoadError(f"{self.path}: metadata {key} missing")
            return default
        try:
            value = field.contents()
        except UnicodeDecodeError as error:
            problem = f"metadata {key} is not UTF-8 ({error})"
            raise LoadError(f"{self.path}: {problem}; the file is corrupt") from None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not object):
            raise LoadError(f"{self.path}: metadata {key} must be of type {kind.__name__}, got {value!r:.80}")
        return value

    def _list(self, key: str, kind: type, default: Any = _required) -> list[Any]:
        """The entries of a list in the metadata, checked for their type."""
        values: list[Any] = self._metadata(key, list, default)
        for value in values:
            if not isinstance(value, kind):
                raise LoadError(f"{self.path}: {key} must hold {kind.__name__} values, got {value!r:.80}")
        return values

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise LoadError(f"{self.path}: tensor {name} missing; the file is incomplete")
        return self._tensors[name]

    def _names(self) -> dict[str, str]:
        """GGUF's name of every tensor that this configuration needs -> Hugging Face's."""
        if self.config.num_hidden_layers > len(self._tensors):
            claim = f"llama.block_count is {self.config.num_hidden_layers}"
            raise LoadError(
                f"{self.path}: {claim}, but the file has no more than {len(self._tensors)} tensors"
            )
        return tensor_names(self.config.num_hidden_layers)

    def _dequantise(self, name: str) -> Tensor:
        """One tensor in fp32. GGUF states dimensions fastest first; the result has rows first, as torch."""
        import numpy as np
        from gguf.quants import dequantize

        tensor = self._tensor(name)
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise LoadError(
                f"{self.path}: {name} is of type {tensor.tensor_type.name}, which the gguf package cannot "
                "dequantise; use a file in F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K or Q6_K"
            ) from None
        # F32 comes back as a view of the read-only map: copy that, and only that.
        return torch.from_numpy(np.require(values, dtype=np.float32, requirements=["C", "W"]))

    def _rotate_half_rows(self, weight: Tensor, heads: int) -> Tensor:
        """Rows of each head from interleaved pairs back to halves: the inverse of llama.cpp's `permute`."""
        # [heads, pair, first or second of the pair, hidden]
        pairs = weight.view(heads, self.config.head_dim // 2, 2, -1)
        return pairs.transpose(1, 2).reshape(weight.shape)

    def _narrowed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        matrix_types = {tensor.tensor_type.name for tensor in self._tensors.values() if len(tensor.shape) > 1}
        if matrix_types != {"BF16"}:
            return tensors
        narrow = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        exact = all(torch.equal(narrow[name].float(), tensor) for name, tensor in tensors.items())
        return narrow if exact else tensors


def _shortest_float(value: float) -> float:
    """The shortest decimal that is this fp32 number: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))
