"""Python's own documentation as a corpus, which is on every machine that runs this."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from train.data.source import Block, SingleSource

# The standard library without its tests, its applications and what an installation may lack.
_NOT_DOCUMENTATION = set(
    "site-packages dist-packages test tests idlelib lib2to3 turtledemo __pycache__".split()
)


class EmbeddedSource(SingleSource):
    """The documentation inside every CPython: the language reference's topics, and each function's and
    class's docstrings.

    One shard of one block. Modules are parsed, never imported: some open windows or start servers at import.
    """

    revision: str | None = None
    num_shards = 1
    sizes: Sequence[float] = (1.0,)

    def span(self, shard: int, block: int) -> tuple[float, float]:
        return 0.0, 1.0

    @property
    def cache_key(self) -> tuple[str, str]:
        return "embedded", self.fingerprint.split()[-1]

    def describe(self) -> dict[str, Any]:
        return {"identity": "embedded", "fingerprint": self.fingerprint, "num_shards": 1}

    def read(self, shard: int, first_block: int = 0) -> Generator[Block, None, None]:
        if first_block == 0:
            yield self.documents

    @cached_property
    def documents(self) -> list[str]:
        """All documents, in a fixed order, without the paragraphs that earlier ones have."""
        from pydoc_data.topics import topics

        documents = [topics[name].strip() for name in sorted(topics)]
        library = Path(sysconfig.get_path("stdlib"))
        for path in sorted(library.rglob("*.py")):
            parts = path.relative_to(library).parts
            if not _NOT_DOCUMENTATION.intersection(parts):
                module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
                documents.extend(_docstrings(path, module))
        return list(_without_repeats(dict.fromkeys(documents)))

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for document in self.documents:
            digest.update(document.encode(errors="replace") + b"\0")
        return f"embedded {len(self.documents)} documents {digest.hexdigest()}"


REPEAT = 80  # characters; shorter paragraphs ("Return a string.") repeat by nature


def _without_repeats(documents: Iterable[str]) -> Iterator[str]:
    """Drops paragraphs that an earlier document has, and documents of which little is left.

    Topics contain one another and classes copy docstrings: without this, held-out text would also be trained
    on.
    """
    seen: set[str] = set()
    for document in documents:
        paragraphs = [(paragraph, " ".join(paragraph.split())) for paragraph in document.split("\n\n")]
        kept = [paragraph for paragraph, words in paragraphs if len(words) < REPEAT or words not in seen]
        seen.update(words for _, words in paragraphs)
        text = "\n\n".join(kept)
        if len(kept) == len(paragraphs) or len(text) >= REPEAT:
            yield text


def _docstrings(path: Path, module: str) -> Iterator[str]:
    """Documents of one module as `help()` would show it: the module's text, then every documented function,
    and class with its methods.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return  # a template, or a file that is not UTF-8: it documents nothing
    if text := ast.get_docstring(tree):
        yield f"module {module}\n\n{text}"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
            yield f"{_signature(node, module + '.')}\n\n{text}"
        elif isinstance(node, ast.ClassDef):
            parts = [text] if (text := ast.get_docstring(node)) else []
            methods = [one for one in node.body if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef))]
            for method in methods:
                if text := ast.get_docstring(method):
                    parts.append(f"{_signature(method)}\n\n{text}")
            if parts:
                yield "\n\n".join([f"class {module}.{node.name}", *parts])


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, prefix: str = "") -> str:
    return f"def {prefix}{node.name}({ast.unparse(node.args)})"
