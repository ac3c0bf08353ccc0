"""The launches that are certified: recorded from the public functions, not listed by hand.

Each case calls public functions, forward and backward, on tensors of the "meta" device at the models' own
shapes (kernels/certify/recorder.py). So what is certified is what would be launched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import adamw
from kernels.backend import load_triton
from kernels.certify.recorder import RecordedLaunch, Recorder, recording, tensor
from kernels.certify.targets import Target
from kernels.decode_head import decode_head
from kernels.decode_layers import decode_layers
from kernels.launch_config import DEPENDENT_LAUNCH
from kernels.mlp import mlp
from kernels.types import Backend, LayerWeights, TokenState

EPS = 1e-5
HEAD_DIM = 64
LAYERS = 30  # of the 135M model
VOCABULARY = 49152


class Sizes(NamedTuple):
    """Widths of a model."""

    hidden: int
    heads: int
    key_heads: int
    ffn: int


MODELS = {"135M": Sizes(576, 9, 3, 1536), "360M": Sizes(960, 15, 5, 2560), "1.7B": Sizes(2048, 32, 32, 8192)}


def tables(*shape: int) -> tuple[Tensor, Tensor]:
    """cos and sin."""
    return tensor(*shape, dtype=torch.float32, grad=False), tensor(*shape, dtype=torch.float32, grad=False)


def _layer_weights(size: Sizes, dtype: torch.dtype, head_dim: int = HEAD_DIM) -> LayerWeights:
    return LayerWeights(
        input_norm=tensor(size.hidden, dtype=dtype),
        qkv=tensor((size.heads + 2 * size.key_heads) * head_dim, size.hidden, dtype=dtype),
        o=tensor(size.hidden, size.heads * head_dim, dtype=dtype),
        post_norm=tensor(size.hidden, dtype=dtype),
        gate_up=tensor(2 * size.ffn, size.hidden, dtype=dtype),
        down=tensor(size.hidden, size.ffn, dtype=dtype),
    )


def layer(
    run: Recorder, ops: Backend, model: str, docs: bool = False, batch: int = 32, length: int = 512,
    train: bool = True,
) -> None:  # fmt: skip
    """One block as smollm2/model.py composes it; without `train` a prefill, whose keys come from a cache."""
    size, dtype = MODELS[model], run.dtype
    weights = _layer_weights(size, dtype)
    if train:  # fp32 master weights, which the kernel rounds itself
        norm = tensor(size.hidden, dtype=torch.float32)
        weights = weights._replace(input_norm=norm, post_norm=norm)
    x, stream = (tensor(batch, length, size.hidden, dtype=dtype) for _ in range(2))
    cos, sin = tables(*([batch] if docs else []), length, HEAD_DIM // 2)
    doc_start = tensor(batch, length, dtype=torch.int32, grad=False) if docs else None
    with torch.set_grad_enabled(train):
        normed, stream = ops.add_rms_norm(x, stream, weights.input_norm, EPS)
        q, k, v = ops.rope_qkv(
            F.linear(normed, weights.qkv).unflatten(-1, (-1, HEAD_DIM)), cos, sin, size.key_heads
        )
        if not train:
            k, v = (tensor(batch, 2048, size.key_heads, HEAD_DIM, dtype=dtype)[:, :length] for _ in range(2))
        mixed = ops.attention(q, k, v, doc_start)
        normed, stream = ops.add_rms_norm(
            F.linear(mixed.flatten(2), weights.o), stream, weights.post_norm, EPS
        )
        x = ops.mlp(normed, weights.gate_up, weights.down)
    if train:
        run.backward(x, stream)


def first_norm(run: Recorder, ops: Backend) -> None:
    x, weight = tensor(32, 512, 576, dtype=run.dtype), tensor(576, dtype=torch.float32)
    run.backward(ops.rms_norm(x, weight, EPS))


def last_norm(run: Recorder, ops: Backend) -> None:
    x, weight = tensor(32, 512, 576, dtype=run.dtype), tensor(576, dtype=torch.float32)
    run.backward(ops.add_rms_norm(x, tensor(32, 512, 576, dtype=run.dtype), weight, EPS)[0])


def rope_views(run: Recorder, ops: Backend) -> None:
    q, k, _ = tensor(32, 512, 15, HEAD_DIM, dtype=run.dtype).split((9, 3, 3), dim=2)
    run.backward(*ops.rope(q, k, *tables(512, HEAD_DIM // 2)))


def rope_into_caches(run: Recorder, ops: Backend, model: str, head_dim: int = HEAD_DIM) -> None:
    """One new token for each of 32 rows, with one table for all of them."""
    size, dtype = MODELS[model], run.dtype
    qkv = tensor(32, 1, size.heads + 2 * size.key_heads, head_dim, dtype=dtype, grad=False)
    keys, values = (tensor(32, 1024, size.key_heads, head_dim, dtype=dtype, grad=False) for _ in range(2))
    lengths = tensor(32, dtype=torch.int64, grad=False)
    ops.rope_cache(qkv, *tables(1, head_dim // 2), keys, values, lengths)


def swiglu_separate(run: Recorder, ops: Backend) -> None:
    run.backward(ops.swiglu(tensor(32, 512, 1536, dtype=run.dtype), tensor(32, 512, 1536, dtype=run.dtype)))


def fused_mlp(run: Recorder, ops: Backend, model: str) -> None:
    """SwiGLU inside its products, whether or not the launch table uses it on this target."""
    size, dtype = MODELS[model], run.dtype
    shapes = (32, 512, size.hidden), (2 * size.ffn, size.hidden), (size.hidden, size.ffn)
    run.backward(mlp(*(tensor(*shape, dtype=dtype) for shape in shapes)))


def attention_separate(run: Recorder, ops: Backend, head_dim: int, docs: bool) -> None:
    q, k, v = (tensor(32, 512, heads, head_dim, dtype=run.dtype) for heads in (9, 3, 3))
    run.backward(ops.attention(q, k, v, tensor(32, 512, dtype=torch.int32, grad=False) if docs else None))


def attention_views(run: Recorder, ops: Backend) -> None:
    run.backward(ops.attention(*tensor(32, 512, 15, HEAD_DIM, dtype=run.dtype).split((9, 3, 3), dim=2)))


def attention_chunk(run: Recorder, ops: Backend) -> None:
    q = tensor(1, 37, 9, HEAD_DIM, dtype=run.dtype)
    k, v = (tensor(1, 301, 3, HEAD_DIM, dtype=run.dtype) for _ in range(2))
    ops.attention(q.detach(), k.detach(), v.detach())


def embedding(run: Recorder, ops: Backend, model: str, copy: bool = False) -> None:
    """fp32 master weights, read themselves or through their copy in the run's dtype."""
    ids, width = tensor(32, 512, dtype=torch.int64, grad=False), MODELS[model].hidden
    weight = tensor(VOCABULARY, width, dtype=torch.float32)
    shadow = tensor(VOCABULARY, width, dtype=run.dtype, grad=False) if copy else None
    run.backward(*ops.tied_embedding(ids, weight, run.dtype, shadow))


