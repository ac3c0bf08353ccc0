"""Wrong input is refused before a kernel starts, as `operation: expected ..., got ...`, by the reference and
the kernels in the same words.
"""

import re
from functools import partial

import pytest
import torch
from kernel_cases import DEVICE, EPS, PLACE, TORCH, TRITON, angles, draw

from kernels import launch_config

OTHER_DEVICE = torch.device("meta")
UNCHANGED = {}
half, long = torch.Tensor.half, torch.Tensor.long


def far(x):
    """The same tensor on another device."""
    return x.to(OTHER_DEVICE)


def drawn(shapes, change):
    """Random tensors of these shapes; `change` has a function for those that are changed, by index."""
    return changed([draw(*shape) for shape in shapes], change)


def changed(tensors, change):
    return [change.get(index, lambda x: x)(tensor) for index, tensor in enumerate(tensors)]


def norm(ops, x=(2, 96), weight=(96,), change=UNCHANGED):
    return ops.rms_norm(*drawn((x, weight), change), EPS)


def add(ops, x=(2, 96), residual=(2, 96), weight=(96,), change=UNCHANGED):
    return ops.add_rms_norm(*drawn((x, residual, weight), change), EPS)


def rotate(ops, q=(2, 7, 3, 32), k=(2, 7, 1, 32), table=(7, 16), change=UNCHANGED):
    return ops.rope(*changed((draw(*q), draw(*k), *angles(*table)), change))


def rotate_packed(ops, qkv=(2, 7, 5, 32), table=(7, 16), key_heads=1, change=UNCHANGED):
    return ops.rope_qkv(*changed((draw(*qkv), *angles(*table)), change), key_heads)


def attend(ops, q=(2, 7, 3, 32), k=(2, 7, 1, 32), v=None, doc_start=None, change=UNCHANGED, **options):
    return ops.attention(*drawn((q, k, v or k), change), doc_start, **options)


def decode(ops, q=(2, 1, 3, 32), k=(2, 7, 1, 32), v=None, lengths=(7, 7), change=UNCHANGED):
    lengths = torch.tensor(lengths, device=DEVICE) if isinstance(lengths, tuple) else lengths
    return ops.decode_attention(*drawn((q, k, v or k), change), lengths)


def gated(ops, shapes=((2, 8), (2, 8)), change=UNCHANGED):
    return ops.swiglu(*drawn(shapes, change))


def loss(ops, hidden=(4, 32), weight=(97, 32), targets=(0, 1, 2, 96), change=UNCHANGED, **options):
    targets = torch.tensor(targets, device=DEVICE) if isinstance(targets, tuple) else targets
    return ops.linear_cross_entropy(*drawn((hidden, weight), change), targets, **options)


