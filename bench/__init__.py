"""Measurements. `python -m bench.kernels` times the kernels; `python -m bench.gpu --out DIR` measures everything in one command."""
