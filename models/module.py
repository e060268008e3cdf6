"""The one file that knows how flax.nnx stores parameters: a module factory becomes functions on plain dicts.

nnx objects never cross a `jit` boundary: the framework sees nested dicts of arrays beside a tree of axis
names, and `Network.bind` rebuilds the module inside the trace, where it costs nothing at run time.
`Objective` is what all objectives over such a network have in common.
"""

import abc
import functools
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import jax
from flax import nnx

from meshway.models.layers.side_outputs import Reports, capture, capture_intermediates

Batch = Mapping[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]


class NetworkFactory(Protocol):
    """A gin-configured module class: everything but the random streams is already bound."""

    def __call__(self, *, rngs: nnx.Rngs) -> nnx.Module: ...


class Param(nnx.Param):
    """A parameter; metadata `axes` holds one logical axis name a dimension, or None."""


def param(value: jax.Array, axes: tuple[str | None, ...]) -> Param:
    """Declares a parameter with its logical axes, None for a dimension that is never cut.

    Raises:
      ValueError: the number of names differs from the rank.
    """
    if value.ndim != len(axes):
        raise ValueError(f"a parameter of shape {value.shape} was declared with axes {axes}")
    return Param(value, axes=axes)


class Network:
    """A module factory as pure functions: `init`, `axes` and `bind`."""

    def __init__(self, factory: NetworkFactory):
        self._factory = factory

    def init(self, rng: jax.Array) -> dict[str, Any]:
        """Returns fresh parameters as nested dicts with string keys."""
        return nnx.to_pure_dict(nnx.state(self._factory(rngs=nnx.Rngs(params=rng)), nnx.Param))

    def axes(self) -> dict[str, Any]:
        """Returns the logical axes of each parameter, in the tree of `init`.

        Raises:
          ValueError: a parameter was declared without axes (use `module.param`).
        """
        _, state = self._abstract
        axes: dict[str, Any] = {}
        for path, variable in nnx.to_flat_state(state):
            names = variable.get_metadata().get("axes")
            if names is None:
                raise ValueError(
                    f"parameter {'/'.join(map(str, path))} has no logical axes; declare it by module.param"
                )
            node = axes
            *parents, last = map(str, path)
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = names
        return axes

    def bind(self, params: dict[str, Any]) -> Any:
        """Returns the module holding `params`: call its methods within the same trace."""
        graphdef, abstract = self._abstract
        state = jax.tree.map(lambda leaf: leaf, abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)

    @functools.cached_property
    def _abstract(self) -> tuple[Any, Any]:
        return nnx.split(nnx.eval_shape(lambda: self._factory(rngs=nnx.Rngs(params=jax.random.key(0)))))


class Criterion(Protocol):
    """What an objective minimises, from logits [batch, ..., classes]; targets and weights are [batch, ...]."""

    def __call__(
        self, logits: jax.Array, targets: jax.Array, weights: jax.Array, reports: Reports | None = None
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """Returns (summed loss, summed weight, metrics)."""
        ...

    def score(self, logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """Returns log p(target) [batch, ...], 0 where the weight is 0."""
        ...


class Objective(Network, abc.ABC):
    """A criterion over a network's logits; meets `framework.interfaces.Model` by shape, once a subclass adds
    `batch_spec`, `logits` and `targets`."""

    def __init__(self, network: NetworkFactory, criterion: Criterion):
        super().__init__(network)
        self._criterion = criterion

    @abc.abstractmethod
    def logits(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> jax.Array:
        """Returns the logits of each target, float32 [batch, ..., classes]; `rng` None means no dropout."""

    @abc.abstractmethod
    def targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns (targets, weights) of a batch, [batch, ...] each."""

    def loss(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Metrics]:
        """Returns (summed loss, summed weight, metrics) over weighted targets; `rng` None means no dropout."""
        with capture() as reports:
            logits = self.logits(params, batch, rng)
        return self._criterion(logits, *self.targets(batch), reports)

    def score(self, params: dict[str, Any], batch: Batch) -> jax.Array:
        """Returns the log-probability of each target, float32 [batch, length], 0 where its weight is 0."""
        logits = self.logits(params, batch, None)
        return self._criterion.score(logits, *self.targets(batch))

    def observe(self, params: dict[str, Any], batch: Batch, names: Collection[str]) -> dict[str, jax.Array]:
        """Returns intermediate values of the pass that `score` makes, by name, [batch, length, ...].

        Raises:
          ValueError: a name that the network does not know; says which it does.
        """
        with capture_intermediates(names) as found:
            self.logits(params, batch, None)
        return found
