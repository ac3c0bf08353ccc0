"""tied_embedding: the numerics contract, all kinds of runs of equal ids, and which gradients it may write."""

import pytest
import torch
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
    swapped,
)

from kernels import embedding

# Memory that a kernel does not write holds NaN, and not by chance the right value of an earlier run.
pytestmark = pytest.mark.usefixtures("poison_empty")
WINDOW = embedding.WINDOW


def some_ids(*shape, vocabulary=23):
    return torch.randint(0, vocabulary, shape).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [576, 960, 2048])
def test_models_widths(width, dtype):
    """fp32 masters: the gradient is fp32 and never rounded to 16 bits."""
    _, (dweight,) = agree("tied_embedding", (some_ids(2, 9), draw(23, width)), dtype)
    assert dweight.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_numbers_of_tokens(tokens, dtype):
    agree("tied_embedding", (some_ids(tokens), draw(23, 33, dtype=dtype)), dtype)


@pytest.mark.parametrize("runs", [
    (1,), (WINDOW - 1,), (WINDOW,), (WINDOW + 1,), (2 * WINDOW,), (10 * WINDOW + 3,), (5, WINDOW - 5, 7),
    (5, WINDOW - 4, 7), (5, WINDOW - 6, 7), (100, 3 * WINDOW, 1, 100), (8, 9, 7, 16, 17, 1),
    (WINDOW, WINDOW, 1), (1,) * 40,
], ids=str)  # fmt: skip
def test_runs_of_equal_ids(runs):
    """Within a window, across its end, over whole windows, and more windows than are added at a time."""
    ids = torch.repeat_interleave(torch.randperm(len(runs)) + 2, torch.tensor(runs))
    ids = ids[torch.randperm(sum(runs))]
    _, (dweight,) = agree("tied_embedding", (ids.to(DEVICE), draw(len(runs) + 3, 8)), torch.float32)
    assert dweight.isfinite().all()


def test_other_columns_than_a_program_has():
    """Two programs for the columns of a row, the second with a tail."""
    agree("tied_embedding", (some_ids(150, vocabulary=2), draw(3, 1031)), torch.float32)


@over(ROW_LAYOUTS)
def test_layouts(layout):
    ids, weight = some_ids(19), draw(23, 33)
    agree("tied_embedding", (gap(ids), layout(weight)), torch.float32)
    agree("tied_embedding", (ids.view(1, 19).t(), weight), torch.float32)


@over(ROW_LAYOUTS)
def test_layouts_of_gradients(layout):
    agree("tied_embedding", (some_ids(19), draw(23, 33)), torch.float32, upstream=layout)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_weights_own_dtype(dtype):
    """Rows are summed in fp32 and rounded once, however many tokens there are."""
    ids, weight = some_ids(300, vocabulary=2), draw(3, 33, dtype=dtype)
    _, (dweight,) = agree("tied_embedding", (ids, weight), dtype)
    assert dweight.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_copy_of_the_weight_gives_the_same_bits(dtype):
    ids, weight = some_ids(2, 9), draw(23, 33).requires_grad_()
    plain, _ = TRITON.tied_embedding(ids, weight, dtype)
    copied, _ = TRITON.tied_embedding(ids, weight, dtype, weight.detach().to(dtype))
    assert_same([copied], [plain])
    changed, _ = TRITON.tied_embedding(ids, weight, dtype, torch.zeros_like(weight, dtype=dtype))
    assert (changed == 0).all() and torch.autograd.grad(changed.float().sum(), weight)[0].sum() == 18 * 33


def test_ids_in_32_bits():
    ids, weight = some_ids(2, 9), draw(23, 33)
    assert_same(
        TRITON.tied_embedding(ids.int(), weight, torch.float32),
        TORCH.tied_embedding(ids, weight, torch.float32),
    )


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_empty_batch(shape):
    (x, _), (dweight,) = agree("tied_embedding", (some_ids(*shape), draw(23, 33)), torch.float32)
    assert x.shape == (*shape, 33) and dweight.shape == (23, 33)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="an assertion on the device ends the process")
@pytest.mark.parametrize("wrong", [23, -1, 2**31, 2**40, -(2**63)])
def test_an_id_out_of_range_raises(wrong):
    ids, weight = some_ids(19), draw(23, 33)
    ids[7] = wrong
    for requires_grad in (False, True):
        message = ""
        try:
            TRITON.tied_embedding(ids, weight.requires_grad_(requires_grad), torch.float32)
        except RuntimeError as error:
            message = str(error)
        assert "tied_embedding: expected ids in [0, 23)" in message
    with pytest.raises(IndexError):
        TORCH.tied_embedding(ids, weight, torch.float32)


