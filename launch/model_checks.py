"""Checks of a model, for the tests of one's own: `check_model` of `meshway.launch.testing`."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

from meshway.framework.errors import UserError, did_you_mean, first_line
from meshway.framework.inference.decoding import decoding_model, teacher_forced
from meshway.framework.interfaces import ArraySpec, Batch, Decodes, Model, Params
from meshway.framework.partitioning.sharded_model import ShardedModel
from meshway.framework.trees import flatten
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config

CHECKS = ("parameters", "loss", "order", "halves", "padding", "segments", "score", "gradients", "decoding")


def check_model(
    recipe: str,
    bindings: Sequence[str] = (),
    lengths: Mapping[str, int] | None = None,
    batch_size: int | None = None,
    skip: Collection[str] = (),
    tolerance: float = 1e-4,
    seed: int = 0,
) -> None:
    """Checks the model of a recipe, on random batches.

    'parameters': they are finite, and the layout knows their axes. 'loss': it is finite. 'halves': a batch's loss and
    weight are the sums of its halves'. 'order': rows may change places. 'padding': what lies there changes nothing.
    'segments': examples packed in a row score as they do alone. 'score': the cross-entropy is made of it. 'gradients':
    on the recipe's layout, where it has several devices, they are those of one. 'decoding': a token after the other,
    by prefill and decode, each has the log-probability that `score` gives.

    Args:
      recipe: a gin file, or the name of a shipped one.
      bindings: more of it, as after `--gin.`: 'D_MODEL=32'.
      lengths: TASK_FEATURE_LENGTHS; None for the recipe's, else 16 tokens of inputs and targets.
      batch_size: rows, an even number; None for 4, or one for each device.
      skip: checks of CHECKS to leave out, as 'segments' of a model that is never given packed rows.
      tolerance: how far a number may be off, relative to the largest of those beside it.
      seed: of parameters and batches.

    Raises:
      AssertionError: something is wrong with it; names the check.
    """
    for name in skip:
        require(
            name in CHECKS, f"skip: there is no check {name!r}; they are {list(CHECKS)}{did_you_mean(name, CHECKS)}"
        )
    with asserted(f" (recipe {recipe})"):
        alone, room = _sharded(recipe, (*bindings, "LAYOUT='single'"), lengths)
        meshed, _ = _sharded(recipe, bindings, lengths)
        size = batch_size or max(4, meshed.partitioner.mesh.size)
        spec = meshed.batch(size, room).spec
        with raising(f"{type(alone.model).__name__} (recipe {recipe})"):
            if "parameters" not in skip:
                _check_axes(meshed, spec)
            # Under no layout: on one device, where nothing is constrained.
            given = _Given(alone.model, _parameters(alone.model, seed), spec, _batch(spec, seed), tolerance)
            for name in CHECKS[1:]:
                if name not in (*skip, "gradients"):
                    getattr(given, name)()
            if "gradients" not in skip and meshed.partitioner.mesh.size > 1:
                _check_gradients(given, meshed, size, room)


def _sharded(
    recipe: str, bindings: Sequence[str], lengths: Mapping[str, int] | None
) -> tuple[ShardedModel, Mapping[str, int]]:
    """Returns a recipe's model under its layout, and its lengths."""

    def load(*more: str) -> config.Recipe:
        given = (*bindings, *more)
        invocation = Invocation("infer", "opened", gin_files=(recipe,), bindings=given)
        return config.load(invocation, import_unreferenced=False)

    known = None if lengths else load().macro("TASK_FEATURE_LENGTHS")
    room = dict(lengths or known or {"inputs": 16, "targets": 16})
    parts = load(f"TASK_FEATURE_LENGTHS={room}").build("infer.opened")
    return ShardedModel(parts["model"], parts["layout"]), room


def _parameters(model: Model, seed: int) -> Params:
    """Returns fresh parameters on the host."""
    params = jax.device_get(jax.jit(model.init)(jax.random.key(seed)))
    for name, value in flatten(params).items():
        require(np.isfinite(value).all(), f"parameters: {name} is not finite when it is initialised")
    return cast(Params, params)


