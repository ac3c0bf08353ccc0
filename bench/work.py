"""Bytes and floating-point operations that each operation cannot avoid, from its shapes: the floors that
times are compared with.

Letters: N tokens = B rows x T, h hidden, F feed-forward, H query and K key heads of size D, V vocabulary, e
bytes per element of an activation. Every input is read once and every output written once; what a kernel
saves for its backward pass counts when it is not an output anyway. A matrix product of [N, i] by [i, o] is 2
N i o operations forward and twice that backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from smollm2.config import SmolLM2Config

# what an MFU is made of: that of a benchmark is that of a training run
from train.metrics import flops_per_token as flops_per_token
from train.metrics import peak_flops as peak_flops

MFU_CONVENTION = (
    "6 per weight and token, causal attention counted half, dense bf16 peak of the vendor; none on a CPU"
)


@dataclass(frozen=True)
class Work:
    """What one pass must do."""

    bytes: int = 0
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: int) -> Work:
        return Work(self.bytes * times, self.flops * times)

    def floor(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Seconds that it takes at least, on a machine with these rates."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


@dataclass(frozen=True)
class Cost:
    """Forward and backward pass of an operation."""

    forward: Work
    backward: Work = Work()

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.forward * times, self.backward * times)

    def phase(self, name: str) -> Work:
        """Of "forward", "backward" or "forward+backward"."""
        return {"forward": self.forward, "backward": self.backward}.get(name, self.forward + self.backward)


def rms_norm(tokens: int, hidden: int, size: int) -> Cost:
    """Forward 2 N h e (x, y) and 4 N (rstd); backward 3 N h e (dy, x, dx)."""
    return Cost(Work(2 * tokens * hidden * size + 4 * tokens), Work(3 * tokens * hidden * size + 4 * tokens))


def add_rms_norm(tokens: int, hidden: int, size: int) -> Cost:
    """Forward 4 N h e (x, residual, y, sum) and 4 N (rstd); backward 4 N h e (dy, dsum, sum, dx)."""
    return Cost(*[Work(4 * tokens * hidden * size + 4 * tokens)] * 2)


def rope_qkv(tokens: int, length: int, heads: int, key_heads: int, head_dim: int, size: int) -> Cost:
    """Forward 2 N (H + K) D e (the values stay where they are); backward 2 N (H + 2K) D e; 4 T D of tables
    each.
    """
    tables, head = 4 * length * head_dim, 2 * tokens * head_dim * size
    return Cost(Work(head * (heads + key_heads) + tables), Work(head * (heads + 2 * key_heads) + tables))


def rope(tokens: int, length: int, heads: int, key_heads: int, head_dim: int, size: int) -> Cost:
    """2 N (H + K) D e (q and k, or their gradients, read and written) and 4 T D of tables, each way."""
    return Cost(*[Work(2 * tokens * (heads + key_heads) * head_dim * size + 4 * length * head_dim)] * 2)


def rope_cache(rows: int, heads: int, key_heads: int, head_dim: int, size: int) -> Cost:
    """One new token a row: 2 R (H + 2K) D e (the projection read; queries, new keys and values written) and 4
    R D of tables. No backward pass.
    """
    return Cost(Work(2 * rows * (heads + 2 * key_heads) * head_dim * size + 4 * rows * head_dim))


def attention(batch: int, length: int, heads: int, key_heads: int, head_dim: int, size: int) -> Cost:
    """Causal, half of the square: 2 B H T^2 D operations forward, 5 B H T^2 D backward.

    Forward N (2H + 2K) D e (q, k, v, out) and 4 N H (log-sum-exp); backward N (4H + 4K) D e (q, k, v, out,
    do, dq, dk, dv) and 4 N H.
    """
    tokens, square = batch * length, batch * heads * length * length * head_dim
    element = tokens * (heads + key_heads) * head_dim * size
    return Cost(
        Work(2 * element + 4 * tokens * heads, 2 * square), Work(4 * element + 4 * tokens * heads, 5 * square)
    )


def decode_attention(batch: int, keys: int, heads: int, key_heads: int, head_dim: int, size: int) -> Cost:
    """One new query a row: 2 B S K D e of cache, and q and out; 4 B H S D operations. No backward pass."""
    return Cost(
        Work(2 * batch * (keys * key_heads + heads) * head_dim * size, 4 * batch * heads * keys * head_dim)
    )


def swiglu(tokens: int, width: int, size: int) -> Cost:
    """Forward 3 N F e (gate, up, y); backward 5 N F e (dy, gate, up, dgate, dup)."""
    return Cost(Work(3 * tokens * width * size), Work(5 * tokens * width * size))


def linear_cross_entropy(tokens: int, vocabulary: int, hidden: int, size: int) -> Cost:
    """Forward 2 N V h operations, backward 4; N h e of hidden states and 4 V h of fp32 weights, then the same
    of gradients.
    """
    moved, product = tokens * hidden * size + 4 * vocabulary * hidden, 2 * tokens * vocabulary * hidden
    return Cost(Work(moved, product), Work(moved, 2 * product))


def linear(tokens: int, inputs: int, outputs: int, size: int) -> Cost:
    """Forward e (N i + i o + N o); backward e (N o + i o + N i) for the input's and e (N o + N i + i o) for
    the weight's gradient.
    """
    moved = size * (tokens * inputs + inputs * outputs + tokens * outputs)
    product = 2 * tokens * inputs * outputs
    return Cost(Work(moved, product), Work(2 * moved, 2 * product))


def mlp(tokens: int, hidden: int, width: int, size: int) -> Cost:
    """Both products as of `linear`, with SwiGLU in them: the activations N F e are written by the first and
    read by the second.

    Backward, the gradient of the activations need not reach memory: gate and up are read (2 N F e) and their
    gradients written (2 N F e), and the second product moves N F e less.
    """
    products = linear(tokens, hidden, 2 * width, size) + linear(tokens, width, hidden, size)
    activations = tokens * width * size
    return products + Cost(Work(activations), Work(3 * activations))


def tied_embedding(tokens: int, distinct: int, vocabulary: int, hidden: int, size: int) -> Cost:
    """Forward 8 N ids, 4 h of each distinct one's row in fp32, N h e written.

    Backward N h e and 8 N read; 4 V h of the head's gradient written, and 8 h a distinct id for its row, read
    and written again.
    """
    looked_up = tokens * (hidden * size + 8)
    return Cost(
        Work(looked_up + 4 * distinct * hidden), Work(looked_up + 4 * hidden * (vocabulary + 2 * distinct))
    )


def adamw(parameters: int) -> Work:
    """A step with P parameters in fp32: 4 P for the norm of the gradients, 28 P for p, g, m, v read and p, m,
    v written.
    """
    return Work(32 * parameters)


def projections(config: SmolLM2Config) -> dict[str, tuple[int, int]]:
    """The matrix products of one block: (inputs, outputs) of each."""
    hidden, width, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    return {
        "qkv projection": (hidden, (heads + 2 * config.num_key_value_heads) * config.head_dim),
        "output projection": (heads * config.head_dim, hidden),
        "gate and up projection": (hidden, 2 * width),
        "down projection": (width, hidden),
    }


def decode_layer(config: SmolLM2Config, rows: int, keys: int, size: int) -> Cost:
    """A whole block for one new token a row, the last of S keys, with matrices of M elements in all: 2 R M +
    4 R H S D operations.

    (M + 2 h) e of weights, read once for all R rows; 2 R h e of x and out; 2 R S K D e of caches, of which S
    - 1 keys and values are read and the new ones written; 4 R D of tables. What lies between the operations
    of a block need not reach memory. No backward pass.
    """
    heads, key_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    matrices = sum(inputs * outputs for inputs, outputs in projections(config).values())
    elements = matrices + 2 * config.hidden_size * (1 + rows) + 2 * rows * keys * key_heads * head_dim
    return Cost(
        Work(elements * size + 4 * rows * head_dim, 2 * rows * matrices + 4 * rows * heads * keys * head_dim)
    )


def decode_head(rows: int, hidden: int, vocabulary: int, size: int) -> Cost:
    """(V h + h) e of weights, read once for all R rows, R h e of x, 4 R V of logits in fp32; 2 R V h
    operations. No backward pass.
    """
    moved = size * hidden * (vocabulary + 1 + rows) + 4 * rows * vocabulary
    return Cost(Work(moved, 2 * rows * vocabulary * hidden))


def decode_inputs(rows: int, hidden: int, half: int, size: int) -> Cost:
    """R rows of the embedding and of both tables [P, D/2], read and written: 2 R h e + 8 R D; of each row the
    token, and the length twice. No backward pass.
    """
    return Cost(Work(rows * (2 * hidden * size + 16 * half + 24)))


def decode_best(rows: int, hidden: int, vocabulary: int, size: int) -> Cost:
    """As decode_head, but 12 bytes a row of results, one candidate, in the place of its logits."""
    whole = decode_head(rows, hidden, vocabulary, size).forward
    return Cost(Work(whole.bytes - 4 * rows * (vocabulary - 3), whole.flops))


def next_token(rows: int, candidates: int, size: int) -> Cost:
    """R C e of scores are read. No backward pass."""
    return Cost(Work(rows * candidates * size))


def layer(config: SmolLM2Config, batch: int, length: int, size: int) -> dict[str, Cost]:
    """The operations of one block, in order."""
    tokens, hidden, width = batch * length, config.hidden_size, config.intermediate_size
    heads, key_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    products = {name: linear(tokens, *sides, size) for name, sides in projections(config).items()}
    return {
        "add_rms_norm (2)": add_rms_norm(tokens, hidden, size) * 2,
        "qkv projection": products["qkv projection"],
        "rope_qkv": rope_qkv(tokens, length, heads, key_heads, head_dim, size),
        "attention": attention(batch, length, heads, key_heads, head_dim, size),
        "output projection": products["output projection"],
        "gate and up projection": products["gate and up projection"],
        "swiglu": swiglu(tokens, width, size),
        "down projection": products["down projection"],
    }


def step(config: SmolLM2Config, batch: int, length: int, size: int) -> dict[str, Cost]:
    """A whole optimizer step, with P parameters in fp32.

    embedding: 4 N h read and N h e written, backward N h e read and 4 V h written. weights: cast to e bytes
    and back, (4 + e) (P - V h) each way, or nothing in fp32; the tied matrix is read in fp32, by the
    embedding and the loss, and counted there.
    optimizer (under backward): as of `adamw`; gradients are clipped in passing.
    """
    tokens, hidden, parameters = batch * length, config.hidden_size, config.num_parameters()
    layers = sum(layer(config, batch, length, size).values(), Cost(Work())) * config.num_hidden_layers
    cast = 0 if size == 4 else (4 + size) * (parameters - config.vocab_size * hidden)
    return {
        "layers": layers,
        "embedding": Cost(
            Work(tokens * hidden * (4 + size)), Work(tokens * hidden * size + 4 * config.vocab_size * hidden)
        ),
        "final norm": rms_norm(tokens, hidden, size),
        "loss": linear_cross_entropy(tokens, config.vocab_size, hidden, size),
        "weights": Cost(*[Work(cast)] * 2),
        "optimizer": Cost(Work(), adamw(parameters)),
    }


def prefill_flops(config: SmolLM2Config, batch: int, length: int) -> int:
    """Operations of a prompt's way through the model, to the logits of its last token."""
    one = sum(cost.forward.flops for cost in layer(config, batch, length, 2).values())
    return config.num_hidden_layers * one + 2 * batch * config.hidden_size * config.vocab_size


