"""When attention goes block by block and when it is torch's, and what the blocks keep."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import TORCH, products
from kernels.eager import attention as eager_attention


def draw(length: int, heads: int = 3, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(2, length, heads, 32).to(dtype).requires_grad_()


def blocked(out: Tensor) -> bool:
    """Whether blocks are among the operations that made it."""
    nodes = [out.grad_fn]
    for node in nodes:
        nodes += [before for before, _ in node.next_functions if before is not None] if node else []
    return any("BlockedAttention" in type(node).__name__ for node in nodes)


@pytest.fixture
def capability(monkeypatch):
    """Says which instructions the processor has, whether its library multiplies bf16, and from how many rows
    16 bits are multiplied in fp32.
    """

    def set_to(name: str, bf16: bool, rows: int | None = None) -> None:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bf16)
        monkeypatch.setattr(products, "rows_in_fp32", lambda dtype: None if dtype == torch.float32 else rows)

    return set_to


def test_training_in_bf16_takes_blocks_where_the_library_multiplies_it(capability):
    q, k, v = draw(20), draw(20, 1), draw(20, 1)
    capability("AVX512", bf16=True)
    assert blocked(TORCH.attention(q, k, v))
    assert blocked(TORCH.attention(q.detach(), k.detach(), v))
    assert blocked(TORCH.attention(q, k, v, torch.zeros(2, 20, dtype=torch.int32), scale=0.5))
    capability("AVX512", bf16=False)
    assert not blocked(TORCH.attention(q, k, v))


@pytest.mark.parametrize("name", ["AVX2", "AVX512"])
def test_training_in_fp32_takes_blocks_with_documents_on_x86(name, capability):
    q, k, v = (draw(20, heads, torch.float32) for heads in (3, 1, 1))
    doc_start = torch.zeros(2, 20, dtype=torch.int32)
    capability("DEFAULT", bf16=False)
    assert not blocked(TORCH.attention(q, k, v, doc_start))
    capability(name, bf16=name == "AVX512", rows=20)
    assert blocked(TORCH.attention(q, k, v, doc_start))
    assert not blocked(TORCH.attention(q, k, v))
    for dtype in (torch.bfloat16, torch.float16):  # whose products are fp32 ones there
        narrow = q.to(dtype), k.to(dtype), v.to(dtype)
        assert blocked(TORCH.attention(*narrow, doc_start))
        assert not blocked(TORCH.attention(*narrow))


@pytest.mark.parametrize("length", [1, 65, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_last_query_alone_in_its_block_that_sees_nothing_is_zero(dtype, length):
    leaves = q, k, v = [draw(length, heads, dtype) for heads in (3, 1, 1)]
    doc_start = torch.zeros(2, length, dtype=torch.int32)
    doc_start[:, -1] = length
    out = eager_attention.blocked_attention(q, k, v, doc_start)
    gradients = torch.autograd.grad(out[:, -1].float().sum(), leaves)
    assert not out[:, -1].any() and not any(gradient.any() for gradient in gradients)


def test_everything_else_is_torchs(capability):
    q, k, v = draw(20), draw(20, 1), draw(20, 1)
    doc_start = torch.zeros(2, 20, dtype=torch.int32)
    capability("AVX2", bf16=True)
    assert not blocked(TORCH.attention(q, k, v, doc_start, dropout_p=0.1))
    for dtype in (torch.float64, torch.float16):
        assert not blocked(TORCH.attention(q.to(dtype), k.to(dtype), v.to(dtype), doc_start))
    empty = TORCH.attention(q[:0], k[:0], v[:0], doc_start[:0])
    assert empty.shape == (0, 20, 3, 32) and not blocked(empty)
    with torch.no_grad():
        assert not blocked(TORCH.attention(q, k, v, doc_start))
    assert not blocked(TORCH.attention(q.detach(), k.detach(), v.detach(), doc_start))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_has_torchs(dynamic):
    q, k, v = draw(20), draw(20, 1), draw(20, 1)
    torch.compiler.reset()  # so that no other test's sizes decide which of ours are dynamic
    compiled = torch.compile(TORCH.attention, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    found = compiled(q, k, v)
    assert torch.equal(found, eager_attention.library_attention(q, k, v))


def test_only_what_wants_a_gradient_gets_one():
    q, k, v = draw(140), draw(140, 1), draw(140, 1)
    upstream = torch.randn(2, 140, 3, 32).bfloat16()
    whole = torch.autograd.grad(eager_attention.blocked_attention(q, k, v), (q, k, v), upstream)
    (alone,) = torch.autograd.grad(
        eager_attention.blocked_attention(q.detach(), k, v.detach()), (k,), upstream
    )
    assert torch.equal(alone, whole[1])


def test_a_second_backward_pass_gives_the_same_and_a_second_derivative_is_refused():
    q, k, v = draw(140), draw(140, 1), draw(140, 1)
    out = eager_attention.blocked_attention(q, k, v)
    first, second = (torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="first derivatives only; leave create_graph=True out"):
        torch.autograd.grad(out.square().sum(), (q,), create_graph=True)


FAKE = partial(FakeTensorMode, allow_non_fake_inputs=True)


@pytest.mark.parametrize("mode", [partial(torch.device, "meta"), FAKE])
def test_a_mode_that_makes_other_tensors_leaves_no_buffers_behind(mode):
    q, k, v = draw(140), draw(140, 1), draw(140, 1)
    expected = eager_attention.blocked_attention(q, k, v)
    eager_attention._buffers.kept.clear()
    with contextlib.suppress(Exception), mode():
        eager_attention.blocked_attention(q, k, v)
    assert torch.equal(eager_attention.blocked_attention(q, k, v), expected)


def test_results_are_not_the_buffers_of_the_next_call():
    q, k, v = draw(140), draw(140, 1), draw(140, 1)
    out = eager_attention.blocked_attention(q, k, v)
    kept = [x.clone() for x in (out, *torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True))]
    found = [out, *torch.autograd.grad(out.sum(), (q, k, v))]
    eager_attention.blocked_attention(*(draw(140, heads) for heads in (3, 1, 1))).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_of_the_size_of_all_scores_exists_or_is_kept(masked, monkeypatch):
    batch, length, heads = 2, 512, 3
    block = heads * eager_attention.ARITHMETIC[torch.bfloat16].queries * length
    monkeypatch.setattr(eager_attention, "MAX_SCORES", block)  # one row of the batch at a time
    monkeypatch.setattr(eager_attention, "_buffers", eager_attention._Buffers())
    q, k, v = draw(length), draw(length, 1), draw(length, 1)
    doc_start = torch.zeros(batch, length, dtype=torch.int32) if masked else None
    if doc_start is not None:
        doc_start[:, 100:] = 100
    largest, kept = 0, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with Watch(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        eager_attention.blocked_attention(q, k, v, doc_start).sum().backward()
    assert 2 * block < largest <= 4 * block < 4 * batch * heads * length * length / 4
    own = q.nbytes + k.nbytes + v.nbytes
    assert sum(tensor.nbytes for tensor in kept) == own + q.nbytes + 4 * batch * heads * length + (
        doc_start.nbytes if masked else 0
    )
