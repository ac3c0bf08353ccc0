"""`python -m smollm2.cache list | clear`: what lies in the cache folder, and its removal."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase

from smollm2.cli import Parser, program, run_command
from smollm2.errors import UsageError
from smollm2.pretrained.cache import cache_folder
from smollm2.pretrained.cache_contents import KINDS, Entry, contents, copies, remove, total

DAY = 86400


def build_parser() -> Parser:
    """The command line of `python -m smollm2.cache`."""
    kinds = "; ".join(f"{kind}: {what}" for kind, what in KINDS.items())
    parser = Parser(
        prog="python -m smollm2.cache",
        description="Lists what lies in the cache folder ($SMOLLM2_CACHE, else ~/.cache/smollm2), or removes "
        f"some of it; all but the history is rebuilt when it is needed. Kinds: {kinds}.",
        epilog="example: python -m smollm2.cache clear --kind copy --older-than 30",
    )
    add = parser.add_argument
    add("action", nargs="?", choices=("list", "clear"), default="list", help="list (the default) or clear")
    add("names", nargs="*", metavar="NAME", help="clear these, as listed; * stands for anything")
    add("--kind", choices=KINDS, help="only what is of this kind")
    add("--older-than", type=float, metavar="DAYS", help="only what was not changed for so long")
    add("--all", action="store_true", help="clear everything")
    add("--yes", action="store_true", help="clear without a question")
    add("--json", action="store_true", help="list as JSON")
    parser.add("--debug")
    return parser


def main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(argv)
    clears = args.action == "clear"
    for flag in ("json",) if clears else ("all", "yes"):
        if getattr(args, flag):
            raise UsageError(f"--{flag}: does not belong to {args.action}")
    chosen = bool(args.names or args.kind or args.older_than is not None)
    if clears and chosen == args.all:
        raise UsageError("clear: expected names, --kind or --older-than, or --all alone")
    root = cache_folder()
    entries = contents(root)
    selected = _selected(entries, args)
    if args.json:
        print(json.dumps([_record(entry) for entry in selected], indent=2, ensure_ascii=False))
        return 0
    if not selected:
        print(f"{root}: nothing {'to clear' if clears or chosen else 'is there'}")
        return 0
    size = sum(entry.size for entry in selected)
    print(f"{root}: {_size(size)}\n" + "\n".join(_line(entry, entries) for entry in selected))
    if not clears:
        return 0
    _ask(args, f"remove these {len(selected)}? [y/N] ")
    left = [entry for entry in selected if not remove(root, entry)]
    removed = size - sum(entry.size for entry in left)
    print(f"removed {len(selected) - len(left)}, {_size(removed)}")
    for entry in left:
        print(f"{entry.name}: left, a running process writes it", file=sys.stderr)
    return 1 if left else 0


def _selected(entries: Sequence[Entry], args: argparse.Namespace) -> list[Entry]:
    """What all of the conditions hold for; the copies of a model are cleared with it. Raises UsageError for a
    name that nothing has.
    """
    for name in args.names:
        if not any(_is_named(entry, name) for entry in entries):
            hint = f"`{program('python -m smollm2.cache')} list` shows them"
            raise UsageError(f"NAME: nothing in the cache is called {name!r}; {hint}")
    oldest = None if args.older_than is None else time.time() - args.older_than * DAY
    found = {
        entry.name
        for entry in entries
        if (not args.names or any(_is_named(entry, name) for name in args.names))
        and (args.kind is None or entry.kind == args.kind)
        and (oldest is None or entry.changed < oldest)
    }
    return [
        entry
        for entry in entries
        if entry.name in found or (args.action == "clear" and entry.parent in found)
    ]


def _is_named(entry: Entry, pattern: str) -> bool:
    return fnmatchcase(entry.name, pattern)


def _line(entry: Entry, entries: Sequence[Entry]) -> str:
    """Size, age, kind and name of an entry, and what it was made from."""
    days = max(0.0, time.time() - entry.changed) / DAY
    age = f"{days:.0f} d" if days >= 1 else f"{days * 24:.0f} h"
    about = [entry.state] if entry.state else []
    if copies(entry, entries):
        about.append(f"{_size(total(entry, entries))} with its copies")
    if entry.source and entry.parent is None:
        gone = os.path.isabs(entry.source) and not os.path.exists(entry.source)
        about.append(f"from {entry.source}{', which is gone' if gone else ''}")
    name = f"{'  ' if entry.parent else ''}{entry.name}"
    behind = f" ({'; '.join(about)})" if about else ""
    return f"{_size(entry.size):>9} {age:>6}  {entry.kind:<11}{name}{behind}"


def _record(entry: Entry) -> dict[str, object]:
    return {**asdict(entry), "paths": [str(path) for path in entry.paths]}


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _ask(args: argparse.Namespace, question: str) -> None:
    """Returns if the answer is yes. Raises UsageError for any other, and where nobody can answer."""
    if args.yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("clear: asks before it removes anything; answer on a terminal, or add --yes")
    print(question, end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("clear: nothing was removed")


if __name__ == "__main__":
    sys.exit(run_command(main))
