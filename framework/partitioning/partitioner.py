"""The partitioner: a mesh, the rules over it, and shardings for everything a step touches."""

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshway.framework import axes as axes_lib
from meshway.framework.axes import Names, Product, Ring, sharded_by
from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.interfaces import ArraySpec
from meshway.framework.partitioning.mesh import MeshShape
from meshway.framework.partitioning.products import product_of
from meshway.framework.partitioning.rules import Resolution, Rules, Target

Placed = tuple[Names, tuple[int, ...]]  # logical axes and sizes of an array
Products = Literal["compiler", "by_hand", "one_way", "bidirectional"]
RINGS = get_args(Ring)
Compiler = Callable[[jax.stages.Lowered, Mapping[str, Any]], jax.stages.Compiled]  # takes XLA's options, too


class Activations:
    """Answers a model's questions about the layout (`axes.Ambient`). `Partitioner.activate` makes a new one each time,
    so what it records belongs to what was traced inside that `with` block and to nothing else.

    Attributes:
      constrained: (axes, shape, spec) of the activations that were constrained -> how often (a scanned layer once).
      names: the logical names that were asked for, of all questions.
    """

    def __init__(
        self,
        mesh: Mesh,
        activation_rules: Rules,
        parameter_rules: Rules,
        prefill_rules: Rules | None = None,
        products: "Products" = "compiler",
    ):
        """`prefill_rules` are those of activations while prompts are read, None for the same; `products`: see
        `Layout`."""
        self.mesh, self.by_hand = mesh, products != "compiler"
        self.ring: Ring | None = products if products in RINGS else None  # type: ignore[assignment]
        self._moves = False  # whether a product gathers or scatters
        self.constrained: Counter[tuple[Names, tuple[int, ...], PartitionSpec]] = Counter()
        self.names: set[str] = set()
        self._all_rules, self._parameter_rules = (activation_rules, prefill_rules or activation_rules), parameter_rules

    @property
    def _activation_rules(self) -> Rules:
        return self._all_rules[axes_lib.in_prefill()]

    def sharding(self, names: Names, shape: tuple[int, ...]) -> NamedSharding:
        """Returns the sharding of an activation with logical axes `names`; UserError as `Rules.resolve`."""
        resolved = self._activation_rules.resolve(names, shape, "an activation")
        self.names |= resolved.fired
        self.constrained[names, shape, resolved.spec] += 1
        return NamedSharding(self.mesh, resolved.spec)

    def mesh_axes(self, name: str) -> tuple[str, ...]:
        """Returns the mesh axes, of more than one device, that shard logical axis `name` of activations.

        Raises:
          UserError: no rule maps `name`.
        """
        self.names.add(name)
        return tuple(axis for axis in self._activation_rules.axes_of(name) if self.mesh.shape[axis] > 1)

    def kernel_axes(self, name: str) -> tuple[str, ...]:
        """Returns the mesh axes that shard logical axis `name` of parameters; UserError when no rule maps it."""
        return self._parameter_rules.axes_of(name, "a parameter")

    def product(self, x: Placed, kernel: Placed, output: Placed) -> Product:
        """Returns how to multiply arrays of these (axes, sizes), by `products.product_of`."""
        placed = [
            rules.resolve(*each, what)
            for rules, each, what in (
                (self._activation_rules, x, "an activation"),
                (self._parameter_rules, kernel, "a parameter"),
                (self._activation_rules, output, "an activation"),
            )
        ]
        self.names |= placed[0].fired | placed[2].fired
        x_axes, kernel_axes, output_axes = (sharded_by(each.spec, len(each.rules)) for each in placed)
        how = product_of(self.mesh, x_axes, kernel_axes, output_axes, self.ring)
        self._moves |= how.scattered is not None or (how.x, how.stored) != (how.operand, how.kernel)
        return how

    def check_products(self) -> None:
        """Raises UserError where products were to gather and scatter in rings, and none on several devices did."""
        if self.ring is not None and self.mesh.size > 1 and not self._moves:
            raise UserError(
                f"Layout.products={self.ring!r} has no effect: no product of this model gathers its input or weights, "
                "or scatters its sums, under this layout; LAYOUT='model_sequence' shards activations between layers"
            )

    def lookup(
        self, names: Names, shape: tuple[int, ...], table_names: Names, table_shape: tuple[int, ...]
    ) -> list[NamedSharding]:
        """Returns the shardings that entries looked up in a parameter go through, from where they are found to where
        `names` say.

        An example: four devices, a mesh of fsdp=4, an embedding table [vocab, embed] whose `embed` is stored sharded
        over fsdp, and activations [batch, length, embed] whose `batch` is sharded over fsdp. Device d holds columns d
        of the table, so given all token ids it looks up columns d of every token (the first sharding). One all-to-all
        over fsdp then turns some columns of all tokens into all columns of some tokens (the second):

                        embed                                       embed
                   d0 | d1 | d2 | d3                           +------------------+
                 +----+----+----+----+                         |        d0        |
                 |    |    |    |    |       all-to-all        +------------------+
          batch  |    |    |    |    |    --------------->     |        d1        |
                 |    |    |    |    |       over fsdp         +------------------+
                 |    |    |    |    |                         |        d2        |
                 +----+----+----+----+                         +------------------+
                                                               |        d3        |
                  (None, None, fsdp)                           +------------------+
                                                                (fsdp, None, None)

        In general, dimensions of the table keep at first the mesh axes that the table is stored over, and the others
        have the axes that `names` want, except those of the table. Where a mesh axis of the table's dimensions is
        wanted elsewhere, it is handed over, one axis at a time and the innermost first, since the compiler knows how to
        exchange two dimensions over one mesh axis. What remains (axes that only the table has) is the caller's last
        constraint.

        Args:
          names: the logical axes of what was looked up, of sizes `shape`.
          table_names: those of the parameter, of sizes `table_shape`; names in both are the entries' own dimensions.

        Raises:
          UserError: see `Rules.resolve`.
        """
        stored = sharded_by(self._parameter_rules.resolve(table_names, table_shape, "a table").spec)
        resolved = self._activation_rules.resolve(names, shape, "an activation")
        self.names |= resolved.fired
        wanted = sharded_by(resolved.spec)
        of_table = [stored[table_names.index(name)] if name in table_names else None for name in names]
        held = [axis for axes in stored for axis in axes]  # the table's mesh axes that were not handed over yet
        steps = []
        while True:
            entries = [
                tuple(axis for axis in (want if own is None else own) if (axis in held) == (own is not None))
                for want, own in zip(wanted, of_table, strict=True)
            ]
            steps.append(NamedSharding(self.mesh, PartitionSpec(*[axes or None for axes in entries])))
            movable = [axis for own in of_table for axis in own or () if axis in held]
            elsewhere = {axis for want, own in zip(wanted, of_table, strict=True) if own is None for axis in want}
            if elsewhere.isdisjoint(movable):
                return steps
            held.remove(movable[-1])


