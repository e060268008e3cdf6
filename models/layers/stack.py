"""A stack of layers with stacked parameters, run by scan or unrolled."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from meshway.models.layers.blocks import SelfAttentionBlock
from meshway.models.layers.integer_products import rounding_key
from meshway.models.layers.norm import split_key
from meshway.models.layers.pipeline import Pipeline
from meshway.models.layers.remat import Policy, policy_of
from meshway.models.layers.side_outputs import Reports, capture, sow

UNROLLED_LAYERS_ON_CPU = 8  # beyond, compile time (4x at 12+12 layers) outweighs scan's 13-20 % of the CPU step


class Block(Protocol):
    """One layer: called with the stack's context, a dropout key and its own slice of the cache."""

    def __call__(self, x: jax.Array, *, rng: jax.Array | None, cache: Any, **context: Any) -> tuple[jax.Array, Any]: ...


class BlockFactory(Protocol):
    """A block class with its other arguments bound, as gin makes it."""

    def __call__(self, *, d_model: int, rngs: nnx.Rngs) -> nnx.Module: ...


class Stack(nnx.Module):
    """`num_layers` blocks in the repeating pattern `blocks`, whose last period may be incomplete.

    Layer n of a pattern of P blocks is entry n // P of block_{n % P}. Parameters are always stored stacked, [layers,
    ...] for each block of the pattern, whether the layers are run by `lax.scan` or unrolled: a checkpoint does not
    depend on it. A program may give each of them by layer instead, as a tuple of arrays [...]: layers then run one
    after the other and read them where they lie, while an entry of a stack is copied before it is used. Decoding, whose
    cost is reading weights, does so.
    """

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        blocks: Sequence[BlockFactory] = (SelfAttentionBlock,),
        scan: bool | str = "auto",
        remat: str | Mapping[str, str] = "none",
        pipeline: Pipeline | None = None,
    ):
        """`scan` "auto" unrolls short stacks on CPU, except with a cache, and scans otherwise; `remat` is what
        `remat.policy_of` takes; `pipeline`, which layout files bind, runs the stack over the mesh's stages, except with
        a cache.

        Raises:
          ValueError: no layers, or an unknown option.
        """
        if num_layers < 1 or not blocks:
            raise ValueError(f"Stack: num_layers={num_layers} of {len(blocks)} blocks; there must be one of each")
        if scan not in (True, False, "auto"):
            raise ValueError(f"Stack.scan must be True, False or 'auto', not {scan!r}")
        self.pattern = min(len(blocks), num_layers)
        self.num_periods, self.remainder = divmod(num_layers, self.pattern)
        self.scan, self.keep, self.pipeline = scan, policy_of(remat), pipeline
        for i, block in enumerate(blocks[: self.pattern]):
            keys = jax.random.split(rngs.params(), self.num_periods + (i < self.remainder))
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
          (activations, the updated cache or None). Reports of blocks are reported again as arrays [layers].
        """
        graphdefs, states = self._split()
        count = self.num_periods + bool(self.remainder)
        keys = None if rng is None else jax.random.split(rng, count)

        def period(
            x: jax.Array, layer: tuple[Any, Any, Any], context: dict[str, Any]
        ) -> tuple[jax.Array, tuple[Any, list[Reports]]]:
            states, period_key, caches = layer
            x = checkpoint_name(x, "layer_input")
            new, reports_of_blocks = [], []
            for i, key in enumerate(split_key(period_key, self.pattern)[: len(states)]):
                block = nnx.merge(graphdefs[i], states[i])
                with capture() as reports, rounding_key(key):
                    x, block_cache = block(x, rng=key, cache=None if caches is None else caches[i], **context)
                new.append(block_cache)
                reports_of_blocks.append(reports)
            return x, (None if caches is None else new, reports_of_blocks)

        if _is_by_layer(states[0]):
            reports_of_parts: list[list[Reports]] = []
            caches: list[Any] = []
            for n in range(count):
                own = [_layer(state, n) for state in states[: self._blocks_in(n)]]
                its = None if cache is None else cache[n * self.pattern :][: len(own)]
                x, (new, reports) = period(x, (own, None if keys is None else keys[n], its), context)
                reports_of_parts.append(jax.tree.map(lambda value: value[None], reports))
                caches += new or ()
            _sow_by_layer(reports_of_parts)
            return x, None if cache is None else tuple(caches)

        layers, keep = (states, keys, None if cache is None else jnp.arange(count)), self.keep

        def cached(carry: tuple[jax.Array, list[Any]], layer: Any) -> tuple[Any, list[Reports]]:
            # The cache is carried from layer to layer, so that it is updated in place: as an output of the scan it
            # would be a second copy.
            (x, cache), (states, key, number) = carry, layer
            own = _at(cache[: len(states)], number)
            x, (new, reports) = period(x, (states, key, own), context)
            return (x, [*_put(cache[: len(states)], own, new, number), *cache[len(states) :]]), reports

        if self.pipeline is not None and cache is None and self.pipeline.num_stages() > 1:
            self._check_whole_periods()
            x, (_, reports) = self.pipeline(self._run, period, x, layers, context, keep)
            reports_of_parts = [reports]
        else:
            reports_of_parts = []
            for part in self._parts(layers):
                if cache is None:
                    x, (_, reports) = self._run(lambda x, layer: period(x, layer, context), x, part, keep)
                else:
                    (x, cache), reports = self._run(cached, (x, cache), part, keep, decoding=True)
                reports_of_parts.append(reports)
        _sow_by_layer(reports_of_parts)
        return x, cache

    def _parts(self, layers: tuple[Any, Any, Any]) -> list[Any]:
        """Returns the layers of all complete periods and, where there is one, those of the last, incomplete period."""
        if not self.remainder:
            return [layers]
        states, *others = layers

        def rows(tree: Any, part: slice) -> Any:
            return jax.tree.map(lambda leaf: leaf[part], tree)

        rest = (states[: self.remainder], *others)
        return [rows(layers, slice(self.num_periods)), rows(rest, slice(self.num_periods, None))]

    def _check_whole_periods(self) -> None:
        """Raises ValueError if the last period of the pattern is incomplete, which no stage of a pipeline could run."""
        if self.remainder:
            whole = self.num_periods * self.pattern
            raise ValueError(
                f"a pipeline runs whole periods: the stack's {whole + self.remainder} layers leave {self.remainder} "
                f"over from periods of {self.pattern} blocks; {whole} or {whole + self.pattern} layers would do"
            )

    def _run(
        self,
        period: Callable[[Any, Any], tuple[Any, Any]],
        x: Any,
        layers: Any,
        keep: Policy | None,
        decoding: bool = False,
    ) -> tuple[Any, Any]:
        """Runs `period(x, layer)` over consecutive periods, `layers` [periods, ...], under remat policy `keep`; returns
        (x, the stacked outputs)."""
        num_periods = jax.tree.leaves(layers)[0].shape[0]
        scans = self._scans(num_periods, decoding)
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

    def empty_cache(self, **arguments: Any) -> Sequence[Any]:
        """Returns each block's `empty_cache(**arguments)`, in a list and stacked over layers; or, where parameters are
        given by layer, each layer's in a tuple."""
        graphdefs, states = self._split()
        if _is_by_layer(states[0]):
            of_layers = (
                nnx.merge(graphdefs[i], _layer(states[i], n))
                for n in range(self.num_periods + bool(self.remainder))
                for i in range(self._blocks_in(n))
            )
            return tuple(layer.empty_cache(**arguments) for layer in of_layers)
        return [
            jax.vmap(lambda state, graphdef=graphdef: nnx.merge(graphdef, state).empty_cache(**arguments))(state)
            for graphdef, state in zip(graphdefs, states, strict=True)
        ]

    def _split(self) -> tuple[list[Any], list[Any]]:
        pairs = [nnx.split(getattr(self, f"block_{i}")) for i in range(self.pattern)]
        return [graphdef for graphdef, _ in pairs], [state for _, state in pairs]

    def _blocks_in(self, period: int) -> int:
        """Returns how many blocks of the pattern a period has: all, or those of the last, incomplete one."""
        return self.pattern if period < self.num_periods else self.remainder

    def _scans(self, num_periods: int, decoding: bool) -> bool:
        if self.scan == "auto":
            if decoding:
                # XLA:CPU copies a layer's weights before it uses them; unrolled, it copies those of all layers at once
                # and takes at least twice the time.
                return num_periods > 1
            return jax.default_backend() != "cpu" or num_periods * self.pattern > UNROLLED_LAYERS_ON_CPU
        return bool(self.scan)


