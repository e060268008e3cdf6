"""A flax.linen module of one's own as a model, beside those of `module.Network`.

Axis names come from the collection `params_axes` (flax.linen.partitioning.param_with_axes, as in T5X), from boxes
(flax.linen.with_logical_partitioning), or from patterns in the recipe. All else is what any model has: the step, the
optimizers, checkpoints and evaluation know nothing of Linen.
"""

import abc
import dataclasses
import functools
import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from meshway.framework import axes as axes_lib
from meshway.models.losses import CrossEntropy, Metrics, OutputLayer, TokenSpec, text_spec, token_targets
from meshway.models.objectives import Batch, RowDecoding, TargetLoss, image_spec

# What T5X's layers call axes, and what ours do; a name that stands in neither is passed on to the layout's rules.
T5X_AXES: Mapping[str, str | None] = {
    "kv": "head_dim",
    "joined_kv": "heads",
    "abspos_buckets": "positions",
    "mlp_activations": None,
    "stack": None,
}
# Arguments of a module that say whether it trains, and their value while it does.
SWITCHES = {"enable_dropout": True, "train": True, "training": True, "is_training": True, "deterministic": False}

Patterns = Sequence[tuple[str, Sequence[str | None]]]


@dataclasses.dataclass(frozen=True)
class VariableOptions:
    """Those of a model's variables; `Linen` documents them."""

    param_axes: Patterns = ()
    axis_names: Mapping[str, str | None] = dataclasses.field(default_factory=lambda: T5X_AXES)
    collections: Sequence[str] = ()


