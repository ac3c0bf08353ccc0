"""Training: `python -m train.run` trains, `python -m train.plot` draws what was logged."""

import smollm2  # noqa: F401 - before anything here imports torch: it sets how idle CPU threads wait
