"""Wrong input is refused before a kernel starts, as `operation: expected ..., got ...`; reference and kernels
use the same words.
"""

import re

import pytest
import torch
from kernel_cases import DEVICE, EPS, TORCH, TRITON, angles, draw

BACKENDS = {"torch": TORCH, "triton": TRITON}
PLACE = torch.empty(0, device=DEVICE).device  # as a tensor names it: "cuda:0" where DEVICE is "cuda"
OTHER_DEVICE = torch.device("meta")


def far(x):
    """The same tensor on another device."""
    return x.to(OTHER_DEVICE)


def norm(ops, x=(2, 96), weight=(96,), change=lambda x, w: (x, w)):
    return ops.rms_norm(*change(draw(*x), draw(*weight)), EPS)


def add(ops, x=(2, 96), residual=(2, 96), weight=(96,), change=lambda x, r, w: (x, r, w)):
    return ops.add_rms_norm(*change(draw(*x), draw(*residual), draw(*weight)), EPS)


def rotate(ops, q=(2, 7, 3, 32), k=(2, 7, 1, 32), table=(7, 16), change=lambda q, k, c, s: (q, k, c, s)):
    return ops.rope(*change(draw(*q), draw(*k), *angles(*table)))


def rotate_packed(ops, qkv=(2, 7, 5, 32), table=(7, 16), key_heads=1):
    return ops.rope_qkv(draw(*qkv), *angles(*table), key_heads)


def attend(
    ops, q=(2, 7, 3, 32), k=(2, 7, 1, 32), v=None, doc_start=None, change=lambda q, k, v: (q, k, v), **options
):
    return ops.attention(*change(draw(*q), draw(*k), draw(*(v or k))), doc_start, **options)


def decode(ops, q=(2, 1, 3, 32), k=(2, 7, 1, 32), v=None, lengths=None, change=lambda q, k, v: (q, k, v)):
    lengths = torch.tensor([7, 7], device=DEVICE) if lengths is None else lengths
    return ops.decode_attention(*change(draw(*q), draw(*k), draw(*(v or k))), lengths)


def gated(ops, *shapes, change=lambda *x: x):
    return ops.swiglu(*change(*(draw(*shape) for shape in shapes)))


def loss(ops, hidden=(4, 32), weight=(97, 32), targets=None, change=lambda h, w: (h, w), **options):
    targets = torch.tensor([0, 1, 2, 96], device=DEVICE) if targets is None else targets
    return ops.linear_cross_entropy(*change(draw(*hidden), draw(*weight)), targets, **options)


def ints(*values, dtype=torch.int64, device=DEVICE):
    return torch.tensor(values, dtype=dtype, device=device)


