"""The loops around an engine's steps: one batch, many prompts, a file of prompts, and guesses ahead."""
