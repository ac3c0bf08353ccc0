"""How often the loops of a Triton kernel run, and which of its tensors it reads and writes: found by calling
its Python with tensors that hold nothing.

Of everything that a kernel computes only whole numbers are followed: its sizes, its place in the grid, and
what it loads from tensors of whole numbers, which is taken to be `length`. All else is unknown, and so is
what follows from it. A condition that is unknown counts as true.
"""

from __future__ import annotations

import ast
import inspect
import operator
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from types import FunctionType
from typing import Any, TypeAlias

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITCallable, mangle_type

Jitted: TypeAlias = JITCallable | InterpretedFunction  # the latter where TRITON_INTERPRET is set

Line = tuple[str, int]  # of a file, as compilers name it
Source = tuple[Line, Line]  # the first and the last line of a loop
# A loop and the one that it runs in (None: none) -> its iterations for each of that one's.
Trips = dict[tuple[Source, Source | None], float]


@dataclass(frozen=True)
class Run:
    """What a launch does."""

    trips: Trips  # of the first program
    read: set[str]  # arguments, by the first and the last programs of the grid
    written: set[str]


class Value:
    """A whole number, or None where it is not known; a pointer, if it leads to an argument."""

    def __init__(self, number: int | None = None, argument: str | None = None, dtype: Any = None) -> None:
        """dtype: of a pointer."""
        self.number, self.argument = number, argument
        if dtype is not None:
            self.dtype = dtype

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return UNKNOWN

    def __call__(self, *_: Any, **__: Any) -> Value:
        return UNKNOWN

    def __getitem__(self, _: Any) -> Value:
        return self

    def __iter__(self) -> Iterator[Value]:
        return iter((UNKNOWN, UNKNOWN))  # tl.split

    def __bool__(self) -> bool:
        return self.number is None or bool(self.number)

    def to(self, *_: Any, **__: Any) -> Value:
        return self


UNKNOWN = Value()
BINARY = ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift", "truediv",
    "lt", "le", "gt", "ge", "eq", "ne")  # fmt: skip


def _number(value: Any) -> int | None:
    value = getattr(value, "value", value) if isinstance(value, tl.constexpr) else value
    return value.number if isinstance(value, Value) else value if isinstance(value, int) else None


def _known(function: Callable[..., Any]) -> Callable[..., Value]:
    """The function for values: unknown unless every argument is known."""

    def call(*values: Any, **_: Any) -> Value:
        numbers = [_number(value) for value in values]
        pointer = next((value for value in values if isinstance(value, Value) and value.argument), UNKNOWN)
        known = None if None in numbers else int(function(*numbers))
        return Value(known, pointer.argument, pointer.dtype)

    return call


for _name in BINARY:
    _function = getattr(operator, f"{_name}_" if _name in ("and", "or") else _name)
    setattr(Value, f"__{_name}__", _known(_function))
    setattr(Value, f"__r{_name}__", _known(lambda x, y, function=_function: function(y, x)))
setattr(Value, "__neg__", _known(operator.neg))  # noqa: B010 -- as the others


def _range(*bounds: Any) -> range:
    """Once, if a bound is unknown."""
    numbers = [number for bound in bounds if (number := _number(bound)) is not None]
    return range(*numbers) if len(numbers) == len(bounds) else range(1)


class _Language:
    """What stands for triton.language in a kernel that is called."""

    def __init__(self, grid: Sequence[int], length: int, whole: Container[str]) -> None:
        """whole: the arguments that are tensors of whole numbers."""
        self.place: Sequence[int] = (0, 0, 0)
        self.steps = Counter[tuple[Source, Source | None]]()
        self.running: list[Source] = []
        self.read, self.written = set[str](), set[str]()
        self.modules: dict[int, dict[str, Any]] = {}  # the globals of each, with this language
        self.num_programs = lambda axis: Value(grid[axis])
        self.program_id = lambda axis: Value(self.place[axis])
        self.cast = self.max_contiguous = lambda value, *_, **__: value
        self.cdiv, self.minimum, self.maximum = _known(lambda x, y: -(-x // y)), _known(min), _known(max)
        self.static_range = _range
        self._length, self._whole = length, whole

    def __getattr__(self, name: str) -> Any:
        return UNKNOWN

    def load(self, pointer: Value, *_: Any, **__: Any) -> Value:
        if pointer.argument:
            self.read.add(pointer.argument)
        return Value(self._length if pointer.argument in self._whole else None)

    def store(self, pointer: Value, *_: Any, **__: Any) -> None:
        if pointer.argument:
            self.written.add(pointer.argument)

    def range(self, *bounds: Any, loop_unroll_factor: int = 1, **_: Any) -> Iterator[Value]:
        """Counts the loop that it is called for; what an unrolled one leaves over runs behind it."""
        frame = sys._getframe(1)
        file, line = frame.f_code.co_filename, frame.f_lineno
        node = next(one for one in _loops(file) if one.lineno <= line <= one.body[0].lineno)
        source = (file, node.lineno), (file, node.end_lineno or line)
        steps = _range(*bounds)
        return self._steps(source, steps[::loop_unroll_factor], len(steps) // loop_unroll_factor)

    def _steps(self, source: Source, steps: Sequence[int], many: int) -> Iterator[Value]:
        self.steps[source, self.running[-1] if self.running else None] += many
        self.running.append(source)
        yield from (Value(step) for step in steps)
        self.running.pop()

    def trips(self) -> Trips:
        """After one program."""
        every = Counter[Source]()
        for (source, _), steps in self.steps.items():
            every[source] += steps
        return {key: steps / (every[key[1]] if key[1] else 1) for key, steps in self.steps.items()}


@cache
def _loops(file: str) -> list[ast.For]:
    """Those of a file, innermost last begun first."""
    nodes = ast.walk(ast.parse(Path(file).read_text(encoding="utf-8")))
    return sorted((node for node in nodes if isinstance(node, ast.For)), key=lambda node: -node.lineno)


def _callable(function: Jitted, language: _Language) -> FunctionType:
    """The kernel as Python, in a world where the language is another."""
    module = function.fn.__globals__
    if (names := language.modules.get(id(module))) is None:
        names = language.modules[id(module)] = {}
        for name, value in module.items():
            if value is tl:
                names[name] = language
            elif isinstance(value, JITCallable | InterpretedFunction):
                names[name] = _callable(value, language)
            elif isinstance(value, tl.constexpr):
                names[name] = value.value
            else:
                of_triton = str(getattr(value, "__module__", "")).startswith("triton.")
                names[name] = UNKNOWN if of_triton else value
        names["range"] = language.range
    return FunctionType(function.fn.__code__, names, argdefs=function.fn.__defaults__)


def run(kernel: Jitted, arguments: Mapping[str, Any], grid: Sequence[int], length: int) -> Run:
    """arguments: of the launch, by name; length: what a tensor of whole numbers holds."""
    values, whole = {}, set[str]()
    for name in inspect.signature(kernel.fn).parameters.keys() & arguments.keys():
        value = arguments[name]
        if isinstance(value, Tensor):
            values[name] = Value(argument=name, dtype=tl.str_to_ty(mangle_type(value), None))
            if not (value.is_floating_point() or value.dtype == torch.bool):
                whole.add(name)
        else:
            values[name] = Value(value) if type(value) is int else value
    grid = (*grid, 1, 1)[:3]
    language = _Language(grid, length, whole)
    trips: Trips = {}
    function = _callable(kernel, language)
    for language.place in product(*(sorted({0, many - 1}) for many in grid)):
        function(**values)
        trips = trips or language.trips()
    return Run(trips, language.read, language.written)
