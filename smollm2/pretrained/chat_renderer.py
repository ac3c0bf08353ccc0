"""The program that renders chat templates: a line of JSON in, a line of JSON out.

smollm2/pretrained/chat_template.py runs it as a process of its own, because a template is a program by
whoever published the model. jinja2's sandbox keeps it from files and from Python's insides, but not from
looping for ever or from 'a' * 10**12. Here the operating system bounds both: SECONDS of processor time and
MEMORY bytes. (Windows has no such limits; jinja2's sandbox remains.) To start quickly this file imports
nothing of the project.

The language is that of transformers: jinja2 with loop controls, `raise_exception`, `strftime_now`, a `tojson`
that escapes no HTML, and `{% generation %}` blocks, which mark text and change none, unless the values
generation_begins and generation_ends say what to write around them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
from datetime import datetime
from typing import Any

SECONDS, MEMORY, CHARACTERS = 2, 512 << 20, 1 << 24


def limit(seconds: int) -> None:
    """Bounds the memory of this process, and what it computes from now on."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limits here, or lower ones already
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        spent = int(used.ru_utime + used.ru_stime) + 1
        for kind, bound in ((resource.RLIMIT_CPU, spent + seconds), (resource.RLIMIT_AS, MEMORY)):
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (bound if hard == resource.RLIM_INFINITY else min(bound, hard), hard))


@functools.lru_cache(maxsize=8)
def compiled(template: str, marks: str) -> Any:
    """A template of jinja2. marks: characters that `tojson` never escapes."""
    from jinja2 import ext, nodes
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begins, ends = (
                nodes.Output([nodes.Name(f"generation_{name}", "load")], lineno=line)
                for name in ("begins", "ends")
            )
            return [begins, nodes.Scope(body, lineno=line), ends]

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        text = json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        for mark in marks if ensure_ascii else "":
            text = text.replace(json.dumps(mark)[1:-1], mark)
        return text

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)


def render(template: str, marks: str, variants: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The text, or the error, of each variant of the values."""
    now, answers = datetime.now(), []
    for values in variants:
        try:
            text = compiled(template, marks).render(values, strftime_now=now.strftime)
            if len(text) > CHARACTERS:
                raise ValueError(f"expected at most {CHARACTERS:,} characters, got {len(text):,}")
            answers.append({"text": text})
        except MemoryError:
            answers.append({"error": f"needs more than {MEMORY >> 20} MB of memory"})
        except Exception as error:  # noqa: BLE001 - whatever the template makes Python trip over
            answers.append({"error": str(error) or type(error).__name__})
    return answers


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on the terminal is for the command that asks
    sys.path[:] = sys.argv[1:]
    for line in sys.stdin:
        limit(SECONDS)
        print(json.dumps(render(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
