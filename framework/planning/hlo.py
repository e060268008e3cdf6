"""HLO text as data: computations, their instructions, shapes, operands, and where values come from."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

from meshway.framework.errors import UserError

_HEAD = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\]")
_OPCODE = re.compile(r"\s*([a-z][a-z0-9\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)|\b([a-zA-Z_][\w.\-]*)\s*(?=,|$)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation|called_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result, as a single device holds it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes, rounded up where elements are smaller than a byte."""
        return math.ceil(self.size * _bits(self.dtype) / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without the leading %.
      opcode: as `all-reduce`.
      arrays: the arrays of the result, those of nested tuples one after the other.
      operands: the names of the operands, or what stands in the parentheses of a constant or parameter.
      attributes: the text after the operands.
      computation: the name of the computation it stands in.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    computation: str

    @property
    def op_name(self) -> str:
        """The metadata's `op_name`: which operation of the program it comes from; "" where there is none."""
        found = _OP_NAME.search(self.attributes)
        return re.sub(r"\\(.)", r"\1", found.group(1)) if found else ""

    def attribute(self, name: str) -> str:
        """Returns the text after `name=` up to the next blank outside of brackets; "" where there is none."""
        found = re.search(rf"(?:^|[\s,]){re.escape(name)}=", self.attributes)
        if not found:
            return ""
        depth, start = 0, found.end()
        for index in range(start, len(self.attributes)):
            letter = self.attributes[index]
            depth += (letter in "{[(") - (letter in "}])")
            if depth < 0 or (depth == 0 and letter == ","):
                return self.attributes[start:index].strip()
        return self.attributes[start:].strip()

    def called(self) -> dict[str, tuple[str, ...]]:
        """Returns attribute -> the computations it names."""
        calls: dict[str, tuple[str, ...]] = {}
        for attribute, names in _CALLED.findall(self.attributes):
            listed = [name.strip().removeprefix("%") for name in names.strip("{}").split(",")]
            calls[attribute] = tuple(name for name in listed if name)
        return calls


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in order, by name; `root` is the name of the one that is returned."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: computations by name, and the name of the one that runs."""

    computations: Mapping[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Reads HLO text, as `jax.stages.Compiled.as_text()` returns it.

    Raises:
      UserError: there is no entry computation in it: it is no HLO text.
    """
    computations: dict[str, Computation] = {}
    entry, name, root = "", "", ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name, root, instructions = head.group(2), "", {}
            entry = name if head.group(1) else entry
        elif line.startswith("}") and name:
            computations[name] = Computation(name, instructions, root)
            name = ""
        elif name and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found.group(2), found.group(3), name)
            if instruction is not None:
                instructions[instruction.name] = instruction
                root = instruction.name if found.group(1) else root
    if not entry:
        raise UserError("the compiled program's text has no ENTRY computation: it is no HLO, as XLA prints it")
    return Module(computations, entry)


def _instruction(name: str, rest: str, computation: str) -> Instruction | None:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest, end)
    if end <= 0 or not opcode:
        return None
    close = _closing(rest, opcode.end() - 1)
    inside, attributes = rest[opcode.end() : close], rest[close + 1 :].lstrip(", ")
    arrays = tuple(
        Array(dtype, tuple(int(size.removeprefix("<=")) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(rest[:end])
    )
    if opcode.group(1) in ("constant", "parameter"):
        operands: tuple[str, ...] = (inside,)
    else:
        operands = tuple(typed or plain for typed, plain in _NAME.findall(inside))
    return Instruction(name, opcode.group(1), arrays, operands, attributes, computation)


def _closing(text: str, start: int) -> int:
    """Returns where the parenthesis that opens at `start` closes; the end of the text if it does not."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def _bits(dtype: str) -> int:
    """f32 -> 32, bf16 -> 16, f8e4m3fn -> 8, c64 -> 64, pred -> 8; tokens and opaque values have none."""
    if dtype == "pred":
        return 8
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) if digits else 0