def loss(run: Recorder, ops: Backend, train: bool = True, **options: Any) -> None:
    hidden, weight = tensor(32 * 512, 576, dtype=run.dtype), tensor(VOCABULARY, 576, dtype=torch.float32)
    targets = tensor(32 * 512, dtype=torch.int64, grad=False)
    value = ops.linear_cross_entropy(hidden, weight, targets, **options)
    if train:
        run.backward(value)


def decode(
    run: Recorder, ops: Backend, batch: int = 1, new: int = 1, keys: int = 1000, model: str = "135M",
    head_dim: int = HEAD_DIM,
) -> None:  # fmt: skip
    """One block for a few new tokens, over a cache of 2048 of which `keys` are filled."""
    size, dtype = MODELS[model], run.dtype
    key_cache, value_cache = (
        tensor(batch, 2048, size.key_heads, head_dim, dtype=dtype, grad=False)[:, :keys] for _ in range(2)
    )
    lengths = tensor(batch, dtype=torch.int64, grad=False)
    with torch.no_grad():
        x, weights = tensor(batch, new, size.hidden, dtype=dtype), _layer_weights(size, dtype, head_dim)
        cos, sin = tables(batch, new, head_dim // 2)
        ops.decode_layer(
            x, weights, key_cache, value_cache, lengths, cos, sin, eps=EPS, ops=ops, dependent=True
        )


def joined(run: Recorder, ops: Backend, batch: int = 1) -> None:
    """Two blocks for one new token in one launch, where the compiled kernel has the instructions for that."""
    if run.target.name not in DEPENDENT_LAUNCH:
        return
    size, dtype = MODELS["135M"], run.dtype
    caches = [tensor(batch, 1024, size.key_heads, HEAD_DIM, dtype=dtype, grad=False)] * 2
    lengths, x = tensor(batch, dtype=torch.int64, grad=False), tensor(batch, 1, size.hidden, dtype=dtype)
    weights, (cos, sin) = [_layer_weights(size, dtype)] * 2, tables(batch, 1, HEAD_DIM // 2)
    with torch.no_grad():
        decode_layers(x, weights, caches, caches, lengths, cos, sin, eps=EPS)


def head(run: Recorder, ops: Backend, model: str) -> None:
    """The final norm and the head of a decode step."""
    width = MODELS[model].hidden
    shapes = (1, 1, width), (width,), (VOCABULARY, width)
    x, scale, weight = (tensor(*shape, dtype=run.dtype, grad=False) for shape in shapes)
    decode_head(x, scale, weight, EPS, dependent=True)


def ends(run: Recorder, ops: Backend, model: str, batch: int = 1) -> None:
    """What lies between the layers of a decode step: greedy, greedy with suppressed tokens, sampled."""
    width = MODELS[model].hidden

    def integers(*shape: int) -> Tensor:
        return tensor(*shape, dtype=torch.int64, grad=False)

    flags = (tensor(size, dtype=torch.bool, grad=False) for size in (batch, VOCABULARY))
    (finished, suppressed), stop = flags, integers(1)
    state = TokenState(integers(batch, 1), finished, integers(16, batch), integers(batch))
    shapes = (batch, width), (width,), (VOCABULARY, width)
    x, scale, weight = (tensor(*shape, dtype=run.dtype, grad=False) for shape in shapes)
    with torch.no_grad():
        ops.decode_inputs(state.tokens, weight, integers(batch), *tables(2048, HEAD_DIM // 2))
        for mask in (None, suppressed):
            ops.next_token(*ops.decode_best(x, scale, weight, EPS, mask, dependent=True), state, stop, 0)
        ops.next_token(None, integers(batch, 1), state, stop, 0)


def optimizer(run: Recorder, ops: Backend) -> None:
    """The clip norm and AdamW with copies in the run's dtype (fp32: none), over a layer of the 135M model and
    its embedding.
    """
    size, device = MODELS["135M"], torch.device("meta")
    weights = *_layer_weights(size, run.dtype), tensor(VOCABULARY, size.hidden, dtype=run.dtype)
    elements = [weight.numel() for weight in weights]
    work = adamw.plan(elements, [0] * len(elements), device)
    table = tensor(5 * work.tensors + adamw.GROUP_WORDS, dtype=torch.int64, grad=False)
    found = adamw.gradient_norm(table, work, 1.0)
    steps = tensor(work.tensors, dtype=torch.float32, grad=False)
    adamw.adamw(table, work, steps, found[0], found[1], None if run.dtype == torch.float32 else run.dtype)


class Case(NamedTuple):
    """What to call with what, and its label in the table."""

    label: str
    run: Callable[..., None]
    arguments: dict[str, Any]
    every_dtype: bool = False  # certified in fp16 and fp32 too (on two targets)


LAYER, FIRST_NORM, LAST_NORM, LOSS = "layer 135M", "first norm", "last norm", "loss"
DECODE, EMBEDDING, OPTIMIZER = "decode 1x1, 1000 keys", "embedding", "optimizer"
CASES = (
    Case(LAYER, layer, {"model": "135M"}, every_dtype=True),
    Case("layer 135M, documents", layer, {"model": "135M", "docs": True}, every_dtype=True),
    Case("layer 360M", layer, {"model": "360M"}),
    Case("layer 1.7B", layer, {"model": "1.7B"}),
    Case(FIRST_NORM, first_norm, {}, every_dtype=True),
    Case(LAST_NORM, last_norm, {}, every_dtype=True),
    Case("rope of views", rope_views, {}, every_dtype=True),
    Case("swiglu of two tensors", swiglu_separate, {}, every_dtype=True),
    Case("fused mlp 135M", fused_mlp, {"model": "135M"}, every_dtype=True),
    Case("fused mlp 360M", fused_mlp, {"model": "360M"}),
    Case("fused mlp 1.7B", fused_mlp, {"model": "1.7B"}),
    Case("attention of views", attention_views, {}, every_dtype=True),
    Case("head dim 32", attention_separate, {"head_dim": 32, "docs": False}),
    Case("head dim 32, documents", attention_separate, {"head_dim": 32, "docs": True}),
    Case("head dim 128", attention_separate, {"head_dim": 128, "docs": False}),
    Case("head dim 128, documents", attention_separate, {"head_dim": 128, "docs": True}),
    Case("prefill 1x77", layer, {"model": "135M", "batch": 1, "length": 77, "train": False}),
    Case("chunk of 37 over 301 keys", attention_chunk, {}),
    Case(EMBEDDING, embedding, {"model": "135M"}, every_dtype=True),
    Case("embedding from a copy", embedding, {"model": "135M", "copy": True}),
    Case("embedding 1.7B", embedding, {"model": "1.7B"}),
    Case(LOSS, loss, {}, every_dtype=True),
    Case("loss, z-loss and smoothing", loss, {"z_loss": 1e-4, "label_smoothing": 0.1}),
    Case("loss of each token", loss, {"train": False, "reduction": "none"}),
    Case(DECODE, decode, {}, every_dtype=True),
    Case("decode 1x1, 100 keys", decode, {"keys": 100}),
    Case("decode 16x1, 1024 keys", decode, {"batch": 16, "keys": 1024}),
    Case("decode 2x4, 1000 keys", decode, {"batch": 2, "new": 4}),
    Case("decode 1x16, 1000 keys", decode, {"new": 16}),
    Case("decode 1x1, 360M", decode, {"model": "360M"}),
    Case("decode 1x1, 1.7B", decode, {"model": "1.7B"}),
    Case("decode 1x1, head dim 32", decode, {"head_dim": 32}),
    Case("decode 1x1, head dim 128", decode, {"head_dim": 128}),
    Case("joined layers 1x1, 1024 keys", joined, {}),
    Case("joined layers 16x1, 1024 keys", joined, {"batch": 16}),
    # more rows than the fused layer supports: the composition
    Case("decode 32x1, 1000 keys", decode, {"batch": 32}, every_dtype=True),
    Case("decode 32x1, 100 keys", decode, {"batch": 32, "keys": 100}),
    Case("rope into caches, 1.7B", rope_into_caches, {"model": "1.7B"}),
    Case("rope into caches, head dim 128", rope_into_caches, {"model": "135M", "head_dim": 128}),
    Case("head 135M", head, {"model": "135M"}, every_dtype=True),
    Case("head 360M", head, {"model": "360M"}),
    Case("head 1.7B", head, {"model": "1.7B"}),
    Case("ends of a step 135M", ends, {"model": "135M"}, every_dtype=True),
    Case("ends of a step 360M", ends, {"model": "360M"}),
    Case("ends of a step 1.7B", ends, {"model": "1.7B"}),
    # whole logits
    Case("ends of a step, 32 rows", ends, {"model": "135M", "batch": 32}, every_dtype=True),
    Case(OPTIMIZER, optimizer, {}, every_dtype=True),
)


def record(target: Target) -> list[RecordedLaunch]:
    """All launches of all cases on a target, repetitions included."""
    ops = load_triton()
    with recording(target) as recorder:
        for case in CASES:
            others = (torch.float16, torch.float32) if case.every_dtype and target.every_dtype else ()
            for dtype in (torch.bfloat16, *others):
                recorder.case, recorder.dtype = case.label, dtype
                case.run(recorder, ops, **case.arguments)
    return recorder.launches
