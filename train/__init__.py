"""Training of SmolLM2: data, optimisation, checkpoints, metrics."""

import smollm2  # noqa: F401 - before anything here imports torch: it sets how idle threads wait
