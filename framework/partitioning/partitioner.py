"""The partitioner: a mesh, the rules over it, and shardings for everything a step touches."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshway.framework import axes as axes_lib
from meshway.framework.axes import Names
from meshway.framework.errors import UserError
from meshway.framework.interfaces import ArraySpec
from meshway.framework.partitioning.activations import Activations
from meshway.framework.partitioning.mesh import MeshShape
from meshway.framework.partitioning.rules import Resolution, Rules, Target


class Layout:
    """What a layout file says: the mesh, and how state and activations are sharded over it."""

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
        parameters: how parameters are sharded.
        activations: how batches and activations are.
        optimizer: how the optimizer's state is; None for as parameters are (ZeRO-1 shards only this).
        compiler_options: XLA's options by platform ("tpu", "gpu", "cpu"), as to overlap communication and compute.
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

    @contextlib.contextmanager
    def activate(self) -> Iterator[Activations]:
        """Makes mesh and rules ambient: trace, lower and call model code inside.

        Yields:
          a record of what is asked for inside, empty at first.
        """
        asked = Activations(self.mesh, self.activation_rules, self.parameter_rules)
        with jax.set_mesh(self.mesh), axes_lib.under(asked):
            yield asked

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
                return lowered.compile(compiler_options=self._compiler_options or None)
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
            and activations, "opt_state", "params" and so on.

        Raises:
          UserError: a rule that matched no tensor: a misspelt name shards nothing, silently.
        """
        used: dict[Rules, set[str]] = {
            rules: set() for rules in (self.parameter_rules, self.optimizer_rules, self.activation_rules)
        }
        for what, names in fired.items():
            used[self.rules_of(what)].update(names)
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
