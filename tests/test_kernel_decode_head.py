"""Final norm and head in one launch: the numerics contract, fp32 logits, and that a row's logits do not
depend on other rows.
"""

import re

import numerics
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    DEVICE,
    DTYPES,
    EPS,
    INTERPRETED,
    PLACE,
    assert_same,
    configured_for,
    draw,
    far,
    gap,
)  # fmt: skip

from kernels import reference
from kernels.decode_head import _decode_head, decode_head

pytestmark = pytest.mark.usefixtures("poison_empty")


def inputs(*rows, width=96, vocabulary=101, dtype=torch.float32):
    """x [*rows, width], norm weight, head weight."""
    return (
        draw(*rows, width, dtype=dtype),
        1 + draw(width, dtype=dtype, scale=0.2),
        draw(vocabulary, width, dtype=dtype, scale=width**-0.5),
    )


def composed(x, scale, weight):
    return F.linear(reference.rms_norm(x, scale, EPS), weight)


def agree(*tensors):
    ours = decode_head(*tensors, EPS)
    base, truth = composed(*tensors).float(), composed(*(tensor.double() for tensor in tensors))
    numerics.check("decode_head", "logits", ours, base, truth, tested=tensors[0].dtype)
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [576, 960, 2048])
def test_models_widths(width, dtype):
    agree(*inputs(2, 1, width=width, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(), (1,), (3,), (16,), (2, 7)])
def test_rows(rows, dtype):
    logits = agree(*inputs(*rows, dtype=dtype))
    assert logits.shape == (*rows, 101) and logits.dtype == torch.float32


@pytest.mark.parametrize("width, vocabulary", [(1, 1), (33, 16), (64, 17), (97, 511)])
def test_any_width_and_vocabulary(width, vocabulary):
    agree(*inputs(3, width=width, vocabulary=vocabulary))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0])
def test_size_of_the_stream(scale):
    x, *weights = inputs(3)
    agree(x * scale, *weights)


def test_logits_are_not_rounded_to_the_model():
    """In 16 bits the logits are closer to the truth than any 16-bit logits could be."""
    tensors = inputs(4, width=576, vocabulary=200, dtype=torch.float16)
    truth = composed(*(tensor.double() for tensor in tensors))
    ours = decode_head(*tensors, EPS)
    assert (ours - truth).abs().max() < 0.1 * (truth.half() - truth).abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_is_the_row_in_a_batch(dtype):
    x, *weights = inputs(16, dtype=dtype)
    batch = decode_head(x, *weights, EPS)
    for rows in ([0], [15], [3, 9], [8, 2, 0, 1, 5]):
        assert_same([decode_head(x[rows], *weights, EPS)], [batch[rows]])


@pytest.mark.parametrize(
    "first, width, aligned", [(48, 208, True), (50, 200, False)], ids=["aligned", "not aligned"]
)
def test_views(first, width, aligned):
    """A stream with gaps, and a head that is part of a wider matrix.

    If the head's address and stride are multiples of 16, as those of a dense one are, the compiled kernel and
    the bits are the same. Otherwise the compiler lays the columns out differently and sums them in another
    order; the contract holds. (The interpreter has one order.)
    """
    x, scale, weight = inputs(3)
    wide = torch.full((101, width), float("nan"), device=DEVICE)
    wide[:, first : first + 96] = weight
    ours = agree(gap(x, dim=1), scale, wide[:, first : first + 96])
    if aligned or INTERPRETED:
        assert_same([ours], [decode_head(x, scale, weight, EPS)])


def test_a_head_far_apart():
    """Offsets past 2^31 elements; see test_kernel_offsets.py."""
    x, scale, weight = inputs(2, vocabulary=3, dtype=torch.float16)
    assert_same([decode_head(x, scale, far(weight, 0), EPS)], [decode_head(x, scale, weight, EPS)])


def test_the_gpus_configuration_agrees():
    tensors = inputs(3, width=97, vocabulary=51)
    ours = agree(*tensors)
    with configured_for("sm_90"):
        torch.testing.assert_close(agree(*tensors), ours, rtol=1e-5, atol=1e-5)


def test_no_rows_and_no_vocabulary():
    assert decode_head(*inputs(0), EPS).shape == (0, 101)
    assert decode_head(*inputs(3, vocabulary=0), EPS).shape == (3, 0)


def test_inputs_are_not_written():
    tensors = inputs(3)
    before = [tensor.clone() for tensor in tensors]
    decode_head(*tensors, EPS)
    assert_same(tensors, before)


BAD = [
    (lambda x, n, w: (x, n[1:], w), "norm_weight of shape [96], got [95]"),
    (lambda x, n, w: (x, n, w[:, 1:]), "head_weight of shape [V, 96], got [101, 95]"),
    (lambda x, n, w: (x, n, w[0]), "head_weight of shape [V, 96], got [96]"),
    (lambda x, n, w: (x, n, w.half()), "head_weight of dtype torch.float32 as x, got torch.float16"),
    (lambda x, n, w: (x, n, w.to("meta")), f"head_weight on {PLACE} as x, got meta"),
    (lambda x, n, w: (x, n, w.t().contiguous().t()), "head_weight with a last stride of 1, got 101"),
    (lambda x, n, w: (x.repeat(6, 1), n, w), "at most 16 rows, got 18"),
    (
        lambda x, n, w: (x.double(), n.double(), w.double()),
        "float32, float16 or bfloat16 (the torch backend also takes float64), got torch.float64",
    ),
]


@pytest.mark.parametrize("change, message", BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(f"decode_head: expected {message}")):
        decode_head(*change(*inputs(3)), EPS)


def test_torch_compile_sees_one_operation():
    torch.library.opcheck(_decode_head.op, (*inputs(3), EPS))