@pytest.mark.parametrize("wrong", [23, 24, -1, -2])
def test_nothing_is_written_out_of_bounds(wrong):
    memory, dx, ids = torch.zeros(27, 33, device=DEVICE), draw(300, 33), some_ids(300)
    ids[::2] = wrong
    embedding._add_rows(memory[2:25], dx, ids)
    expected = torch.zeros(23, 33, device=DEVICE).index_add_(0, ids[1::2], dx[1::2])
    torch.testing.assert_close(memory[2:25], expected, rtol=1e-5, atol=1e-5)
    assert (memory[:2] == 0).all() and (memory[25:] == 0).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_without_a_gradient_the_head_is_the_weight(frozen):
    ids, weight = some_ids(19), draw(23, 33).requires_grad_(not frozen)
    with torch.set_grad_enabled(frozen):
        x, head = TRITON.tied_embedding(ids, weight, torch.float16)
    assert head is weight and not x.requires_grad


class Case:
    """A model of an embedding and a head. kept: gradients that others keep; in_place: answers of _is_ours."""

    def __init__(self, monkeypatch, backend=TRITON):
        torch.manual_seed(5)
        self.ids, self.weight, self.kept, self.in_place = some_ids(40), draw(23, 16).requires_grad_(), [], []
        self.x, self.head = backend.tied_embedding(self.ids, self.weight, torch.float32)
        self.loss = backend.linear_cross_entropy(self.x, self.head, self.ids.roll(-1))
        is_ours = embedding._is_ours

        def recorded(*arguments):
            self.in_place.append(is_ours(*arguments))
            return self.in_place[-1]

        monkeypatch.setattr(embedding, "_is_ours", recorded)


def backward(case):
    case.loss.backward()


def retained(case):
    case.loss.backward(retain_graph=True)


def retained_and_repeated(case):
    case.loss.backward(retain_graph=True)
    case.weight.grad = None
    case.loss.backward()


def retain_grad(case):
    case.head.retain_grad()
    case.loss.backward()
    case.kept.append(case.head.grad)


def hooked(name, register):
    """A backward pass after `register(case)`."""

    def way(case):
        register(case)
        case.loss.backward()

    way.__name__ = name
    return way


def register_a_replacement(case):
    case.kept.append(torch.zeros(23, 16, device=DEVICE))
    case.head.register_hook(lambda dhead: case.kept[0].copy_(dhead))


def keep_what(change):
    return lambda case: case.head.register_hook(lambda dhead: case.kept.append(change(dhead)))


hook_that_looks = hooked("hook_that_looks", lambda case: case.head.register_hook(lambda dhead: None))
HOOKS = [
    hooked("hook_that_keeps", keep_what(lambda x: x)),
    hooked("hook_that_keeps_a_view", keep_what(lambda x: x.view(-1).view(23, 16))),
    hooked("hook_that_keeps_an_alias", keep_what(lambda x: x.detach())),
    hooked("hook_that_replaces", register_a_replacement),
    hooked("hook_of_the_losss_node", lambda case: case.loss.grad_fn.register_hook(
        lambda gradients, _: case.kept.append(gradients[1]))),
    hooked("hook_of_the_embeddings_node", lambda case: case.head.grad_fn.register_prehook(
        lambda gradients: case.kept.append(gradients[1]))),
    hooked("hook_after_the_embeddings_node", lambda case: case.head.grad_fn.register_hook(
        lambda _, gradients: case.kept.append(gradients[1]))),
]  # fmt: skip


def asked_for(case):
    case.weight.grad, dhead = torch.autograd.grad(case.loss, (case.weight, case.head))
    case.kept.append(dhead)


def given(case):
    dx, dhead = torch.autograd.grad(case.loss, (case.x, case.head))
    case.kept.append(dhead)
    torch.autograd.backward((case.x, case.head), (dx, dhead))


IN_PLACE = [backward, retained, retained_and_repeated, retain_grad, hook_that_looks]
COPIED = [*HOOKS, asked_for, given]


@pytest.mark.parametrize("way", [*IN_PLACE, *COPIED], ids=lambda way: way.__name__)
def test_who_may_write_the_heads_gradient(way, monkeypatch):
    """Written in place where only the backward pass has it, else copied: what others keep does not change."""
    case, alone, expected = Case(monkeypatch), Case(monkeypatch), Case(monkeypatch, TORCH)
    (dhead,) = torch.autograd.grad(alone.loss, alone.head)
    backward(expected)
    case.in_place.clear()
    way(case)
    torch.testing.assert_close(case.weight.grad, expected.weight.grad, rtol=1e-5, atol=1e-6)
    assert case.in_place == [way in IN_PLACE] * len(case.in_place) and case.in_place
    assert_same(case.kept, [dhead] * len(case.kept))