def step_floor(config: SmolLM2Config, batch: int, length: int, size: int, *roof: float) -> float:
    """Seconds of a step in which every operation runs at the roof (bytes, FLOP per second), one after the
    other.
    """
    parts = step(config, batch, length, size)
    del parts["layers"]
    costs = [*layer(config, batch, length, size).values()] * config.num_hidden_layers + [*parts.values()]
    return sum(one.floor(*roof) for cost in costs for one in (cost.forward, cost.backward))


@dataclass(frozen=True)
class Item:
    """One operation of a whole: the part that it belongs to, how often it happens, and what it must do each
    time.
    """

    part: str
    times: int
    cost: Cost

    def floors(self, bytes_per_second: float, flops_per_second: float) -> dict[str, float]:
        """Phase -> seconds in the whole that it takes at least; no backward pass, no entry."""
        phases = {"forward": self.cost.forward, "backward": self.cost.backward}
        return {
            name: self.times * todo.floor(bytes_per_second, flops_per_second)
            for name, todo in phases.items()
            if todo != Work()
        }


# The parts of a step, of which an operation that is not here is one by itself.
_PARTS = {
    "qkv projection": "products", "output projection": "products", "gate and up projection": "products",
    "down projection": "products", "rope_qkv": "attention", "add_rms_norm": "norms", "final norm": "norms",
    "embedding": "weights",
}  # fmt: skip