# Refused by every backend: operation -> (call, the message after "operation: expected ").
STARTS = torch.zeros(2, 7, dtype=torch.int32, device=DEVICE)
SHARED = {
    "rms_norm": [
        (partial(norm, weight=(95,)), "weight of shape [96], got [95]"),
        (partial(norm, weight=(1, 96)), "weight of shape [96], got [1, 96]"),
        (partial(norm, x=(), weight=(1,)), "x of shape [..., D], got []"),
        (partial(norm, change={1: half}), "weight of dtype torch.float32 as x, got torch.float16"),
        (partial(norm, change={0: long}), "x of a floating-point dtype, got torch.int64"),
        (partial(norm, change={1: far}), f"weight on {PLACE} as x, got meta"),
    ],
    "add_rms_norm": [
        (partial(add, weight=(95,)), "weight of shape [96], got [95]"),
        (partial(add, residual=(3, 96)), "residual of shape [2, 96], got [3, 96]"),
        (partial(add, residual=(1, 96)), "residual of shape [2, 96], got [1, 96]"),
        (partial(add, change={1: half}), "residual of dtype torch.float32 as x, got torch.float16"),
        (partial(add, change={1: far}), f"residual on {PLACE} as x, got meta"),
    ],
    "rope": [
        (partial(rotate, q=(7, 3, 32)), "q of shape [B, T, H, D], got [7, 3, 32]"),
        (partial(rotate, q=(2, 7, 3, 31)), "an even head dim, got 31"),
        (partial(rotate, k=(2, 8, 1, 32)), "k of shape [2, 7, K, 32], got [2, 8, 1, 32]"),
        (partial(rotate, k=(2, 7, 1, 64)), "k of shape [2, 7, K, 32], got [2, 7, 1, 64]"),
        (partial(rotate, table=(6, 16)), "cos of shape [7, 16] or [2, 7, 16], got [6, 16]"),
        (partial(rotate, table=(7, 32)), "cos of shape [7, 16] or [2, 7, 16], got [7, 32]"),
        (partial(rotate, table=(3, 7, 16)), "cos of shape [7, 16] or [2, 7, 16], got [3, 7, 16]"),
        (partial(rotate, change={3: lambda x: x[:6]}), "sin of shape [7, 16] or [2, 7, 16], got [6, 16]"),
        (
            partial(rotate, change={2: lambda x: x.expand(2, 7, 16)}),
            "sin of shape [2, 7, 16] as cos, got [7, 16]",
        ),
        (partial(rotate, change={1: half}), "k of dtype torch.float32 as q, got torch.float16"),
        (partial(rotate, change={0: torch.Tensor.int}), "q of a floating-point dtype, got torch.int32"),
        (partial(rotate, change={2: long}), "cos and sin of one floating-point dtype, got torch.int64"),
        (partial(rotate, change={3: half}), "cos and sin of one floating-point dtype, got torch.float16"),
        (partial(rotate, change={3: far}), f"sin on {PLACE} as q, got meta"),
        (partial(rotate_packed, table=(6, 16)), "cos of shape [7, 16] or [2, 7, 16], got [6, 16]"),
    ],
    "rope_qkv": [
        (partial(rotate_packed, qkv=(2, 7, 160)), "qkv of shape [B, T, H + 2K, D], got [2, 7, 160]"),
        (partial(rotate_packed, key_heads=0), "key_heads so that H + 2K = 5 with H > 0, got 0"),
        (partial(rotate_packed, key_heads=3), "key_heads so that H + 2K = 5 with H > 0, got 3"),
    ],
    "attention": [
        (partial(attend, q=(7, 3, 32)), "q of shape [B, T, H, D], got [7, 3, 32]"),
        (partial(attend, k=(1, 7, 1, 32)), "keys of shape [2, S, K, 32], got [1, 7, 1, 32]"),
        (partial(attend, k=(2, 7, 1, 64)), "keys of shape [2, S, K, 32], got [2, 7, 1, 64]"),
        (partial(attend, v=(2, 8, 1, 32)), "values of shape [2, 7, 1, 32] as the keys, got [2, 8, 1, 32]"),
        (partial(attend, k=(2, 7, 2, 32)), "key heads that divide the 3 query heads, got 2"),
        (partial(attend, scale=float("nan")), "a finite scale, got nan"),
        (partial(attend, scale=-float("inf")), "a finite scale, got -inf"),
        (partial(attend, k=(2, 7, 0, 32)), "key heads that divide the 3 query heads, got 0"),
        (partial(attend, k=(2, 6, 1, 32)), "at least as many keys as the 7 queries, got 6"),
        (partial(attend, change={2: half}), "v of dtype torch.float32 as q, got torch.float16"),
        (partial(attend, change={1: far}), f"k on {PLACE} as q, got meta"),
        (partial(attend, doc_start=STARTS[0]), "doc_start of shape [2, 7], got [7]"),
        (partial(attend, doc_start=STARTS.float()), "doc_start of an integer dtype, got torch.float32"),
        (partial(attend, doc_start=far(STARTS)), f"doc_start on {PLACE} as q, got meta"),
    ],
    "decode_attention": [
        (partial(decode, q=(2, 3, 32)), "q of shape [B, T, H, D], got [2, 3, 32]"),
        (partial(decode, k=(3, 7, 1, 32)), "keys of shape [2, S, K, 32], got [3, 7, 1, 32]"),
        (partial(decode, k=(2, 7, 2, 32)), "key heads that divide the 3 query heads, got 2"),
        (partial(decode, q=(2, 8, 3, 32)), "at least as many keys as the 8 queries, got 7"),
        (partial(decode, lengths=(7,)), "lengths of shape [2], got [1]"),
        (partial(decode, lengths=(7.0, 7.0)), "lengths of an integer dtype, got torch.float32"),
        (partial(decode, lengths=far(torch.tensor([7, 7]))), f"lengths on {PLACE} as q, got meta"),
        (partial(decode, change={1: half}), "k of dtype torch.float32 as q, got torch.float16"),
    ],
    "swiglu": [
        (partial(gated, shapes=((2, 8), (2, 7))), "up of shape [2, 8] as gate, got [2, 7]"),
        (partial(gated, shapes=((2, 8), (1, 8))), "up of shape [2, 8] as gate, got [1, 8]"),
        (partial(gated, shapes=((2, 7),)), "an even last dimension of the packed gate and up, got 7"),
        (partial(gated, shapes=((),)), "gate of shape [..., F], got []"),
        (
            partial(gated, shapes=((2, 8), (2, 8)), change={1: half}),
            "up of dtype torch.float32 as gate, got torch.float16",
        ),
        (
            partial(gated, shapes=((2, 8),), change={0: long}),
            "gate of a floating-point dtype, got torch.int64",
        ),
        (partial(gated, shapes=((2, 8), (2, 8)), change={1: far}), f"up on {PLACE} as gate, got meta"),
    ],
    "linear_cross_entropy": [
        (partial(loss, hidden=(2, 2, 32)), "hidden of shape [N, D], got [2, 2, 32]"),
        (partial(loss, weight=(97, 31)), "weight of shape [V, 32], got [97, 31]"),
        (partial(loss, targets=(0, 1, 2)), "targets of shape [4], got [3]"),
        (partial(loss, targets=(0.0, 0.0, 0.0, 0.0)), "targets of an integer dtype, got torch.float32"),
        (
            partial(loss, change={0: long}),
            "hidden and weight of floating-point dtypes, got (torch.int64, torch.float32)",
        ),
        (partial(loss, change={1: far}), f"weight and targets on {PLACE} as hidden, got (device"),
        (partial(loss, targets=far(torch.tensor([0, 1, 2, 3]))), f"weight and targets on {PLACE} as hidden"),
        (partial(loss, reduction="max"), "reduction 'mean', 'sum' or 'none', got 'max'"),
        (partial(loss, z_loss=-0.1), "z_loss >= 0, got -0.1"),
        (partial(loss, label_smoothing=1.5), "label_smoothing in [0, 1], got 1.5"),
    ],
}