# (call, what the message says): refused by every backend.
SHARED = [
    # rms_norm
    (lambda ops: norm(ops, weight=(95,)), "rms_norm: expected weight of shape [96], got [95]"),
    (lambda ops: norm(ops, weight=(1, 96)), "rms_norm: expected weight of shape [96], got [1, 96]"),
    (lambda ops: norm(ops, x=(), weight=(1,)), "rms_norm: expected x of shape [..., D], got []"),
    (
        lambda ops: norm(ops, change=lambda x, w: (x, w.half())),
        "rms_norm: expected weight of dtype torch.float32 as x, got torch.float16",
    ),
    (
        lambda ops: norm(ops, change=lambda x, w: (x.long(), w)),
        "rms_norm: expected x of a floating-point dtype, got torch.int64",
    ),
    (
        lambda ops: norm(ops, change=lambda x, w: (x, far(w))),
        f"rms_norm: expected weight on {PLACE} as x, got meta",
    ),
    # add_rms_norm
    (lambda ops: add(ops, weight=(95,)), "add_rms_norm: expected weight of shape [96], got [95]"),
    (lambda ops: add(ops, residual=(3, 96)), "add_rms_norm: expected residual of shape [2, 96], got [3, 96]"),
    (lambda ops: add(ops, residual=(1, 96)), "add_rms_norm: expected residual of shape [2, 96], got [1, 96]"),
    (
        lambda ops: add(ops, change=lambda x, r, w: (x, r.half(), w)),
        "add_rms_norm: expected residual of dtype torch.float32 as x, got torch.float16",
    ),
    (
        lambda ops: add(ops, change=lambda x, r, w: (x, far(r), w)),
        f"add_rms_norm: expected residual on {PLACE} as x, got meta",
    ),
    # rope
    (lambda ops: rotate(ops, q=(7, 3, 32)), "rope: expected q of shape [B, T, H, D], got [7, 3, 32]"),
    (lambda ops: rotate(ops, q=(2, 7, 3, 31)), "rope: expected an even head dim, got 31"),
    (lambda ops: rotate(ops, k=(2, 8, 1, 32)), "rope: expected k of shape [2, 7, K, 32], got [2, 8, 1, 32]"),
    (lambda ops: rotate(ops, k=(2, 7, 1, 64)), "rope: expected k of shape [2, 7, K, 32], got [2, 7, 1, 64]"),
    (
        lambda ops: rotate(ops, table=(6, 16)),
        "rope: expected cos of shape [7, 16] or [2, 7, 16], got [6, 16]",
    ),
    (
        lambda ops: rotate(ops, table=(7, 32)),
        "rope: expected cos of shape [7, 16] or [2, 7, 16], got [7, 32]",
    ),
    (
        lambda ops: rotate(ops, table=(3, 7, 16)),
        "rope: expected cos of shape [7, 16] or [2, 7, 16], got [3, 7, 16]",
    ),
    (
        lambda ops: rotate(ops, change=lambda q, k, c, s: (q, k, c, s[:6])),
        "rope: expected sin of shape [7, 16] or [2, 7, 16], got [6, 16]",
    ),
    (
        lambda ops: rotate(ops, change=lambda q, k, c, s: (q, k, c.expand(2, 7, 16), s)),
        "rope: expected sin of shape [2, 7, 16] as cos, got [7, 16]",
    ),
    (
        lambda ops: rotate(ops, change=lambda q, k, c, s: (q, k.half(), c, s)),
        "rope: expected k of dtype torch.float32 as q, got torch.float16",
    ),
    (
        lambda ops: rotate(ops, change=lambda q, k, c, s: (q.int(), k, c, s)),
        "rope: expected q of a floating-point dtype, got torch.int32",
    ),
    (
        lambda ops: rotate(ops, change=lambda q, k, c, s: (q, k, c.long(), s)),
        "rope: expected cos and sin of one floating-point dtype, got torch.int64",
    ),
    (
        lambda ops: rotate(ops, change=lambda q, k, c, s: (q, k, c, s.half())),
        "rope: expected cos and sin of one floating-point dtype, got torch.float16",
    ),
    (
        lambda ops: rotate(ops, change=lambda q, k, c, s: (q, k, c, far(s))),
        f"rope: expected sin on {PLACE} as q, got meta",
    ),
    # rope_qkv
    (
        lambda ops: rotate_packed(ops, qkv=(2, 7, 160)),
        "rope_qkv: expected qkv of shape [B, T, H + 2K, D], got [2, 7, 160]",
    ),
    (
        lambda ops: rotate_packed(ops, key_heads=0),
        "rope_qkv: expected key_heads so that H + 2K = 5 with H > 0, got 0",
    ),
    (
        lambda ops: rotate_packed(ops, key_heads=3),
        "rope_qkv: expected key_heads so that H + 2K = 5 with H > 0, got 3",
    ),
    (
        lambda ops: rotate_packed(ops, table=(6, 16)),
        "rope: expected cos of shape [7, 16] or [2, 7, 16], got [6, 16]",
    ),
    # attention
    (lambda ops: attend(ops, q=(7, 3, 32)), "attention: expected q of shape [B, T, H, D], got [7, 3, 32]"),
    (
        lambda ops: attend(ops, k=(1, 7, 1, 32)),
        "attention: expected keys of shape [2, S, K, 32], got [1, 7, 1, 32]",
    ),
    (
        lambda ops: attend(ops, k=(2, 7, 1, 64)),
        "attention: expected keys of shape [2, S, K, 32], got [2, 7, 1, 64]",
    ),
    (
        lambda ops: attend(ops, v=(2, 8, 1, 32)),
        "attention: expected values of shape [2, 7, 1, 32] as the keys, got [2, 8, 1, 32]",
    ),
    (
        lambda ops: attend(ops, k=(2, 7, 2, 32)),
        "attention: expected key heads that divide the 3 query heads, got 2",
    ),
    (
        lambda ops: attend(ops, k=(2, 7, 0, 32)),
        "attention: expected key heads that divide the 3 query heads, got 0",
    ),
    (
        lambda ops: attend(ops, k=(2, 6, 1, 32)),
        "attention: expected at least as many keys as the 7 queries, got 6",
    ),
    (
        lambda ops: attend(ops, change=lambda q, k, v: (q, k, v.half())),
        "attention: expected v of dtype torch.float32 as q, got torch.float16",
    ),
    (
        lambda ops: attend(ops, change=lambda q, k, v: (q, far(k), v)),
        f"attention: expected k on {PLACE} as q, got meta",
    ),
    (
        lambda ops: attend(ops, doc_start=torch.zeros(7, dtype=torch.int32, device=DEVICE)),
        "attention: expected doc_start of shape [2, 7], got [7]",
    ),
    (
        lambda ops: attend(ops, doc_start=torch.zeros(2, 7, device=DEVICE)),
        "attention: expected doc_start of an integer dtype, got torch.float32",
    ),
    (
        lambda ops: attend(ops, doc_start=torch.zeros(2, 7, dtype=torch.int32, device=OTHER_DEVICE)),
        f"attention: expected doc_start on {PLACE} as q, got meta",
    ),
    # decode_attention
    (
        lambda ops: decode(ops, q=(2, 3, 32)),
        "decode_attention: expected q of shape [B, T, H, D], got [2, 3, 32]",
    ),
    (
        lambda ops: decode(ops, k=(3, 7, 1, 32)),
        "decode_attention: expected keys of shape [2, S, K, 32], got [3, 7, 1, 32]",
    ),
    (
        lambda ops: decode(ops, k=(2, 7, 2, 32)),
        "decode_attention: expected key heads that divide the 3 query heads, got 2",
    ),
    (
        lambda ops: decode(ops, q=(2, 8, 3, 32)),
        "decode_attention: expected at least as many keys as the 8 queries, got 7",
    ),
    (lambda ops: decode(ops, lengths=ints(7)), "decode_attention: expected lengths of shape [2], got [1]"),
    (
        lambda ops: decode(ops, lengths=ints(7.0, 7.0, dtype=torch.float32)),
        "decode_attention: expected lengths of an integer dtype, got torch.float32",
    ),
    (
        lambda ops: decode(ops, lengths=ints(7, 7, device=OTHER_DEVICE)),
        f"decode_attention: expected lengths on {PLACE} as q, got meta",
    ),
    (
        lambda ops: decode(ops, change=lambda q, k, v: (q, k.half(), v)),
        "decode_attention: expected k of dtype torch.float32 as q, got torch.float16",
    ),
    # swiglu
    (lambda ops: gated(ops, (2, 8), (2, 7)), "swiglu: expected up of shape [2, 8] as gate, got [2, 7]"),
    (lambda ops: gated(ops, (2, 8), (1, 8)), "swiglu: expected up of shape [2, 8] as gate, got [1, 8]"),
    (
        lambda ops: gated(ops, (2, 7)),
        "swiglu: expected an even last dimension of the packed gate and up, got 7",
    ),
    (lambda ops: gated(ops, ()), "swiglu: expected gate of shape [..., F], got []"),
    (
        lambda ops: gated(ops, (2, 8), (2, 8), change=lambda g, u: (g, u.half())),
        "swiglu: expected up of dtype torch.float32 as gate, got torch.float16",
    ),
    (
        lambda ops: gated(ops, (2, 8), change=lambda g: (g.long(),)),
        "swiglu: expected gate of a floating-point dtype, got torch.int64",
    ),
    (
        lambda ops: gated(ops, (2, 8), (2, 8), change=lambda g, u: (g, far(u))),
        f"swiglu: expected up on {PLACE} as gate, got meta",
    ),
    # linear_cross_entropy
    (
        lambda ops: loss(ops, hidden=(2, 2, 32)),
        "linear_cross_entropy: expected hidden of shape [N, D], got [2, 2, 32]",
    ),
    (
        lambda ops: loss(ops, weight=(97, 31)),
        "linear_cross_entropy: expected weight of shape [V, 32], got [97, 31]",
    ),
    (
        lambda ops: loss(ops, targets=ints(0, 1, 2)),
        "linear_cross_entropy: expected targets of shape [4], got [3]",
    ),
    (
        lambda ops: loss(ops, targets=torch.zeros(4, device=DEVICE)),
        "linear_cross_entropy: expected targets of an integer dtype, got torch.float32",
    ),
    (
        lambda ops: loss(ops, change=lambda h, w: (h.long(), w)),
        "linear_cross_entropy: expected hidden and weight of floating-point dtypes, "
        "got (torch.int64, torch.float32)",
    ),
    (
        lambda ops: loss(ops, change=lambda h, w: (h, far(w))),
        f"linear_cross_entropy: expected weight and targets on {PLACE} as hidden, got (device",
    ),
    (
        lambda ops: loss(ops, targets=ints(0, 1, 2, 3, device=OTHER_DEVICE)),
        f"linear_cross_entropy: expected weight and targets on {PLACE} as hidden",
    ),
    (
        lambda ops: loss(ops, reduction="max"),
        "linear_cross_entropy: expected reduction 'mean', 'sum' or 'none', got 'max'",
    ),
    (lambda ops: loss(ops, z_loss=-0.1), "linear_cross_entropy: expected z_loss >= 0, got -0.1"),
    (
        lambda ops: loss(ops, label_smoothing=1.5),
        "linear_cross_entropy: expected label_smoothing in [0, 1], got 1.5",
    ),
]