class Layout:
    """What a layout file says: the mesh, and how state and activations are sharded over it."""

    def __init__(
        self,
        mesh: MeshShape,
        parameters: Sequence[tuple[str, Target]],
        activations: Sequence[tuple[str, Target]],
        optimizer: Sequence[tuple[str, Target]] | None = None,
        compiler_options: Mapping[str, Mapping[str, Any]] | None = None,
        prefill: Sequence[tuple[str, Target]] | None = None,
        products: Products = "compiler",
    ):
        """Args:
        mesh: the named mesh.
        parameters: how parameters are sharded.
        activations: how batches and activations are.
        optimizer: how the optimizer's state is; None for as parameters are (ZeRO-1 shards only this).
        compiler_options: XLA's options by platform ("tpu", "gpu", "cpu"), as to overlap communication and compute.
        prefill: how activations are while prompts are read; None for as in all other passes.
        products: who decides on the collectives around the products of attention and feed-forward layers: the
          compiler, or the layers, which gather, scatter and exchange as Pope et al. 2022 do (`products.product_of`):
          "by_hand" before and after each product; "one_way" and "bidirectional" in steps beside parts of it, of chunks
          that go around a ring in one direction, or in both (`models/layers/collective_matmul.py`).

        Raises:
          UserError: `products` is none of these.
        """
        if products not in (known := get_args(Products)):
            raise UserError(f"Layout.products is one of {known}, not {products!r}{did_you_mean(products, known)}")
        self.prefill, self.products = prefill, products
        self.mesh, self.parameters, self.activations = mesh, parameters, activations
        self.optimizer = parameters if optimizer is None else optimizer
        self.compiler_options = compiler_options or {}


