"""`python -m train.run [config.yaml] [key=value ...]`: trains a SmolLM2. Parse (train/command_line.py), build
(train/build.py), loop.

Without a YAML file the run is train/configs/quickstart.yaml: a few minutes on two CPU cores, offline. With
model=, which does not fit quickstart's small shape, it is the defaults of train/config.py. Several processes:
`torchrun --nproc-per-node N -m train.run ...` (train/distributed.py).
"""

from __future__ import annotations

import contextlib
import gc
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from smollm2.cli import program, run_command
from smollm2.config import SmolLM2Config
from smollm2.errors import LoadError
from train import display, estimate, keep_freed_memory, metrics, plot, sharding
from train.build import Run, build
from train.checkpoint import checkpoint_folder, take_snapshot
from train.command_line import HELP, parse
from train.config import RunConfig
from train.data.batches import training_batches
from train.distributed import Interrupted, StopRequest, World, join_world, leave_world
from train.epochs import steps_of
from train.evaluation import evaluate, sample
from train.folder import check_folder, claimed, open_folder, run_folder
from train.optim import describe_optimizer, learning_rate, set_learning_rate
from train.rng import rng_states
from train.saver import Saver
from train.step import CapturedStep, TrainStep, memory_advice


def print_plan(run: Run, origin: str) -> None:
    """The facts of a run, before it starts."""
    config, model, rows = run.config, run.model, len(run.held_out[0])
    model_as_written = config.as_written()["model"]
    origin_of_weights = "from scratch" if config.from_scratch else f"continued from {model_as_written}"
    if run.progress.step:
        origin_of_weights = f"resumed at step {run.progress.step:,}"
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    adapted = f", {trained:,} of them in adapters and trained" if config.lora else ""
    compiled = ", compiled" if config.compile else ""
    backend = f"{model.backend.name} ({model.backend.why}), {config.dtype}{compiled}"
    threads = f", {torch.get_num_threads()} threads" if run.world.device.type == "cpu" else ""
    size, sharded = run.world.size, sharding.describe(config, run.world)
    ranks = f", {size} processes{sharded}" if size > 1 else ""
    held_out = "none: no evaluation"
    if rows:
        tokens = f"{run.held_out.learned.numel():,} tokens"
        tokens += " that are learned" if config.format == "chat" else ""
        held_out = f"{rows} rows, {tokens}, unigram entropy {run.entropy:.3f} nats"
    rows_per_step = f"{config.grad_accumulation} x {config.batch_size} rows of {config.sequence_length}"
    facts = {
        "config": origin,
        "data": run.progress.data.fingerprint,
        "held out": held_out,
        "tokenizer": f"{run.tokenizer.vocab_size:,} tokens",
        "model": f"{model.num_parameters():,} parameters{adapted}, {origin_of_weights}",
        "backend": f"{backend}, on {run.world.device}{threads}{ranks}",
        "steps": f"{config.steps:,} of {config.tokens_per_step:,} tokens ({rows_per_step})",
        "optimizer": describe_optimizer(model, config, run.world.device),
        "launches": f"{'one CUDA graph a step' if run.stream else 'one by one'} ({run.why})",
        "folder": str(run.folder),
    }
    for name, fact in facts.items():
        print(f"{name:10}{fact}", flush=True)
    if config.warmup_steps >= max(2, config.steps):
        never = f"the learning rate never gets beyond its warm-up to lr={config.lr}"
        print(f"warning: warmup_steps={config.warmup_steps} of steps={config.steps}: {never}", flush=True)


# ---- loop --------------------------------------------------------------------------------------------------