def _batch(spec: Mapping[str, ArraySpec], seed: int) -> dict[str, np.ndarray]:
    """Returns a batch of random tokens, or pixels: one example a row, without padding."""
    random = np.random.default_rng(seed)
    found = {}
    for name, each in spec.items():
        values: Any
        if name.endswith("positions"):
            values = np.broadcast_to(np.arange(each.shape[1]), each.shape)
        elif name.endswith(("segment_ids", "weights")):
            values = np.ones(each.shape)
        elif name.endswith("mask"):
            values = np.zeros(each.shape)
        elif np.dtype(each.dtype).kind in "iu":
            values = (
                random.integers(3, 60, each.shape) if name.endswith("tokens") else random.integers(0, 2, each.shape)
            )
        else:
            values = random.standard_normal(each.shape)
        found[name] = np.array(values, each.dtype)
    if "decoder_input_tokens" in found:
        found["decoder_input_tokens"] = _shifted(found["decoder_target_tokens"])
    return found


def _shifted(tokens: np.ndarray) -> np.ndarray:
    """Returns what a decoder reads where it is to predict `tokens` [rows, length]."""
    return np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]


@dataclasses.dataclass
class _Given:
    """A model with what its checks need; each is a method that raises AssertionError."""

    model: Model
    params: Params
    spec: Mapping[str, ArraySpec]
    batch: dict[str, np.ndarray]
    tolerance: float

    def __post_init__(self) -> None:
        self._loss: Callable[..., Any] = jax.jit(lambda params, batch: self.model.loss(params, batch, None))
        self._score: Callable[..., Any] = jax.jit(self.model.score)
        self.sides = [name.removesuffix("segment_ids") for name in self.spec if name.endswith("segment_ids")]

    def sums(self, batch: Batch) -> np.ndarray:
        """Returns (summed loss, summed weight)."""
        return np.array(jax.device_get(self._loss(self.params, batch)[:2]), np.float64)

    def scores(self, batch: Batch) -> np.ndarray:
        """Returns log-probabilities [rows, length]."""
        return np.asarray(self._score(self.params, batch))

    def close(self, found: Any, wanted: Any, message: str) -> None:
        """Compares numbers, and says by how much the farthest is off."""
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        require(found.shape == wanted.shape, f"{message}: shape {list(found.shape)}, not {list(wanted.shape)}")
        off = np.abs(found - wanted)
        bound = self.tolerance * max(1.0, float(np.abs(wanted).max(initial=0.0)))
        if not (off <= bound).all():
            at = np.unravel_index(int(np.argmax(np.where(np.isnan(off), np.inf, off))), off.shape)
            place = f", row {at[0]}" + (f", place {at[1]}" if len(at) > 1 else "") if at else ""
            raise AssertionError(f"{message}: {found[at]:.6g} instead of {wanted[at]:.6g}{place}")

    def loss(self) -> None:
        total, weight = self.sums(self.batch)
        require(np.isfinite([total, weight]).all() and weight > 0, f"loss: it is {total}, of a weight of {weight}")

    def halves(self) -> None:
        half = len(next(iter(self.batch.values()))) // 2
        parts = [{name: x[rows] for name, x in self.batch.items()} for rows in (slice(half), slice(half, None))]
        found = self.sums(parts[0]) + self.sums(parts[1])
        message = "halves: (loss, weight) of the halves of a batch do not add up to the whole's; they must be sums"
        self.close(found, self.sums(self.batch), message)

    def order(self) -> None:
        turned = {name: x[::-1] for name, x in self.batch.items()}
        self.close(self.sums(turned), self.sums(self.batch), "order: (loss, weight) depend on the order of rows")
        self.close(self.scores(turned)[::-1], self.scores(self.batch), "order: scores depend on the rows beside them")

    def padding(self) -> None:
        cut = {name: x.copy() for name, x in self.batch.items()}
        padded = cut.copy()
        for name, x in cut.items():
            if self.sides and name.endswith(("segment_ids", "weights", "mask")):
                x[:, -(x.shape[1] // 3) :] = 0
            elif not self.sides and name.endswith("weights"):
                x[-1:] = 0
        for name, x in cut.items():
            if name.endswith(("segment_ids", "weights", "mask", "positions")):
                continue
            padded[name] = x.copy()
            where = np.s_[:, -(x.shape[1] // 3) :] if self.sides else np.s_[-1:]
            padded[name][where] = 1 if not name.endswith("tokens") else 61 - x[where] // 2
        message = "padding: (loss, weight) depend on what lies where segment_ids and weights are 0"
        self.close(self.sums(padded), self.sums(cut), message)

    def segments(self) -> None:
        if not self.sides:
            return
        packed = {name: x.copy() for name, x in self.batch.items()}
        halves = {side: self.spec[f"{side}segment_ids"].shape[1] // 2 for side in self.sides}
        for side, half in halves.items():
            packed[f"{side}segment_ids"][:, half:] = 2
            packed[f"{side}positions"][:, half:] -= half
            if f"{side}input_tokens" in packed and f"{side}target_tokens" in packed:
                packed[f"{side}input_tokens"][:, half] = 0  # what a decoder starts from
        together = self.scores(packed)
        for first in (True, False):
            alone = {name: np.zeros_like(x) for name, x in packed.items()}
            for side, half in halves.items():
                for name in (name for name in packed if name.startswith(side)):
                    part = packed[name][:, :half] if first else packed[name][:, half:]
                    alone[name][:, : part.shape[1]] = np.minimum(part, 1) if name.endswith("segment_ids") else part
            half = together.shape[1] // 2
            found = together[:, :half] if first else together[:, half:]
            where = "after" if first else "before"
            message = f"segments: an example's scores depend on that {where} it in a packed row"
            self.close(found, self.scores(alone)[:, : found.shape[1]], message)

    def score(self) -> None:
        metrics = self._loss(self.params, self.batch)[2]
        if "cross_entropy" in metrics:
            entropy = float(metrics["cross_entropy"][0])
            self.close(-self.scores(self.batch).sum(), entropy, "score: it does not add up to the metric cross_entropy")

    def decoding(self) -> None:
        if not all(hasattr(self.model, name) for name in ("prefill", "decode")):
            return
        case = TeacherForced.of(self.batch, prefix="decoder_prefix_mask" in self.batch)
        found = case.through_cache(decoding_model(self.model), self.params)
        found = np.take_along_axis(found, case.targets[..., None], axis=2)[..., 0]
        wanted = np.take_along_axis(self.scores(case.batch), case.places, axis=1)
        message = "decoding: by prefill and decode a token has another log-probability than by score"
        self.close(np.where(case.real, found, 0), np.where(case.real, wanted, 0), message)


def _check_axes(meshed: ShardedModel, spec: Mapping[str, ArraySpec]) -> None:
    """Checks that each parameter has a name for each dimension, and that the layout has a rule for each of these, and
    for those of activations."""
    axes, shapes = flatten(meshed.axes), flatten(meshed.param_shapes)
    for name in sorted(axes.keys() ^ shapes.keys()):
        lacking, others = ("axes()", axes) if name in shapes else ("init()", shapes)
        raise AssertionError(f"parameters: {lacking} lacks {name}, which the other has{did_you_mean(name, others)}")
    for name, leaf in shapes.items():
        require(len(axes[name]) == leaf.ndim, f"parameters: {name} has shape {list(leaf.shape)} and axes {axes[name]}")
    _ = meshed.param_shardings  # names the axis that no rule knows
    with meshed.partitioner.activate():
        abstract = {name: jax.ShapeDtypeStruct(each.shape, each.dtype) for name, each in spec.items()}
        jax.eval_shape(lambda params, batch: meshed.model.loss(params, batch, None), meshed.param_shapes, abstract)


def _check_gradients(given: _Given, meshed: ShardedModel, size: int, room: Mapping[str, int]) -> None:
    """Compares gradients on the mesh with those on one device, leaf by leaf."""

    def gradients(model: Model, params: Params, batch: Batch) -> dict[str, np.ndarray]:
        return flatten(jax.device_get(jax.jit(jax.grad(lambda params: model.loss(params, batch, None)[0]))(params)))

    wanted = gradients(given.model, given.params, given.batch)
    placed = jax.device_put(given.params, meshed.param_shardings)
    with meshed.partitioner.activate():
        found = gradients(meshed.model, placed, meshed.batch(size, room).shard(given.batch))
    mesh = dict(meshed.partitioner.mesh.shape)
    for name, each in wanted.items():
        given.close(found[name], each, f"gradients: that of {name} on the mesh {mesh} is not that of one device")


@dataclasses.dataclass(frozen=True)
class TeacherForced:
    """A batch whose targets are fed one by one, and what of it is read first.

    Attributes:
      batch: rows in full.
      prompt: what a prefill reads of them.
      targets: int32 [rows, steps], what is then fed.
      places: int32 [rows, steps], where each of the targets is predicted in the full row.
      real: bool [rows, steps], whether the row goes so far.
    """

    batch: dict[str, np.ndarray]
    prompt: dict[str, np.ndarray]
    targets: np.ndarray
    places: np.ndarray
    real: np.ndarray

    @classmethod
    def of(cls, given: Batch, prefix: bool = False) -> "TeacherForced":
        """Returns rows of a batch of one example each. Prompts have 1, 2 ... 8 tokens, from which each row goes on to
        its end; encoders' inputs are of different lengths. With `prefix` a prompt's tokens see each other both ways."""
        batch = {name: np.array(x) for name, x in given.items()}
        tokens = batch["decoder_target_tokens"]
        rows, length = tokens.shape
        batch["decoder_input_tokens"] = _shifted(tokens)
        if "encoder_segment_ids" in batch:
            inputs = batch["encoder_segment_ids"]
            inputs[:] = np.arange(inputs.shape[1]) < (3 + 5 * np.arange(rows) % 20)[:, None]
            places = np.broadcast_to(np.arange(length), tokens.shape)
            return cls(batch, batch, tokens, places, places >= 0)
        prompts = (1 + np.arange(rows) % min(8, length))[:, None]
        read = (np.arange(length) < prompts).astype(np.int32)
        if prefix:
            batch["decoder_prefix_mask"] = read
        prompt = batch | {"decoder_segment_ids": read, "decoder_input_tokens": batch["decoder_input_tokens"] * read}
        places = prompts - 1 + np.arange(length)
        real, places = places < length, np.minimum(places, length - 1)
        return cls(batch, prompt, np.take_along_axis(tokens, places, axis=1), places, real)

    def through_cache(self, model: Decodes, params: Params, prompt: Batch | None = None) -> np.ndarray:
        """Returns the log-probability of every token at each target's place, one step of decoding for each target,
        float32 [rows, steps, vocab]; `prompt` as it lies on devices, if it does."""
        decode = jax.jit(functools.partial(teacher_forced, model))
        return np.asarray(decode(params, self.prompt if prompt is None else prompt, self.targets))


def require(condition: Any, message: str) -> None:
    """Raises AssertionError, under `python -O` too."""
    if not condition:
        raise AssertionError(message)


@contextlib.contextmanager
def asserted(where: str = "", name: str = "", shown: str = "") -> Iterator[None]:
    """Makes a UserError an AssertionError, with `shown` in place of `name`."""
    try:
        yield
    except UserError as error:
        message = str(error).replace(name, shown) if name else str(error)
        raise AssertionError(message if shown and shown in message else f"{message}{where}") from error


@contextlib.contextmanager
def raising(what: str) -> Iterator[None]:
    """Makes whatever a user's code raises an AssertionError that says whose it was."""
    try:
        yield
    except (AssertionError, UserError):
        raise
    except Exception as error:
        raise AssertionError(f"{what} raises {type(error).__name__}: {first_line(error)}") from error
