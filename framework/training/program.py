"""A training run made concrete on devices: shapes, shardings, the compiled step. Shared by every verb that needs it."""

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from meshway.framework.data.prefetch import BatchSizes, TrainingStream
from meshway.framework.data.source import Dataset, DataSource
from meshway.framework.data.vocabulary import Framing, Vocabulary, source_framing
from meshway.framework.errors import UserError
from meshway.framework.interfaces import ArraySpec, Batch, Model, Params, untrained
from meshway.framework.optimizers.optimizers import BoundOptimizer, Optimizer, ParameterAverage
from meshway.framework.partitioning.partitioner import Activations, Layout
from meshway.framework.partitioning.sharded_model import Row, ShardedModel, explain
from meshway.framework.planning.flops import train_flops
from meshway.framework.training.step import (
    GradientRule,
    LossNormalizingFactor,
    SpikeGuard,
    TrainState,
    TrainStep,
    WeightStatistics,
    check_factor,
    check_microbatches,
    init_state,
    plain_gradient,
    rng_impl_of,
    state_axes,
)
from meshway.framework.trees import axis_sizes, flatten, merge, select


class TrainProgram:
    """Model, optimizer and layout with a batch size: everything a step needs but data."""

    def __init__(
        self,
        model: Model,
        optimizer: Optimizer,
        layout: Layout,
        batch_size: int,
        lengths: Mapping[str, int],
        seed: int = 0,
        num_microbatches: int = 1,
        gradient_rule: GradientRule = plain_gradient,
        loss_normalizing_factor: LossNormalizingFactor = "NUM_REAL_TARGET_TOKENS",
        average: ParameterAverage | None = None,
        spikes: SpikeGuard | None = None,
        statistics: WeightStatistics | None = None,
        use_hardware_rng: bool | str = False,
        devices: Sequence[jax.Device] | None = None,
    ):
        """`batch_size` counts examples over all processes; `lengths` are tokens by task feature; `devices` may be those
        of machines that are not there, to plan for them, and by default are all there are.

        `loss_normalizing_factor` is T5X's: by default gradients are those of the mean over weighted target tokens of
        the global batch; None is those of the sum, as T5X's recipes have it.

        `use_hardware_rng` is T5X's too, for dropout: True draws it by jax's 'unsafe_rbg', the generator of the device,
        which costs less on TPUs but draws otherwise on another mesh or platform; or the name of another generator.
        Fresh parameters are always drawn by jax's default one.

        Raises:
          UserError: the layout does not fit the devices, the batch is not divisible, a length is missing, the factor
            is a number that is not positive, or there is no such generator.
        """
        check_microbatches(batch_size, num_microbatches)
        check_factor(loss_normalizing_factor)
        self.model, self.seed, self.batch_size, self.lengths = model, seed, batch_size, dict(lengths)
        self.num_microbatches = num_microbatches
        self.sharded = ShardedModel(model, layout, devices)
        self.batch = self.sharded.batch(batch_size, self.lengths)
        self.partitioner, self.axes, self.param_shapes = (
            self.sharded.partitioner,
            self.sharded.axes,
            self.sharded.param_shapes,
        )
        self.batch_spec, self.batch_shardings = self.batch.spec, self.batch.shardings
        self.optimizer_name = _name(optimizer.transform)
        self.optimizer: BoundOptimizer = optimizer.bind(self.axes, self.param_shapes, untrained(model))
        self.average = average if average and average.decay is not None else None
        self._spikes = spikes if spikes and (spikes.loss, spikes.grad_norm) != (None, None) else None
        if statistics := statistics if statistics and statistics.every else None:
            statistics.members(self.optimizer.trainable)  # raises for a pattern that matches nothing
        options = (
            gradient_rule,
            loss_normalizing_factor,
            self.average,
            self._spikes,
            statistics,
            rng_impl_of(use_hardware_rng),
        )
        self._step = TrainStep(model, self.optimizer, seed, num_microbatches, *options)

    def of_size(self, batch_size: int) -> "TrainProgram":
        """Returns the program of the same state with batches of another size, and with the least number of equal
        microbatches that are no larger than this one's and whose rows the devices of the batch share evenly.

        Raises:
          UserError: the batch is not divisible over the mesh.
        """
        if batch_size == self.batch_size:
            return self
        program = copy.copy(self)
        for name in ("flops", "_traced_loss"):  # of batches
            vars(program).pop(name, None)
        program.batch_size = batch_size
        try:
            program.batch = self.sharded.batch(batch_size, self.lengths)
        except UserError as error:
            raise UserError(f"BATCH_SIZE_SCHEDULE: {error}") from error
        largest = self.batch_size // self.num_microbatches
        name, spec = next(iter(program.batch.spec.items()))
        parts = batch_size // program.batch.shardings[name].shard_shape(spec.shape)[0]
        counts = [n for n in range(1, batch_size + 1) if batch_size % n == 0 and batch_size // n <= largest]
        # Where none divides, a rule's next alternative may do; if there is none, the trace says what does not fit.
        program.num_microbatches = next((n for n in counts if batch_size // n % parts == 0), counts[0])
        program.batch_spec, program.batch_shardings = program.batch.spec, program.batch.shardings
        program._step = dataclasses.replace(self._step, num_microbatches=program.num_microbatches)
        return program

    @functools.cached_property
    def state_shapes(self) -> TrainState:
        """ShapeDtypeStructs of the state."""
        return jax.eval_shape(self._init_state, jax.random.key(self.seed))

    @functools.cached_property
    def resolved_state(self) -> TrainState:
        """For every leaf of the state a `Resolution`: where the rules put it, and which of them said so."""
        axes, shapes = self._state_axes(), self.state_shapes
        names = [field.name for field in dataclasses.fields(TrainState)]
        return TrainState(
            *[self.partitioner.resolve(getattr(axes, name), getattr(shapes, name), name) for name in names]
        )

    @functools.cached_property
    def state_shardings(self) -> TrainState:
        """A sharding for every leaf of the state."""
        return self.partitioner.shardings(self.resolved_state)

    @property
    def abstract_state(self) -> TrainState:
        """The state's shapes with their shardings: what a checkpoint restores onto."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.state_shapes,
            self.state_shardings,
        )

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch's shapes."""
        return self.batch.abstract

    @functools.cached_property
    def num_params(self) -> int:
        """Number of parameters."""
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.param_shapes))

    @functools.cached_property
    def flops(self) -> float:
        """Model FLOPs of one step: three times the matmuls of a forward pass, on no mesh: what a layout adds to them,
        as the idle stages of a pipeline do, is no work of the model's."""
        return train_flops(
            lambda params, batch: self.model.loss(params, batch, None)[0],
            self.param_shapes,
            self.abstract_batch,
        )

    def init(self) -> TrainState:
        """Returns the fresh state, each leaf initialised in its shards; equal on every mesh."""
        key = jax.random.key(self.seed)
        replicated = self.partitioner.replicated
        initialise = self.partitioner.compile(
            self._init_state, key, in_shardings=replicated, out_shardings=self.state_shardings
        )
        return initialise(key)

    def with_average(self, state: TrainState) -> TrainState:
        """Returns a state whose averages, if there are any, begin at its parameters."""
        if self.average is None:
            return state
        begin, trainable = self.average.init, self.optimizer.trainable
        where = self.state_shardings
        begun = self.partitioner.compile(
            lambda params: begin(select(params, trainable)),
            state.params,
            in_shardings=(where.params,),
            out_shardings=where.average,
        )
        return dataclasses.replace(state, average=begun(state.params))

    @property
    def also_refused(self) -> str:
        """What else than infinities a step leaves its update out for, as ", or ..."."""
        return ", or a spike above what SPIKE_LOSS and SPIKE_GRAD_NORM allow," if self._spikes else ""

    def evaluated(self, state: TrainState) -> Params:
        """Returns the parameters that the run's own evaluations read: averaged ones where `average` says so."""
        if self.average is None or not self.average.evaluate:
            return state.params
        return self._averaged(state.params, state.average)

    @functools.cached_property
    def _averaged(self) -> jax.stages.Compiled:
        shapes, where = self.state_shapes, self.state_shardings

        def averaged(params: Params, average: Params) -> Params:
            kept = select(params, flatten(average))
            return merge(params, jax.tree.map(lambda value, own: value.astype(own.dtype), average, kept))

        return self.partitioner.compile(
            averaged,
            shapes.params,
            shapes.average,
            in_shardings=(where.params, where.average),
            out_shardings=where.params,
        )

    def _init_state(self, key: jax.Array) -> TrainState:
        return init_state(self.model, self.optimizer, key, self.average, self._spikes)

    def _state_axes(self) -> Any:
        return state_axes(self.model, self.optimizer, self.average, self._spikes)

    def compile_step(self) -> jax.stages.Compiled:
        """Returns the compiled step, `(state, batch) -> (state, metrics)`, which consumes the state it is given.

        Raises:
          UserError: an activation does not fit the rules, or a rule matched nothing.
        """
        self.trace_loss()
        return self.partitioner.compile(
            self._step,
            self.state_shapes,
            self.abstract_batch,
            in_shardings=(self.state_shardings, self.batch_shardings),
            out_shardings=(self.state_shardings, self.partitioner.replicated),
            donate=(0,),
        )

    def trace_loss(self) -> Activations:
        """Traces the loss of a microbatch without compiling, so that every axis meets its rule.

        Returns:
          what the loss asked of the layout; traced once for a program.

        Raises:
          UserError: one does not, a rule matched nothing, or the model refuses the sizes it is given (ValueError).
        """
        return self._traced_loss

    @functools.cached_property
    def _traced_loss(self) -> Activations:
        fired = {
            field.name: _fired(getattr(self.resolved_state, field.name)) for field in dataclasses.fields(TrainState)
        }
        fired["batch"] = frozenset(name for spec in self.batch_spec.values() for name in spec.axes if name is not None)
        micro = {
            name: jax.ShapeDtypeStruct((leaf.shape[0] // self.num_microbatches, *leaf.shape[1:]), leaf.dtype)
            for name, leaf in self.abstract_batch.items()
        }
        try:
            with self.partitioner.activate() as asked:
                jax.eval_shape(lambda params, batch: self.model.loss(params, batch, None), self.param_shapes, micro)
        except ValueError as error:
            raise UserError(f"{type(self.model).__name__}: {error}") from error
        self.partitioner.check_rules_matched(fired | {"batch": fired["batch"] | asked.names})
        asked.check_products()
        return asked

    def trace_gradients(self) -> Any:
        """Returns the jaxpr of a step's gradients: parameters, batch and number of the step to gradients and metrics.

        Raises:
          UserError: as `trace_loss`.
        """
        self.trace_loss()
        with self.partitioner.activate():
            return jax.make_jaxpr(self._step.gradients)(
                self.param_shapes, self.abstract_batch, jax.ShapeDtypeStruct((), np.int32)
            )

    def shard_batch(self, batch: Batch) -> dict[str, jax.Array]:
        """Puts this process's rows of a batch on its devices."""
        return self.batch.shard(batch)

    def explain(self) -> list[Row]:
        """Returns a row for every tensor of the state and the batch."""
        rows: list[Row] = []
        axes = self._state_axes()
        for field in dataclasses.fields(TrainState):
            rows += explain(
                self.partitioner,
                getattr(axes, field.name),
                getattr(self.state_shapes, field.name),
                field.name,
            )
        batch_axes = {name: spec.axes for name, spec in self.batch_spec.items()}
        return rows + explain(self.partitioner, batch_axes, self.abstract_batch, "batch")

    def synthetic_batch(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Returns a full batch of random tokens, unpacked: what `meshway bench` feeds."""
        random = np.random.default_rng(seed)
        return {name: _synthetic(name, spec, random) for name, spec in self.batch_spec.items()}


def open_data(
    program: TrainProgram,
    data: DataSource,
    schedule: Sequence[tuple[int, int]] = (),
    skipped: Sequence[tuple[int, int]] = (),
) -> tuple[Dataset, dict[str, Vocabulary], Framing | None]:
    """Returns the training stream, and the vocabularies and the framing of its texts, all checked against the model.

    Args:
      program: what is trained.
      data: where it comes from.
      schedule: (last step, examples of a batch up to it), before the program's batch size.
      skipped: (first, last) numbers of batches to leave out.

    Raises:
      UserError: the data cannot be read, or does not fit; a batch is not divisible over the mesh.
    """

    def stream(size: int) -> Dataset:
        sized, of_size = data, program.of_size(size)
        if of_size is not program:
            sized = copy.copy(data)
            sized.batch_size = size
        dataset = sized.train(program.partitioner.process_rows(size))
        check_batch(of_size.batch_spec, dataset.spec())
        return dataset

    dataset = TrainingStream(stream, BatchSizes(program.batch_size, schedule), skipped)
    vocabularies = data.vocabularies()
    check_vocabularies(program, vocabularies)
    return dataset, vocabularies, source_framing(data)


def check_batch(spec: Mapping[str, ArraySpec], given: Mapping[str, tuple[Sequence[int], Any]]) -> None:
    """Compares what the model asks of a batch with what the data gives.

    Raises:
      UserError: a feature is missing, or has another shape.
    """
    missing = sorted(set(spec) - set(given))
    extra = sorted(set(given) - set(spec))
    if missing or extra:
        raise UserError(
            f"the data's features do not fit the model: missing {missing}, not asked for {extra}; "
            "the model file's FEATURE_CONVERTER must belong to its MODEL"
        )
    for name, (shape, _) in given.items():
        if tuple(shape) != tuple(spec[name].shape):
            raise UserError(
                f"batch feature {name}: the data gives {tuple(shape)}, the model asks {tuple(spec[name].shape)}"
            )


def check_vocabularies(program: TrainProgram | ShardedModel, vocabularies: Mapping[str, Vocabulary]) -> None:
    """Compares the data's vocabularies, by task feature, with the model's axis "vocab".

    Raises:
      UserError: a vocabulary has more tokens than the model has entries.
    """
    entries = axis_sizes(program.axes, program.param_shapes, "vocab")
    for feature, vocabulary in vocabularies.items():
        size = vocabulary.size
        if entries and size > min(entries):
            raise UserError(
                f"feature {feature!r} has a vocabulary of {size:,} tokens, and the model has {min(entries):,} entries: "
                f"set VOCAB_SIZE to at least {size} (a multiple of 128 shards well over a mesh)"
            )


def _fired(resolved: Any) -> frozenset[str]:
    """Returns the names whose rules fired for a tree of `Resolution`s."""
    return frozenset(name for leaf in jax.tree.leaves(resolved) for name in leaf.fired)


def _name(factory: Any) -> str:
    """Returns what people call a factory, as 'adamw'; of one made by a call, what was called."""
    factory = getattr(factory, "func", factory)  # of a functools.partial
    return getattr(factory, "__qualname__", type(factory).__name__).partition(".<locals>")[0]


def _synthetic(name: str, spec: ArraySpec, random: np.random.Generator) -> np.ndarray:
    if name.endswith("positions"):
        return np.broadcast_to(np.arange(spec.shape[1], dtype=spec.dtype), spec.shape).copy()
    if name.endswith("tokens"):
        return random.integers(3, 200, spec.shape).astype(spec.dtype)
    if name.endswith(("segment_ids", "weights")):
        return np.ones(spec.shape, spec.dtype)
    return random.standard_normal(spec.shape).astype(spec.dtype)
