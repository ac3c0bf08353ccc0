"""`python -m train.verify_resume [config.yaml] [key=value ...]`: proves, bit for bit, that a run that was
killed is the run that was not.

One run trains N + M steps without a pause. Another is killed with SIGKILL three times: in the middle of a
step, in the middle of writing a checkpoint, in the middle of the last step; each time it is started again
with resume=auto. With --kills K it is killed K times at random moments instead. Then losses, gradient norms,
learning rates, samples, weights, optimizer state, random generators, counters and the batches themselves are
compared, all of them exactly; a line of metrics that is there twice counts as different.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from smollm2.cli import Parser, run_command
from smollm2.errors import LoadError, UsageError
from smollm2.lora import ADAPTER_WEIGHTS
from train import checkpoint, run, step
from train.checkpoint import LATEST, RECORD, STATE, checkpoints, newest_checkpoint, read_moments
from train.command_line import CONFIGS, parse
from train.data.batches import Batch
from train.metrics import SAMPLES_FILE, read_metrics

DEADLINE = 600.0  # seconds until the first checkpoint is there, on a machine however slow
ROOT = Path(run.__file__).resolve().parents[run.__name__.count(".")]  # where the package is found
# of metrics.jsonl: they tell the time
TIMED = ("tokens_per_second", "mfu", "wait_ms", "memory_gb", "memory_peak_gb", "eta_seconds")


# ---- in the runs -------------------------------------------------------------------------------------------


def _die(files: object = None) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return "not reached"


def _record_batches(folder: Path) -> None:
    """Writes a digest of every batch that is trained on, under the position of the data after it."""
    original = step.TrainStep._count_targets
    path = folder / f"stream-{os.environ.get('RANK', '0')}.jsonl"

    def recorded(self: step.TrainStep, batch: Batch) -> int:
        parts = (batch.input_ids, batch.doc_start, batch.labels)
        content = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts if part is not None))
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([str(batch.cursor), content.hexdigest()]) + "\n")
        return original(self, batch)

    step.TrainStep._count_targets = recorded  # type: ignore[method-assign]


def _set_trap(where: str, number: int, folder: Path) -> None:
    """Kills this process in optimizer step `number`, when its gradients are there and the weights not yet
    changed, or ("save") in the write of the first checkpoint, when its files are there and its manifest not
    yet.

    A step's death waits until the first checkpoint is there: it is written in the background, and without it
    nothing could be resumed.
    """
    if where == "save":
        checkpoint.manifest = _die
        return
    original, done = step.update, itertools.count(1)
    last = int(os.environ.get("RANK", "0")) + 1 == int(os.environ.get("WORLD_SIZE", "1"))

    def trapped(optimizer: torch.optim.Optimizer, bad: torch.Tensor) -> None:
        if next(done) == number and last:
            deadline = time.monotonic() + DEADLINE
            while not (folder / "run" / "checkpoints" / LATEST).is_file() and time.monotonic() < deadline:
                time.sleep(0.01)
            _die()
        original(optimizer, bad)

    step.update = trapped


def _child(arguments: Sequence[str]) -> int:
    """A run with the trap of its first argument, WHERE:NUMBER or none:0, that writes its batches into the
    folder of the second.
    """
    trap, folder, *keys = arguments
    where, _, number = trap.partition(":")
    _record_batches(Path(folder))
    if where != "none":
        _set_trap(where, int(number), Path(folder))
    return run.main(keys)


# ---- around the runs ---------------------------------------------------------------------------------------


class Trial:
    """Starts runs of one configuration in one folder."""

    def __init__(self, keys: Sequence[str], folder: Path, ranks: int) -> None:
        self.folder, self.ranks = folder, ranks
        self.run = folder / "run"
        self._keys = [*keys, f"output_dir={self.run}"]
        folder.mkdir(parents=True)

    def start(self, trap: str = "none:0") -> subprocess.Popen[bytes]:
        """A process of its own group, whose output goes to log.txt."""
        torchrun = f"-m torch.distributed.run --standalone --nproc-per-node={self.ranks}".split()
        launcher = torchrun if self.ranks > 1 else []
        resume = ["resume=auto"] if (self.run / "config.yaml").is_file() else []
        child = ["-m", "train.verify_resume", "--child", trap, str(self.folder)]
        command = [sys.executable, *launcher, *child, *self._keys, *resume]
        # In the user's folder, so that paths are what they were; a folder there called train is not imported.
        found = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": found, "PYTHONSAFEPATH": "1"}
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def finish(self) -> None:
        """Runs to the end. Raises LoadError with the last lines of the log if it does not get there."""
        code = self.start().wait()
        if code != 0:
            raise LoadError(f"a run ended with exit code {code}: {self._tail()}")

    def die(self, trap: str) -> str:
        """Runs into a trap and returns the name of the newest checkpoint. Raises LoadError if it comes to its
        end, or leaves none.
        """
        code = self.start(trap).wait()
        if code == 0 or (self.ranks == 1 and code != -signal.SIGKILL):
            what = f"a run that was to be killed at {trap} ended with exit code {code}"
            raise LoadError(f"{what}: {self._tail()}")
        newest = newest_checkpoint(self.run, print)
        if newest is None:
            what = f"a run that was killed at {trap} had no checkpoint to resume from"
            raise LoadError(f"{what}: {self._tail()}")
        return newest.name

    def batches(self) -> int:
        """How many batches rank 0 has read in all its runs."""
        path = self.folder / "stream-0.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def _tail(self) -> str:
        log = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
        return " | ".join(log.strip().splitlines()[-3:])


def _kill_at_random(trial: Trial, kills: int, seed: int, steps: int, straight_seconds: float) -> list[float]:
    """Starts the run over and over and kills it after a random number of steps, up to twice those between
    checkpoints, and a moment more; after none, somewhere in its start. Returns the seconds from each start to
    its kill. Then lets it come to its end.
    """
    generator = random.Random(seed)
    delays: list[float] = []
    while len(delays) < kills:
        count = generator.randrange(2 * steps)
        moment = generator.random() * (0.1 if count else min(straight_seconds, 12.0))
        target = trial.batches() + count
        process, began = trial.start(), time.monotonic()
        while process.poll() is None and trial.batches() < target and time.monotonic() - began < DEADLINE:
            time.sleep(0.005)
        try:
            if process.wait(moment) == 0:
                break  # it got to its end first
            raise LoadError(f"a run ended by itself with exit code {process.returncode}: {trial._tail()}")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            delays.append(time.monotonic() - began)
            if sys.stdout.isatty() or len(delays) % 5 == 0:
                newest = [path.name for path in checkpoints(trial.run)] or ["none"]
                print(f"killed {len(delays)} of {kills} times, newest checkpoint {newest[-1]}", flush=True)
    trial.finish()
    return delays


# ---- comparison --------------------------------------------------------------------------------------------


def _same(one: Any, other: Any) -> bool:
    """Equality to the last bit, through dictionaries and lists."""
    if isinstance(one, torch.Tensor):
        same_type = isinstance(other, torch.Tensor) and one.dtype == other.dtype
        return same_type and torch.equal(one.view(-1), other.view(-1))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(_same(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


def _metrics(folder: Path, name: str) -> list[tuple[int, Any]]:
    """(step, value) in the order of the lines: one that is there twice shows."""
    return [(line["step"], line[name]) for line in read_metrics(folder) if name in line]


def _stream(path: Path) -> dict[str, set[str]]:
    """Position -> digests of the batches that were read there; several if a repeated step read something
    else.
    """
    found: dict[str, set[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        position, content = json.loads(line)
        found.setdefault(position, set()).add(content)
    return found


def _weights(end: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint: the model's, or those of the adapters that were trained."""
    adapters = end / ADAPTER_WEIGHTS
    return load_file(adapters if adapters.is_file() else end / "model.safetensors")


