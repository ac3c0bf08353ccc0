"""linear_cross_entropy against the numerics contract: the loss and both gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    DEVICE,
    DTYPES,
    LENGTHS,
    ROW_LAYOUTS,
    TORCH,
    TRITON,
    agree,
    assert_same,
    draw,
    gap,
    over,
)

from kernels import linear_cross_entropy
from kernels.products import tokens_per_chunk

# Memory that a kernel does not write holds NaN, and not by chance the right value of an earlier run.
pytestmark = pytest.mark.usefixtures("poison_empty")


def inputs(tokens, width, vocabulary, dtype=torch.float32):
    """((hidden, weight), targets), for logits of size 2 or so."""
    hidden = draw(tokens, width, dtype=dtype)
    weight = draw(vocabulary, width, dtype=dtype, scale=2 * width**-0.5)
    return (hidden, weight), torch.randint(0, vocabulary, (tokens,)).to(DEVICE)


def some_ignored(targets):
    targets[::4] = -100
    return targets


def times(factor):
    """An upstream gradient of about that factor: at the mean's gradients, of size 1/N, atol hides errors."""
    return lambda dy: dy.abs().clamp(min=0.5) * factor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [576, 960, 2048])
def test_models_widths(width, dtype):
    tensors, targets = inputs(5, width, 1009, dtype)
    agree("linear_cross_entropy", tensors, some_ignored(targets), upstream=times(5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loss_scale_saves_what_is_small(dtype):
    """The mean over many tokens may be too small for fp16, before GradScaler multiplies it by 65,536."""
    tensors, targets = inputs(9, 32, 97, dtype)
    small = torch.tensor(2.0**-14, device=DEVICE)
    agree("linear_cross_entropy", tensors, some_ignored(targets), scale=small, upstream=times(2.0**16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_numbers_of_tokens(tokens, dtype):
    tensors, targets = inputs(tokens, 32, 97, dtype)
    agree("linear_cross_entropy", tensors, targets, upstream=times(tokens))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 511, 8192, 8193, 49152])
def test_vocabularies(vocabulary, dtype):
    tensors, targets = inputs(6, 64, vocabulary, dtype)
    targets[0], targets[1] = 0, vocabulary - 1
    agree("linear_cross_entropy", tensors, targets, reduction="sum", upstream=times(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "z_loss, label_smoothing", [(0.0, 0.0), (0.01, 0.0), (0.0, 0.1), (0.003, 0.2), (0.0, 1.0)]
)
def test_losses(reduction, z_loss, label_smoothing, dtype):
    tensors, targets = inputs(9, 48, 101, dtype)
    upstream = times(9 if reduction == "mean" else 1)
    options = dict(reduction=reduction, z_loss=z_loss, label_smoothing=label_smoothing)
    agree("linear_cross_entropy", tensors, some_ignored(targets), upstream=upstream, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [32, 34, 63])
def test_chunks(tokens, dtype):
    """dW is summed over chunks; the last chunk is ragged and counts."""
    tensors, targets = inputs(tokens, 48, 101, dtype)
    options = dict(z_loss=0.01, chunk_tokens=16, upstream=times(tokens))
    agree("linear_cross_entropy", tensors, some_ignored(targets), **options)


def test_chunks_do_not_change_the_losses():
    tensors, targets = inputs(33, 48, 101)
    losses = [
        TRITON.linear_cross_entropy(*tensors, targets, reduction="none", chunk_tokens=chunk)
        for chunk in (None, 1, 16, 33, 100)
    ]
    torch.testing.assert_close(losses[1:], losses[:1] * 4, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [97, 49152, 151936, 2**31 - 1])
@pytest.mark.parametrize(
    "width, across", [(1, 1), (64, 1), (192, 1), (576, 3), (640, 5), (768, 3), (960, 5), (1024, 4), (2048, 8)]
)
def test_the_rule_of_the_chunk(width, across, vocabulary):
    """The fewest tokens that fill their waves as far as whole rows of tiles can, or the most allowed."""
    most = max(128, min(8192, 2**29 // vocabulary) // 128 * 128)
    for processors in (1, 16, 46, 78, 84, 96, 108, 114, 132, 144, 148, 170, 188, 304):

        def fills(tokens, processors=processors):
            tiles = tokens // 128 * across
            places = -(-tiles // processors) * processors
            return tiles >= 0.95 * places and tiles + across > places

        full = [tokens for tokens in range(min(4096, most), most + 1, 128) if fills(tokens)]
        assert tokens_per_chunk(width, vocabulary, processors) == (full[0] if full else most), processors


def test_the_chunks_of_the_models():
    """On H100, A100 and B200: at most half of the logits of 16,384 tokens exist."""
    expected = {576: [5632, 4608, 6272], 960: [6656, 5504, 7552], 2048: [4224, 5120, 4736]}
    for width, chunks in expected.items():
        assert [tokens_per_chunk(width, 49152, processors) for processors in (132, 108, 148)] == chunks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scale(reduction, dtype):
    """It multiplies the loss and both gradients."""
    tensors, targets = inputs(9, 48, 101, dtype)
    options = dict(reduction=reduction, upstream=times(9 if reduction == "mean" else 1))
    scale = torch.tensor(0.3, device=DEVICE)
    scaled = agree("linear_cross_entropy", tensors, some_ignored(targets), scale=scale, **options)
    torch.manual_seed(1234)
    plain = agree("linear_cross_entropy", *inputs(9, 48, 101, dtype)[:1], targets, **options)
    for ours, expected in zip((*scaled[0], *scaled[1]), (*plain[0], *plain[1]), strict=True):
        atol = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[ours.dtype]
        atol *= max(1.0, expected.abs().max().item())
        torch.testing.assert_close(ours, expected * 0.3, rtol=0, atol=atol)


def test_scale_of_the_mean_and_of_each_token():
    tensors, targets = inputs(12, 48, 101)
    scale = 1 / (some_ignored(targets) != -100).sum().float()
    for ops in (TRITON, TORCH):
        of_sum = ops.linear_cross_entropy(*tensors, targets, reduction="sum", scale=scale)
        assert_same([of_sum], [ops.linear_cross_entropy(*tensors, targets)])
        losses = ops.linear_cross_entropy(*tensors, targets, reduction="none")
        scaled = ops.linear_cross_entropy(*tensors, targets, reduction="none", scale=scale)
        assert_same([scaled], [losses * scale])


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_copy_of_the_weight_gives_the_same_bits(dtype):
    """And the weight has the gradient, in its own dtype."""
    (hidden, weight), targets = inputs(40, 32, 97)
    hidden = hidden.to(dtype).requires_grad_()
    weight.requires_grad_()
    for ops in (TRITON, TORCH):
        found = []
        for copy in (None, weight.detach().to(dtype)):
            loss = ops.linear_cross_entropy(hidden, weight, targets, weight_copy=copy, chunk_tokens=16)
            found.append([loss.detach(), *torch.autograd.grad(loss, (hidden, weight))])
        assert_same(found[1], found[0])
        copy = torch.zeros_like(weight, dtype=dtype)
        zeros = ops.linear_cross_entropy(hidden, weight, targets, weight_copy=copy)
        torch.testing.assert_close(zeros.item(), math.log(97), rtol=1e-5, atol=0)


def test_the_gradients_are_given_away():
    """An upstream gradient of 1 copies and reads nothing: even a signalling NaN stays, at its address."""
    (hidden, weight), targets = inputs(9, 32, 97)
    tensors = hidden.requires_grad_(), weight.requires_grad_()
    loss = TRITON.linear_cross_entropy(*tensors, targets)
    made = loss.grad_fn.gradients[:2]
    made[1].view(torch.int32)[3, 5] = 0x7F800001  # a signalling NaN: arithmetic makes it a quiet one
    addresses = [x.data_ptr() for x in made]
    gradients = torch.autograd.grad(loss, tensors, retain_graph=True)
    assert [x.data_ptr() for x in gradients] == addresses
    assert gradients[1].view(torch.int32)[3, 5] == 0x7F800001
    again = torch.autograd.grad(loss, tensors)  # computed again
    assert again[1].isfinite().all() and not {x.data_ptr() for x in again} & set(addresses)
    assert_same([again[0]], [gradients[0]])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rescaling(dtype):
    """More elements than the programs multiply at a time, with a tail, in fp32 and rounded once."""
    block = linear_cross_entropy.RESCALED
    sizes = 7 * block + 3, 4 * block + 5
    dhidden, dweight = draw(sizes[0] + 1, dtype=dtype), draw(sizes[1] + 1)
    expected = [(dhidden.float() * 0.7).to(dtype), dweight * 0.7]
    for whole, ours in zip(expected, (dhidden, dweight), strict=True):
        whole[-1] = ours[-1]
    upstream = torch.tensor(0.7, device=DEVICE)
    linear_cross_entropy._rescale_kernel[(3,)](dhidden, dweight, upstream, *sizes, BLOCK=block)
    assert_same([dhidden, dweight], expected)


@pytest.mark.parametrize("options, message", [
    (dict(scale=torch.ones(1)), r"scale of shape \[\] in float32, got \(\[1\], torch.float32\)"),
    (dict(scale=torch.ones(()).double()), r"scale of shape \[\] in float32, got \(\[\], torch.float64\)"),
    (dict(scale=torch.ones((), device="meta")), "scale on cpu as hidden, got meta"),
    (dict(weight_copy=torch.ones(97, 31)), r"weight_copy of shape \[97, 32\] as the weight, got \[97, 31\]"),
    (dict(weight_copy=torch.ones(97, 32).half()), "weight_copy of dtype torch.float32, got torch.float16"),
    (dict(chunk_tokens=0), "chunk_tokens >= 1, got 0"),
])  # fmt: skip
def test_bad_options(options, message):
    hidden, weight, targets = torch.zeros(4, 32), torch.zeros(97, 32), torch.zeros(4, dtype=torch.int64)
    for ops in (TRITON, TORCH):
        with pytest.raises(ValueError, match=f"linear_cross_entropy: expected {message}"):
            ops.linear_cross_entropy(hidden, weight, targets, **options)


def test_a_second_derivative_is_refused():
    tensors, targets = inputs(9, 32, 97)
    tensors[0].requires_grad_()
    with pytest.raises(RuntimeError, match="linear_cross_entropy has first derivatives only"):
        torch.autograd.grad(TRITON.linear_cross_entropy(*tensors, targets), tensors[0], create_graph=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_reduction(dtype):
    tensors, targets = inputs(9, 48, 101, dtype)
    options = dict(reduction="none", label_smoothing=0.1)
    losses = TRITON.linear_cross_entropy(*tensors, some_ignored(targets), **options)
    truth = F.cross_entropy(tensors[0].double() @ tensors[1].double().t(), targets, **options)
    assert losses.dtype == torch.float32 and not losses.requires_grad
    torch.testing.assert_close(losses.double(), truth, rtol=0, atol={torch.float32: 1e-5}.get(dtype, 2e-2))


def test_all_targets_ignored():
    """The mean over nothing is 0, with gradients of exactly 0."""
    tensors, targets = inputs(7, 32, 97)
    (loss,), gradients = agree("linear_cross_entropy", tensors, torch.full_like(targets, -100))
    assert_same([loss, *gradients], [torch.zeros_like(x) for x in (loss, *gradients)])


@pytest.mark.parametrize("ignore_index", [-1, 3, 96])
def test_other_ignored_index(ignore_index):
    """Also an index of the vocabulary: such a token has no loss, whatever its logits."""
    tensors, targets = inputs(8, 32, 97)
    targets[::3] = ignore_index
    options = dict(ignore_index=ignore_index, upstream=times(8))
    _, gradients = agree("linear_cross_entropy", tensors, targets, **options)
    assert (gradients[0][::3] == 0).all() and (gradients[0][1] != 0).any()


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_kinds_and_layouts_of_targets(kind):
    tensors, targets = inputs(8, 32, 97)
    expected = TRITON.linear_cross_entropy(*tensors, targets)
    assert_same([TRITON.linear_cross_entropy(*tensors, gap(targets.to(kind)))], [expected])


@over(ROW_LAYOUTS)
def test_layouts_of_inputs(layout):
    (hidden, weight), targets = inputs(9, 32, 97)
    agree("linear_cross_entropy", (layout(hidden), layout(weight)), targets, upstream=times(9))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, id="fp16"), DTYPES[2]])
def test_master_weights(dtype):
    """An fp32 head under 16-bit activations is cast; its gradient is fp32 and never rounded to 16 bits."""
    (hidden, weight), targets = inputs(40, 32, 97)
    tensors = hidden.to(dtype), weight
    _, (dhidden, dweight) = agree("linear_cross_entropy", tensors, targets, upstream=times(40))
    assert dhidden.dtype == dtype and dweight.dtype == torch.float32
    assert not torch.equal(dweight, dweight.to(dtype).float())


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_one_gradient_is_wanted(wanted):
    tensors, targets = inputs(9, 32, 97)
    both = [x.clone().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(TRITON.linear_cross_entropy(*both, targets), both)[wanted]
    tensors[wanted].requires_grad_()
    loss = TRITON.linear_cross_entropy(*tensors, targets)
    assert_same(torch.autograd.grad(loss, tensors[wanted]), [expected])


def test_large_logits():
    """Logits of several hundred: the maximum is subtracted before the exponential."""
    (hidden, weight), targets = inputs(9, 32, 97)
    agree("linear_cross_entropy", (hidden * 100, weight), targets, upstream=times(9))


@pytest.mark.parametrize("target", [97, 98, 10**6, -1, -(10**6)])
def test_a_target_out_of_range_gives_nan_and_reads_nothing(target):
    """The other tokens of the batch keep their losses."""
    tensors, targets = inputs(6, 32, 97)
    expected = TRITON.linear_cross_entropy(*tensors, targets, reduction="none")
    targets[2] = target
    losses = TRITON.linear_cross_entropy(*tensors, targets, reduction="none")
    assert losses[2].isnan()
    keep = [0, 1, 3, 4, 5]
    assert_same([losses[keep]], [expected[keep]])
    assert TRITON.linear_cross_entropy(*tensors, targets).isnan()


def test_logits_are_never_held_as_a_whole():
    """The largest tensor of the forward and backward pass is one chunk of logits."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            # the interpreter copies storages as bytes
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                largest = max(largest, out.numel())
            return out

    (hidden, weight), targets = inputs(80, 8, 500)
    hidden.requires_grad_(), weight.requires_grad_()
    with Watch():
        TRITON.linear_cross_entropy(hidden, weight, targets, chunk_tokens=16).backward()
    assert largest == 16 * 500


def test_empty_batch():
    (hidden, weight), targets = inputs(0, 32, 97)
    (loss,), (dhidden, dweight) = agree("linear_cross_entropy", (hidden, weight), targets)
    assert loss == 0 and dhidden.shape == (0, 32)
    assert_same([dweight], [torch.zeros_like(weight)])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="4,099 tokens take minutes in the interpreter")
def test_whole_vocabulary_in_bf16():
    tensors, targets = inputs(4099, 576, 49152, torch.bfloat16)
    agree("linear_cross_entropy", tensors, targets, upstream=times(4099))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="65,537 tokens take minutes in the interpreter")
@pytest.mark.parametrize("tokens", [65536, 65537])
def test_many_tokens(tokens):
    tensors, targets = inputs(tokens, 64, 512, torch.bfloat16)
    loss = TORCH.linear_cross_entropy(*tensors, targets)
    torch.testing.assert_close(TRITON.linear_cross_entropy(*tensors, targets), loss, rtol=1e-3, atol=1e-3)
    agree("linear_cross_entropy", tensors, targets, upstream=times(tokens))
