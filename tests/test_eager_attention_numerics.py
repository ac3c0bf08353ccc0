"""The attention of training on a CPU, in blocks, against the numerics contract: torch's own is the base, the
reference in fp64 the truth.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable

import numerics
import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.eager import attention as eager_attention

LENGTHS = [1, 7, 63, 64, 65, 127, 200, 257]
NAMES = "out", "dq", "dk", "dv"

pytestmark = pytest.mark.usefixtures("poison_empty")


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def fresh_buffers(monkeypatch):
    """Buffers of each test are allocated in it, and so full of NaN: nothing is right because an earlier call
    left it there.
    """
    monkeypatch.setattr(eager_attention, "_buffers", eager_attention._Buffers())


def draw(*shape: int) -> Tensor:
    """Values that bf16 holds, so that every dtype computes with the same numbers."""
    return torch.randn(*shape).bfloat16().float()


def tensors(batch: int, length: int, keys: int, heads: int, key_heads: int, head_dim: int) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    shapes = ((length, heads), (keys, key_heads), (keys, key_heads), (length, heads))
    return [draw(batch, *shape, head_dim) for shape in shapes]


def run(
    attention: Callable[..., Tensor],
    values: list[Tensor],
    dtype: torch.dtype,
    doc_start: Tensor | None = None,
    scale: float | None = None,
) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    *leaves, upstream = (value.detach().to(dtype) for value in values)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = attention(*leaves, doc_start, scale=scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def check(
    dtype: torch.dtype, values: list[Tensor], doc_start: Tensor | None = None, scale: float | None = None
) -> None:
    ours = run(eager_attention.blocked_attention, values, dtype, doc_start, scale)
    base = run(eager_attention.library_attention, values, dtype, doc_start, scale)
    truth = run(reference.attention, values, torch.float64, doc_start, scale)
    for name, *three in zip(NAMES, ours, base, truth, strict=True):
        numerics.check("attention, torch", name, *three)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_length(dtype, length):
    check(dtype, tensors(2, length, length, 9, 3, 64))


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(("heads", "key_heads"), [(3, 3), (3, 1), (15, 5)])
def test_every_head_dim_and_group(dtype, heads, key_heads, head_dim):
    check(dtype, tensors(1, 130, 130, heads, key_heads, head_dim))


@pytest.mark.parametrize(("length", "keys"), [(1, 200), (65, 66), (130, 257)])
def test_more_keys_than_queries(dtype, length, keys):
    check(dtype, tensors(2, length, keys, 6, 2, 32))


@pytest.mark.parametrize("scale", [0.05, 1.0, -0.2, 0.0])
def test_a_scale_of_ones_own(dtype, scale):
    check(dtype, tensors(1, 100, 100, 3, 1, 32), scale=scale)


@pytest.mark.parametrize("length", [65, 200, 257])
def test_documents(dtype, length):
    """Rows whose documents end within a block, at its border, and after every token."""
    doc_start = torch.zeros(4, length, dtype=torch.int32)
    doc_start[0, 64:] = 64
    doc_start[1, 13:], doc_start[1, length // 2 :] = 13, length // 2
    doc_start[2] = torch.arange(length)
    check(dtype, tensors(4, length, length, 6, 2, 32), doc_start)


def test_one_document_in_all_rows_leaves_out_the_keys_before_it(dtype):
    doc_start = torch.zeros(2, 300, dtype=torch.int64)
    doc_start[:, 128:] = 128
    check(dtype, tensors(2, 300, 300, 3, 1, 32), doc_start)


def test_first_keys_in_any_order_and_more_keys(dtype):
    doc_start = torch.stack([torch.randperm(150)[:100], torch.arange(100), torch.full((100,), 3)])
    visible = doc_start <= torch.arange(50, 150)  # queries that see nothing have a test of their own
    check(dtype, tensors(3, 100, 150, 3, 1, 32), torch.where(visible, doc_start, 0))


def test_queries_that_see_nothing_give_zeros_and_no_gradients(dtype):
    values = tensors(2, 300, 300, 6, 2, 32)
    doc_start = torch.zeros(2, 300, dtype=torch.int64)
    # one query, a whole block, a whole row of the batch
    doc_start[0, 5], doc_start[0, 128:256], doc_start[1] = 6, 256, 500
    blind = doc_start > torch.arange(300)
    out, dq, dk, dv = run(eager_attention.blocked_attention, values, dtype, doc_start)
    assert not out[blind].any() and not dq[blind].any()
    assert not dk[1].any() and not dv[1].any()
    # The others are as if nothing came back to those queries.
    values[3][blind] = 0
    other = run(eager_attention.blocked_attention, values, dtype, torch.where(blind, 0, doc_start))
    for mine, theirs in zip(
        (out[~blind], dq[~blind], dk, dv), (other[0][~blind], other[1][~blind], *other[2:]), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=numerics.ATOL[dtype], rtol=numerics.ATOL[dtype])


def test_scores_far_apart_neither_overflow_nor_lose_the_row(dtype):
    values = tensors(1, 70, 70, 3, 1, 64)
    values[0] *= 30  # scores up to a hundred and more: exp of them is no fp32 number
    check(dtype, values)


def test_a_batch_in_parts_and_smaller_blocks(dtype, monkeypatch):
    values = tensors(5, 200, 200, 3, 1, 32)
    queries = eager_attention.ARITHMETIC[dtype].queries
    row = 3 * queries * 200  # scores of a whole block of one row
    monkeypatch.setattr(eager_attention, "MAX_SCORES", 2 * row)  # two rows at a time, and a rest
    check(dtype, values)
    monkeypatch.setattr(eager_attention, "MAX_SCORES", row // 2)  # one row, half a block
    check(dtype, values)


def test_slices_of_a_packed_projection_and_an_expanded_gradient(dtype):
    q, k, v = draw(2, 150, 5, 32).split((3, 1, 1), dim=2)
    values = [q, k, v, draw(1, 1, 1, 32).expand(2, 150, 3, 32)]
    check(dtype, values)
    dense = [x.clone(memory_format=torch.contiguous_format) for x in values]
    strided, copied = (run(eager_attention.blocked_attention, some, dtype) for some in (values, dense))
    assert all(torch.equal(mine, other) for mine, other in zip(strided, copied, strict=True))


@pytest.mark.parametrize("fault", ["mask", "lse", "delta"])
def test_a_planted_fault_fails_the_contract(dtype, fault, monkeypatch):
    """The mask one key too wide, a log-sum-exp of something else, delta left out: each beyond the budget."""
    values = tensors(2, 200, 200, 3, 1, 32)
    if fault == "mask":
        triu = Tensor.triu_
        monkeypatch.setattr(Tensor, "triu_", lambda x, diagonal: triu(x, diagonal + 1))
    elif fault == "lse":
        how = eager_attention.ARITHMETIC[dtype]
        monkeypatch.setitem(eager_attention.ARITHMETIC, dtype, how._replace(log_=Tensor.log10_))
    else:
        fold = eager_attention._Sizes.fold

        def without(sizes: eager_attention._Sizes, x: Tensor, purpose: str, dtype: torch.dtype) -> Tensor:
            return fold(sizes, torch.zeros_like(x) if purpose == "delta" else x, purpose, dtype)

        monkeypatch.setattr(eager_attention._Sizes, "fold", without)
    ours = run(eager_attention.blocked_attention, values, dtype)
    monkeypatch.undo()
    base, truth = (
        run(eager_attention.library_attention, values, dtype),
        run(reference.attention, values, torch.float64),
    )
    with pytest.raises(AssertionError, match="over the budget"):
        for name, *three in zip(NAMES, ours, base, truth, strict=True):
            numerics.check("planted fault", name, *three)


def test_the_same_bits_in_every_process_and_every_time(dtype, project_root):
    """With one thread and with two."""
    program = f"""
        import hashlib, torch
        from kernels.eager import attention as eager_attention
        torch.manual_seed(0)
        q, k, v = (torch.randn(3, 150, heads, 32).to({dtype}).requires_grad_() for heads in (6, 2, 2))
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for _ in range(3):
                out = eager_attention.blocked_attention(q, k, v)
                found = (out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))
                content = b"".join(x.detach().view(torch.uint8).numpy().tobytes() for x in found)
                print(hashlib.sha256(content).hexdigest())
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    first, second = (subprocess.check_output(command, cwd=project_root, text=True) for _ in range(2))
    assert first == second
    digests = first.split()
    assert len(digests) == 6 and len(set(digests[:3])) == len(set(digests[3:])) == 1
