"""The form of weights for inference, made from those of a checkpoint when it is read: by layer, and quantised by qwix.

A quantised parameter w is integers q and a float32 scale for each channel, an entry of the axes that products do not
sum over: w is q * scale, off by half a scale at most, which is the channel's largest |w| over the largest integer.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import qwix

from meshway.framework.axes import Names
from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.interfaces import Params
from meshway.framework.partitioning.sharded_model import ShardedModel
from meshway.framework.trees import flatten, unflatten

WEIGHTS = {"int8": jnp.int8, "int4": jnp.int4}  # what weights may be kept in


def check_weights(dtype: str | None, where: str) -> None:
    """Raises UserError unless weights may be kept in `dtype`, given at `where`; None is as they are stored."""
    if dtype is not None and dtype not in WEIGHTS:
        raise UserError(f"{where}={dtype} is not one of {', '.join(WEIGHTS)}{did_you_mean(dtype, WEIGHTS)}")


def is_quantized(sharded: ShardedModel) -> bool:
    """Whether a model's parameters are in the form that `quantized` gave them."""
    leaves = jax.tree.leaves(sharded.param_shapes, is_leaf=lambda node: isinstance(node, qwix.QArray))
    return any(isinstance(leaf, qwix.QArray) for leaf in leaves)


def prepared(
    sharded: ShardedModel, params: Params, by_layer: bool, weights: str | None = None
) -> tuple[ShardedModel, Params]:
    """Returns a model and its parameters in the form that inference reads, one array after the other: what is not
    needed any more of `params` is deleted, so that no two of them are there in both forms.

    Args:
      sharded, params: as they are stored.
      by_layer: whether to take stacked parameters apart, as `ShardedModel.by_layer` has it.
      weights: one of WEIGHTS; None leaves dtypes as they are.

    Raises:
      UserError: the model names no parameter that may be quantised, or programs here take no such dtype.
    """
    check_weights(weights, "weights")
    if by_layer:
        sharded = sharded.by_layer()
        params = sharded.split(params, consume=True)
    if weights is None:
        return sharded, params
    return (wanted := quantized(sharded, weights)), quantize(sharded, wanted, params, weights, consume=True)


def quantized(sharded: ShardedModel, dtype: str, runs: bool = True) -> ShardedModel:
    """Returns the model with parameters as `quantize` makes them; a scale is sharded as its channel is.

    Args:
      sharded: the model, by layer or not.
      dtype: one of WEIGHTS.
      runs: whether its devices are here, so that a program can try whether they take the dtype.

    Raises:
      UserError: the model names no parameter that may be quantised, or compiled programs here take no such dtype.
    """
    if runs:
        _check_backend(sharded, dtype)
    shapes, axes = flatten(sharded.param_shapes), flatten(sharded.axes)
    for path, summed in _summed(sharded).items():

        def shape_of(leaf: jax.ShapeDtypeStruct, names: Names, summed: Names = summed) -> qwix.QArray:
            made: qwix.QArray = jax.eval_shape(_quantizer(dtype, names, summed), leaf)
            return made

        def axes_of(leaf: jax.ShapeDtypeStruct, names: Names, summed: Names = summed) -> qwix.QArray:
            scale = tuple(None if name in summed else name for name in names)
            return dataclasses.replace(shape_of(leaf, names, summed), qvalue=names, scale=scale)

        whole = shapes[path]
        shapes[path] = jax.tree.map(shape_of, whole, axes[path])
        axes[path] = jax.tree.map(axes_of, whole, axes[path])
    return sharded.in_form(unflatten(shapes), unflatten(axes))


def quantize(given: ShardedModel, wanted: ShardedModel, params: Params, dtype: str, consume: bool = False) -> Params:
    """Returns parameters quantised.

    Args:
      given: the model as `params` are.
      wanted: what `quantized` made of it.
      params: in their shards.
      dtype: one of WEIGHTS.
      consume: whether to delete each array once it is quantised, so that no two are there in both forms.
    """
    arrays, axes, shardings = flatten(params), flatten(given.axes), flatten(wanted.param_shardings)
    for path, summed in _summed(given).items():

        def one(array: jax.Array, names: Names, where: qwix.QArray, summed: Names = summed) -> qwix.QArray:
            made: qwix.QArray = _program(dtype, names, summed, where)(array)
            if consume:
                array.delete()
            return made

        arrays[path] = jax.tree.map(one, arrays[path], axes[path], shardings[path])
    return unflatten(arrays)


def _check_backend(sharded: ShardedModel, dtype: str) -> None:
    """Raises UserError where a compiled program takes no array of this dtype: int4 on CPU, before jax 0.12."""
    partitioner, where = sharded.partitioner, sharded.partitioner.replicated
    with partitioner.activate():
        array = jax.jit(lambda: jnp.zeros(2, WEIGHTS[dtype]), out_shardings=where)()
    try:
        partitioner.compile(lambda x: x + x, array, in_shardings=(where,), out_shardings=where)(array)
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise UserError(
            f"weights={dtype}: programs for {jax.default_backend()} take no arrays of {dtype}; use int8"
        ) from error


def _summed(sharded: ShardedModel) -> Mapping[str, Names]:
    found: Mapping[str, Names] = getattr(sharded.model, "summed", dict)()
    if not found:
        raise UserError(
            f"{type(sharded.model).__name__} names no parameter that may be quantised (see Quantizes in "
            "framework/interfaces.py): leave out --weights"
        )
    return found


def _quantizer(dtype: str, names: Names, summed: Names) -> Callable[[jax.Array], qwix.QArray]:
    channels = [axis for axis, name in enumerate(names) if name not in summed]
    options = {"channelwise_axes": channels, "scale_dtype": jnp.float32}
    return functools.partial(qwix.quantize, qtype=WEIGHTS[dtype], **options)


@functools.cache
def _program(dtype: str, names: Names, summed: Names, where: qwix.QArray) -> Callable[[jax.Array], qwix.QArray]:
    return jax.jit(_quantizer(dtype, names, summed), out_shardings=where)