class Variables(abc.ABC):
    """What Linen calls variables as `params` and `axes`: nested dicts with string keys, beside one of axis names."""

    def __init__(self, name: str, options: VariableOptions):
        """Raises ValueError where a pattern is no regular expression."""
        for pattern, _ in options.param_axes:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"param_axes: {pattern!r} is not a regular expression: {error}") from None
        self._name, self._collections = name, tuple(options.collections)
        self._param_axes, self._axis_names = options.param_axes, options.axis_names

    @abc.abstractmethod
    def initial_variables(self, rng: jax.Array) -> Mapping[str, Any]:
        """Returns the collections of variables as the module makes them."""

    def init(self, rng: jax.Array) -> dict[str, Any]:
        """Returns fresh parameters; mutable collections are beside them, each under its own name."""
        return self._state(unfreeze(meta.unbox(dict(self.initial_variables(rng)))))

    @functools.cached_property
    def _abstract(self) -> dict[str, Any]:
        """The collections of variables as shapes, in the boxes that name their axes."""
        return unfreeze(dict(jax.eval_shape(self.initial_variables, jax.random.key(0))))

    def axes(self) -> dict[str, Any]:
        """Returns the logical axes of each parameter, a tree of the structure of `init`.

        Raises:
          ValueError: a parameter has no axes, or not one for each dimension; a pattern matches none; or the module has
            batch statistics that `collections` does not name.
        """
        variables = self._abstract
        if "batch_stats" in variables and "batch_stats" not in self._collections:
            raise ValueError(
                f"{self._name} has batch statistics: bind linen.Linen.collections = ('batch_stats',), so that steps "
                "update them"
            )
        boxed = flatten_dict(self._state(variables), sep="/")
        sown = flatten_dict(dict(variables.get("params_axes", {})), sep="/")
        unused, found, problems = {pattern for pattern, _ in self._param_axes}, {}, []
        for path, leaf in boxed.items():
            rank, names = meta.unbox(leaf).ndim, self._given(path, unused)
            if names is None:
                names = getattr(leaf, "names", getattr(sown.get(f"{path}_axes"), "names", None))
            if names is None and path.split("/")[0] in self._collections:
                names = (None,) * rank
            if names is None or len(names) != rank:
                said = "none" if names is None else tuple(names)
                problems.append(f"{path} of shape {list(meta.unbox(leaf).shape)} has {said}")
            else:
                found[path] = tuple(name and self._axis_names.get(name, name) for name in names)
        if problems:
            raise ValueError(
                f"parameters of {self._name} need a logical axis name for each dimension: {'; '.join(problems[:3])} "
                f"({len(problems)} such). Declare them with flax.linen.with_logical_partitioning or "
                "param_with_axes, or bind param_axes = [('.*/kernel', ('embed', 'mlp')), ...]"
            )
        if unused:
            raise ValueError(f"param_axes: {sorted(unused)[0]!r} matches no parameter of {self._name}")
        return unflatten_dict(found, sep="/")

    def untrained(self) -> frozenset[str]:
        """Returns the paths of what `init` has beside parameters: variables that the loss itself updates."""
        shapes = self._state(meta.unbox(self._abstract))
        return frozenset(path for path in flatten_dict(shapes, sep="/") if path.split("/")[0] in self._collections)

    def _given(self, path: str, unused: set[str]) -> Sequence[str | None] | None:
        for pattern, names in self._param_axes:
            if re.fullmatch(pattern, path):
                unused.discard(pattern)
                return names
        return None

    def _state(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the parameters, with the mutable collections beside them."""
        others = {name: variables[name] for name in self._collections if name in variables}
        if clash := others.keys() & variables["params"].keys():
            raise ValueError(f"{self._name} has a submodule called as its collection {min(clash)!r}: rename it")
        return {**variables["params"], **others}

    def _split(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns (parameters, the collections beside them)."""
        others = {name: params[name] for name in self._collections if name in params}
        return {name: value for name, value in params.items() if name not in others}, others

    def _rules(self) -> list[tuple[str, Any]]:
        """Returns the layout's rules of activations as flax takes them, for constraints inside the module."""
        rules = []
        for name in (*axes_lib.VOCABULARY, *self._axis_names):
            target = self._axis_names.get(name, name)
            try:
                rules.append((name, (target and axes_lib.mesh_axes(target)) or None))
            except LookupError:  # a name that this layout does not map: an error only if a parameter has it
                continue
        return rules


class LinenNetwork(Variables, TargetLoss):
    """A flax.linen module as pure functions, and the loss of the logits that its call returns; a subclass adds
    `batch_spec` and `targets`."""

    def __init__(
        self,
        module: nn.Module,
        lengths: Mapping[str, int],
        arguments: Mapping[str, str],
        variables: "VariableOptions",
        criterion: CrossEntropy,
    ):
        """Raises ValueError where an argument of the module's call has no value; `Linen` documents the arguments."""
        Variables.__init__(self, type(module).__name__, variables)
        TargetLoss.__init__(self, criterion)
        self._module, self._example = module, self.batch_spec(1, lengths)
        self._arguments, self._switches = self._read_arguments(dict(arguments))

    @abc.abstractmethod
    def batch_spec(self, batch_size: int, lengths: Mapping[str, int]) -> dict[str, TokenSpec]:
        """Returns the features of a batch."""

    def initial_variables(self, rng: jax.Array) -> Mapping[str, Any]:
        """Returns what the module's `init` makes for a batch of one row of ones, with `rng` for every stream."""
        example = {name: jnp.ones(spec.shape, spec.dtype) for name, spec in self._example.items()}
        return self._module.init(rng, **self._call(example, training=False))

    def hidden(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, OutputLayer]:
        """Returns the logits, float32 [batch, ..., classes], and an output layer that leaves them as they are.

        Raises:
          ValueError: the module returns something else.
        """
        return self._apply(params, batch, rng)[0], lambda logits: logits

    def loss_and_updates(
        self, params: dict[str, Any], batch: Batch, rng: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, Metrics, dict[str, Any]]:
        """Returns what `loss` does, and new values of the variables of `untrained`, a part of the tree of `init`."""
        logits, updates = self._apply(params, batch, rng)
        return *self._criterion(lambda logits: logits, logits, *self.targets(batch)), updates

    def observe(self, params: dict[str, Any], batch: Batch, names: Collection[str]) -> dict[str, jax.Array]:
        """Returns what submodules return in the pass that `score` makes, by their path, [batch, length, ...].

        Raises:
          ValueError: a path that the module does not have, or whose output is not one array.
        """
        trained, others = self._split(params)
        call = self._call(batch, training=False)
        with nn.logical_axis_rules(self._rules()):
            _, found = self._module.apply(
                {"params": trained, **others}, **call, capture_intermediates=True, mutable=["intermediates"]
            )
        flat = flatten_dict(unfreeze(found["intermediates"]), sep="/")
        values = {path.removesuffix("/__call__"): value[0] for path, value in flat.items() if len(value) == 1}
        if missing := [name for name in names if not isinstance(values.get(name), jax.Array)]:
            raise ValueError(f"no intermediate {missing[0]!r}; {self._name} has {', '.join(sorted(values))}")
        return {name: values[name] for name in names}

    def _apply(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the logits, and new values of the collections where the module trains."""
        trained, others = self._split(params)
        mutable = [] if rng is None else list(self._collections)
        call, rngs = self._call(batch, training=rng is not None), {} if rng is None else {"dropout": rng}
        with nn.logical_axis_rules(self._rules()):
            made, updates = self._module.apply({"params": trained, **others}, **call, rngs=rngs, mutable=mutable)
        if not isinstance(made, jax.Array) or made.ndim != self.targets(batch)[0].ndim + 1:
            raise ValueError(
                f"{self._name} must return the logits of each target, [batch, ..., classes]; it returned "
                f"{jax.tree.map(jnp.shape, made)}"
            )
        return made.astype(jnp.float32), unfreeze(updates)

    def _call(self, batch: Batch, training: bool) -> dict[str, Any]:
        given = {argument: batch[feature] for argument, feature in self._arguments.items()}
        return given | {name: SWITCHES[name] == training for name in self._switches}

    def _read_arguments(self, renamed: dict[str, str]) -> tuple[dict[str, str], list[str]]:
        """Returns (argument of the call -> feature, its switches)."""
        parameters = dict(list(inspect.signature(type(self._module).__call__).parameters.items())[1:])
        for argument, feature in renamed.items():
            if argument not in parameters or feature not in self._example:
                what, wrong = ("argument", argument) if argument not in parameters else ("feature", feature)
                known = list(parameters if argument not in parameters else self._example)
                raise ValueError(f"arguments: there is no {what} {wrong!r}; there are {', '.join(known)}")
        given = {name: name for name in parameters if name in self._example} | renamed
        switches = [name for name in parameters if name in SWITCHES and name not in given]
        for name, parameter in parameters.items():
            filled = name in given or name in switches or parameter.default is not parameter.empty
            if not filled and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise ValueError(
                    f"argument {name!r} of {self._name}.__call__ is no feature of a batch ({', '.join(self._example)})"
                    f": bind arguments = {{{name!r}: '{next(iter(self._example))}'}}, or give it a default"
                )
        return given, switches


class Linen(RowDecoding, LinenNetwork):
    """Maximum likelihood of targets for a flax.linen module whose call returns their logits, [batch, length, vocab].

    Its call is given the features of a batch by name: `decoder_input_tokens`, `decoder_segment_ids`,
    `encoder_input_tokens` and so on, as T5X's modules have them; and `train` or `deterministic` (see `SWITCHES`).
    Dropout draws from the stream 'dropout'. Constraints of activations inside it (flax's with_logical_constraint)
    follow the layout's rules.
    """

    def __init__(
        self,
        module: nn.Module,
        lengths: Mapping[str, int],
        encoder: bool = False,
        prefix: bool = False,
        arguments: Mapping[str, str] = {},
        param_axes: Patterns = (),
        axis_names: Mapping[str, str | None] = T5X_AXES,
        collections: Sequence[str] = (),
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
    ):
        """Args:
          module: the module, unbound.
          lengths: tokens by task feature, for the shapes with which the module makes its parameters.
          encoder: whether batches hold inputs apart from targets; else both are in a decoder's rows.
          prefix: of a decoder, whether inputs see each other both ways: the batch has `decoder_prefix_mask`.
          arguments: argument of the module's call -> feature of a batch, where their names differ.
          param_axes: (regex over the whole path of a parameter, its axis names), before what the module says itself.
          axis_names: the module's name of an axis -> the layout's.
          collections: mutable collections that a training step updates, such as 'batch_stats'; kept beside parameters.
          z_loss, label_smoothing: see `losses.CrossEntropy`.

        Raises:
          ValueError: an argument of the module's call has no value, or a pattern of `param_axes` is no regex.
        """
        self._encoder, self._prefix = encoder, prefix
        options = VariableOptions(param_axes, axis_names, collections)
        super().__init__(module, lengths, arguments, options, CrossEntropy(z_loss, label_smoothing))

    def batch_spec(self, batch_size: int, lengths: Mapping[str, int]) -> dict[str, TokenSpec]:
        """Returns the features of a batch, those of T5X's converters."""
        return text_spec(batch_size, lengths, self._encoder, self._prefix)

    def targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns (target tokens, weights), [batch, length] each."""
        return token_targets(batch, "decoder")


class LinenClassifier(LinenNetwork):
    """Maximum likelihood of each image's label for a flax.linen module whose call, given `image` [batch, ...], returns
    the logits of its classes, [batch, classes]. Batches are those of `objectives.Classifier`."""

    def __init__(
        self,
        module: nn.Module,
        image_shape: Sequence[int],
        arguments: Mapping[str, str] = {},
        param_axes: Patterns = (),
        axis_names: Mapping[str, str | None] = T5X_AXES,
        collections: Sequence[str] = (),
        label_smoothing: float = 0.0,
    ):
        """`Linen` documents the arguments."""
        self._image_shape = tuple(image_shape)
        options = VariableOptions(param_axes, axis_names, collections)
        super().__init__(module, {}, arguments, options, CrossEntropy(label_smoothing=label_smoothing))

    def batch_spec(self, batch_size: int, lengths: Mapping[str, int]) -> dict[str, TokenSpec]:
        """Returns the features of a batch; `lengths` are not read."""
        return image_spec(batch_size, self._image_shape)

    def targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns (labels, weights), [batch] each."""
        return batch["label"], batch["loss_weights"]

    def score(self, params: dict[str, Any], batch: Batch) -> jax.Array:
        """Returns the log-probability of each label, float32 [batch, 1], 0 on padding."""
        return super().score(params, batch)[:, None]
