"""The partitioner: a mesh, the rules over it, and shardings for everything a step touches."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshway.framework import axes as axes_lib
from meshway.framework.axes import Names
from meshway.framework.errors import UserError
from meshway.framework.interfaces import ArraySpec
from meshway.framework.partitioning.mesh import MeshShape
from meshway.framework.partitioning.rules import Rules, Target


class Layout:
    """What a layout file says: the mesh, how state is stored on it, and how activations are computed on it."""

    def __init__(
        self,
        mesh: MeshShape,
        parameters: Sequence[tuple[str, Target]],
        activations: Sequence[tuple[str, Target]],
        optimizer: Sequence[tuple[str, Target]] | None = None,
        compiler_options: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        """Args:
        mesh: the named mesh.
        parameters: where parameters lie.
        activations: where batches and activations lie.
        optimizer: where the optimizer's state lies; None for where parameters do (ZeRO-1 cuts only this).
        compiler_options: XLA's options by platform ("tpu", "gpu", "cpu"): what overlaps communication with work.
        """
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
        self._compiler_options = _options_of(layout.compiler_options, self.mesh.devices.flat[0].platform)
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        # What models asked for while traced: (axes, shape, spec) -> how often. `planning.waste` reads it.
        self.placed: Counter[tuple[Names, tuple[int, ...], PartitionSpec]] = Counter()

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """Makes mesh and rules ambient: trace, lower and call model code inside."""
        with jax.set_mesh(self.mesh), axes_lib.under(self):
            yield

    def rules_of(self, what: str) -> Rules:
        """Returns the table that places `what`: "batch", "opt_state", or anything else of the state."""
        return {"batch": self.activation_rules, "opt_state": self.optimizer_rules}.get(what, self.parameter_rules)

    def state_shardings(self, names: Any, shapes: Any, what: str = "parameter") -> Any:
        """Returns a tree of shardings for a tree of axis names beside a tree of shapes.

        Raises:
          UserError: see `Rules.resolve`; the message names the tensor.
        """
        rules = self.rules_of(what)

        def of(path: Any, shape: Any, leaf_names: Names) -> NamedSharding:
            name = f"{what}/{path_name(path)}".rstrip("/")
            return NamedSharding(self.mesh, rules.resolve(leaf_names, shape.shape, name).spec)

        return jax.tree_util.tree_map_with_path(of, shapes, names)

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
          UserError: `batch_size` does not divide by the mesh axes of "batch".
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
                return lowered.compile(compiler_options=self._compiler_options or None)
            except jax.errors.JaxRuntimeError as error:
                if "compile option" not in str(error):
                    raise
                raise UserError(
                    f"Layout.compiler_options: {str(error).splitlines()[0]} (this platform's: "
                    f"{self._compiler_options}); mend or remove it in the layout file"
                ) from error

    def check_rules_matched(self) -> None:
        """Call once a step was traced.

        Raises:
          UserError: a rule that matched no tensor: a misspelt name shards nothing, silently.
        """
        tables = (self.parameter_rules, self.optimizer_rules, self.activation_rules)
        unmatched = dict.fromkeys(rule for table in tables for rule in table.unmatched())
        if unmatched:
            raise UserError("rules that match no axis of this model: " + "; ".join(unmatched))

    def sharding(self, names: Names, shape: tuple[int, ...]) -> NamedSharding:
        """Returns where an activation with logical axes `names` lies; UserError as `Rules.resolve`."""
        spec = self.activation_rules.resolve(names, shape, "an activation").spec
        self.placed[names, shape, spec] += 1
        return NamedSharding(self.mesh, spec)

    def lookup(
        self, names: Names, shape: tuple[int, ...], table_names: Names, table_shape: tuple[int, ...]
    ) -> list[NamedSharding]:
        """Returns where entries taken from a parameter are found, and the way from there to where `names` say.

        At first their axes that are the parameter's lie as it is stored, the others as activations, without the mesh
        axes that cut the parameter. Then these go over to the others, the innermost first: the compiler knows how to
        exchange two dimensions over one mesh axis.

        Raises:
          UserError: see `Rules.resolve`.
        """
        stored = self.parameter_rules.resolve(table_names, table_shape, "a table").spec
        wanted = [_axes_of(entry) for entry in self.activation_rules.resolve(names, shape, "an activation").spec]
        cut = [_axes_of(stored[table_names.index(name)]) if name in table_names else None for name in names]
        held = [axis for entry in stored for axis in _axes_of(entry)]  # not yet given back
        steps = []
        while True:
            entries = [
                tuple(axis for axis in (there if mine is None else mine) if (axis in held) == (mine is not None))
                for there, mine in zip(wanted, cut, strict=True)
            ]
            steps.append(NamedSharding(self.mesh, PartitionSpec(*[entry or None for entry in entries])))
            moving = [axis for mine in cut for axis in mine or () if axis in held]
            if not any(axis in there for axis in moving for there, mine in zip(wanted, cut) if mine is None):
                return steps
            held.remove(moving[-1])

    def mesh_axes(self, name: str) -> tuple[str, ...]:
        """Returns the mesh axes, of more than one device, that cut logical axis `name` of activations.

        Raises:
          UserError: no rule maps `name`.
        """
        return tuple(axis for axis in self.activation_rules.axes_of(name) if self.mesh.shape[axis] > 1)


def _axes_of(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


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
