"""What a run will cost before it starts: parameters, FLOPs, memory and time, from its configuration and the
shape of its model.

    for line in lines(estimate(config, model.config, device)):
        print(line)

Letters as in kernels/reference.py. Bytes are counted per device, GB are 1e9 bytes. FLOPs follow
train/metrics.py: 6 per weight and token, causal attention counted half. What recomputation adds under
gradient_checkpointing is in the time, not in the FLOPs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from kernels.eager.loss import CHUNK_TOKENS
from kernels.products import tokens_per_chunk
from smollm2.config import SmolLM2Config
from smollm2.errors import LoadError
from smollm2.lora import adapter_parameters
from smollm2.pretrained.tokenizer import Tokenizer
from train.config import RunConfig
from train.data.source import Single, Source
from train.data.token_cache import Caches, TokenCache
from train.data.worker_pool import WorkerPool
from train.display import duration
from train.metrics import flops_per_token, peak_flops
from train.sharding import group_size

ASSUMED_MFU = 0.35  # of a GPU's bf16 peak; one H100 measured 0.33 for the 135M model at 32 x 512
PROCESSORS = 132  # multiprocessors, an H100's, for the chunk of logits: others differ by a quarter
# Part of the rate of the model's largest matrix product that a whole training step reaches: norms, attention,
# loss and optimizer are not matrix products of that shape. Measured on two CPU cores: at the quickstart's
# size 0.55 in fp32 (0.52 with checkpointing) and 0.30 in bf16, whose products are too small there; at 135M
# and 2 x 512 tokens 0.73 in fp32 and 0.57 in bf16. Beside other work, less.
MATMUL_EFFICIENCY = 0.6


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. Not all peak at the same time: a run takes a little less than their sum."""

    parameters: int  # fp32
    gradients: int  # fp32
    moments: int  # AdamW's two averages, fp32; of Muon one, for the matrices of the blocks
    weight_copies: int  # projections in a compute dtype other than fp32, which the backward pass needs
    activations: int  # what the forward pass leaves for the backward pass of a micro-batch
    # the same with gradient_checkpointing: inputs of the layers, and one layer recomputed
    activations_checkpointed: int
    loss_gradients: int  # both gradients of linear_cross_entropy, formed in the forward pass
    logits: int  # of one chunk of tokens, and what is computed from them
    checkpointing: bool
    # sharding: embedding whole with a second gradient, two layers whole, the gradient of one on its way
    gathered: int = 0
    shards: int = 1  # parts into which parameters, gradients and moments are cut
    optimizer: str = "adamw"

    @property
    def total(self) -> int:
        activations = self.activations_checkpointed if self.checkpointing else self.activations
        fixed = self.parameters + self.gradients + self.moments
        return fixed + self.weight_copies + activations + self.loss_gradients + self.logits + self.gathered


@dataclass(frozen=True)
class Estimate:
    """See `lines` for what each figure means."""

    embedding: int  # parameters, shared with the head and counted once
    blocks: int  # parameters of everything else
    steps: int
    tokens_per_step: int  # of all processes
    micro_batch: tuple[int, int]  # rows and tokens of one forward pass on one device
    dtype: str
    backend: str  # torch or triton
    flops_per_token: float
    recomputation: float  # FLOPs done per FLOP counted: 1, or more with gradient checkpointing
    memory: Memory
    rate: float  # FLOP/s that all devices together are expected to reach
    rate_source: str  # where that figure comes from

    @property
    def parameters(self) -> int:
        return self.embedding + self.blocks

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def tokens_per_second(self) -> float:
        return self.rate / (self.flops_per_token * self.recomputation)

    @property
    def seconds(self) -> float:
        """Of all steps, without evaluations, samples and checkpoints."""
        return self.tokens / self.tokens_per_second