def _stacked(block: BlockFactory, d_model: int, keys: jax.Array) -> nnx.Module:
    """Builds a block with parameters [layers, ...], one layer for each key."""

    graphdefs = []

    def make(key: jax.Array) -> Any:
        graphdef, state = nnx.split(block(d_model=d_model, rngs=nnx.Rngs(params=key)))
        graphdefs.append(graphdef)  # it holds no arrays: the same for all layers
        return state

    states = jax.vmap(make)(keys)
    stacked = nnx.merge(graphdefs[0], states)
    for _, node in nnx.iter_graph(stacked):
        if isinstance(node, nnx.Param):
            node.set_metadata(axes=("layers", *node.get_metadata("axes")), stacked=True)
    return stacked


def _is_by_layer(state: Any) -> bool:
    """Returns whether the parameters of a block are tuples of one array a layer."""
    return any(isinstance(variable.get_value(), tuple) for _, variable in nnx.to_flat_state(state))


def _layer(state: Any, number: int) -> Any:
    """Returns one layer of a block's parameters, which are given by layer."""
    return jax.tree.map(lambda leaf: leaf[number], state, is_leaf=lambda node: isinstance(node, tuple))


def _at(cache: Any, number: jax.Array) -> Any:
    """Returns one layer of a cache [layers, ...]."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), cache)


def _put(cache: Any, old: Any, new: Any, number: jax.Array) -> Any:
    """Returns a cache [layers, ...] with one layer changed from `old` to `new`; unchanged leaves are not written."""
    return jax.tree.map(
        lambda whole, was, part: whole if part is was else jax.lax.dynamic_update_index_in_dim(whole, part, number, 0),
        cache,
        old,
        new,
    )


def _sow_by_layer(parts: list[list[Reports]]) -> None:
    """Reports what the blocks of a pattern reported, arrays [periods] for each part of a stack, as arrays [layers] in
    the order of layers.

    Where only some blocks of a pattern report a name, only those are counted as its layers.
    """
    for kind in ("losses", "metrics"):
        values_by_part = [[getattr(reports, kind) for reports in part] for part in parts]
        for name in dict.fromkeys(name for part in values_by_part for block in part for name in block):
            columns = [[block[name] for block in part if name in block] for part in values_by_part]
            values = [jnp.stack(part, axis=1).reshape(-1) for part in columns if part]
            sow(Reports(**{kind: {name: jnp.concatenate(values)}}))
