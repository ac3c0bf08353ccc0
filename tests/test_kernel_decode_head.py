"""Final norm and head in one launch: the numerics contract, fp32 logits, that a row's logits do not depend on
other rows, and that the best of every few columns are the best of these logits, bit for bit.
"""

import dataclasses
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
    TORCH,
    TRITON,
    assert_same,
    configured_for,
    draw,
    far,
    gap,
)  # fmt: skip

from kernels import reference
from kernels.backend import with_ops
from kernels.decode_head import _decode_best, _decode_head, decode_best, decode_head
from kernels.launch_config import launch_config

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


def same_best(*tensors, suppressed=None):
    """decode_best, held to the logits of decode_head tile by tile: their bits, and the first of a tie."""
    scores, ids = decode_best(*tensors, EPS, suppressed)
    logits = decode_head(*tensors, EPS)
    logits = logits.where(~logits.isnan(), torch.inf)
    if suppressed is not None:
        logits = logits.masked_fill(suppressed, -torch.inf)
    columns = launch_config("decode_head", tensors[0].dtype, DEVICE, tensors[0].shape[1]).block_n
    padded = F.pad(logits, (0, -logits.shape[1] % columns), value=-torch.inf).unflatten(1, (-1, columns))
    expected = padded.max(-1)
    first = expected.indices + torch.arange(0, padded.shape[1] * columns, columns, device=DEVICE)
    assert scores.dtype == torch.float32 and ids.dtype == torch.int32
    assert_same([scores, ids.long()], [expected.values, first])
    return scores, ids


def mask_of(vocabulary):
    """Some tokens, all of a tile among them, whatever its size here or on a GPU."""
    return (torch.arange(vocabulary, device=DEVICE) % 3 == 0).index_fill(
        0, torch.arange(64, device=DEVICE), True
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [576, 960, 2048])
def test_the_best_at_models_widths(width, dtype):
    same_best(*inputs(2, width=width, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_the_best_of_rows_and_of_those_not_suppressed(rows, dtype):
    tensors = inputs(rows, dtype=dtype)
    scores, ids = same_best(*tensors)
    assert scores.is_contiguous() and ids.shape == scores.shape == (rows, scores.shape[1])
    same_best(*tensors, suppressed=mask_of(101))
    same_best(gap(tensors[0], dim=1), *tensors[1:], suppressed=gap(mask_of(101)))


@pytest.mark.parametrize("width, vocabulary", [(1, 1), (33, 16), (64, 17), (97, 511)])
def test_the_best_of_any_width_and_vocabulary(width, vocabulary):
    x, scale, weight = inputs(3, width=width, vocabulary=vocabulary)
    weight[-1] = -x[0] * scale  # a negative logit, less than that of a column of zeros past the end
    same_best(x, scale, weight)


def test_of_equal_logits_the_first_is_the_best():
    x, scale, weight = inputs(3, vocabulary=64)
    same_best(x, scale, weight[:1].expand(64, -1))
    same_best(x, scale, weight.repeat_interleave(2, dim=0))


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's word on 0 * inf
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_best_of_rows_that_are_not_finite(value):
    x, scale, weight = inputs(3)
    x[1, 5] = value
    weight[30, 5] = value
    scores, _ = same_best(x, scale, weight, suppressed=mask_of(101))
    assert not scores[1].amax().isfinite() and scores[2].amax().isfinite(), "token 30 is suppressed"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_best_of_a_row_alone_are_those_in_a_batch(dtype):
    x, *weights = inputs(16, dtype=dtype)
    batch = decode_best(x, *weights, EPS)
    for rows in ([0], [15], [3, 9], [8, 2, 0, 1, 5]):
        assert_same(decode_best(x[rows], *weights, EPS), [found[rows] for found in batch])


def test_the_best_by_the_gpus_configuration():
    with configured_for("sm_90"):
        same_best(*inputs(3, width=97, vocabulary=151), suppressed=mask_of(151))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 17])
def test_the_token_is_that_of_the_composition(rows, dtype):
    """Of few rows and of many, and where decode_head was replaced: it has its effect here too."""
    tensors, masks = inputs(rows, dtype=dtype), (None, mask_of(101))
    for ops in (TRITON, with_ops(TRITON, decode_head=TORCH)):
        for suppressed in masks:
            scores, ids = ops.decode_best(*tensors, EPS, suppressed)
            best = scores.argmax(1, keepdim=True)
            logits = ops.decode_head(*tensors, EPS)
            logits = logits if suppressed is None else logits.masked_fill(suppressed, -torch.inf)
            assert_same(
                [best if ids is None else ids.gather(1, best).long()], [logits.argmax(1, keepdim=True)]
            )


def test_a_replaced_head_is_called_for_the_best_too():
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return reference.decode_head(*args, **options)

    marked = dataclasses.replace(TORCH, name="marked", decode_head=counted)
    with_ops(TRITON, decode_head=marked).decode_best(*inputs(2), EPS)
    assert len(calls) == 1
    with_ops(TRITON, decode_head=marked, decode_best=TRITON).decode_best(*inputs(2), EPS)
    assert len(calls) == 1


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


BAD_BEST = [
    (lambda x, n, w, s: (x[None], n, w, EPS, s), "x of shape [R, E], got [1, 3, 96]"),
    (lambda x, n, w, s: (x, n[1:], w, EPS, s), "norm_weight of shape [96], got [95]"),
    (lambda x, n, w, s: (x, n, w, EPS, s[1:]), "suppressed of shape [101], got [100]"),
    (lambda x, n, w, s: (x, n, w, EPS, s.int()), "suppressed of dtype torch.bool, got torch.int32"),
    (lambda x, n, w, s: (x, n, w, EPS, s.to("meta")), f"suppressed on {PLACE} as x, got meta"),
]


@pytest.mark.parametrize("change, message", BAD_BEST, ids=[message for _, message in BAD_BEST])
@pytest.mark.parametrize("ops", [TORCH, TRITON], ids=["torch", "triton"])
def test_bad_input_of_the_best_is_refused(change, message, ops):
    with pytest.raises(ValueError, match=re.escape(f"decode_best: expected {message}")):
        ops.decode_best(*change(*inputs(3), mask_of(101)))


def test_torch_compile_sees_one_operation():
    torch.library.opcheck(_decode_head.op, (*inputs(3), EPS, False))
    torch.library.opcheck(_decode_best.op, (*inputs(3), EPS, mask_of(101), False))
