"""`python -m bench.gpu --out DIR [--minutes 9]`: everything a GPU has to show, in order of value, under a
time budget.

    training.json     one step beside its peers; a short real training run; what each optimisation of a step
                      is worth
    kernels.json      every operation beside its alternatives, launches and bytes; candidates for the launch
                      table; the roofline
    tests.json        the kernels' tests; every operation under compute-sanitizer
    numerics.json     worst error over budget of each operation and dtype, for `python -m kernels.certify
                      --numerics`
    generation.json   prefill and decode, beside transformers
    summary.txt       44 lines, printed last
    logs.tgz          what the parts printed

Each part is a process of its own with a limit of its own, a share of the time that is left, and saves what it
has as it goes: a crash, a hang or a cut-off loses nothing that was finished. The text of the training run is
tokenised beside the parts that come before it, at the lowest priority and on a quarter of the processors.
`--tokenizer` spares the run the time to learn a tokenizer.

Needs torch, triton, numpy, safetensors and tokenizers; the tests need pytest, the training run omegaconf, the
peers what `pip install -e '.[peers]'` brings. What is missing is named. `--device cpu --tiny` exercises every
part in Triton's interpreter, in a minute or two, and tests/test_gpu_rehearsal.py takes the parts and a
captured training run through the branches that only a GPU has.

Neither can see any number; clocks and power; how much memory is held at a time; whether a capture meets a
call that waits; what the profiler and compute-sanitizer report; what Inductor makes for a GPU, and in how
long a time; which of torch's kernels for attention take these shapes and dtypes.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import text, train_run
from bench.record import ROOT, add_device, command_line, python, read_json, resolve_device, write_json
from bench.summary import summarise
from smollm2.cli import run_command
from smollm2.errors import UsageError
from smollm2.pretrained.load import load_tokenizer

GRACE = 15.0  # seconds for a part to save when it is stopped
ENDING = 5.0  # seconds for the summary and the logs
PATIENCE = 0.25  # of its time the training run waits for its tokens, before it makes them itself


@dataclass(frozen=True)
class Stage:
    """One part: the section it writes, its module, its file, and its share of the time left when it and all
    later ones still wait.
    """

    section: str
    module: str
    file: str
    share: float


# In order of value. An H100 with 16 processors took 40 s for the steps without compiled variants, 100 for two
# thirds of the kernels, 50 for the tests, 75 for two thirds of generation, 22 for the candidates and 18 for
# compute-sanitizer.
STAGES = (
    Stage("step", "train_step", "training.json", 100),
    Stage("kernels", "kernels", "kernels.json", 110),
    Stage("tests", "correctness", "tests.json", 70),
    Stage("generation", "generation", "generation.json", 90),
    Stage("run", "train_run", "training.json", 60),
    Stage("ladder", "ladder", "training.json", 50),
    Stage("tuning", "tuning", "kernels.json", 25),
    Stage("memcheck", "memcheck", "tests.json", 25),
    Stage("roofline", "roofline", "kernels.json", 40),
)
RESULTS = sorted({stage.file for stage in STAGES} | {"numerics.json", "summary.txt", "logs.tgz"})
# At toy size a few operations stand for all: the interpreter takes a second or two for each.
TINY_OPERATIONS = "--op=swiglu --op=linear_cross_entropy --op=decode_attention".split()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_line("gpu", "Measures everything in one command.")
    add = parser.add_argument
    out = "folder for the results; it must not hold any yet"
    add("--out", type=Path, required=True, metavar="DIR", help=out)
    add("--minutes", type=float, default=9.0, help="time budget")
    add_device(parser)
    add("--tiny", action="store_true", help="toy sizes: exercises the code, measures nothing")
    learned = (
        "of the training run: tokenizer.json, its folder, or what train.run takes (default: the run learns "
        "one in its own time)"
    )
    add("--tokenizer", default="train", metavar="PATH", help=learned)
    sections = [stage.section for stage in STAGES]
    add("--only", action="append", choices=sections, help="only this part; may be repeated")
    return parser.parse_args(argv)


def run_stage(
    stage: Stage, options: argparse.Namespace, folder: Path, log: Path, limit: float, more: Sequence[str] = ()
) -> str:
    """Runs a part for at most `limit` seconds; returns how it ended: "complete", or why not. Nothing of it is
    left running.

    more: arguments that only this part has.
    """
    # the part stops itself then, if it can
    soft = max(1.0, limit - GRACE) if limit > 2 * GRACE else limit / 2
    flags = ("--device", options.device, "--seconds", f"{soft:.0f}", "--json", folder / stage.file)
    command = python(f"{__package__}.{stage.module}", *flags, *(["--tiny"] if options.tiny else []), *more)
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}, stdin=subprocess.DEVNULL,
            stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        _stop(process)
        return f"stopped after {limit:.0f} s"
    except KeyboardInterrupt:
        _stop(process)
        raise
    _kill_group(process)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "complete" if code == 0 else f"failed with exit code {code}: {' '.join(lines[-1:])[:200]}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks the part to end as Ctrl-C does, waits a little, then kills it and all that it started."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    _kill_group(process)
    process.wait()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the part leads a group of its own


@contextmanager
def preparation(
    options: argparse.Namespace, stages: Sequence[Stage], log: Path, scratch: Path
) -> Iterator[subprocess.Popen[bytes] | None]:
    """Tokenises the text of the training run meanwhile, where another part comes before it; nothing of that
    is left running.

    It is in the process group of this program, so that whatever ends the group ends it too. Its workers leave
    when it is gone.
    """
    run = next((stage for stage in stages[1:] if stage.section == "run"), None)
    if run is None or train_run.missing():
        yield None
        return
    processors = max(1, (os.cpu_count() or 1) // 4)
    seconds = 60 * options.minutes * run.share / sum(stage.share for stage in stages)
    workers = max(1, processors - 1)  # the last one packs what they tokenise
    command = text.preparation(
        options.tiny, options.tokenizer, scratch / "tokens", workers=workers, seconds=seconds
    )
    # rayon's threads learn a tokenizer
    threads = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": str(processors)}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **threads}, stdin=subprocess.DEVNULL, stdout=stream,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        # before it starts threads and workers, which inherit it
        os.setpriority(os.PRIO_PROCESS, process.pid, 19)
        yield process
    finally:
        process.kill()
        process.wait()


def await_preparation(process: subprocess.Popen[bytes], limit: float) -> str:
    """Waits for the tokens at most `limit` seconds; returns how that ended. What is not done by then is left
    to the run, undisturbed.
    """
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "stopped; the run makes the tokens that are missing"
    return "complete" if code == 0 else f"failed with exit code {code}; the run makes its tokens itself"


def record_end(stage: Stage, folder: Path, status: str) -> None:
    """Writes how a part ended into its section, which a part that died or did not begin could not do
    itself.
    """
    content = read_json(folder / stage.file)
    section = content.get(stage.section, {})
    if section.get("status") != "complete" or status != "complete":
        head = read_json(folder / STAGES[0].file)
        known = {key: head[key] for key in ("device", "versions", "commit", "sources", "date") if key in head}
        write_json(folder / stage.file, {**known, **content, stage.section: {**section, "status": status}})


def pack(logs: Path, target: Path) -> None:
    """All logs in one archive, replaced in one move."""
    temporary = target.with_name(f".{target.name}.tmp")
    with tarfile.open(temporary, "w:gz") as archive:
        for path in sorted(logs.iterdir()):
            archive.add(path, path.name)
    os.replace(temporary, target)


def trouble(folder: Path, ends: dict[str, str]) -> bool:
    """Whether anything is wrong, other than that time was short."""
    results = read_json(folder / "tests.json")
    files: dict[str, Any] = results.get("tests", {}).get("files", {})
    found = results.get("memcheck", {}).get("results", {})
    return (
        any(end.startswith("failed") for end in ends.values())
        or any(outcome["failures"] or outcome["end"].startswith("exit code") for outcome in files.values())
        or any(result["result"] == "errors" for result in found.values())
    )


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    began = time.monotonic()
    resolve_device(options.device, options.tiny)
    options.tokenizer = text.tokenizer_source(options.tokenizer)
    if options.tokenizer != "train":
        load_tokenizer(options.tokenizer)  # better now than when the run begins
    folder: Path = options.out.expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    present = [name for name in RESULTS if (folder / name).exists()]
    if present:
        found = f"found {', '.join(present)}; name another"
        raise UsageError(f"--out {options.out}: expected a folder without results, {found}")
    # both end a run in the same way: what is finished stays
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stages = [stage for stage in STAGES if not options.only or stage.section in options.only]
    ends: dict[str, str] = {}
    interrupted = False
    with tempfile.TemporaryDirectory(prefix="bench-gpu-", ignore_cleanup_errors=True) as temporary:
        logs, scratch = Path(temporary, "logs"), Path(temporary, "scratch")
        logs.mkdir()
        more = {
            "tests": ["--numerics", str(folder / "numerics.json")],
            "run": ["--tokenizer", options.tokenizer, "--scratch", str(scratch)],
            "kernels": TINY_OPERATIONS if options.tiny else [],
        }
        with preparation(options, stages, logs / "prepare.log", scratch) as preparing:
            for index, stage in enumerate(stages):
                left = 60 * options.minutes - ENDING - (time.monotonic() - began)
                limit = left * stage.share / sum(later.share for later in stages[index:])
                since = time.monotonic()
                end = "no time was left"
                try:
                    if stage.section == "run" and preparing is not None and limit > 1:
                        print(f"preparation: {await_preparation(preparing, PATIENCE * limit)}", flush=True)
                        limit -= time.monotonic() - since
                    if limit > 1:
                        log, own = logs / f"{stage.section}.log", more.get(stage.section, ())
                        end = run_stage(stage, options, folder, log, limit, own)
                except KeyboardInterrupt:
                    end, interrupted = "interrupted", True
                ends[stage.section] = end
                record_end(stage, folder, end)
                pack(logs, folder / "logs.tgz")
                print(f"{stage.section}: {end} ({time.monotonic() - since:.0f} s)", flush=True)
                if interrupted:
                    break
    summary = summarise(folder)
    (folder / "summary.txt").write_text(summary + "\n", encoding="utf-8")
    print(f"\n{summary}")
    if interrupted:
        return 130
    return 1 if trouble(folder, ends) else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
