"""Plants bugs in the kernels, one by one, and runs the tests that must notice; a program of its own.

    python tests/planted_faults.py NAME...      -> last line of stdout: {name: [[error, report] of each test]}

The bugs are in planted_faults.txt. This process imports and collects the tests once, but runs none. A fork of
it for each fault plants the fault in the imported functions and runs the tests. "control" replaces every file
by itself and runs one test of each test file.
"""

from __future__ import annotations

import gc
import json
import linecache
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONTROL = "control"


@dataclass(frozen=True)
class Fault:
    """In `file`, `old` (which occurs `count` times) becomes `new`. The first of `tests` must fail, the others
    must not.
    """

    name: str
    file: str
    tests: list[str]
    old: str
    new: str
    count: int


def read_faults() -> Iterator[Fault]:
    """The faults of planted_faults.txt: under the name of a file, for each fault

    NAME: TEST (COUNT times)
    unnoticed by TEST        any number of these
    -OLD
    +NEW                     without it, OLD is deleted

    COUNT is 1 by default. TEST belongs to tests/test_kernel_FILE; FILE::TEST names another file.
    """
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    for section in re.split(r"^== ", text, flags=re.MULTILINE)[1:]:
        file, *lines = section.splitlines()

        def test_id(test: str, file: str = file) -> str:
            return f"tests/test_kernel_{test if '::' in test else f'{Path(file).name}::{test}'}"

        for found in re.finditer(
            r"^(\w.*?): (.*?)(?: \((\d+) times\))?\n((?:unnoticed by .*\n)*)((?:-.*\n)+)((?:\+.*\n)*)",
            "\n".join(lines) + "\n",
            re.MULTILINE,
        ):
            name, test, count, others, *change = found.groups()
            tests = [test, *re.findall("unnoticed by (.*)", others)]
            old, new = ("\n".join(line[1:] for line in part.splitlines()) for part in change)
            yield Fault(name, file, [test_id(test) for test in tests], old, new, int(count or 1))


FAULTS = list(read_faults())


def codes(code: CodeType) -> dict[str, list[CodeType]]:
    """The code of every function in it, by qualified name."""
    found: dict[str, list[CodeType]] = {}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found.setdefault(inner.co_qualname, []).append(inner)
            for name, others in codes(inner).items():
                found.setdefault(name, []).extend(others)
    return found


def plant(file: str, change: Callable[[str], str], functions: list[FunctionType]) -> None:
    """Gives the functions of that file the code of its changed text. Triton's interpreter reads the text."""
    path = str(ROOT / file)
    text = Path(path).read_text(encoding="utf-8")
    changed = change(text)
    linecache.cache[path] = (len(changed), None, changed.splitlines(keepends=True), path)
    before, after = (codes(compile(each, path, "exec", dont_inherit=True)) for each in (text, changed))
    swap = {a: b for name in after for a, b in zip(before[name], after[name], strict=True)}
    for function in functions:
        if function.__code__ in swap:
            function.__code__ = swap[function.__code__]


def replaced(fault: Fault, text: str) -> str:
    found = text.count(fault.old)
    assert found == fault.count, f"{fault.old!r} stands in {fault.file} {found} times, expected {fault.count}"
    return text.replace(fault.old, fault.new)


def in_a_fork(function: Callable[[], Any]) -> Any:
    """The function's result, passed as JSON, or how the fork ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with os.fdopen(writer, "w") as result:
                json.dump(function(), result)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as result:
        text = result.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else [[f"exit code {os.waitstatus_to_exitcode(status)}", ""]]


class Planter:
    """A plugin of pytest that runs the tests of each fault in a fork, and no others."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.outcomes: dict[str, list[list[str]]] = {}
        self.error = ["", ""]

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        if call.excinfo:
            lines = traceback.format_exception(call.excinfo.value)
            self.error = [call.excinfo.typename, "".join(lines)[-4000:]]

    def pytest_runtestloop(self, session: Any) -> bool:
        from triton.runtime.interpreter import interpreter_semantic

        # A GPU does not check integers for overflow: the tests have to notice what comes of it.
        interpreter_semantic.binary_op_sanitize_overflow_impl = lambda *_: None
        faults = {fault.name: fault for fault in FAULTS}
        items = {item.nodeid: item for item in session.items}
        functions = [function for function in gc.get_objects() if type(function) is FunctionType]
        gc.freeze()  # else a fork's first collection copies all the memory

        def run(tests: list[str]) -> Iterator[list[str]]:
            for test in tests:
                self.error = ["", ""]
                item = items[test]
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                yield self.error

        def outcome(name: str) -> list[list[str]]:
            try:
                if name == CONTROL:
                    for file in {fault.file for fault in FAULTS}:
                        plant(file, str, functions)
                    return list(run(list({test.partition("::")[0]: test for test in items}.values())))
                fault = faults[name]
                plant(fault.file, lambda text: replaced(fault, text), functions)
                return list(run(fault.tests))
            except BaseException as error:
                return [[f"not planted: {error!r}", ""]]

        self.outcomes = {name: in_a_fork(lambda name=name: outcome(name)) for name in self.names}
        return True


def main(names: list[str]) -> int:
    import pytest
    import sympy  # noqa: F401  (torch asks for it at the first call, which is in a fork)
    import torch

    torch.set_num_threads(1)  # and no thread pool before a fork
    planter = Planter(names)
    tests = {test for fault in FAULTS if fault.name in names or CONTROL in names for test in fault.tests}
    options = ["--no-header", "--disable-warnings", "--tb=native", "-p", "no:cacheprovider"]
    options.append(f"--rootdir={ROOT}")
    code = pytest.main([*options, *sorted(tests)], plugins=[planter])
    print(json.dumps(planter.outcomes))
    return 0 if planter.outcomes else int(code) or 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