DOUBLE = "expected float32, float16 or bfloat16 (the torch backend also takes float64), got torch.float64"


def double(*tensors):
    return tuple(x.double() for x in tensors)


# Refused by the kernels only; the reference is more general.
KERNELS_ONLY = [
    (lambda ops: norm(ops, change=double), f"rms_norm: {DOUBLE}"),
    (lambda ops: add(ops, change=double), f"add_rms_norm: {DOUBLE}"),
    (lambda ops: rotate(ops, change=double), f"rope: {DOUBLE}"),
    (lambda ops: ops.rope_qkv(draw(2, 7, 5, 32).double(), *angles(7, 16), 1), f"rope_qkv: {DOUBLE}"),
    (lambda ops: attend(ops, change=double), f"attention: {DOUBLE}"),
    (lambda ops: decode(ops, change=double), f"decode_attention: {DOUBLE}"),
    (lambda ops: gated(ops, (2, 8), (2, 8), change=double), f"swiglu: {DOUBLE}"),
    (lambda ops: loss(ops, change=double), f"linear_cross_entropy: {DOUBLE}"),
    (
        lambda ops: rotate(ops, q=(2, 7, 3, 48), k=(2, 7, 1, 48), table=(7, 24)),
        "rope: expected a head dim that is a power of two, got 48",
    ),
    (
        lambda ops: rotate_packed(ops, qkv=(2, 7, 5, 6), table=(7, 3)),
        "rope_qkv: expected a head dim that is a power of two, got 6",
    ),
    (
        lambda ops: attend(ops, q=(2, 7, 3, 16), k=(2, 7, 1, 16)),
        "attention: expected a head dim in [32, 64, 128], got 16",
    ),
    (
        lambda ops: attend(ops, q=(2, 7, 3, 96), k=(2, 7, 1, 96)),
        "attention: expected a head dim in [32, 64, 128], got 96",
    ),
    (
        lambda ops: attend(ops, dropout_p=0.1),
        "attention: expected dropout_p = 0 (for dropout use backend 'triton,attention=torch'), got 0.1",
    ),
    (
        lambda ops: decode(ops, q=(2, 1, 3, 48), k=(2, 7, 1, 48)),
        "decode_attention: expected a head dim in [32, 64, 128], got 48",
    ),
    (
        lambda ops: decode(ops, q=(2, 17, 3, 32), k=(2, 20, 1, 32)),
        "decode_attention: expected at most 16 new queries, got 17",
    ),
    (
        lambda ops: decode(ops, change=lambda q, k, v: (q, torch.stack((k, k), -1)[..., 0], v)),
        "decode_attention: expected key cache with a last stride of 1, got 2",
    ),
    (
        lambda ops: decode(ops, change=lambda q, k, v: (q, k, v[..., :1].expand(v.shape))),
        "decode_attention: expected value cache with a last stride of 1, got 0",
    ),
    (
        lambda ops: decode(ops, change=lambda q, k, v: (torch.stack((q, q), -1)[..., 0], k, v)),
        "decode_attention: expected q with a last stride of 1, got 2",
    ),
]


def refused(call, ops):
    with pytest.raises(ValueError) as error:
        call(ops)
    return str(error.value)


@pytest.mark.parametrize("call, message", SHARED, ids=[message for _, message in SHARED])
def test_every_backend_refuses_in_the_same_words(call, message):
    said = refused(call, TRITON)
    assert message in said
    assert re.fullmatch(r"[a-z_]+: expected .+, got .+", said)
    assert refused(call, TORCH) == said


@pytest.mark.parametrize("call, message", KERNELS_ONLY, ids=[message for _, message in KERNELS_ONLY])
def test_the_kernels_refuse_what_they_do_not_do(call, message):
    assert refused(call, TRITON) == message


@pytest.mark.parametrize(
    "call", [norm, add, rotate, rotate_packed, attend, decode, lambda ops: gated(ops, (2, 8)), loss]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_right_input_is_accepted(call, backend):
    """The defaults of the calls above: what is refused is refused for the one thing that was changed."""
    call(BACKENDS[backend])
