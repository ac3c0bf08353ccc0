"""The AdamW kernels alone: accuracy, tails, alignment, skipped steps, copies, the table of addresses."""

import copy
import math
from array import array
from dataclasses import dataclass, field

import numerics
import pytest
import torch
from kernel_cases import DEVICE, DTYPES, assert_same, draw
from torch import Tensor

from kernels import adamw
from kernels.launch_config import launch_config

pytestmark = pytest.mark.usefixtures("poison_empty")

CONFIG = launch_config("adamw", torch.float32, DEVICE, 1)
BLOCK, CHUNK = CONFIG.block_n, CONFIG.block_m * CONFIG.block_n
SIZES = (
    1, 7, adamw.TAIL + 1, BLOCK - 1, BLOCK, BLOCK + adamw.TAIL, CHUNK, CHUNK + 1,
    2 * CHUNK + 2 * BLOCK + 3, 0,
)  # fmt: skip
EPSILON = 2.0**-24  # half a unit in the last place of 1: one rounding


@dataclass
class Tensors:
    """N parameters, their gradients and averages, in float64 for the truth, and their groups' settings."""

    gradients: list[Tensor | None]
    parameters: list[Tensor]
    averages: list[Tensor]
    squares: list[Tensor]
    steps: Tensor
    group: list[int]
    lr: list[float] = field(default_factory=lambda: [0.1])
    settings: list[tuple[float, ...]] = field(
        default_factory=lambda: [(0.9, 0.95, 1e-8, 0.1)]
    )  # + eps, decay
    copies: list[Tensor | None] = field(default_factory=list)

    def run(
        self, found_inf: float = 0.0, max_norm: float = 0.0, copy_dtype: torch.dtype | None = None
    ) -> Tensor:
        """One step of the kernels, in place -> [norm, factor]."""
        rates = [torch.tensor(lr, dtype=torch.float32, device=DEVICE) for lr in self.lr]
        copies = self.copies or [None] * len(self.parameters)
        tensors = self.gradients, self.parameters, self.averages, self.squares, copies
        rows = [[0 if one is None else one.data_ptr() or 16 for one in row] for row in tensors]
        settings = [(lr.data_ptr(), *one) for lr, one in zip(rates, self.settings, strict=True)]
        words = adamw.table_words(rows, settings)
        table = adamw.AddressTable(len(words), DEVICE).send(words)
        work = adamw.plan([one.numel() for one in self.parameters], self.group, DEVICE)
        found = adamw.gradient_norm(table, work, max_norm)
        adamw.adamw(table, work, self.steps, torch.tensor(found_inf, device=DEVICE), found[1], copy_dtype)
        return found

    def fused(self, max_norm: float = 0.0) -> "Tensors":
        """The same step by torch's fused AdamW, clipped as in train/optim.py, on copies in their dtype."""
        other = copy.deepcopy(self)
        for index, parameter in enumerate(other.parameters):
            if other.gradients[index] is None:
                continue
            lr, (beta1, beta2, eps, decay) = self.lr[self.group[index]], self.settings[self.group[index]]
            leaf = torch.nn.Parameter(parameter)
            optimizer = torch.optim.AdamW([leaf], lr, (beta1, beta2), eps, decay, fused=True)
            optimizer.state[leaf] = {
                "step": other.steps[index].clone(), "exp_avg": other.averages[index],
                "exp_avg_sq": other.squares[index],
            }  # fmt: skip
            leaf.grad = other.gradients[index]
            if max_norm:
                norm = torch.stack([one.norm() for one in self.gradients if one is not None]).norm()
                leaf.grad = leaf.grad * torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            optimizer.step()
            other.steps[index] += 1
        return other

    def double(self) -> "Tensors":
        wide = copy.deepcopy(self)
        for name in ("gradients", "parameters", "averages", "squares"):
            setattr(wide, name, [None if one is None else one.double() for one in getattr(wide, name)])
        # rounded as the kernels get them
        wide.lr = [torch.tensor(lr, dtype=torch.float32).item() for lr in wide.lr]
        return wide

    def results(self) -> dict[str, list[Tensor]]:
        return {"p": self.parameters, "m": self.averages, "v": self.squares}


def tensors(sizes: tuple[int, ...] = SIZES, **options: object) -> Tensors:
    """Averages as after some steps: m^2 <= v. Values are near 1, where an error in the last place shows."""
    steps = torch.arange(len(sizes), dtype=torch.float32, device=DEVICE)
    made = [[draw(size) for size in sizes] for _ in range(3)]
    squares = [draw(one.numel()).square() + one.square() for one in made[2]]
    return Tensors(*made, squares, steps, [0] * len(sizes), **options)