def loop(run: Run) -> int:
    """Trains until config.steps are done or a signal comes. Returns the exit code: 0, or 128 + the signal's
    number.

    Raises SaveError when the last checkpoint cannot be written, FloatingPointError when the run diverges,
    LoadError when the data end.
    """
    config, world, progress = run.config, run.world, run.progress
    batches = training_batches(
        run.source, run.tokenizer, rows=config.rows_per_step, length=config.sequence_length, seed=config.seed,
        validation_fraction=run.held_out_fraction, cursor=progress.data.cursor, workers=config.workers,
        cache=run.cache, rank=world.rank, world=world.size, pin=world.device.type == "cuda",
    )  # fmt: skip
    what = run.forward, run.optimizer, run.guard, config, world, run.model.working_copies
    train_step = TrainStep(*what) if run.stream is None else CapturedStep(run.stream, *what)
    sharded, alone = config.sharded, World(world.device)
    writers = sharding.writers(world) if sharded else alone
    keep = config.keep_checkpoints, config.keep_every
    saver = Saver(run.folder, *keep, background=config.background_save, writers=writers)
    reporter: metrics.Reporter | Silent = Silent()
    if world.main:
        facts = run.folder, config, progress, run.model.config, world.device
        reporter = metrics.Reporter(*facts, devices=world.size)
    if progress.step:
        reporter.note(resumed=True)
    progress.best = world.from_main(lambda: _kept_best(run))
    first, stopped = progress.step + 1, 0
    noted: dict[str, str] = {}  # of the streams that fail
    with StopRequest(world) as stop, closing(reporter), closing(batches):
        if not progress.step and not config.from_scratch:
            _report(run, reporter, saver)  # what the weights bring
        if progress.unreported:  # the run was stopped before them
            _report(run, reporter, saver)
            if progress.step >= config.steps or _is_best(run):
                _save(run, saver, reporter, final=True)
        while progress.step < config.steps and not stopped:
            began = time.perf_counter()
            try:
                with _saved_if_it_fails(run, saver, reporter), stop.waiting():
                    batch = next(batches)
            except Interrupted:  # what was read ahead is not counted as read
                stopped = stop.agree()
                if progress.step:
                    _save(run, saver, reporter, final=True)
                break
            waited = time.perf_counter() - began
            lr = learning_rate(progress.step, config)
            set_learning_rate(run.optimizer, lr)
            with memory_advice(config):
                loss, gradient_norm = train_step(batch)
            progress.step += 1
            progress.unreported = True
            progress.tokens += batch.tokens
            progress.data.consume(batch)
            reporter.advance(batch.tokens, waited)
            stopped = stop.agree()
            last = progress.step == config.steps or stopped > 0

            if progress.step == first:
                gc.collect()
                gc.freeze()  # what exists now lives until the end: later collections pass over it
            if last or progress.step == first or progress.step % config.log_every == 0:
                # the only place that waits for the device
                progress.skipped_steps, longest = int(run.guard.skipped), run.guard.longest()
                reporter.log(float(loss), float(gradient_norm), lr)
                if longest >= config.max_skipped_steps:
                    _save(run, saver, reporter, final=True)
                    row = f"{longest} steps in a row had a loss or gradients that are not finite (or spikes)"
                    remedy = "those steps were left out; continue with resume=auto and a lower lr"
                    raise FloatingPointError(f"{row}, up to step {progress.step}; {remedy}")
            if not stopped:
                _report(run, reporter, saver)
            if _due(config.checkpoint_every, progress.step, last) or _is_best(run):
                with reporter.excluded():
                    _save(run, saver, reporter, final=last)
            if failure := saver.failure():
                reporter.line(f"warning: {failure}; training goes on")
                reporter.note(failed_save=str(failure))
            if (lost := display.lost_output()) != noted:
                noted = lost
                reporter.note(**lost)
                if why := lost.get("lost_stdout"):  # stderr may be read all the same
                    print(f"warning: stdout cannot be written ({why}); training goes on", file=sys.stderr)
    if world.main:
        if stopped and not progress.step:
            print("stopped before the first step: there is nothing to save; start it again", flush=True)
        elif stopped:
            where = f"stopped at step {progress.step}, saved in {_checkpoint(run)}"
            print(f"{where}; continue with resume=auto", flush=True)
        else:
            print_result(run, reporter.held_out_loss)
    return 128 + stopped if stopped else 0


class Silent:
    """Stands in for the Reporter on ranks that report nothing."""

    held_out_loss = None

    def __getattr__(self, _: str) -> Any:
        return lambda *_, **__: contextlib.nullcontext()


