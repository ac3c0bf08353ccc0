"""What backend=torch runs: the formulas of kernels/reference.py with fewer passes over memory, forward and
backward, without Triton.

Fresh memory is what a training step on a CPU waits for: its first touch, a page fault per 4 KiB, costs more
than the arithmetic does. The same tests that hold the Triton kernels to the reference hold these functions to
it.
"""