def hold(ours: Tensors, base: Tensors, truth: Tensors) -> None:
    for name, *found in zip("pmv", *(each.results().values() for each in (ours, base, truth)), strict=True):
        for index, three in enumerate(zip(*found, strict=True)):
            numerics.check("adamw", f"{name} {index}", *three)
    assert torch.equal(ours.steps, base.steps)


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e6])
def test_sizes_with_every_kind_of_tail(max_norm):
    ours = tensors()
    base, truth = ours.fused(max_norm), ours.double().fused(max_norm)
    ours.run(max_norm=max_norm)
    hold(ours, base, truth)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.0), (0.3, 0.45)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_one_step_is_right_to_the_rounding_of_each_operation(betas, decay, eps):
    """Bounds by the size of the operands of m, v and p, which the general contract does not use."""
    ours = tensors((BLOCK + 77, 300), settings=[(*betas, eps, decay)])
    before, truth = copy.deepcopy(ours), ours.double().fused()
    ours.run()
    for index in range(2):
        m, v, p = (getattr(ours, name)[index].double() for name in ("averages", "squares", "parameters"))
        m0, g, p0 = (x[index].double() for x in (before.averages, before.gradients, before.parameters))
        error = {
            name: (x - truth.results()[name][index]).abs() for name, x in zip("mvp", (m, v, p), strict=True)
        }
        assert (error["m"] <= 4 * EPSILON * (m0.abs() + g.abs())).all()
        assert (error["v"] <= 4 * EPSILON * (before.squares[index].double() + g.square())).all()
        # The update inherits the relative error of m, which cancellation may enlarge, and half of that of v.
        step, root = ours.lr[0] / (1 - betas[0] ** (index + 1)), math.sqrt(1 - betas[1] ** (index + 1))
        size = step * (m0.abs() + g.abs()) / (truth.squares[index].sqrt() / root + eps)
        assert (error["p"] <= 2 * EPSILON * p0.abs() + 12 * EPSILON * size).all()


def test_many_steps_of_groups_with_settings_of_their_own():
    options = dict(lr=[0.03, 0.01], settings=[(0.9, 0.95, 1e-8, 0.1), (0.8, 0.999, 1e-6, 0.0)])
    ours = tensors((BLOCK + 5, 130, 64), **options)
    ours.group = [0, 1, 1]
    base, truth = ours, ours.double()
    for _ in range(30):
        base, truth = base.fused(max_norm=5.0), truth.fused(max_norm=5.0)
        ours.run(max_norm=5.0)
        hold(ours, base, truth)
        ours.gradients = base.gradients = [draw(one.numel()) for one in ours.parameters]
        truth.gradients = [one.double() for one in ours.gradients]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e30])
def test_norm_and_factor(scale, max_norm):
    ours = tensors()
    ours.gradients = [None if index == 3 else one * scale for index, one in enumerate(ours.gradients)]
    kept = [one for one in ours.gradients if one is not None]
    base = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(kept)))
    truth = torch.cat([one.double() for one in kept]).norm()
    norm, factor = ours.run(max_norm=max_norm)
    numerics.check("clip norm", "norm", norm / scale, base / scale, truth / scale)
    wanted = min(1.0, max_norm / (truth.item() + 1e-6)) if max_norm else 1.0
    assert factor.item() == pytest.approx(wanted, rel=1e-6)