def test_the_gradient_is_the_tensor_that_the_loss_made(monkeypatch):
    case = Case(monkeypatch)
    made = case.loss.grad_fn.gradients[1].data_ptr()
    backward(case)
    assert case.weight.grad.data_ptr() == made


def test_two_heads(monkeypatch):
    """autograd owns the sum of their gradients."""
    case, expected = Case(monkeypatch), Case(monkeypatch, TORCH)
    for one, ops in ((case, TRITON), (expected, TORCH)):
        (one.loss + 2 * ops.linear_cross_entropy(one.x, one.head, one.ids.roll(1))).backward()
    torch.testing.assert_close(case.weight.grad, expected.weight.grad, rtol=1e-5, atol=1e-6)
    assert case.in_place == [True]


@pytest.mark.parametrize("used", ["x", "head"])
def test_one_output_has_no_gradient(used, monkeypatch):
    case, expected = Case(monkeypatch), Case(monkeypatch, TORCH)
    dy = torch.randn_like(getattr(case, used))
    for one in (case, expected):
        getattr(one, used).backward(dy)
    torch.testing.assert_close(case.weight.grad, expected.weight.grad, rtol=1e-5, atol=1e-6)


def test_a_second_derivative_is_refused(monkeypatch):
    case = Case(monkeypatch)
    with pytest.raises(RuntimeError, match="linear_cross_entropy has first derivatives only"):
        torch.autograd.grad(case.loss, case.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="tied_embedding has first derivatives only"):
        torch.autograd.grad(case.x.sum(), case.weight, create_graph=True)


@pytest.mark.parametrize("change, message", [
    (dict(input_ids=torch.zeros(3)), "input_ids of dtype int64 or int32, got torch.float32"),
    (dict(weight=torch.zeros(5)), r"weight of shape \[V, D\], got \[5\]"),
    (dict(weight=torch.zeros(5, 4, dtype=torch.int32)), "a weight and a dtype of floating point"),
    (dict(dtype=torch.int64), "a weight and a dtype of floating point"),
    (dict(weight_copy=torch.zeros(4, 4)), r"weight_copy of shape \[5, 4\] as the weight, got \[4, 4\]"),
    (dict(weight_copy=torch.zeros(5, 4).half()), "weight_copy of dtype torch.float32, got torch.float16"),
    (dict(weight_copy=torch.zeros(5, 4, device="meta")), "weight_copy on cpu as the weight, got meta"),
])  # fmt: skip
def test_bad_input(change, message):
    call = dict(input_ids=torch.zeros(3, dtype=torch.int64), weight=torch.zeros(5, 4), dtype=torch.float32)
    call |= change
    for ops in (TRITON, TORCH):
        with pytest.raises(ValueError, match=f"tied_embedding: expected {message}"):
            ops.tied_embedding(**call)


@pytest.mark.parametrize("name", ["dtype", "weight"])
def test_float64_is_the_references(name):
    call = dict(input_ids=some_ids(3), weight=draw(23, 4), dtype=torch.float32)
    call |= dict(dtype=torch.float64) if name == "dtype" else dict(weight=call["weight"].double())
    with pytest.raises(ValueError, match="tied_embedding: expected float32, float16 or bfloat16"):
        TRITON.tied_embedding(**call)


def test_opcheck():
    ids, weight = some_ids(2, 9), draw(23, 33)
    torch.library.opcheck(embedding._embedding_forward.op, (ids, weight, torch.float16))
    torch.library.opcheck(embedding._embedding_backward.op, (draw(2, 9, 33), ids, 23, torch.float32))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="a graph is captured on a GPU")
@pytest.mark.parametrize("same", [False, True])
def test_captured_in_a_graph(same):
    """Nothing waits for the device, and the same graph serves a batch that repeats one token."""
    ids, weight = some_ids(16384, vocabulary=49152), draw(49152, 576).requires_grad_()
    dx, dhead = draw(16384, 576, dtype=torch.bfloat16), draw(49152, 576)

    def gradient():
        x, head = TRITON.tied_embedding(ids, weight, torch.bfloat16)
        return torch.autograd.grad((x, head), weight, (dx, dhead))[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradient()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradient()
    ids.fill_(7) if same else ids.random_(0, 49152)
    graph.replay()
    assert_same([captured], [gradient()])


def test_a_heads_gradient_that_is_not_contiguous_is_copied():
    weight = draw(23, 8).requires_grad_()
    ids, dx, dhead = some_ids(2, 5), draw(2, 5, 8), swapped(draw(23, 8))
    x, head = TRITON.tied_embedding(ids, weight, torch.float32)
    before = dhead.clone()
    (ours,) = torch.autograd.grad((x, head), weight, (dx, dhead))
    expected = before.index_add(0, ids.flatten(), dx.flatten(0, 1))
    torch.testing.assert_close(ours, expected)
    assert torch.equal(dhead, before)