class Partitioner:
    """A layout on real devices.

    Everything is Auto-sharded `jit` with `NamedSharding`s pinned on every input and output: without pinned
    outputs `jit` leaves optimizer state on one device, and layouts drift after the first step.
    """

    def __init__(self, layout: Layout, devices: Sequence[jax.Device] | None = None):
        """Raises UserError where the layout does not fit the devices (see `MeshShape.build`, `Rules`)."""
        self.mesh: Mesh = layout.mesh.build(devices)
        sizes = dict(self.mesh.shape)
        self.parameter_rules = Rules(layout.parameters, sizes, "Layout.parameters")
        self.optimizer_rules = self.parameter_rules
        if layout.optimizer is not layout.parameters:
            self.optimizer_rules = Rules(layout.optimizer, sizes, "Layout.optimizer")
        self.activation_rules = Rules(layout.activations, sizes, "Layout.activations", ("length", "kv_length"))
        self.prefill_rules = self.activation_rules
        if layout.prefill is not None:
            self.prefill_rules = Rules(layout.prefill, sizes, "Layout.prefill", ("length", "kv_length"))
        self._products: Products = layout.products
        self._compiler_options = _options_of(layout.compiler_options, self.mesh.devices.flat[0].platform)
        self._compiler: Compiler = lambda lowered, options: lowered.compile(compiler_options=dict(options) or None)
        self.replicated = NamedSharding(self.mesh, PartitionSpec())

    @contextlib.contextmanager
    def activate(self, products: Products | None = None) -> Iterator[Activations]:
        """Makes mesh and rules ambient: trace, lower and call model code inside.

        Args:
          products: what to trace with instead of the layout's own.

        Yields:
          a record of what is asked for inside, empty at first.
        """
        tables = self.activation_rules, self.parameter_rules, self.prefill_rules
        asked = Activations(self.mesh, *tables, products or self._products)
        with jax.set_mesh(self.mesh), axes_lib.under(asked):
            yield asked

    @contextlib.contextmanager
    def compiling_by(self, compiler: Compiler) -> Iterator[None]:
        """Gives what is compiled inside a `with` block to another compiler, with the layout's options."""
        before, self._compiler = self._compiler, compiler
        try:
            yield
        finally:
            self._compiler = before

    def rules_of(self, what: str) -> Rules:
        """Returns the table that places `what`: "batch", "opt_state" and "average" (of parameters, read only where the
        optimizer's state is), or anything else of the state."""
        tables = {"batch": self.activation_rules, "opt_state": self.optimizer_rules, "average": self.optimizer_rules}
        return tables.get(what, self.parameter_rules)

    def resolve(self, names: Any, shapes: Any, what: str = "parameter") -> Any:
        """Returns a tree of `Resolution`s, with the rules that fired, for a tree of axis names beside one of shapes.

        Raises:
          UserError: see `Rules.resolve`; the message names the tensor.
        """
        rules = self.rules_of(what)

        def of(path: Any, shape: Any, leaf_names: Names) -> Resolution:
            return rules.resolve(leaf_names, shape.shape, f"{what}/{path_name(path)}".rstrip("/"))

        return jax.tree_util.tree_map_with_path(of, shapes, names)

    def shardings(self, resolved: Any) -> Any:
        """Returns a tree of shardings for a tree of `Resolution`s."""
        return jax.tree.map(lambda leaf: NamedSharding(self.mesh, leaf.spec), resolved)

    def state_shardings(self, names: Any, shapes: Any, what: str = "parameter") -> Any:
        """Returns a tree of shardings for a tree of axis names beside a tree of shapes; raises as `resolve`."""
        return self.shardings(self.resolve(names, shapes, what))

    def batch_shardings(self, spec: Mapping[str, ArraySpec]) -> dict[str, NamedSharding]:
        """Returns the sharding of each feature of a batch."""
        return {
            name: NamedSharding(
                self.mesh,
                self.activation_rules.resolve(feature.axes, feature.shape, f"batch feature {name}").spec,
            )
            for name, feature in spec.items()
        }

    def process_rows(self, batch_size: int) -> slice:
        """Returns which rows of a global batch this process's devices hold.

        Raises:
          UserError: `batch_size` is not divisible by the mesh axes of "batch".
        """
        resolved = self.activation_rules.resolve(("batch",), (batch_size,), "the batch")
        sharding = NamedSharding(self.mesh, resolved.spec)
        spans = [
            index[0].indices(batch_size)[:2]
            for index in sharding.addressable_devices_indices_map((batch_size,)).values()
            if index is not None
        ]
        start, stop = min(span[0] for span in spans), max(span[1] for span in spans)
        if sum(end - begin for begin, end in set(spans)) != stop - start:
            raise UserError(
                f"this process's devices hold scattered rows of the batch: {sorted(set(spans))}; reorder the mesh"
            )
        return slice(start, stop)

    def put_batch(
        self, batch: Mapping[str, np.ndarray], shardings: Mapping[str, NamedSharding], batch_size: int
    ) -> dict[str, jax.Array]:
        """Puts this process's rows of a batch on its devices, as global arrays."""
        if jax.process_count() == 1:
            return jax.device_put(dict(batch), {name: shardings[name] for name in batch})
        return {
            name: jax.make_array_from_process_local_data(shardings[name], rows, (batch_size, *rows.shape[1:]))
            for name, rows in batch.items()
        }

    def compile(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        in_shardings: Any,
        out_shardings: Any,
        donate: tuple[int, ...] = (),
    ) -> jax.stages.Compiled:
        """Traces and compiles `function` for abstract or real `arguments`, under this layout.

        Raises:
          UserError: the compiler does not know one of the layout's options.
        """
        with self.activate():
            jitted = jax.jit(function, in_shardings=in_shardings, out_shardings=out_shardings, donate_argnums=donate)
            lowered = jitted.lower(*arguments)
            try:
                return self._compiler(lowered, self._compiler_options)
            except jax.errors.JaxRuntimeError as error:
                if "compile option" not in str(error):
                    raise
                raise UserError(
                    f"Layout.compiler_options: {str(error).splitlines()[0]} (this platform's: "
                    f"{self._compiler_options}); mend or remove it in the layout file"
                ) from error

    def check_rules_matched(self, fired: Mapping[str, Collection[str]]) -> None:
        """Compares the rules with those that a program used.

        Args:
          fired: the logical names whose rules fired, by what was placed, as `rules_of` takes it: "batch" for batches
            and activations, those of prompts too, "opt_state", "params" and so on.

        Raises:
          UserError: a rule that matched no tensor: a misspelt name shards nothing, silently.
        """
        tables = (self.parameter_rules, self.optimizer_rules, self.activation_rules, self.prefill_rules)
        used: dict[Rules, set[str]] = {rules: set() for rules in tables}
        for what, names in fired.items():
            used[self.rules_of(what)].update(names)
        used[self.prefill_rules] |= used[self.activation_rules]  # the same layers ask for the same names
        unmatched = dict.fromkeys(rule for rules, names in used.items() for rule in rules.unmatched(names))
        if unmatched:
            raise UserError("rules that match no axis of this model: " + "; ".join(unmatched))

    def sharding(self, names: Names, shape: tuple[int, ...]) -> NamedSharding:
        """Returns the sharding of an activation with logical axes `names`; UserError as `Rules.resolve`."""
        return NamedSharding(self.mesh, self.activation_rules.resolve(names, shape, "an activation").spec)


def _options_of(options: Mapping[str, Mapping[str, Any]], platform: str) -> dict[str, Any]:
    """Returns the compiler options of one platform."""
    known = ("cpu", "gpu", "tpu")
    for name in options:
        if name not in known:
            raise UserError(f"Layout.compiler_options names platform {name!r}, not one of {known}")
    return dict(options.get("gpu" if platform in ("cuda", "rocm") else platform, {}))


def path_name(path: Sequence[Any]) -> str:
    """Returns a tree path as a/b/c."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
