"""A stack of layers whose parameters lie in one array each, run by scan or unrolled."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from meshway.models.layers import remat as remat_lib
from meshway.models.layers.dropout import split_key
from meshway.models.layers.pipeline import Pipeline
from meshway.models.layers.reports import Reports, collecting, say

UNROLLED_PERIODS_ON_CPU = 8  # beyond, compile time (4x at 12+12 layers) outweighs scan's 13-20 % of the CPU step


class Block(Protocol):
    """One layer: called with the stack's context, a dropout key and its own slice of the cache."""

    def __call__(self, x: jax.Array, *, rng: jax.Array | None, cache: Any, **context: Any) -> tuple[jax.Array, Any]: ...


class BlockFactory(Protocol):
    """A gin-configured block class."""

    def __call__(self, *, d_model: int, rngs: nnx.Rngs) -> nnx.Module: ...


class Stack(nnx.Module):
    """`num_layers` blocks in the repeating pattern `blocks`.

    Parameters are always stored stacked, [layers, ...] for each block of the pattern, whether the layers are then
    run by `lax.scan` or unrolled: a checkpoint does not depend on how it was run.
    """

    def __init__(
        self,
        num_layers: int,
        blocks: Sequence[BlockFactory],
        d_model: int,
        *,
        rngs: nnx.Rngs,
        scan: bool | str = "auto",
        remat: str = "none",
        pipeline: Pipeline | None = None,
    ):
        """`scan` "auto" unrolls short stacks on CPU and scans otherwise; `remat` names a policy of `remat.POLICIES`;
        `pipeline`, which layout files bind, runs the stack over the mesh's stages, except with a cache.

        Raises:
          ValueError: `num_layers` is no multiple of the pattern, or an unknown option.
        """
        if num_layers % len(blocks):
            raise ValueError(f"Stack: num_layers={num_layers} is no multiple of its pattern of {len(blocks)} blocks")
        if remat not in remat_lib.POLICIES:
            raise ValueError(f"Stack.remat: unknown policy {remat!r}; known are {sorted(remat_lib.POLICIES)}")
        if scan not in (True, False, "auto"):
            raise ValueError(f"Stack.scan must be True, False or 'auto', not {scan!r}")
        self.num_periods, self.pattern = num_layers // len(blocks), len(blocks)
        self.scan, self.remat, self.pipeline = scan, remat, pipeline
        for i, block in enumerate(blocks):
            keys = jax.random.split(rngs.params(), self.num_periods)
            setattr(self, f"block_{i}", _stacked(block, d_model, keys))

    def __call__(
        self, x: jax.Array, *, rng: jax.Array | None = None, cache: Any = None, **context: Any
    ) -> tuple[jax.Array, Any]:
        """Runs x [batch, length, d_model] through all layers.

        Args:
          x: activations.
          rng: dropout key; each layer gets its own.
          cache: what `empty_cache` returned, or None.
          **context: passed to every block as it is (masks, biases, the encoder's output ...).

        Returns:
          (activations, the updated cache or None). What blocks report is reported again as arrays [layers].
        """
        graphdefs, states = self._split()
        keys = None if rng is None else jax.random.split(rng, self.num_periods)

        def period(
            x: jax.Array, layer: tuple[Any, Any, Any], context: dict[str, Any]
        ) -> tuple[jax.Array, tuple[Any, list[Reports]]]:
            states, period_key, caches = layer
            new, said = [], []
            for i, key in enumerate(split_key(period_key, self.pattern)):
                block = nnx.merge(graphdefs[i], states[i])
                with collecting() as reports:
                    x, block_cache = block(x, rng=key, cache=None if caches is None else caches[i], **context)
                new.append(block_cache)
                said.append(reports)
            return x, (None if caches is None else new, said)

        layers, keep = (states, keys, cache), remat_lib.POLICIES[self.remat]
        if self.pipeline is not None and cache is None and self.pipeline.num_stages() > 1:
            x, (cache, said) = self.pipeline(self._run, period, x, layers, context, keep)
        else:
            x, (cache, said) = self._run(lambda x, layer: period(x, layer, context), x, layers, keep)
        _say_by_layer(said)
        return x, cache

    def _run(
        self,
        period: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
        x: jax.Array,
        layers: Any,
        keep: remat_lib.Policy | None,
    ) -> tuple[jax.Array, Any]:
        """Runs `period(x, layer)` over consecutive periods, `layers` [periods, ...], under remat policy `keep`, and
        stacks what it returned."""
        num_periods = jax.tree.leaves(layers)[0].shape[0]
        scans = self._scans(num_periods)
        if keep is not None:
            # Inside scan the barrier against common-subexpression elimination is not needed.
            period = jax.checkpoint(period, policy=keep, prevent_cse=not scans)
        if scans:
            return jax.lax.scan(period, x, layers)
        outputs = []
        for i in range(num_periods):
            x, output = period(x, jax.tree.map(lambda leaf, i=i: leaf[i], layers))
            outputs.append(output)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    def empty_cache(self, **arguments: Any) -> list[Any]:
        """Returns each block's `empty_cache(**arguments)`, stacked over layers."""
        graphdefs, states = self._split()
        return [
            jax.vmap(lambda state, graphdef=graphdef: nnx.merge(graphdef, state).empty_cache(**arguments))(state)
            for graphdef, state in zip(graphdefs, states, strict=True)
        ]

    def _split(self) -> tuple[list[Any], list[Any]]:
        pairs = [nnx.split(getattr(self, f"block_{i}")) for i in range(self.pattern)]
        return [graphdef for graphdef, _ in pairs], [state for _, state in pairs]

    def _scans(self, num_periods: int) -> bool:
        if self.scan == "auto":
            return jax.default_backend() != "cpu" or num_periods > UNROLLED_PERIODS_ON_CPU
        return bool(self.scan)


def _stacked(block: BlockFactory, d_model: int, keys: jax.Array) -> nnx.Module:
    """Builds a block with parameters [layers, ...], one layer a key."""

    def make(key: jax.Array) -> tuple[Any, Any]:
        return nnx.split(block(d_model=d_model, rngs=nnx.Rngs(params=key)))

    graphdef, _ = nnx.split(nnx.eval_shape(lambda: nnx.merge(*make(jax.random.key(0)))))
    stacked = nnx.merge(graphdef, jax.vmap(lambda key: make(key)[1])(keys))
    for _, node in nnx.iter_graph(stacked):
        if isinstance(node, nnx.Param):
            node.set_metadata(axes=("layers", *node.get_metadata("axes")))
    return stacked


def _say_by_layer(said: list[Reports]) -> None:
    """Reports what each block of the pattern said, arrays [periods], as arrays [layers] in the layers' order.

    Where only some blocks of a pattern report a name, its layers are counted among those.
    """
    for kind in ("losses", "metrics"):
        names = dict.fromkeys(name for reports in said for name in getattr(reports, kind))
        for name in names:
            columns = [getattr(reports, kind)[name] for reports in said if name in getattr(reports, kind)]
            values = jnp.stack(columns, axis=1).reshape(-1)
            say(Reports(**{kind: {name: values}}))
