"""The proof that every kernel compiles for GPUs that are not there: `python -m kernels.certify`."""