def estimate(config: RunConfig, model: SmolLM2Config, device: torch.device, world: int = 1) -> Estimate:
    """What `config` costs with a model of that shape, on `world` devices like `device`.

    Takes a third of a second where the rate must be measured; allocates next to nothing.
    """
    rows = -(-config.batch_size * config.grad_accumulation // world)  # of a step, per process
    micro_batch = min(config.batch_size, rows), config.sequence_length
    embedding = model.vocab_size * model.hidden_size
    flops = flops_per_token(model, config.sequence_length, config.lora)
    in_blocks = 1 - (4 if config.lora else 6) * embedding / flops
    rate, rate_source = expected_rate(model, device, config.dtype, micro_batch[0] * micro_batch[1], world)
    return Estimate(
        embedding=embedding,
        blocks=model.num_parameters() - embedding,
        steps=config.steps,
        tokens_per_step=config.tokens_per_step,
        micro_batch=micro_batch,
        dtype=config.dtype,
        backend=_backend(config.backend, device),
        flops_per_token=flops,
        # a third is the forward pass
        recomputation=1 + in_blocks / 3 if config.gradient_checkpointing else 1.0,
        memory=memory_of(config, model, device, micro_batch[0], group_size(config, world)),
        rate=rate,
        rate_source=rate_source,
    )


def _backend(name: str, device: torch.device) -> str:
    """torch or triton, whichever does most of the work; replaced operations are not looked at."""
    base = name.split(",")[0].strip()
    return base if base != "auto" else "triton" if device.type in ("cuda", "xpu") else "torch"


# ---- memory ------------------------------------------------------------------------------------------------


def memory_of(
    config: RunConfig, model: SmolLM2Config, device: torch.device, rows: int, shards: int = 1
) -> Memory:
    """Bytes on one device for micro-batches of `rows` rows, with parameters cut into `shards` parts."""
    size = 2 if config.dtype == "bf16" else 4
    triton = _backend(config.backend, device) == "triton"
    tokens, hidden, layers = rows * config.sequence_length, model.hidden_size, model.num_hidden_layers
    parameters, embedding = 4 * model.num_parameters(), model.vocab_size * hidden

    per_layer = layer_bytes_per_token(
        model, size, triton=triton, masked=config.document_masking, length=config.sequence_length,
        cuda=device.type == "cuda",
    )  # fmt: skip
    # Besides the layers: the last norm, token ids and targets, and cosines and sines: looked up for every
    # token, or the whole tables.
    ends = tokens * (_norm_bytes(hidden, size) + 16)
    ends += 4 * model.head_dim * (tokens if config.document_masking else model.max_position_embeddings)
    # output of the sub-layer before and residual stream; the first layer has only the one
    kept = (2 * layers - 1) * size * hidden
    copies, gathered = _layer_weight_copies(model, size), 0
    if shards > 1:
        layer = (model.num_parameters() - embedding) // layers
        gathered = 8 * embedding + 2 * size * layer + (size + 4) * layer
        copies = _joined_copies(model, size)
    part = -(-parameters // shards)
    trained = 4 * adapter_parameters(model, config.lora) if config.lora else part
    # smollm2/working_copies.py
    lasting = device.type == "cuda" and size == 2 and shards == 1 and not config.compile

    chunk = min(tokens, tokens_per_chunk(hidden, model.vocab_size, PROCESSORS) if triton else CHUNK_TOKENS)
    logits = chunk * model.vocab_size * size
    if not triton and device.type != "cpu":  # a CPU goes through the chunk in small tiles
        logits += 8 * chunk * model.vocab_size  # the whole chunk in fp32, and a temporary of its size
    if size == 2:
        # the head, cast, and for torch a product that is then added in fp32
        logits += size * embedding * (1 if triton else 2)
    return Memory(
        parameters=part + (trained if config.lora else 0),
        gradients=trained,
        moments=2 * trained - (4 * _block_matrices(model) if config.optimizer == "muon" else 0),
        optimizer=config.optimizer,
        weight_copies=copies if config.gradient_checkpointing and not lasting else layers * copies,
        activations=tokens * layers * per_layer + ends,
        activations_checkpointed=tokens * (kept + per_layer) + ends,
        loss_gradients=tokens * size * hidden + 4 * embedding,
        logits=logits,
        checkpointing=config.gradient_checkpointing,
        gathered=gathered,
        shards=shards,
    )


def _norm_bytes(hidden: int, size: int) -> int:
    """Per token: the input of an RMSNorm, 1 / rms in fp32, and the input of the projection after it."""
    return 2 * size * hidden + 4


def layer_bytes_per_token(
    model: SmolLM2Config, size: int, *, triton: bool, masked: bool, length: int, cuda: bool
) -> int:
    """Bytes that one block keeps for its backward pass, per token: follows smollm2/model.py and the
    operations line by line.

    size: bytes of an element in the compute dtype; masked: with doc_start; length: tokens in a row. Both
    backends keep the same but for the mask of attention. torch.compile decides for itself, and keeps about as
    much.
    """
    heads, ffn = model.num_attention_heads, model.intermediate_size
    q, k = heads * model.head_dim, model.num_key_value_heads * model.head_dim
    norms = 2 * _norm_bytes(model.hidden_size, size)
    projection = size * (q + 2 * k)  # of which the values stay views
    rotated = size * (q + k)
    output = size * q + 4 * heads  # the next projection keeps the same tensor; log-sum-exp in fp32
    if masked and not triton:
        # SDPA gets keys and values repeated for every query head, and keeps these instead of the projection
        if cuda:
            projection = size * 2 * q
        if cuda or size == 4:  # in bf16 on a CPU, kernels/eager/attention.py keeps none
            output += size * length  # one row of the mask
    mlp = size * 2 * ffn  # gate and up; silu(gate) is computed again
    mlp += size * ffn  # their product, the input of the last projection
    return norms + projection + rotated + output + mlp


def _layer_weight_copies(model: SmolLM2Config, size: int) -> int:
    """Bytes of one block: in bf16 every projection is cast; in fp32 the parameters themselves are used."""
    return size * _block_matrices(model) // model.num_hidden_layers if size == 2 else 0


def _block_matrices(model: SmolLM2Config) -> int:
    """Parameters of the projections of all blocks."""
    q, k = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    return model.num_hidden_layers * model.hidden_size * (2 * q + 2 * k + 3 * model.intermediate_size)


def _joined_copies(model: SmolLM2Config, size: int) -> int:
    """Bytes of one sharded block: q, k, v and gate, up are gathered, then joined for the backward pass."""
    q, k = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    return size * model.hidden_size * (q + 2 * k + 2 * model.intermediate_size)


# ---- time --------------------------------------------------------------------------------------------------


def expected_rate(
    model: SmolLM2Config, device: torch.device, dtype: str, tokens: int, world: int = 1
) -> tuple[float, str]:
    """FLOP/s of all devices, and where the figure comes from. A known GPU in bf16: its peak times an assumed
    MFU. Anything else: the measured rate of the model's largest product times an efficiency.
    """
    devices = world if device.type != "cpu" else 1  # processes on a CPU share its cores
    times = f"{devices} x " if devices > 1 else ""
    peak = peak_flops(device)
    if peak is not None and dtype == "bf16":
        name = f"{torch.cuda.get_device_name(device)}, {peak / 1e12:,.0f} TFLOP/s"
        assumed = f"assuming an MFU of {ASSUMED_MFU:.0%}; the first lines of the run will tell"
        return devices * peak * ASSUMED_MFU, f"{times}{name}, {assumed}"
    measured = matmul_rate(model, device, torch.bfloat16 if dtype == "bf16" else torch.float32, tokens)
    rate = f"{measured / 1e9:,.0f} GFLOP/s measured in a matrix product"
    source = f"{times}{device.type}, {rate}, assuming {MATMUL_EFFICIENCY:.0%} of it"
    return devices * measured * MATMUL_EFFICIENCY, source


def matmul_rate(
    model: SmolLM2Config, device: torch.device, dtype: torch.dtype, tokens: int, seconds: float = 0.3
) -> float:
    """FLOP/s of the projection to gate and up, [tokens, hidden] x [hidden, 2F]: the fastest repetition within
    `seconds`, because other processes on a shared CPU make most of them several times slower.
    """
    # On a GPU, enough work that the host is not the limit.
    rows, repeats = (min(tokens, 2048), 1) if device.type == "cpu" else (min(tokens, 16384), 20)
    x = torch.randn(rows, model.hidden_size, device=device, dtype=dtype)
    weight = torch.randn(2 * model.intermediate_size, model.hidden_size, device=device, dtype=dtype)
    work = 2 * repeats * rows * weight.numel()

    def once() -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            x @ weight.t()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - began

    once()
    end = time.perf_counter() + seconds
    taken: list[float] = []
    while len(taken) < 3 or time.perf_counter() < end:
        taken.append(once())
    return work / min(taken)


# ---- text --------------------------------------------------------------------------------------------------


def lines(found: Estimate) -> list[str]:
    """The estimate as readable lines, names in a column of ten characters."""
    rows, length = found.micro_batch
    memory, work = found.memory, found.flops_per_token * found.tokens
    share = f", one of {memory.shards} shards" if memory.shards > 1 else ""
    activations, other = memory.activations, f"{_gb(memory.activations_checkpointed)} with"
    if memory.checkpointing:
        activations, other = memory.activations_checkpointed, f"{_gb(memory.activations)} without"
    moments = "Muon and AdamW" if memory.optimizer == "muon" else "AdamW"
    work_on = f"{rows} x {length} tokens, {found.backend}, {found.dtype}"
    parts = [
        (memory.parameters, f"parameters, fp32{share}"),
        (memory.gradients, f"gradients, fp32{share}"),
        (memory.moments, f"{moments}'s moments, fp32{share}"),
        (memory.gathered, "gathered: the embedding, two layers, gradients on their way"),
        (memory.weight_copies, f"copies of weights, {found.dtype}"),
        (activations, f"activations of {work_on} ({other} gradient_checkpointing)"),
        (memory.loss_gradients, "gradients of the loss"),
        (memory.logits, "a chunk of logits"),
    ]
    size = f"embedding (also the head) {found.embedding:,}, blocks {found.blocks:,}"
    flop, speed = f"{_flop(found.flops_per_token)} a token, {_flop(work)}", f"{found.tokens_per_second:,.0f}"
    facts = [
        ("size", f"{found.parameters:,} parameters: {size}"),
        ("tokens", f"{found.tokens_per_step:,} a step, {found.tokens:,} in {found.steps:,} steps"),
        ("compute", f"{flop} in all (causal attention counted half)"),
        ("memory", f"about {_gb(memory.total)} per device, without the framework's own:"),
        *(("", f"{_gb(count):>8} {what}") for count, what in parts if count),
        ("time", f"about {_time(found.seconds)} at {speed} tokens/s, without evaluations"),
        ("", f"({found.rate_source})"),
    ]
    return [f"{name:10}{fact}" for name, fact in facts]


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _flop(count: float) -> str:
    for factor, unit in ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 1e6:.3g} MFLOP"


def _time(seconds: float) -> str:
    days = seconds / 86400
    return f"{days:.1f} days" if days >= 2 else duration(seconds)


# ---- mixture -----------------------------------------------------------------------------------------------


def mixture_lines(source: Source, config: RunConfig, tokenizer: Tokenizer, cache: Caches) -> list[str]:
    """A line for every source of a mixture: its share, the tokens that the run reads of it, and its epochs
    where its size is known: counted where the token cache has all of it, else estimated.
    """
    width = max(len(part.name or "") for part in source.parts)
    lines: list[str] = []
    for part, own in zip(source.parts, cache.parts, strict=True):
        if part.name is None:
            continue
        share = config.steps * config.tokens_per_step * float(part.weight)
        size, about = own.tokens_of(part.source.num_shards) if own is not None else None, ""
        if size is None:
            size, about = estimated_tokens(part.source, tokenizer, own), "about "
        extent = "of a source of unknown size"
        if size:
            extent = f"of {about}{size:,}: {about}{share / size:,.2f} epochs"
        name = f"{'mixture' if not lines else '':10}{part.name:{width}}"
        lines.append(f"{name}  {float(part.weight):7.2%}  {share:,.0f} tokens {extent}")
    return lines


SOME_DOCUMENTS = 200  # tokenised for an estimate


def estimated_tokens(source: Single, tokenizer: Tokenizer, cache: TokenCache | None = None) -> int | None:
    """The tokens of a source, extrapolated from its first block, or from that block's first documents. None
    if the block cannot be read, or its share of the source is not known.
    """
    begin, end = source.span(0, 0)
    part = (end - begin) * source.sizes[0] / (sum(source.sizes) or 1.0)
    stored = cache.get(0, 0) if cache is not None else None
    if stored is not None and part > 0:
        return round(len(stored.tokens) / part)
    try:
        block = next(source.read(0), []) if part > 0 else []
    except LoadError:
        return None
    if not block:
        return None
    tokens = len(WorkerPool(tokenizer, 0, None, source.train_on).encode(block[:SOME_DOCUMENTS]).tokens)
    return round(tokens * len(block) / len(block[:SOME_DOCUMENTS]) / part)
