"""mlp in both forms, with SwiGLU between the library's products or inside its own: the numerics contract."""

import dataclasses

import kernel_cases
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    LENGTHS,
    ROW_LAYOUTS,
    TORCH,
    TRITON,
    WITHOUT_FP16,
    agree,
    assert_same,
    draw,
    far,
    over,
    swapped,
)

from kernels import launch_config, mlp, products, swiglu, with_ops
from kernels.eager import linear as eager_linear

# Memory that a kernel does not write holds NaN, and not by chance the right value of an earlier run.
pytestmark = pytest.mark.usefixtures("poison_empty")

HERE = launch_config.architecture(DEVICE)
SIXTEEN = DTYPES[1:]


def take(monkeypatch, form):
    """Gives kernel_cases.TRITON the mlp of that form, and returns it."""
    if form == "fused, descriptors" and not (INTERPRETED or launch_config.has_descriptors(DEVICE)):
        pytest.skip(f"{HERE} has no tensor descriptors")
    monkeypatch.setattr(launch_config, "DESCRIPTORS", (HERE,) if form == "fused, descriptors" else ())
    monkeypatch.setattr(launch_config, "FUSED_MLP", ())
    backend = TRITON if form == "composed" else dataclasses.replace(TRITON, mlp=mlp.mlp)
    monkeypatch.setattr(kernel_cases, "TRITON", backend)
    return backend.mlp


@pytest.fixture(params=["composed", "fused", "fused, descriptors"])
def form(request, monkeypatch):
    return take(monkeypatch, request.param)


@pytest.fixture(params=["fused", "fused, descriptors"])
def fused(request, monkeypatch):
    return take(monkeypatch, request.param)


def drawn(rows, width, ffn, dtype=torch.float32):
    """x, gate_up and down, scaled so that all values are of the order of one."""
    gate_up = draw(2 * ffn, width, dtype=dtype, scale=width**-0.5)
    down = draw(width, ffn, dtype=dtype, scale=ffn**-0.5)
    return draw(rows, width, dtype=dtype), gate_up, down


def gradients(function, tensors, dy, **options):
    """(y, its gradients)"""
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = function(*leaves, **options)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


WIDTHS = [
    pytest.param(width, ffn, *dtype.values, id=f"{width}-{ffn}-{dtype.id}")
    for width, ffn, dtypes in ((576, 1536, DTYPES), (960, 2560, WITHOUT_FP16))
    for dtype in dtypes
]


@pytest.mark.parametrize("width, ffn, dtype", WIDTHS)
def test_models_widths(form, width, ffn, dtype):
    agree("mlp", drawn(5, width, ffn, dtype))


@pytest.mark.slow
def test_widths_of_the_largest_model(monkeypatch):
    """In one form; smaller tensors test the others. The interpreter's time is per tile: tiles are wide."""
    take(monkeypatch, "fused")
    if INTERPRETED:
        wide = launch_config.Row(1 << 20, launch_config.LaunchConfig(16, 1024, num_warps=4))
        for op in ("mlp_fwd", "mlp_bwd"):
            monkeypatch.setitem(launch_config.TABLE, op, (wide,))
        launch_config.launch_config.cache_clear()
    agree("mlp", drawn(5, 2048, 8192, torch.float16))
    launch_config.launch_config.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", LENGTHS)
def test_numbers_of_rows(form, rows, dtype):
    # One row of few columns would be at the mercy of a single element.
    agree("mlp", drawn(rows, 72, 136 if rows > 1 else 1032, dtype))


@pytest.mark.parametrize("width, ffn", [(1, 1), (7, 5), (65, 129), (64, 257), (200, 8)])
def test_widths_that_are_no_models(form, width, ffn):
    agree("mlp", drawn(3, width, ffn))
    agree("mlp", drawn(3, width, ffn, torch.float16))


def test_more_tiles_of_rows_than_go_together(fused):
    """Tiles go in bands of GROUP rows of tiles; the last band has fewer."""
    rows = (mlp.GROUP + 2) * launch_config.launch_config("mlp_fwd", torch.float16, DEVICE, 264).block_m - 1
    agree("mlp", drawn(rows, 8, 264, torch.float16))


@over(ROW_LAYOUTS)
def test_layouts_of_inputs_and_upstream_gradients(form, layout):
    x, gate_up, down = drawn(5, 72, 40, torch.float16)
    agree("mlp", (layout(x), gate_up, down), upstream=layout)
    agree("mlp", (x, layout(gate_up), layout(down)))


