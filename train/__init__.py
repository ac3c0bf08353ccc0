"""Training: `python -m train.run` trains, `python -m train.plot` draws what was logged."""

import os

# Idle OpenMP threads sleep. By default they spin, and one more busy program on the machine then slows a small model tenfold (measured:
# 235 against 2,400 tokens/s of training on two cores). OpenMP reads this once, when torch is imported: hence here, before anything
# imports it. Generation keeps torch's default: its steps are short, and waking a thread twenty times a layer costs a fifth of the speed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
