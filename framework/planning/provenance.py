"""Which arguments of a program a value was computed from, followed through loops and calls of its HLO."""

from collections.abc import Sequence

from meshway.framework.planning.hlo import Computation, Instruction, Module

Sources = frozenset[str]
Value = Sources | tuple["Value", ...]  # a tuple where the HLO value is one
_NOTHING: Sources = frozenset()


def sources_of_operands(module: Module) -> dict[tuple[str, str], Sources]:
    """Returns (computation, instruction) -> the entry arguments that its operands depend on.

    An argument is named by what stands before the first bracket of its label in the program: `state.params` for
    `state.params['decoder']['scale']`. A value that depends on `state.params` alone is a weight, moved or cast;
    one that depends on constants alone depends on nothing. Fusions and kernels are taken as one operation.
    """
    walk = _Walk(module)
    entry = module.computations[module.entry]
    walk.run(entry, [frozenset({_label(each)}) for each in _parameters(entry)])
    return walk.found


class _Walk:
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
