"""What single fields of config.json mean in a recipe, and the way back."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from meshway.framework.errors import UserError

Config = Mapping[str, Any]  # config.json, with the defaults of its family put in
Bindings = dict[str, Any]  # a macro, or `scope/module.Class.parameter` -> a Python literal or a Reference
REQUIRED: Any = object()  # the default of what has none


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@selector` in a recipe, with `()` where it is evaluated."""

    selector: str
    evaluate: bool = True

    def __repr__(self) -> str:
        return f"@{self.selector}" + ("()" if self.evaluate else "")


class Setting(Protocol):
    """Some fields of config.json, and the bindings that say the same."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of config.json that it reads."""
        ...

    def read(self, config: Config) -> Bindings:
        """Returns the bindings; raises UserError for a value that meshway does not compute."""
        ...

    def write(self, bindings: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields; raises UserError for bindings that the family's config.json cannot say."""
        ...


@dataclasses.dataclass(frozen=True)
class Same:
    """A value that both have.

    Attributes:
      field, binding: its two names.
      like: where it is null on one side, the (field, binding) whose value it is.
      times: the same, times a number.
      default: of the binding, where a recipe may leave it out.
      divides: the field of which it must be a divisor.
    """

    field: str
    binding: str
    like: tuple[str, str] | None = None
    times: int = 1
    default: Any = REQUIRED
    divides: str | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    def read(self, config: Config) -> Bindings:
        value = config.get(self.field)
        if value is None and self.like:
            value = self.times * config[self.like[0]]
        if self.divides and config[self.divides] % value:
            raise UserError(
                f"config.json: {self.field} = {value} does not divide {self.divides} = {config[self.divides]}"
            )
        return {} if value == self.default else {self.binding: value}

    def write(self, bindings: Mapping[str, Any]) -> dict[str, Any]:
        value = required(bindings, self.binding, self.field, self.default)
        if value is None and self.like:
            value = self.times * required(bindings, self.like[1], self.like[0])
        return {self.field: value}


@dataclasses.dataclass(frozen=True)
class HeadDim:
    """The features of a head: `field`, and where there is none or it is null, the width over the heads."""

    field: str | None
    width: str = "hidden_size"
    heads: str = "num_attention_heads"

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,) if self.field else ()

    def read(self, config: Config) -> Bindings:
        value = config.get(self.field) if self.field else None
        if value is None and config[self.width] % config[self.heads]:
            raise UserError(
                f"config.json: {self.heads} = {config[self.heads]} does not divide {self.width} = {config[self.width]}"
            )
        return {"HEAD_DIM": config[self.width] // config[self.heads] if value is None else value}

    def write(self, bindings: Mapping[str, Any]) -> dict[str, Any]:
        head_dim, width = required(bindings, "HEAD_DIM", "head_dim"), required(bindings, "D_MODEL", self.width)
        if self.field:
            return {self.field: head_dim}
        if head_dim * bindings["NUM_HEADS"] != width:
            raise UserError(
                f"HEAD_DIM={head_dim} times NUM_HEADS={bindings['NUM_HEADS']} is not D_MODEL={width}, as this family's "
                "config.json takes for granted"
            )
        return {}


@dataclasses.dataclass(frozen=True)
class InverseRoot:
    """A number whose inverse square root is the binding."""

    field: str
    binding: str

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    def read(self, config: Config) -> Bindings:
        return {self.binding: config[self.field] ** -0.5}

    def write(self, bindings: Mapping[str, Any]) -> dict[str, Any]:
        value = required(bindings, self.binding, self.field) ** -2
        return {self.field: round(value) if abs(value - round(value)) < 1e-9 * value else value}


@dataclasses.dataclass(frozen=True)
class Table:
    """A value that has another name here: pairs (theirs, ours), of which the first that fits is taken."""

    field: str
    binding: str
    pairs: tuple[tuple[Any, Any], ...]

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    def read(self, config: Config) -> Bindings:
        for theirs, ours in self.pairs:
            if theirs == config.get(self.field):
                return {self.binding: ours}
        raise not_supported(self.field, config.get(self.field), [theirs for theirs, _ in self.pairs])

    def write(self, bindings: Mapping[str, Any]) -> dict[str, Any]:
        value = required(bindings, self.binding, self.field)
        for theirs, ours in self.pairs:
            if ours == (tuple(value) if isinstance(value, list) else value):
                return {self.field: theirs}
        known = ", ".join(dict.fromkeys(repr(ours) for _, ours in self.pairs))
        raise UserError(
            f"{self.binding} = {value!r} cannot be written in this family's config.json; supported: {known}"
        )


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A field for whose other values meshway's model computes something else."""

    field: str
    allowed: tuple[Any, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    def read(self, config: Config) -> Bindings:
        if config.get(self.field) not in self.allowed:
            raise not_supported(self.field, config.get(self.field), self.allowed)
        return {}

    def write(self, bindings: Mapping[str, Any]) -> dict[str, Any]:
        return {}


ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
    "relu2": "relu_squared",
    "quick_gelu": "quick_gelu",
}  # transformers' name -> that of `models.layers.mlp.ACTIVATIONS`


def activation(field: str, *, gated: bool) -> Table:
    """Returns the setting of an MLP's activation."""
    gate = ("linear",) if gated else ()
    return Table(field, "ACTIVATIONS", tuple((theirs, (ours, *gate)) for theirs, ours in ACTIVATIONS.items()))


def same_in_words(field: str, binding: str, *values: Any) -> Table:
    """Returns the setting of a value that both call the same and of which only some are known."""
    return Table(field, binding, tuple((value, value) for value in values))


def required(bindings: Mapping[str, Any], name: str, field: str, default: Any = REQUIRED) -> Any:
    """Returns a binding's value; raises UserError where the recipe has none and there is no default."""
    value = bindings.get(name, default)
    if value is REQUIRED:
        raise UserError(f"the recipe has no {name}, config.json's {field}: it is not a recipe of this family")
    return value


def not_supported(field: str, value: Any, allowed: Sequence[Any] = ()) -> UserError:
    """Returns the error for a field's value that changes what is computed, in a way that meshway does not know."""
    known = f" (known: {', '.join(map(repr, allowed))})" if allowed else ""
    return UserError(f"config.json: {field} = {value!r} is not supported by meshway for this family{known}")