def test_leading_dimensions(form):
    x, gate_up, down = drawn(6, 72, 40)
    agree("mlp", (swapped(x.view(3, 2, 72)), gate_up, down), upstream=swapped)
    agree("mlp", (x[0], gate_up, down))


def test_empty_batch(form):
    x, gate_up, down = drawn(0, 72, 40)
    (y,), (dx, dgate_up, ddown) = agree("mlp", (x.view(0, 7, 72), gate_up, down))
    assert y.shape == dx.shape == (0, 7, 72) and not dgate_up.any() and not ddown.any()


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_act_is_formed_from_the_rounded_gate_and_up(fused, dtype):
    packed, act = mlp._mlp_forward(*drawn(70, 72, 136, dtype)[:2])
    assert_same([act], [swiglu.swiglu(packed)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_neither_on_the_run_nor_on_the_number_of_programs(fused, dtype, monkeypatch):
    tensors, dy = drawn(150, 72, 264, dtype), draw(150, 72, dtype=dtype)
    before = [x.clone() for x in (*tensors, dy)]
    first = gradients(fused, tensors, dy)
    for programs in (1, 5, 132):
        monkeypatch.setattr(launch_config, "multiprocessors", lambda device, programs=programs: programs)
        assert_same(gradients(fused, tensors, dy), first)
    assert_same((*tensors, dy), before)


def test_a_row_does_not_depend_on_how_many_others_there_are(fused):
    x, gate_up, _ = drawn(150, 72, 136, torch.float16)
    packed, act = mlp._mlp_forward(x, gate_up)
    for rows in (1, 64, 65):
        assert_same(mlp._mlp_forward(x[-rows:], gate_up), [packed[-rows:], act[-rows:]])


def test_a_second_backward_pass_gives_the_same(fused):
    leaves = [x.requires_grad_() for x in drawn(70, 72, 136)]
    y, dy = fused(*leaves), draw(70, 72)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    assert_same(torch.autograd.grad(y, leaves, dy), first)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_fp32_masters(form, dtype):
    """Cast, or replaced by given copies; either way the gradients are fp32 and within the contract."""
    x, *masters = drawn(70, 72, 136)
    tensors = (x.to(dtype), *masters)
    agree("mlp", tensors)
    dy = draw(70, 72, dtype=dtype)
    y, dx, *dweights = expected = gradients(form, tensors, dy)
    assert y.dtype == dx.dtype == dtype and all(dweight.dtype == torch.float32 for dweight in dweights)
    copies = [master.to(dtype) for master in masters]
    for given in (copies, (copies[0], None), (None, copies[1])):
        assert_same(gradients(form, tensors, dy, copies=tuple(given)), expected)
    others = tuple(2 * copy for copy in copies)
    assert_same(
        gradients(form, tensors, dy, copies=others)[:2], gradients(form, (x.to(dtype), *others), dy)[:2]
    )


def test_only_the_gradients_that_are_wanted_are_formed(form):
    x, gate_up, down = drawn(9, 72, 40)
    down.requires_grad_()
    form(x, gate_up, down).sum().backward()
    assert x.grad is None and gate_up.grad is None and down.grad is not None
    with torch.no_grad():
        assert form(x, gate_up, down).grad_fn is None


@pytest.mark.parametrize("leading", [(), (2, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_composed_form_is_the_composition(leading, dtype, monkeypatch):
    """Linear layers around swiglu, bit for bit."""
    monkeypatch.setattr(launch_config, "FUSED_MLP", ())
    monkeypatch.setattr(products, "rows_in_fp32", lambda dtype: None)
    x, *weights = drawn(10, 576, 1536, dtype)
    x, dy = x.view(*leading, -1, 576), draw(10, 576, dtype=dtype).view(*leading, -1, 576)
    for backend, linear in ((TORCH, eager_linear.linear), (TRITON, eager_linear.linear), (TRITON, F.linear)):
        if linear is F.linear:  # as on a GPU
            monkeypatch.setattr(eager_linear, "supports", lambda *_: False)

        def composition(x, gate_up, down, linear=linear, swiglu=backend.swiglu):
            return linear(swiglu(linear(x, gate_up.to(x.dtype))), down.to(x.dtype))

        assert_same(gradients(backend.mlp, (x, *weights), dy), gradients(composition, (x, *weights), dy))
        if DEVICE.type == "cpu":  # on CUDA their gradients are not rounded on the way to fp32
            masters = [weight.float() for weight in weights]
            assert_same(gradients(backend.mlp, (x, *masters), dy), gradients(composition, (x, *masters), dy))


@pytest.mark.parametrize("table, dtype, expected", [
    ((), torch.float16, "composed"), (("sm_0",), torch.float16, "composed"),
    ((HERE,), torch.float16, "fused"), ((HERE,), torch.float32, "composed"),
])  # fmt: skip
def test_a_line_of_the_table_chooses_the_form(table, dtype, expected, monkeypatch):
    called = []
    for owner, name, label in ((mlp, "mlp", "fused"), (eager_linear, "mlp", "composed")):
        original = getattr(owner, name)

        def counted(*args, label=label, original=original, **options):
            called.append(label)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, counted)
    monkeypatch.setattr(launch_config, "FUSED_MLP", table)
    agree("mlp", drawn(5, 72, 40, dtype))
    assert called[0] == expected  # the reference is called for the comparison too


def test_no_target_is_fused_before_both_forms_were_measured():
    assert launch_config.FUSED_MLP == ()


def test_a_replaced_swiglu_is_composed(monkeypatch):
    monkeypatch.setattr(launch_config, "FUSED_MLP", (HERE,))
    other = dataclasses.replace(TORCH, name="other", swiglu=lambda packed: packed[..., :40])
    x, gate_up, down = drawn(5, 72, 40, torch.float16)
    expected = F.linear(F.linear(x, gate_up)[..., :40], down)
    for backend in (TRITON, TORCH):
        assert_same([with_ops(backend, swiglu=other).mlp(x, gate_up, down)], [expected])
        assert with_ops(backend, swiglu=other, mlp=TORCH).mlp is TORCH.mlp
        assert with_ops(with_ops(backend, mlp=TORCH), swiglu=other).mlp is TORCH.mlp


@pytest.mark.parametrize("change, message", [
    (lambda x, g, d: (x, g[:, :71], d), "gate_up of shape [2F, 72], got [80, 71]"),
    (lambda x, g, d: (x, g[:79], d), "an even number of rows of gate_up, got 79"),
    (lambda x, g, d: (x, g, d.t()), "down of shape [72, 40], got [40, 72]"),
    (lambda x, g, d: (x.long(), g, d), "x of a floating-point dtype, got torch.int64"),
    (lambda x, g, d: (x, g, d.long()), "down of a floating-point dtype, got torch.int64"),
    (lambda x, g, d: (x, g, d, (g.half(), None)),
     "the copy of gate_up of dtype torch.float32 as x, got torch.float16"),
    (lambda x, g, d: (x, g, d, (None, d[:, 1:])), "a copy of down of shape [72, 40], got [72, 39]"),
])  # fmt: skip
@pytest.mark.parametrize("backend", [TORCH, dataclasses.replace(TRITON, mlp=mlp.mlp)], ids=["torch", "fused"])
def test_wrong_input_is_refused_in_the_same_words(backend, change, message):
    tensors = change(*drawn(5, 72, 40))
    with pytest.raises(ValueError) as error:
        backend.mlp(*tensors[:3], copies=tensors[3] if len(tensors) > 3 else None)
    assert str(error.value) == f"mlp: expected {message}"


@pytest.mark.parametrize("which", ["input", "upstream gradient"])
def test_offsets_past_32_bits(which, monkeypatch):
    fused = take(monkeypatch, "fused")
    tensors, dy = drawn(3, 96, 40, torch.float16), draw(3, 96, dtype=torch.float16)
    expected = gradients(fused, tensors, dy)
    x, dy = (far(tensors[0], 0), dy) if which == "input" else (tensors[0], far(dy, 0))
    assert_same(gradients(fused, (x, *tensors[1:]), dy), expected)


def test_opcheck(fused):
    """The schema is true (no writes, no aliases), and the fake has the real shapes, dtypes and strides."""
    x, gate_up, down = drawn(70, 72, 136, torch.float16)
    packed, _ = mlp._mlp_forward(x, gate_up)
    torch.library.opcheck(mlp._mlp_forward.op, (x, gate_up))
    torch.library.opcheck(mlp._mlp_backward.op, (x, down, packed))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="65,537 rows take minutes in the interpreter")
@pytest.mark.parametrize("rows", [65536, 65537])
def test_many_rows(form, rows):
    agree("mlp", drawn(rows, 576, 1536, torch.bfloat16))