def test_no_gradient_at_all_has_norm_zero():
    ours = tensors((5, 0))
    ours.gradients = [None, None]
    assert ours.run(max_norm=1.0).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_norm_says_that_a_gradient_is_not_finite(bad):
    ours = tensors((CHUNK + 9, 3))
    ours.gradients[0][CHUNK + 4] = bad
    norm, factor = ours.run(found_inf=1.0, max_norm=1.0)
    assert not norm.isfinite() and not factor == 1.0


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_addresses_of_any_alignment(offset, dtype):
    """Views at an offset, in buffers of NaN: nothing beside them is read or written."""
    plain = tensors((BLOCK + 5, CHUNK + 40))
    moved, buffers = copy.deepcopy(plain), []

    def place(one: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        buffers.append(torch.full((one.numel() + 16,), math.nan, dtype=dtype, device=DEVICE))
        return buffers[-1][offset : offset + one.numel()].copy_(one)

    for name in ("gradients", "parameters", "averages", "squares"):
        setattr(moved, name, [place(one) for one in getattr(plain, name)])
    plain.copies = [torch.empty_like(one, dtype=dtype) for one in plain.parameters]
    moved.copies = [place(torch.zeros_like(one), dtype) for one in plain.parameters]
    found, other = (each.run(max_norm=1.0, copy_dtype=dtype) for each in (plain, moved))
    assert torch.equal(found, other) or offset
    # The order of the norm's sum differs.
    torch.testing.assert_close(plain.results(), moved.results(), rtol=1e-6, atol=1e-6)
    for one, other in zip(moved.copies, moved.parameters, strict=True):
        assert torch.equal(one, other.to(dtype))
    for buffer in buffers:
        assert int(buffer.isnan().sum()) == 16


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_copies_are_the_rounded_parameters(dtype):
    ours = tensors()
    ours.copies = [torch.empty_like(one, dtype=dtype) for one in ours.parameters]
    ours.copies[2] = None
    ours.run(copy_dtype=dtype)
    for copied, one in zip(ours.copies, ours.parameters, strict=True):
        assert copied is None or torch.equal(copied, one.to(dtype))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_skipped_step_writes_the_copy_of_what_stayed_and_nothing_else(bad, dtype):
    ours = tensors((BLOCK + 5, 7, CHUNK + 1))
    ours.copies = [torch.empty_like(one, dtype=dtype) for one in ours.parameters]
    ours.gradients[0][3] = ours.gradients[0][BLOCK + 1] = bad
    before = copy.deepcopy(ours)
    ours.run(found_inf=1.0, max_norm=1.0, copy_dtype=dtype)
    for name, found in ours.results().items():
        assert_same(found, before.results()[name])
    assert torch.equal(ours.steps, before.steps)
    assert_same(ours.copies, [one.to(dtype) for one in before.parameters])


def test_a_tensor_without_a_gradient_stays_as_it_is():
    ours = tensors((BLOCK + 5, 300, 0))
    ours.gradients[0] = None
    before = copy.deepcopy(ours)
    ours.run(max_norm=1.0)
    for now, then in zip(ours.results().values(), before.results().values(), strict=True):
        assert torch.equal(now[0], then[0]) and not torch.equal(now[1], then[1])
    assert (ours.steps - before.steps).tolist() == [0.0, 1.0, 1.0]


def test_the_same_bits_every_time():
    one = tensors()
    other = copy.deepcopy(one)
    assert torch.equal(one.run(max_norm=1.0), other.run(max_norm=1.0))
    for name, found in one.results().items():
        assert_same(found, other.results()[name])


def test_a_plan_covers_every_chunk_once():
    work = adamw.plan(SIZES, [0] * len(SIZES), DEVICE)
    chunks = [(index, chunk) for index, size in enumerate(SIZES) for chunk in range(-(-size // CHUNK))]
    assert list(zip(work.owner.tolist(), work.chunk.tolist(), strict=True)) == chunks
    # more elements than 32 bits can count
    assert not adamw.plan([2**33], [0], DEVICE).chunk.diff().sub(1).any()


def test_the_table_is_sent_only_when_it_changed():
    table = adamw.AddressTable(3, DEVICE)
    first = table.send(array("q", [1, 2, 3]))
    version = first._version
    assert table.send(array("q", [1, 2, 3])) is first and first._version == version
    assert table.send(array("q", [1, 2, 4])) is first
    assert first.tolist() == [1, 2, 4] and first._version == version + 1


def test_a_capture_has_a_table_and_a_source_that_nothing_else_writes(monkeypatch):
    table, capturing = adamw.AddressTable(3, DEVICE), False
    monkeypatch.setattr(adamw, "_capturing", lambda device: capturing)
    sources = []
    copy_ = torch.Tensor.copy_

    def record(self, source, *args, **kwargs):
        sources.append((self, source))
        return copy_(self, source, *args, **kwargs)

    eager = table.send(array("q", [1, 2, 3]))
    monkeypatch.setattr(torch.Tensor, "copy_", record)
    capturing = True
    captured = table.send(array("q", [4, 5, 6]))
    target, source = sources[-1]
    assert target is captured and captured.data_ptr() != eager.data_ptr()
    with pytest.raises(RuntimeError, match="expected an eager step before every capture"):
        table.send(array("q", [4, 5, 6]))
    capturing = False
    assert table.send(array("q", [7, 8, 9])) is eager
    capturing = True
    second = table.send(array("q", [10, 11, 12]))
    assert second.data_ptr() not in (captured.data_ptr(), eager.data_ptr())
    # A replay copies again: what it reads and where it writes are as they were.
    assert source.tolist() == captured.tolist() == [4, 5, 6] and eager.tolist() == [7, 8, 9]