def step_items(config: SmolLM2Config, batch: int, length: int, size: int) -> dict[str, Item]:
    """`step`, operation by operation. The first norm of a step has no residual and the last one has: one of
    each, as counted there.
    """
    costs = layer(config, batch, length, size)
    del costs["add_rms_norm (2)"]
    layers, norm = config.num_hidden_layers, add_rms_norm(batch * length, config.hidden_size, size)
    found = {"add_rms_norm": Item("norms", 2 * layers, norm)}
    found |= {name: Item(_PARTS.get(name, name), layers, cost) for name, cost in costs.items()}
    rest = step(config, batch, length, size)
    del rest["layers"]
    return found | {
        name: Item(_PARTS.get(name, name), 1, cost) for name, cost in rest.items() if cost != Cost(Work())
    }


def token_items(config: SmolLM2Config, batch: int, keys: int, size: int) -> dict[str, Item]:
    """A decode step of `batch` rows, each over `keys` keys, its own among them: weights and logits are read
    once for all rows.
    """
    layers, hidden = config.num_hidden_layers, config.hidden_size
    heads, key_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    costs = {
        "rms_norm": ("norms", layers, rms_norm(batch, hidden, size)),
        "add_rms_norm": ("norms", layers, add_rms_norm(batch, hidden, size)),
        "rope_qkv": ("KV", layers, rope_qkv(batch, batch, heads, key_heads, head_dim, size)),
        "decode_attention": ("KV", layers, decode_attention(batch, keys, heads, key_heads, head_dim, size)),
        "swiglu": ("swiglu", layers, swiglu(batch, config.intermediate_size, size)),
        **{name: ("weights", layers, linear(batch, *at, size)) for name, at in projections(config).items()},
        "logits": ("logits", 1, linear(batch, hidden, config.vocab_size, size)),
    }
    return {name: Item(part, times, Cost(cost.forward)) for name, (part, times, cost) in costs.items()}


