"""How idle threads wait for work: decided before torch is imported, because OpenMP reads it once, then.

A thread that spins is back at work at once, but takes its processor from whoever else wants it. One that
sleeps gives it away and is slow to wake. A decode step hands out work hundreds of times, so both cost: in
milliseconds a token, int8 weights of 135M, on two cores of an AMD EPYC (Zen 3):

    idle threads                alone   beside one busy program
    sleep                         55                        48
    spin 5,000 times, sleep       32                        91
    spin 300,000 times, sleep     31                       104     libgomp's own choice

No fixed length is right for both. So threads sleep if other programs run now. Else they spin for about as
long as a thread takes to wake: should another program come later, that is the smaller loss. (The load average
would be of no use: it counts for minutes what this program itself did before.)
"""

from __future__ import annotations

import os
import time
from collections.abc import MutableMapping
from pathlib import Path

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# libgomp, in torch's wheels for Linux, counts pause instructions: 0.14 ms on Zen 3, where one takes 28 ns
# with the look at memory beside it. Intel's take about twice as long since Skylake, and less before. On ARM
# there is only the look at memory: threads sleep far sooner. LLVM's and Intel's OpenMP, in the wheels for
# macOS and Windows, spin for 200 ms; the shortest that every version of them understands is 1 ms. Of all
# these only Zen 3 was measured.
SPIN = {"GOMP_SPINCOUNT": "5000", "KMP_BLOCKTIME": "1"}
LOOKS, QUIET = 30, 5  # two milliseconds apart; so many in a row that see nobody else are enough


def choose_waiting(environment: MutableMapping[str, str], load: Path = Path("/proc/loadavg")) -> None:
    """Sets how idle threads wait, unless one of VARIABLES says so already. load: Linux's, or a stand-in."""
    if not any(name in environment for name in VARIABLES):
        environment.update({"OMP_WAIT_POLICY": "PASSIVE"} if others_run(load) else SPIN)


def others_run(load: Path = Path("/proc/loadavg")) -> bool:
    """Whether other programs want the processors of this one now: 60 ms without a pause of 10, so that no
    command of a moment counts. False where Linux does not say. As many others as the machine has processors
    that this program may not use do not count either.
    """
    quiet = 0
    for _ in range(LOOKS):
        try:
            running = int(load.read_text(encoding="ascii").split()[3].partition("/")[0])
        except (OSError, ValueError, IndexError):
            return False
        others, elsewhere = running - 1, (os.cpu_count() or 1) - len(os.sched_getaffinity(0))
        quiet = quiet + 1 if others <= elsewhere else 0
        if quiet == QUIET:
            return False
        time.sleep(0.002)
    return True
