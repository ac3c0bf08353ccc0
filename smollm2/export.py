"""`python -m smollm2.export --model M`: a model from whatever source, as a GGUF file, as a folder that
transformers loads, or as a repository of the Hugging Face hub.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smollm2.cli import Parser, run_command
from smollm2.errors import UsageError
from smollm2.model import SmolLM2ForCausalLM
from smollm2.pretrained.card import (
    CARD,
    PICTURE,
    Training,
    base_model,
    default_license,
    model_card,
    training_of,
)
from smollm2.pretrained.files import Writer, model_files, read_json, write_files
from smollm2.pretrained.gguf_writer import TYPES, save_gguf
from smollm2.pretrained.hub import check_upload, push_folder
from smollm2.pretrained.load import load_model, load_tokenizer, parse_dtype, short_dtype, stored_tensors
from smollm2.pretrained.source import model_folder, resolve
from smollm2.pretrained.tokenizer import Tokenizer


def build_parser() -> Parser:
    """The command line of `python -m smollm2.export`."""
    parser = Parser(
        prog="python -m smollm2.export",
        description="Writes a model as a GGUF file, or as a folder in Hugging Face's layout, or uploads that "
        "folder to the hub. Files are written whole or not at all.",
        epilog="example: python -m smollm2.export --model runs/notes --gguf notes.gguf --type q8_0",
    )
    add = parser.add_argument
    parser.add("--model")
    add("--gguf", type=Path, metavar="FILE", help="write a GGUF file with tokenizer and chat template")
    add("--type", choices=TYPES, help="type of the matrices in the GGUF file (f16)")
    add("--folder", type=Path, metavar="DIR", help="write weights, tokenizer and a model card into a folder")
    words = "upload that folder to this repository (user/name), which is created if needed"
    add("--push-to-hub", metavar="REPOSITORY", help=words)
    add("--private", action="store_true", help="only you see the repository")
    words = "dtype of the weights in the folder; auto keeps that of the source"
    add("--dtype", choices=("auto", "fp32", "bf16", "fp16"), help=words)
    add("--name", help="what the model is called in the file or card; by default as FILE, DIR or REPOSITORY")
    add(
        "--license", metavar="ID", help="for the file and the card; that of SmolLM2 for what descends from it"
    )
    add("--language", action="append", default=[], metavar="CODE", help="for the card; may be repeated")
    words = "results of smollm2 evaluate or lm_eval in JSON, for the card"
    add("--scores", type=Path, metavar="FILE", help=words)
    add("--force", action="store_true", help="replace files that are there")
    parser.add("--debug")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError for what needs no model to be seen wrong."""
    into_folder = args.folder is not None or args.push_to_hub is not None
    if (args.gguf is not None) == into_folder:
        raise UsageError("expected either --gguf FILE, or --folder DIR or --push-to-hub user/name or both")
    belongs = {
        "--folder and --push-to-hub": [
            name for name in ("dtype", "scores", "language") if getattr(args, name)
        ],
        "--gguf": ["type"] if args.type else [],
        "--push-to-hub": ["private"] if args.private else [],
    }
    absent = [*(() if into_folder else ("--folder and --push-to-hub",)), *(() if args.gguf else ("--gguf",))]
    absent += [] if args.push_to_hub else ["--push-to-hub"]
    for place in absent:
        if belongs[place]:
            raise UsageError(f"--{belongs[place][0]}: belongs to {place}, which is not given")
    if args.gguf is not None:
        if args.gguf.suffix.lower() != ".gguf":
            raise UsageError(f"--gguf: expected a name that ends in .gguf, got {args.gguf}")
        if args.gguf.is_dir() or (args.gguf.exists() and not args.force):
            raise UsageError(f"--gguf: {args.gguf} exists; name another file, or replace it with --force")
    if args.push_to_hub is not None:
        check_upload(args.push_to_hub)


def main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(argv)
    _check(args)
    source = model_folder(args.model)
    training = training_of(Path(source).expanduser())
    base = base_model(args.model, training)
    args.license = args.license or default_license(base)
    model = load_model(source, "torch")
    model.to(parse_dtype(args.dtype) or model.dtype)  # the loader would keep a copy in the cache
    tokenizer = load_tokenizer(source)
    if args.gguf is not None:
        about = {"name": args.name or args.gguf.stem, "license": args.license}
        kind = args.type or "f16"
        given = {key: value for key, value in about.items() if value}
        save_gguf(model, args.gguf, kind, tokenizer, given)
        print(f"{args.gguf}: {_megabytes(args.gguf)}, {kind}")
        return 0
    name = args.name or args.push_to_hub or args.folder.resolve().name
    files = _folder_files(args, model, tokenizer, source, name, base, training)
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _check_folder(folder, files, args.force)
        write_files(folder, files)
        if args.folder is not None:
            dtype = short_dtype(str(model.dtype))
            print(f"{folder}: {_megabytes(*(folder / file for file in files))}, {dtype}; its card: {CARD}")
        if args.push_to_hub is not None:
            print(push_folder(folder, args.push_to_hub, private=args.private, files=list(files)))
    return 0


def _folder_files(
    args: argparse.Namespace,
    model: SmolLM2ForCausalLM,
    tokenizer: Tokenizer,
    source: str | Path,
    name: str,
    base: str | None,
    training: Training | None,
) -> dict[str, Writer]:
    """The files of the folder that is written or uploaded."""
    scores = read_json(args.scores).get("results") if args.scores else None
    if args.scores and not isinstance(scores, dict):
        raise UsageError(
            f"--scores: expected results of lm_eval, {{'results': {{task: ...}}}}, in {args.scores}"
        )
    card = model_card(
        name, model.config, short_dtype(str(model.dtype)), base=base, license=args.license,
        languages=args.language, training=training, scores=scores, chat=tokenizer.chat_template is not None,
    )  # fmt: skip
    own = resolve(source) / "generation_config.json"  # may hold what the model does not know: temperature
    generation = read_json(own) if own.is_file() else {}
    files = model_files(model.config, stored_tensors(model), generation) | tokenizer.files()
    files[CARD] = lambda path: path.write_text(card, encoding="utf-8")
    if training is not None and training.picture is not None:
        picture = training.picture
        files[PICTURE] = lambda path: shutil.copyfile(picture, path)
    elif training is not None:
        print(f"no {PICTURE} in the run: python -m train.plot RUN draws it", file=sys.stderr)
    return files


def _check_folder(folder: Path, files: dict[str, Any], force: bool) -> None:
    """Raises UsageError for a folder with files that would be replaced, unless they may be, and for one with
    others: a template or weights of another model would be read with the new ones.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--folder: {folder} is a file; name a folder")
    there = (
        {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        if folder.exists()
        else set()
    )
    if others := sorted(there - files.keys()):
        raise UsageError(f"--folder: {folder} holds other files, such as {others[0]}; name a new folder")
    if there and not force:
        raise UsageError(f"--folder: {folder} is not empty; name another, or replace its files with --force")


def _megabytes(*paths: Path) -> str:
    return f"{sum(path.stat().st_size for path in paths) / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(run_command(main))