def compare(straight: Trial, killed: Trial) -> list[tuple[str, bool, str]]:
    """(what, whether it is equal, its size) for everything that a run leaves behind."""
    rows = []
    names = {name for line in read_metrics(straight.run) for name in line}
    for name in sorted(names - {"step", "resumed", *TIMED}):
        one, other = (_metrics(trial.run, name) for trial in (straight, killed))
        rows.append((name, one == other and len(one) > 0, f"{len(one)} values"))
    texts = [(trial.run / SAMPLES_FILE).read_bytes() for trial in (straight, killed)]
    rows.append((SAMPLES_FILE, texts[0] == texts[1], f"{len(texts[0]):,} bytes"))
    ends = [newest_checkpoint(trial.run, print) for trial in (straight, killed)]
    if ends[0] is None or ends[1] is None:
        raise LoadError("a run left no checkpoint")
    loaders: dict[str, Callable[[Path], Any]] = {
        "weights": _weights,
        "optimizer state": read_moments,
        "generators, counters": lambda end: torch.load(end / STATE, weights_only=True),
    }
    for name, load in loaders.items():
        one, other = load(ends[0]), load(ends[1])
        tensors = [value for value in one.values() if isinstance(value, torch.Tensor)]
        values = f"{len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors):,} values"
        rows.append((name, _same(one, other), values if tensors else f"{len(one)} entries"))
    records = [json.loads((end / RECORD).read_text(encoding="utf-8")) for end in ends if end is not None]
    for record in records:
        del record["files"]  # the metrics tell the time
        for key in ("output_dir", "resume"):
            record["config"].pop(key)
    rows.append(("record of the run", records[0] == records[1], f"step {records[0]['step']}"))
    for rank in range(straight.ranks):
        read, reread = (_stream(trial.folder / f"stream-{rank}.jsonl") for trial in (straight, killed))
        rows.append((f"batches of rank {rank}", read == reread and len(read) > 0, f"{len(read)} batches"))
    return rows


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m train.verify_resume",
        description="Proves, bit for bit, that a run killed and resumed equals one never interrupted.",
        epilog="Without a config: train/configs/tiny.yaml. Exit code 0 if all is equal, 1 if not.",
    )
    parser.add_argument(
        "keys", nargs="*", metavar="config.yaml | key=value", help="the run, as for train.run"
    )
    between = "steps between checkpoints, and before the first kill (default 4)"
    parser.add_argument("--steps", type=int, default=4, metavar="N", help=between)
    parser.add_argument("--more", type=int, default=6, metavar="M", help="steps after them (default 6)")
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="R", help="processes, started by torchrun (default 1)"
    )
    at_random = "instead of the three traps: kill K times at random moments"
    parser.add_argument("--kills", type=int, default=0, metavar="K", help=at_random)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default 0)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep both runs in this folder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_intermixed_args(argv)
    if min(options.steps, options.ranks) < 1 or options.more < 3 or options.kills < 0:
        raise UsageError(
            f"expected --steps and --ranks of at least 1 and --more of at least 3, got {options.steps}, "
            f"{options.ranks}, {options.more}"
        )
    if options.kills and options.ranks > 1:
        raise UsageError(f"--kills: expected one process, got --ranks {options.ranks}; leave one of them out")
    if options.keep and options.keep.exists():
        raise UsageError(f"--keep {options.keep}: expected a folder that does not exist yet")
    return options


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["--child"]:
        return _child(argv[1:])
    options = parse_arguments(argv)
    total = options.steps + options.more
    file = [] if any("=" not in key for key in options.keys) else [str(CONFIGS / "tiny.yaml")]
    given = [key for key in options.keys if not key.startswith("epochs=")]
    keys = [*file, *given, f"steps={total}", f"checkpoint_every={options.steps}", "log_every=1"]
    config, _ = parse(keys)  # wrong keys are refused before anything starts
    with tempfile.TemporaryDirectory(prefix="verify-resume-") as temporary:
        folder = options.keep or Path(temporary)
        straight, killed = (Trial(keys, folder / name, options.ranks) for name in ("straight", "killed"))
        size = f"{total} steps of {config.tokens_per_step:,} tokens, {config.dtype}"
        print(f"{size}, {options.ranks} process(es), backend {config.backend}", flush=True)
        began = time.monotonic()
        straight.finish()
        if options.kills:
            delays = _kill_at_random(
                killed, options.kills, options.seed, options.steps, time.monotonic() - began
            )
            if not delays:
                raise LoadError("--kills: the run came to its end before it was killed once; raise --more")
            when = f"{min(delays):.1f} to {max(delays):.1f} s after the start (seed {options.seed})"
            print(f"killed {len(delays)} times, {when}", flush=True)
            if len(delays) < options.kills:
                few = f"it came to its end before all {options.kills} kills"
                print(f"{few}; a larger --more leaves time for them", flush=True)
        else:
            for trap, where in (
                (f"step:{options.steps + 2}", f"killed in step {options.steps + 2}"),
                ("save:0", "resumed, killed while writing the next checkpoint"),
                (f"step:{options.more}", "resumed, killed in the last step"),
            ):
                print(f"{where}; newest checkpoint {killed.die(trap)}", flush=True)
            killed.finish()
            print("resumed, and came to the end", flush=True)
        rows = compare(straight, killed)
    width = max(len(name) for name, _, _ in rows)
    for name, equal, size in rows:
        print(f"  {name:{width}}  {'equal' if equal else 'DIFFERENT'}  ({size})")
    identical = all(equal for _, equal, _ in rows)
    print(f"verdict: {'bit-identical' if identical else 'NOT identical'}")
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