def _due(every: int, step: int, last: bool = False) -> bool:
    return (every > 0 and step % every == 0) or last


def _is_best(run: Run) -> bool:
    """Whether the checkpoint of the present step is the one to keep, as far as it was evaluated."""
    return run.progress.best.get("step") == run.progress.step


def _kept_best(run: Run) -> dict[str, Any]:
    """What is known of the best checkpoint that lies in this run's folder, if it was chosen by the same
    held-out rows: the former one where the last could not be saved.
    """
    best = run.progress.best
    while best and not checkpoint_folder(run.folder, best["step"]).is_dir():
        best = best.get("former", {})
    same = best and best["rows"] == run.progress.data.held_out_rows
    return best if same and run.config.keep_best else {}


def _checkpoint(run: Run) -> Path:
    """Where the checkpoint of the present step belongs."""
    return checkpoint_folder(run.folder, run.progress.step)


@contextlib.contextmanager
def _saved_if_it_fails(run: Run, saver: Saver, reporter: metrics.Reporter | Silent) -> Iterator[None]:
    """Between steps: an error inside, such as data that end, leaves a checkpoint of the present step."""
    try:
        yield
    except Exception:
        # Only a run of one process can save here: other ranks are waiting in a collective operation.
        if run.world.size == 1 and run.progress.step:
            _save(run, saver, reporter, final=True)
        raise


def _report(run: Run, reporter: metrics.Reporter | Silent, saver: Saver) -> None:
    """The evaluation and the samples that are due after the present step."""
    config, world, step, sharded = run.config, run.world, run.progress.step, run.config.sharded
    if len(run.held_out[0]) and _due(config.eval_every, step, step >= config.steps):
        with reporter.excluded(), _saved_if_it_fails(run, saver, reporter):
            # A sharded forward pass needs all ranks, so that each of them evaluates every row.
            found = evaluate(run.model, run.held_out, config, World(world.device) if sharded else world)
        size = metrics.bytes_per_token(run.held_out.learned, run.tokenizer)
        reporter.evaluation(found, run.entropy, size)
        if config.keep_best and step:
            saver.wait()  # for a best one that is being written
            # all ranks save, or none
            found, best = world.from_main(lambda: (found, _kept_best(run)))
            if found < best.get("held_out_loss", math.inf):
                former = {key: value for key, value in best.items() if key != "former"}
                rows = run.progress.data.held_out_rows
                best = {"step": step, "held_out_loss": found, "rows": rows, "former": former}
            run.progress.best = best
    last = config.format == "chat" and config.sample_every > 0 and step >= config.steps
    if (world.main or sharded) and _due(config.sample_every, step, last):
        with reporter.excluded():
            model = sharding.whole_model(run.model, world) if sharded else run.model
            try:
                texts = sample(model, run.tokenizer, config) if model is not None else []
            except Exception as error:  # noqa: BLE001 - of a run that diverges, which the guard ends
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                reporter.line(f"warning: no samples at step {step} ({reason}); training goes on")
                reporter.note(failed_samples=reason)
            else:
                reporter.samples(texts)
    run.progress.unreported = False


def _save(run: Run, saver: Saver, reporter: metrics.Reporter | Silent, *, final: bool) -> None:
    """Saves the present step while training goes on. final: waits for it; raises SaveError if it fails."""
    run.progress.skipped_steps = int(run.guard.skipped)
    main, sharded = run.world.main, run.config.sharded
    if run.config.keep_best and not _is_best(run):
        saver.wait()
        run.progress.best = run.world.from_main(lambda: _kept_best(run))
    if main:
        run.progress.files = reporter.files()
    state = {"rng": run.world.gather(rng_states()), "guard": run.guard.state()}
    if main or sharded:  # sharded: every rank saves its part
        what = run.model, run.tokenizer, run.optimizer, run.progress, state
        saver.save(take_snapshot(*what, sharded=sharded, main=main))
    if final:
        saver.wait()
        run.world.barrier()
        if saver.last is not None:
            raise saver.last


