"""Training: `python -m train.run` trains, `python -m train.plot` draws what was logged."""
