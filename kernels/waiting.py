"""How idle threads wait for work: said before torch is imported, because OpenMP reads it once, then.

A thread that spins is back at work at once, but takes its processor from whoever else wants it. One that
sleeps gives it away and is slow to wake. Left alone, libgomp spins for many milliseconds, which beside one
more busy program makes a training step a quarter slower. Here threads spin for about as long as they take to
wake, and then sleep: that is never far from the better of the two, whoever runs beside, now or later. (The
load average would be no guide. It counts for minutes what this program itself did before.)
"""

from __future__ import annotations

from collections.abc import MutableMapping

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# libgomp, in torch's wheels for Linux, counts pause instructions: 0.14 ms on Zen 3, where one takes 28 ns
# with the look at memory beside it. Intel's take about twice as long since Skylake, and less before. On ARM
# there is only the look at memory: threads sleep far sooner. LLVM's and Intel's OpenMP, in the wheels for
# macOS and Windows, spin for 200 ms; the shortest that every version of them understands is 1 ms. Of all
# these only Zen 3 was measured.
SPIN = {"GOMP_SPINCOUNT": "5000", "KMP_BLOCKTIME": "1"}


def choose_waiting(environment: MutableMapping[str, str]) -> None:
    """Sets how idle threads wait, unless one of VARIABLES says so already."""
    if not any(name in environment for name in VARIABLES):
        environment.update(SPIN)
