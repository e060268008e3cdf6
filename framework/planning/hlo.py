"""HLO text as data: computations, their instructions, and the program arguments that each value depends on."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from meshway.framework.errors import UserError

_HEAD = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{\s*$")
_END = re.compile(r'^\}(, execution_thread="[^"]*")?\s*$')
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\]")
_OPCODE = re.compile(r"\s*([a-z][a-z0-9\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)|\b([a-zA-Z_][\w.\-]*)\s*(?=,|$)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_ALIAS = re.compile(r"\((\d+), \{[^}]*\}, (?:may|must)-alias\)")
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
      opcode: such as `all-reduce`.
      arrays: the arrays of the result, nested tuples flattened.
      operands: the names of the operands, or the text in the parentheses of a constant or parameter.
      attributes: the text after the operands.
      computation: the name of its computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    computation: str

    @property
    def op_name(self) -> str:
        """The metadata's `op_name`: the operation of the program that it comes from; "" if there is none."""
        found = _OP_NAME.search(self.attributes)
        return re.sub(r"\\(.)", r"\1", found.group(1)) if found else ""

    def attribute(self, name: str) -> str:
        """Returns the text after `name=` up to the next comma outside of brackets; "" if there is none."""
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
    """A program.

    Attributes:
      computations: by name.
      entry: the name of the one that runs.
      aliased: the numbers of its arguments whose memory its results take.
    """

    computations: Mapping[str, Computation]
    entry: str
    aliased: frozenset[int] = frozenset()


def parse(text: str) -> Module:
    """Reads HLO text, as `jax.stages.Compiled.as_text()` returns it.

    Raises:
      UserError: the text has no entry computation, so it is not HLO.
    """
    computations: dict[str, Computation] = {}
    entry, name, root = "", "", ""
    instructions: dict[str, Instruction] = {}
    for line in _whole_lines(text):
        if head := _HEAD.match(line):
            name, root, instructions = head.group(2), "", {}
            entry = name if head.group(1) else entry
        elif name and _END.match(line):
            computations[name] = Computation(name, instructions, root)
            name = ""
        elif name and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found.group(2), found.group(3), name)
            if instruction is not None:
                instructions[instruction.name] = instruction
                root = instruction.name if found.group(1) else root
    if not entry:
        raise UserError("the compiled program's text has no ENTRY computation: it is not HLO as XLA prints it")
    return Module(computations, entry, frozenset(int(number) for number in _ALIAS.findall(text.partition("\n\n")[0])))


def _whole_lines(text: str) -> Iterator[str]:
    """Yields lines, those of one instruction joined: what a kernel says of itself has lines of its own."""
    whole = ""
    for line in text.splitlines():
        begins = _INSTRUCTION.match(line)
        if whole and not (begins or _END.match(line) or _HEAD.match(line)):
            whole += line
            continue
        if whole:
            yield whole
        whole = line if begins else ""
        if not begins:
            yield line


def entry_parameters(module: Module) -> list[Instruction]:
    """Returns the arguments of a program, in order."""
    return _parameters(module.computations[module.entry])


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
    """Returns the index of the parenthesis that closes the one at `start`; the text's length if there is none."""
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


Sources = frozenset[str]
Value = Sources | tuple["Value", ...]  # a tuple if the HLO value is a tuple
_NOTHING: Sources = frozenset()


def sources_of_operands(module: Module) -> dict[tuple[str, str], Sources]:
    """Returns (computation, instruction) -> the entry arguments that its operands depend on.

    An argument is named by the part of its label before the first bracket: `state.params` for
    `state.params['decoder']['scale']`. A value that depends on `state.params` alone is a weight, moved or cast; one
    that depends only on constants has no sources. Fusions and kernels count as one operation.
    """
    tracer = _SourceTracer(module)
    entry = module.computations[module.entry]
    tracer.run(entry, [frozenset({_label(each)}) for each in entry_parameters(module)])
    return tracer.found


class _SourceTracer:
    def __init__(self, module: Module):
        self._module = module
        self.found: dict[tuple[str, str], Sources] = {}

    def run(self, computation: Computation, arguments: Sequence[Value]) -> Value:
        values: dict[str, Value] = {}
        for instruction in computation:
            operands = [values.get(name, _NOTHING) for name in instruction.operands]
            key = (computation.name, instruction.name)
            self.found[key] = self.found.get(key, _NOTHING).union(*map(_flat, operands))
            values[instruction.name] = self._value(instruction, operands, arguments)
        return values.get(computation.root, _NOTHING)

    def _value(self, instruction: Instruction, operands: list[Value], arguments: Sequence[Value]) -> Value:
        opcode, called = instruction.opcode, instruction.called()
        if opcode == "parameter":
            index = int(instruction.operands[0])
            return arguments[index] if index < len(arguments) else _NOTHING
        if opcode == "tuple":
            return tuple(operands)
        if opcode == "get-tuple-element":
            index = int(instruction.attribute("index") or 0)
            whole = operands[0]
            return whole[index] if isinstance(whole, tuple) and index < len(whole) else _flat(whole)
        if opcode in ("copy", "copy-start", "copy-done", "opt-barrier"):
            return operands[0]
        if opcode == "while":
            return self._loop(called["body"][0], operands[0])
        if opcode == "call":
            return self.run(self._module.computations[called["to_apply"][0]], operands)
        if opcode == "conditional":
            branches = [name for names in called.values() for name in names]
            results = [
                self.run(self._module.computations[name], [operand])
                for name, operand in zip(branches, operands[1:], strict=False)
            ]
            joined = results[0] if results else _NOTHING
            for result in results[1:]:
                joined = _join(joined, result)
            return joined
        return _NOTHING.union(*map(_flat, operands))

    def _loop(self, body: str, start: Value) -> Value:
        state = start
        while True:  # sets only grow, and there are few labels
            after = _join(state, self.run(self._module.computations[body], [state]))
            if after == state:
                return state
            state = after


def _parameters(computation: Computation) -> list[Instruction]:
    found = [each for each in computation if each.opcode == "parameter"]
    return sorted(found, key=lambda each: int(each.operands[0]))


def _label(parameter: Instruction) -> str:
    return (parameter.op_name or parameter.name).partition("[")[0]


def _flat(value: Value) -> Sources:
    if isinstance(value, tuple):
        return _NOTHING.union(*map(_flat, value))
    return value


def _join(a: Value, b: Value) -> Value:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return tuple(_join(x, y) for x, y in zip(a, b, strict=True))
    return _flat(a) | _flat(b)
