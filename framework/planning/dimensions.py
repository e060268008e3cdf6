"""The sizes of a recipe's model, read from how its loss uses its parameters: nothing is assumed of its classes but
that an encoder's parameters lie under `encoder/`."""

import math
from collections.abc import Mapping, Sequence

import jax

from meshway.framework.errors import UserError
from meshway.framework.interfaces import Model, Params
from meshway.framework.planning.cost import Transformer
from meshway.framework.planning.products import Product, Uses, find_uses, weights_of

_ENCODER = "encoder/"


def transformer_of(model: Model, lengths: Mapping[str, int]) -> tuple[Transformer, int]:
    """Returns a model's sizes, and how many parameters it has in all.

    Args:
      lengths: tokens by task feature, of a loss that is traced; any that the model takes.

    Raises:
      UserError: it is no dense transformer whose layers are alike, or it does not take the lengths.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    uses = _uses(model, shapes, lengths)
    experts = [product.weight.path for product in uses.products if "expert" in product.weight.names]
    if experts:
        raise UserError(f"{experts[0]}: costs of mixtures of experts are not estimated; those of dense layers are")
    encoder = [product for product in uses.products if product.weight.path.startswith(_ENCODER)]
    decoder = [product for product in uses.products if not product.weight.path.startswith(_ENCODER)]
    sizes = _stack(decoder)
    if encoder:
        sizes["encoder_layers"] = _stack(encoder, decodes=False)["layers"]
    tables = {lookup.weight.path for lookup in uses.lookups if "vocab" in lookup.weight.names}
    logits = {product.weight.path for product in decoder if "vocab" in product.weight.names}
    found = Transformer(**sizes, tied=bool(tables & logits))  # type: ignore[arg-type]  # numbers, and two truths
    return found, sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _uses(model: Model, shapes: Params, lengths: Mapping[str, int]) -> Uses:
    try:
        batch = {
            name: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for name, spec in model.batch_spec(1, lengths).items()
        }
        traced = jax.make_jaxpr(lambda params, batch: model.loss(params, batch, None)[0])(shapes, batch)
    except ValueError as error:
        raise UserError(f"{type(model).__name__}: {error}") from error
    return find_uses(traced, weights_of(shapes, model.axes()))


def _stack(products: Sequence[Product], decodes: bool = True) -> dict[str, int]:
    """Returns the sizes of a stack of layers, of a decoder or an encoder, by the names that `Transformer` has for them.

    Raises:
      UserError: a part of a transformer is not there, or there are layers of several sizes.
    """
    into = [product for product in products if _names(product, product.kept) >= {"mlp"}]
    back = [product for product in products if _names(product, product.contracted) >= {"mlp"}]
    queries = [product for product in products if _names(product, product.kept) >= {"heads", "head_dim"}]
    keys = [product for product in products if _names(product, product.kept) >= {"kv_heads", "head_dim"}]
    logits = [product for product in products if _names(product, product.kept) >= {"vocab"}]
    parts = {"mlp": back, "heads": queries, "kv_heads": keys} | ({"vocab": logits} if decodes else {})
    if missing := [name for name, found in parts.items() if not found]:
        raise UserError(
            f"the loss multiplies no weight of a decoder along {' and '.join(missing)}: layouts are chosen for "
            "transformers that decode"
        )
    layers = sum(product.times for product in back)
    inputs = {id(product.value) for product in queries}
    return {
        "layers": layers,
        "d_model": _size(back, "embed"),
        "d_ff": _size(back, "mlp"),
        "num_heads": _size(queries, "heads"),
        "num_kv_heads": _size(keys, "kv_heads"),
        "head_dim": _size(queries, "head_dim"),
        "vocab_size": _size(logits, "vocab") if decodes else 0,
        "gated": sum(product.times for product in into) == 2 * layers,
        "parallel": all(id(product.value) in inputs for product in into),
    }


def _names(product: Product, dims: Sequence[int]) -> set[str | None]:
    return {product.weight.names[dim] for dim in dims}


def _size(products: Sequence[Product], name: str) -> int:
    """Returns the size that an axis has in all of these weights."""
    found = {
        product.weight.path: size
        for product in products
        for axis, size in zip(product.weight.names, product.weight.shape, strict=True)
        if axis == name
    }
    if len(set(found.values())) != 1:
        listed = ", ".join(f"{path} ({size})" for path, size in found.items())
        raise UserError(
            f"layers are not alike along {name!r}: {listed}" if found else f"no weight has an axis {name!r}"
        )
    return next(iter(found.values()))
