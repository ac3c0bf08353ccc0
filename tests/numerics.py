"""The numerics contract: one function, one table.

truth = the reference in float64; base = the reference in the tested dtype. A kernel passes when its largest
error is at most twice that of the base, plus an absolute allowance for results that the base happens to get
exactly.

With SMOLLM2_NUMERICS=FILE in the environment, the worst error over budget of every operation and dtype that
the session checked is added to FILE when a process ends (several may share the tests); `python -m
kernels.certify --numerics FILE` puts it into the certificate.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os

import torch
from torch import Tensor

# A few units in the last place of a value near 1. Not to be raised to make a test pass.
ATOL = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# (op, dtype) -> the largest error over its budget that was seen in this session; the certificate prints it.
WORST: dict[tuple[str, str], float] = {}


def check(
    op: str, name: str, ours: Tensor, base: Tensor, truth: Tensor, tested: torch.dtype | None = None
) -> None:
    """Asserts max|ours - truth| <= 2 max|base - truth| + atol[tested]. All three of one shape; truth in
    float64.

    tested: the dtype that was computed in, where the result is wider: an fp32 loss over 16-bit activations is
    one number, and the base may be right in it by luck.
    """
    tested = tested or ours.dtype
    assert truth.dtype == torch.float64, f"{op} {name}: the truth must be float64, got {truth.dtype}"
    assert ours.shape == truth.shape, f"{op} {name}: shape {list(ours.shape)}, expected {list(truth.shape)}"
    assert ours.dtype == base.dtype, f"{op} {name}: dtype {ours.dtype}, expected {base.dtype}"
    if truth.numel() == 0:
        return
    assert ours.isfinite().all(), f"{op} {name}: {int((~ours.isfinite()).sum())} values are not finite"
    budget = 2 * (base.double() - truth).abs().max().item() + ATOL[tested]
    error = (ours.double() - truth).abs().max().item()
    key = (op, str(tested).removeprefix("torch."))
    WORST[key] = max(WORST.get(key, 0.0), error / budget)
    assert error <= budget, f"{op} {name} {key[1]}: error {error:.3e} over the budget {budget:.3e}"


def write_report(path: str) -> None:
    """Writes WORST as [{"op", "dtype", "worst"}], sorted, or the worse of it and what stands there; nothing
    if no kernel was checked.
    """
    if not WORST:
        return
    with open(path, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        worst = dict(WORST)
        for row in json.loads(file.read() or "[]"):
            key = row["op"], row["dtype"]
            worst[key] = max(worst.get(key, 0.0), row["worst"])
        file.truncate(0)
        rows = [{"op": op, "dtype": dtype, "worst": value} for (op, dtype), value in sorted(worst.items())]
        file.write(json.dumps(rows, indent=1) + "\n")


if os.environ.get("SMOLLM2_NUMERICS"):
    atexit.register(write_report, os.environ["SMOLLM2_NUMERICS"])
