"""What backend=torch runs: kernels/reference.py's formulas with fewer passes over memory, without Triton.

A training step on a CPU mostly waits for fresh memory: its first touch, a page fault per 4 KiB, costs more
than the arithmetic. The tests that hold the Triton kernels to the reference hold these functions to it too.
"""
