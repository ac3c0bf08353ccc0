"""Training: `python -m train.run` trains, `python -m train.plot` draws what was logged."""

import os

# Idle OpenMP threads sleep. By default they spin, and one more busy program on the machine then slows a small model tenfold (measured:
# 235 against 2,400 tokens/s of training on two cores). OpenMP reads this once, when torch is imported: hence here, before anything
# imports it. (Generation, whose steps are shorter, decides by the load: smollm2/__init__.py.)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