WIDE = "float32, float16 or bfloat16 (the torch backend also takes float64), got torch.float64"
DOUBLE = dict.fromkeys(range(4), torch.Tensor.double)

# Refused by the kernels only; the reference is more general.
KERNELS_ONLY = {
    "rms_norm": [
        (partial(norm, change=DOUBLE), WIDE),
    ],
    "add_rms_norm": [
        (partial(add, change=DOUBLE), WIDE),
    ],
    "rope": [
        (partial(rotate, change=DOUBLE), WIDE),
        (
            partial(rotate, q=(2, 7, 3, 48), k=(2, 7, 1, 48), table=(7, 24)),
            "a head dim that is a power of two, got 48",
        ),
    ],
    "rope_qkv": [
        (partial(rotate_packed, change={0: torch.Tensor.double}), WIDE),
        (partial(rotate_packed, qkv=(2, 7, 5, 6), table=(7, 3)), "a head dim that is a power of two, got 6"),
    ],
    "attention": [
        (partial(attend, change=DOUBLE), WIDE),
        (partial(attend, q=(2, 7, 3, 16), k=(2, 7, 1, 16)), "a head dim in [32, 64, 128], got 16"),
        (partial(attend, q=(2, 7, 3, 96), k=(2, 7, 1, 96)), "a head dim in [32, 64, 128], got 96"),
        (
            partial(attend, dropout_p=0.1),
            "dropout_p = 0 (for dropout use backend 'triton,attention=torch'), got 0.1",
        ),
    ],
    "decode_attention": [
        (partial(decode, change=DOUBLE), WIDE),
        (partial(decode, q=(2, 1, 3, 48), k=(2, 7, 1, 48)), "a head dim in [32, 64, 128], got 48"),
        (partial(decode, q=(2, 17, 3, 32), k=(2, 20, 1, 32)), "at most 16 new queries, got 17"),
        (
            partial(decode, change={1: lambda x: torch.stack((x, x), -1)[..., 0]}),
            "key cache with a last stride of 1, got 2",
        ),
        (
            partial(decode, change={2: lambda x: x[..., :1].expand(x.shape)}),
            "value cache with a last stride of 1, got 0",
        ),
        (
            partial(decode, change={0: lambda x: torch.stack((x, x), -1)[..., 0]}),
            "q with a last stride of 1, got 2",
        ),
    ],
    "swiglu": [
        (partial(gated, shapes=((2, 8), (2, 8)), change=DOUBLE), WIDE),
    ],
    "linear_cross_entropy": [
        (partial(loss, change=DOUBLE), WIDE),
    ],
}


def cases(table):
    """The parameters of a test: (call, the whole message)."""
    rows = [(call, f"{op}: expected {message}") for op, found in table.items() for call, message in found]
    return pytest.mark.parametrize("call, message", rows, ids=[message for _, message in rows])


def refused(call, ops):
    with pytest.raises(ValueError) as error:
        call(ops)
    return str(error.value)


@cases(SHARED)
def test_every_backend_refuses_in_the_same_words(call, message):
    said = refused(call, TRITON)
    assert message in said
    assert re.fullmatch(r"[a-z_]+: expected .+, got .+", said)
    assert refused(call, TORCH) == said


@cases(KERNELS_ONLY)
def test_the_kernels_refuse_what_they_do_not_do(call, message):
    assert refused(call, TRITON) == message


@pytest.mark.parametrize("call", [norm, add, rotate, rotate_packed, attend, decode, gated, loss])
@pytest.mark.skipif(DEVICE.type != "cpu", reason="the device runs the kernels")
def test_a_kernel_on_a_cpu_names_the_interpreter_and_the_torch_backend(call, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    caches = launch_config.launch_config, launch_config.architecture
    for cache in caches:
        cache.cache_clear()
    said = "expected tensors on a CUDA, ROCm or XPU device, got cpu; set TRITON_INTERPRET=1 .*backend 'torch'"
    with pytest.raises(ValueError, match=said):
        call(TRITON)


@pytest.mark.parametrize("call", [norm, add, rotate, rotate_packed, attend, decode, gated, loss])
@pytest.mark.parametrize("ops", [TORCH, TRITON], ids=["torch", "triton"])
def test_the_right_input_is_accepted(call, ops):
    """The defaults of the calls above: what is refused is refused for the one thing that was changed."""
    call(ops)