def print_result(run: Run, held_out_loss: float | None) -> None:
    """The last lines: what was reached, the picture, and how to use the result."""
    if held_out_loss is not None and run.entropy is not None:
        epochs, distance = run.progress.data.epochs, run.entropy - held_out_loss
        reached = f"held-out loss {held_out_loss:.3f} nats per token after {epochs:.2f} epochs"
        side = "below" if distance > 0 else "above"
        print(f"{reached}: {abs(distance):.3f} {side} the unigram entropy {run.entropy:.3f}")
    if run.config.format == "chat":
        data, length = run.progress.data, run.config.sequence_length
        cut = f"{data.truncated:,} of them longer than sequence_length={length} and cut"
        padded = f"{data.padding / max(1, run.progress.tokens):.0%} of all tokens were padding"
        print(f"conversations: {data.documents:,} read, {cut}; {padded}")
    if best := _kept_best(run):
        where = checkpoint_folder(run.folder, best["step"])
        print(f"best: {where}, held-out loss {best['held_out_loss']:.3f}")
    try:
        print(f"picture: {plot.draw(run.folder)}")
    except (LoadError, OSError) as error:
        print(f"no picture: {error}")
    prompt = (run.config.sample_prompts or ["The"])[0]
    chat = ["--chat"] if run.config.format == "chat" else []
    command = ["python", "-m", "smollm2.generate", "--model", str(_checkpoint(run)), *chat, prompt]
    print(f"generate: {shlex.join(command)}", flush=True)


def _print_estimate(config: RunConfig, shape: SmolLM2Config, world: World) -> None:
    lines = estimate.lines(estimate.estimate(config, shape, world.device, world.size))
    print("\n".join([*lines, "", "resolved configuration:", config.as_yaml()]), end="", flush=True)


def train(config: RunConfig, origin: str = "given by a program", *, dry_run: bool = False) -> int:
    """Builds a run and trains it. Returns the exit code: 0, or 128 + number of the signal that stopped it.
    Of a configuration with epochs, it sets the steps that they are.

    Raises UsageError for what cannot be built, LoadError for what cannot be read or saved, FloatingPointError
    when it diverges.
    """
    config.validate()
    world = join_world(config.device)
    # rank 0 speaks for all; what a dry run prints is all that it does
    with display.optional_output(world.main, needed=dry_run), contextlib.ExitStack() as stack:
        if not dry_run:
            folder = run_folder(config)
            world.from_main(lambda: check_folder(folder, config.resume))
            world.from_main(lambda: stack.enter_context(claimed(folder)))
        try:
            if config.epochs:  # saved as steps, so that a resume need not count again
                config.steps, config.epochs = steps_of(config, config.epochs, world), 0.0
            run = build(config, world)
        except LoadError:
            if dry_run and config.from_scratch:  # as without a network: what the configuration alone says
                size = SmolLM2Config.preset(config.model).vocab_size
                size = config.vocab_size if config.trains_tokenizer else size
                print(f"the run cannot be built; from the configuration alone, for a vocabulary of {size:,}:")
                _print_estimate(config, config.model_config(size), world)
            raise
        try:
            print_plan(run, origin)
            if dry_run:
                for line in estimate.mixture_lines(run.source, config, run.tokenizer, run.cache):
                    print(line)
                _print_estimate(config, run.model.config, world)
                return 0
            if run.progress.step >= config.steps and not run.progress.unreported:
                done = f"{run.progress.step} of {config.steps} steps are done"
                print(f"nothing to do: {done}; raise steps to go on")
                return 0
            world.barrier()  # all have looked at the folder before it changes
            if world.main:
                open_folder(run.folder, config, run.tokenizer, run.progress)
            return loop(run)
        finally:
            run.cache.close()


def main(argv: Sequence[str]) -> int:
    if "--help" in argv or "-h" in argv:
        command = "python -m train.run"
        print(HELP.replace(command, program(command)))
        return 0
    flags = ("--dry-run", "--debug")
    config, origin = parse([argument for argument in argv if argument not in flags])
    keep_freed_memory()
    code = train(config, origin, dry_run="--dry-run" in argv)
    leave_world()
    return code


if __name__ == "__main__":
    sys.exit(run_command(main))