# Operation -> backend -> phase -> seconds in the whole.
Measured = dict[str, dict[str, dict[str, float]]]


def losses(
    items: dict[str, Item], measured: Measured, backend: str, whole: float | None, roof: tuple[float, float]
) -> list[dict[str, Any]]:
    """What each operation takes beyond its floor in one backend, the largest first; phases apart. whole:
    seconds of it all.
    """
    rows: list[dict[str, Any]] = []
    for name, item in items.items():
        floors = item.floors(*roof)
        for phase, seconds in measured[name].get(backend, {}).items():
            floor = floors[phase] if phase in floors else sum(floors.values())
            rows.append({"operation": name, "phase": phase, "ms": 1e3 * seconds, "floor_ms": 1e3 * floor})
    between = None if whole is None else 1e3 * whole - sum(row["ms"] for row in rows)
    if between is not None and between > 0:
        rows.append({"operation": "between", "phase": "", "ms": between, "floor_ms": 0.0})
    for row in rows:
        row["loses_ms"] = row["ms"] - row["floor_ms"]
    return sorted(rows, key=lambda row: -row["loses_ms"])


def by_part(
    items: dict[str, Item], measured: Measured, roof: tuple[float, float]
) -> dict[str, dict[str, float]]:
    """Part -> milliseconds of its floor and in each backend that has all of it."""
    backends = {backend for of_backend in measured.values() for backend in of_backend}
    parts: dict[str, dict[str, float]] = {}
    for part in dict.fromkeys(item.part for item in items.values()):
        names = [name for name, item in items.items() if item.part == part]
        parts[part] = {"floor": 1e3 * sum(sum(items[name].floors(*roof).values()) for name in names)}
        for backend in sorted(backends):
            if all(backend in measured[name] for name in names):
                parts[part][backend] = 1e3 * sum(sum(measured[name][backend].values()) for name in names)
    return parts
