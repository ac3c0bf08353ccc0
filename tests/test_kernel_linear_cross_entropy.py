"""linear_cross_entropy against the numerics contract: loss, gradient of the hidden states, gradient of the head."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE, DTYPES, LENGTHS, ROW_LAYOUTS, TORCH, TRITON, agree, assert_same, draw, gap, over

from kernels import linear_cross_entropy

# What a kernel does not write is NaN, and not by luck the right value of an earlier run.
pytestmark = pytest.mark.usefixtures("poison_empty")


def inputs(tokens, width, vocabulary, dtype=torch.float32):
    """Logits of size 2 or so."""
    hidden, weight = draw(tokens, width, dtype=dtype), draw(vocabulary, width, dtype=dtype, scale=2 * width**-0.5)
    return (hidden, weight), torch.randint(0, vocabulary, (tokens,)).to(DEVICE)


def some_ignored(targets):
    targets[::4] = -100
    return targets


def times(factor):
    """An upstream gradient of about that factor. The mean's gradients are of size 1/N: as small as atol, where it would hide an error."""
    return lambda dy: dy.abs().clamp(min=0.5) * factor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [576, 960, 2048])
def test_models_widths(width, dtype):
    tensors, targets = inputs(5, width, 1009, dtype)
    agree("linear_cross_entropy", tensors, some_ignored(targets), upstream=times(5))


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
@pytest.mark.parametrize("z_loss, label_smoothing", [(0.0, 0.0), (0.01, 0.0), (0.0, 0.1), (0.003, 0.2), (0.0, 1.0)])
def test_losses(reduction, z_loss, label_smoothing, dtype):
    tensors, targets = inputs(9, 48, 101, dtype)
    upstream = times(9 if reduction == "mean" else 1)
    options = dict(reduction=reduction, z_loss=z_loss, label_smoothing=label_smoothing)
    agree("linear_cross_entropy", tensors, some_ignored(targets), upstream=upstream, **options)


@pytest.mark.parametrize("tokens", [32, 34, 63])
def test_chunks(tokens, monkeypatch):
    """dW is added up over chunks, the last of them ragged and not ignored."""
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_TOKENS", 16)
    tensors, targets = inputs(tokens, 48, 101)
    agree("linear_cross_entropy", tensors, some_ignored(targets), z_loss=0.01, upstream=times(tokens))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_reduction(dtype):
    tensors, targets = inputs(9, 48, 101, dtype)
    losses = TRITON.linear_cross_entropy(*tensors, some_ignored(targets), reduction="none", label_smoothing=0.1)
    truth = F.cross_entropy(tensors[0].double() @ tensors[1].double().t(), targets, reduction="none", label_smoothing=0.1)
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
    (_, gradients) = agree("linear_cross_entropy", tensors, targets, ignore_index=ignore_index, upstream=times(8))
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
    """A head in fp32 under 16-bit activations is cast on the way in; its gradient comes back in fp32 and is not rounded on the way."""
    (hidden, weight), targets = inputs(40, 32, 97)
    _, (dhidden, dweight) = agree("linear_cross_entropy", (hidden.to(dtype), weight), targets, upstream=times(40))
    assert dhidden.dtype == dtype and dweight.dtype == torch.float32
    assert not torch.equal(dweight, dweight.to(dtype).float())


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_one_gradient_is_wanted(wanted):
    tensors, targets = inputs(9, 32, 97)
    both = [x.clone().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(TRITON.linear_cross_entropy(*both, targets), both)[wanted]
    tensors[wanted].requires_grad_()
    assert_same(torch.autograd.grad(TRITON.linear_cross_entropy(*tensors, targets), tensors[wanted]), [expected])


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


def test_logits_are_never_held_as_a_whole(monkeypatch):
    """The largest tensor of the forward and backward pass is one chunk of logits."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():  # the interpreter copies storages as bytes
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr(linear_cross_entropy, "CHUNK_TOKENS", 16)
    (hidden, weight), targets = inputs(80, 8, 500)
    hidden.requires_grad_(), weight.requires_grad_()
    with Watch():
        TRITON.linear_cross_entropy(hidden, weight, targets).backward()
    assert largest == 16 * 500


def test_empty_batch():
    (hidden, weight), targets = inputs(0, 32, 97)
    (loss,), (dhidden, dweight) = agree("linear_cross_entropy", (hidden, weight), targets)
    assert loss == 0 and dhidden.shape == (0, 32)
    assert_same([dweight], [torch.zeros_like(weight)])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="thousands of tokens with the whole vocabulary take minutes in the interpreter")
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
