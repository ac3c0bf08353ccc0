"""litgpt as a peer, in a virtual environment of its own, because it wants another huggingface_hub than
transformers does.

    python -m bench.litgpt_peer setup     makes the environment: litgpt, and the very torch that runs here
                                          (the size of a second torch)
    python -m bench.litgpt_peer check     a small model: litgpt's losses and tokens beside ours

The environment lies in the cache folder; --venv or SMOLLM2_LITGPT_VENV name another place. Once it is there,
`python -m bench.step_peers`, `bench.train_step` and `bench.generate` use it (bench/peers/litgpt.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.generate_modes import EngineTurns, all_tokens
from bench.peers.litgpt import VENV_VARIABLE, LitgptStep, default_venv, litgpt_variant, litgpt_version, setup
from bench.record import command_line
from bench.step import TrainingStep
from smollm2.cli import run_command
from smollm2.config import SmolLM2Config
from smollm2.engine.eager import Engine
from smollm2.model import SmolLM2ForCausalLM

LOSS_TOLERANCE = 1e-4  # nats over the first steps in fp32


def check() -> int:
    """Litgpt and this project with the same small weights, in fp32: three losses, and twelve tokens after two
    prompts.
    """
    torch.manual_seed(0)
    config = SmolLM2Config.preset("tiny")
    model = SmolLM2ForCausalLM(config, "torch")
    ids = torch.randint(config.vocab_size, (2, 24))
    peer = litgpt_variant(model, torch.float32, ids.device)
    both = EngineTurns(Engine(model.eval()), ids, 12), peer.begin(ids, 12)
    tokens = [all_tokens(turns, 12) for turns in both]
    theirs = LitgptStep(model.state_dict(), config, ids, autocast=False)
    ours = TrainingStep(model.train())
    losses = [(float(ours(ids)), float(theirs())) for _ in range(3)]
    apart, same = max(abs(a - b) for a, b in losses), torch.equal(*tokens)
    facts = theirs.facts
    print(f"litgpt {facts['litgpt']}, torch {facts['torch']}, {facts['threads']} threads")
    verdict = "" if apart <= LOSS_TOLERANCE else ": TOO FAR"
    print(f"losses {', '.join(f'{loss:.5f}' for _, loss in losses)}: within {apart:.1e} of ours{verdict}")
    other = f"OTHER TOKENS: {tokens[1].tolist()}, ours {tokens[0].tolist()}"
    print("the same tokens as ours" if same else other)
    return 0 if same and not verdict else 1


def main(argv: Sequence[str]) -> int:
    parser = command_line("litgpt_peer", "litgpt in an environment of its own.")
    parser.add_argument("command", choices=("setup", "check"))
    folder = f"its folder (default: {VENV_VARIABLE}, or one in the cache folder)"
    parser.add_argument("--venv", type=Path, help=folder)
    options = parser.parse_args(argv)
    if options.venv is not None:
        os.environ[VENV_VARIABLE] = str(options.venv)
    if options.command == "setup":
        setup(default_venv())
        print(f"litgpt {litgpt_version()} in {default_venv()}")
    return check()


if __name__ == "__main__":
    sys.exit(run_command(main))
