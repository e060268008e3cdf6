"""Starting from another run's parameters: ordered renames, an explicit list of parameters left at their initial value,
layers in another pattern, and experts made of dense layers."""

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from meshway.framework.axes import Names
from meshway.framework.checkpoints.manager import Checkpoints, find_checkpoint
from meshway.framework.checkpoints.sources import (
    RESIZES,
    Schema,
    Shape,
    Source,
    VocabularyChange,
    names_in,
    vocabulary_change,
)
from meshway.framework.distributed import processes
from meshway.framework.errors import UserError, did_you_mean, nearest_names
from meshway.framework.files import local_path
from meshway.framework.interfaces import Axes, Params
from meshway.framework.trees import block_of, check_pattern, flatten, map_paths, pattern_lengths, unflatten

if TYPE_CHECKING:
    from meshway.framework.conversion.values import Values


@dataclasses.dataclass(frozen=True)
class Initial:
    """The source of a fresh run's parameters; a run that has a checkpoint of its own does not use it.

    `path` is a run directory or one of its checkpoints; `step` None means the latest. Or it is a Hugging Face
    directory or a checkpoint of T5X or Mesh-TensorFlow (`.../model.ckpt-1000000`), read directly into the shards: the
    recipe must be that model's, as `meshway convert` writes it. None is no source.

    `renames` are ordered (pattern, replacement): a parameter's name is looked up in the checkpoint under the
    replacement of the first pattern that matches it in full, else under its own name. `left_at_init` are patterns of
    parameters that keep their initial values; any other parameter must be found, with its shape.

    `resize` lets a vocabulary have another size than the checkpoint's: parameters with the axis 'vocab' (embeddings,
    logits ...) keep the entries that they have, bit for bit, and new ones are the 'mean' of those or stay 'fresh'.
    'shrink' drops those beyond the model's vocabulary. With None another size is an error.

    `optimizer_state` takes the optimizer's state too, which must be that of the recipe's optimizer (of a T5X
    checkpoint, Adafactor's), with parameters as they are; without it the state is fresh. `count_on` lets steps go on
    from the checkpoint's, and schedules with them, as T5X does; without it they start from 0 (see `continuation`).

    `averaged` takes the averages of parameters that the run kept (EMA_DECAY) instead of them.

    Two more let a mixture of experts start from a dense model (sparse upcycling, Komatsuzaki et al. 2022, section 2):

    - `by_depth`: a stack whose pattern of blocks is n times as long as the checkpoint's takes layers by depth: block j
      of the pattern gets layers j, n + j, 2n + j, ..., whatever block index the renamed name has.
    - `repeat_along`: axes that a parameter of the checkpoint may lack, such as 'expert': its values are repeated.
    """

    path: str | None
    step: int | None = None
    renames: Sequence[tuple[str, str]] = ()
    left_at_init: Sequence[str] = ()
    by_depth: bool = False
    repeat_along: Sequence[str] = ()
    resize: str | None = None
    optimizer_state: bool = False
    count_on: bool = False
    averaged: bool = False

    def __post_init__(self) -> None:
        if self.path is not None:
            local_path(self.path)  # checked now: parameters are first read after the step was compiled
        elif changed := self._changed({"path"}):
            raise UserError(
                f"Initial.{changed[0]} is set, and there is nothing that the run starts from: bind "
                "INITIAL_CHECKPOINT_PATH, or mapping.Initial.path"
            )
        for pattern in (pattern for pattern, _ in self.renames):
            check_pattern(pattern, "Initial.renames")
        for pattern in self.left_at_init:
            check_pattern(pattern, "Initial.left_at_init")
        if self.resize is not None and self.resize not in RESIZES:
            near = did_you_mean(str(self.resize), RESIZES) or f"; it is None or one of {', '.join(RESIZES)}"
            raise UserError(f"Initial.resize = {self.resize!r} is not a way to resize a vocabulary{near}")

        if self.optimizer_state and (changed := self._changed({"path", "step", "count_on", "optimizer_state"})):
            raise UserError(
                f"Initial.optimizer_state and Initial.{changed[0]}: an optimizer's state is taken only for parameters "
                "that are taken unchanged; leave one of them out"
            )

    @property
    def _directory(self) -> Path:
        return local_path(self.path or "")

    @property
    def is_here(self) -> bool:
        """Whether there is anything at `path`, which may be the prefix of some files' names."""
        from meshway.framework.conversion import mesh_tensorflow

        return self._directory.exists() or mesh_tensorflow.is_checkpoint(self._directory)

    def start(self) -> tuple[int, ...] | None:
        """Returns the ids that the decoder of that model starts from; None if its directory does not tell."""
        from meshway.framework.conversion import hugging_face, tokenizer_files
        from meshway.framework.data.vocabularies import read_framing

        try:
            if hugging_face.is_model(directory := self._directory):
                model = hugging_face.open_model(directory)
                vocabulary = tokenizer_files.read_vocabulary(directory, model.config)
                has_encoder = "NUM_ENCODER_LAYERS" in model.bindings
                if vocabulary is None:
                    return None
                return tokenizer_files.read_framing(directory, model.config, has_encoder, vocabulary).start
            found = find_checkpoint(directory, self.step, "Initial.path")
            return None if found is None else read_framing(found[0].parent).start
        except UserError:  # its weights may be usable nevertheless
            return None

    def restore(self, params: Params, axes: Axes) -> Params:
        """Returns `params` (a tree of sharded arrays) with the checkpoint's values, sharded in the same way.

        Args:
          params: fresh parameters.
          axes: the logical axis names of each.

        Raises:
          UserError: there is no checkpoint; a parameter has no source or another shape; a pattern matches nothing, or
            `resize` applies to nothing.
        """
        opened = self.opened
        if isinstance(opened, Tensors):
            return self._from_tensors(opened, params, flatten(axes))
        checkpoints, step = opened
        leaves = flatten(params)
        sources = self.sources(_shapes(leaves), flatten(axes), checkpoints.recipe(step)["schema"])
        wanted: dict[str, Any] = {}
        # Sources used unchanged last, so that one that several parameters share is read with their sharding.
        for name, source in sorted(sources.items(), key=lambda item: item[1].is_whole):
            _insert(wanted, source.name, source.abstract(leaves[name]))
        found = flatten(checkpoints.restore_params(step, wanted))
        used: set[str] = set()

        def value(name: str, leaf: jax.Array) -> jax.Array:
            if name not in sources:
                return leaf
            source = sources[name]
            first = source.name not in used
            used.add(source.name)
            return source.put(found[source.name], leaf, first)

        return map_paths(value, params)

    def known_step(self) -> int | None:
        """Returns the step of the checkpoint, None where it has none; raises UserError where there is no checkpoint."""
        return _step_of(self.opened)

    def check(self, params: Params, axes: Axes) -> None:
        """Finds the source of each parameter without reading any; `params` may be shapes. Raises as `restore` does."""
        opened, shapes = self.opened, _shapes(flatten(params))
        if isinstance(opened, Tensors):
            sources = self._tensor_sources(opened, shapes, flatten(axes))
            opened.values(_shapes(sources))
        else:
            checkpoints, step = opened
            self.sources(shapes, flatten(axes), checkpoints.recipe(step)["schema"])

    @functools.cached_property
    def opened(self) -> "Tensors | tuple[Checkpoints, int]":
        """What is at `path`: another system's tensors, or (checkpoints of ours, step); raises UserError where there is
        nothing, or settings do not apply to it.

        It is opened once, and by all processes at the step that process 0 found: a run that still trains may save
        another checkpoint, and remove one, at any moment.
        """
        if self.step is not None:
            return self._open(self.step)
        try:
            mine, failed = str(self._latest()), None
        except UserError as error:  # what process 0 found may be there, although the latest is gone
            mine, failed = _FAILED, error
        common = processes.barrier("finding the checkpoint to start from", None, mine)[0]
        if failed is not None and common == _FAILED:
            raise failed
        return self._open(int(common) if common.isdigit() else None)  # where process 0 fails, all end with it

    def _latest(self) -> int | None:
        """Returns the step that this process alone would open. It makes no `Checkpoints`, in which Orbax may wait for
        the other processes."""
        from meshway.framework.conversion import hugging_face

        if hugging_face.is_model(self._directory):
            return None
        found = find_checkpoint(self._directory, None, "Initial.path")
        return _step_of(self._open(None)) if found is None else found[1]

    def _open(self, step: int | None) -> "Tensors | tuple[Checkpoints, int]":
        # Here, since training itself reads no other formats.
        from meshway.framework.conversion import hugging_face, mesh_tensorflow, t5x_files

        directory = self._directory
        if hugging_face.is_model(directory):
            return self._hugging_face(directory)
        found = find_checkpoint(directory, step, "Initial.path")
        if found is not None:
            checkpoints = Checkpoints(found[0], read_only=True, averaged=self.averaged)
            if self.averaged:
                checkpoints.averages(found[1])  # raises now where there are none
            return checkpoints, found[1]
        if mesh_tensorflow.is_checkpoint(directory):
            return self._t5x(directory, step, "checkpoint of Mesh-TensorFlow")
        if t5x_files.is_run(directory):
            return self._t5x(directory, step, "checkpoint of T5X")
        raise UserError(
            f"Initial.path: {directory} is neither a run directory nor a checkpoint (no checkpoints/ in it), nor a "
            "Hugging Face directory or a checkpoint of T5X or Mesh-TensorFlow"
        )

    def sources(self, shapes: Mapping[str, Shape], axes: Mapping[str, Names], schema: Schema) -> dict[str, Source]:
        """Returns the source of each parameter but those left at init; raises as `restore` does."""
        saved = {name: tuple(schema[f"params/{name}"][0]) for name in names_in(schema, "params")}
        used: set[str] = set()
        sources, problems, unresized = dict[str, Source](), list[str](), list[str]()
        lengths, saved_lengths = pattern_lengths(shapes), pattern_lengths(saved)
        for name, shape in shapes.items():
            if _first_match(name, self.left_at_init, used):
                continue
            wanted, first, stride = self._renamed(name, used), 0, 1
            blocks = block_of(name), block_of(wanted)
            if self.by_depth and blocks[0] and blocks[1] and blocks[1].stack in saved_lengths:
                own, theirs = lengths[blocks[0].stack], saved_lengths[blocks[1].stack]
                if own % theirs:
                    problems.append(f"{name}: a pattern of {own} blocks takes no layers by depth from one of {theirs}")
                    continue
                wanted = blocks[1].at(blocks[0].index % theirs)
                first, stride = blocks[0].index // theirs, own // theirs
            if wanted not in saved:
                near = nearest_names(wanted, list(saved))
                problems.append(f"{name}: no {wanted!r} in the checkpoint (nearest: {', '.join(near) or 'none'})")
                continue
            source = Source.of(wanted, saved[wanted], shape, axes[name], first, stride, self.repeat_along, self.resize)
            if source is None and (change := vocabulary_change(saved[wanted], shape, axes[name])):
                unresized.append(self._unresized(name, wanted, change))
            elif source is None:
                taken = f" (every {stride}th layer of which would be taken)" if stride > 1 else ""
                problems.append(f"{name} has shape {list(shape)} but {wanted!r} has {list(saved[wanted])}{taken}")
            else:
                sources[name] = source
        repeated = {axes[name][dim] or "" for name, source in sources.items() for dim in source.repeated}
        self._check(problems, used, repeated)
        self._check_vocabularies(unresized, sources)
        return sources

    def _hugging_face(self, directory: Path) -> "Tensors":
        from meshway.framework.conversion import hugging_face

        self._check_alone("Hugging Face directory", ())
        model = hugging_face.open_model(directory)
        if model.left_over and processes.is_primary():
            print(f"Initial.path: not read of {directory}: {', '.join(model.left_over)}", file=sys.stderr)
        return Tensors(model.bindings["VOCAB_SIZE"], model.values, None, None)

    def _t5x(self, directory: Path, step: int | None, what: str) -> "Tensors":
        from meshway.framework.conversion import mesh_tensorflow

        self._check_alone(what, ("step",))
        files, network = mesh_tensorflow.open_checkpoint(directory, step)
        return Tensors(
            network.bindings["VOCAB_SIZE"],
            lambda shapes: network.values(files, shapes),
            files.step,
            lambda shapes, axes: network.optimizer_state(files, shapes, axes),
        )

    def _check_alone(self, what: str, others: Sequence[str]) -> None:
        """Raises UserError for settings that apply only to checkpoints of meshway."""
        if given := self._changed({"path", "resize", "optimizer_state", "count_on", *others}):
            raise UserError(
                f"Initial.path={self.path!r} is a {what}, whose tensors are used unchanged: leave out "
                f"Initial.{given[0]}, or convert it first (meshway convert)"
            )

    def _changed(self, but_for: set[str]) -> list[str]:
        """Returns the settings that are not at their defaults."""
        fields = [field for field in dataclasses.fields(self) if field.name not in but_for]
        return [field.name for field in fields if getattr(self, field.name) != field.default]

    def _from_tensors(self, tensors: "Tensors", params: Params, axes: Mapping[str, Names]) -> Params:
        """Returns `params` filled from another system's tensors, each shard read by slices."""
        from meshway.framework.conversion.values import fill

        leaves = flatten(params)
        sources = self._tensor_sources(tensors, _shapes(leaves), axes)
        wanted = unflatten({name: sources[name].abstract(leaf) for name, leaf in leaves.items()})
        found = flatten(fill(wanted, tensors.values(_shapes(sources))))
        return map_paths(lambda name, leaf: sources[name].put(found[name], leaf, True), params)

    def _tensor_sources(
        self, tensors: "Tensors", shapes: Mapping[str, Shape], axes: Mapping[str, Names]
    ) -> dict[str, Source]:
        """Returns which of another system's tensors each parameter is; raises as `restore` does."""
        sources, problems = dict[str, Source](), list[str]()
        for name, shape in shapes.items():
            dims = zip(shape, axes[name], strict=True)
            saved = tuple(tensors.vocab_size if axis == "vocab" else size for size, axis in dims)
            source = Source.of(name, saved, shape, axes[name], 0, 1, (), self.resize)
            change = vocabulary_change(saved, shape, axes[name])
            if source is not None:
                sources[name] = source
            elif change is not None:
                problems.append(self._unresized(name, name, change))
        self._check_vocabularies(problems, sources)
        return sources

    def _unresized(self, name: str, wanted: str, change: VocabularyChange) -> str:
        """Returns the message about a vocabulary of another size, and what to set."""
        asked = f", and Initial.resize is {self.resize!r}" if self.resize else ""
        remedy = (
            "for a vocabulary that grew set Initial.resize = 'mean' (new entries are the mean of the old) or 'fresh'"
        )
        if change.fewer:
            remedy = f"to drop the last {change.saved - change.wanted} entries set Initial.resize = 'shrink'"
        return f"{name} has a vocabulary of {change.wanted} and {wanted!r} one of {change.saved}{asked}: {remedy}"

    def _check_vocabularies(self, problems: Sequence[str], sources: Mapping[str, Source]) -> None:
        """Raises UserError if a vocabulary of another size may not be resized, or `resize` applies to nothing."""
        if problems:
            raise UserError(f"Initial.path={self.path!r}: " + "; ".join(problems))
        if self.resize and not any(source.resize for source in sources.values()):
            raise UserError(
                f"Initial.resize = {self.resize!r}, and no vocabulary of the model has another size than in {self.path}"
            )

    def _renamed(self, name: str, used: set[str]) -> str:
        pattern = _first_match(name, [pattern for pattern, _ in self.renames], used)
        if pattern is None:
            return name
        replacement = dict(self.renames)[pattern]
        try:  # grouped, since of 'x|xy' the first alternative would rename a prefix of the name
            return re.sub(f"^(?:{pattern})$", replacement, name)
        except (re.error, IndexError) as error:  # such as a group that the pattern has not
            raise UserError(f"Initial.renames: {pattern!r} becomes {replacement!r}: {error}") from None

    def _check(self, problems: list[str], used: set[str], repeated: set[str]) -> None:
        """Raises UserError with all problems, unused patterns and unused `repeat_along`."""
        unused = [p for p in (*[pattern for pattern, _ in self.renames], *self.left_at_init) if p not in used]
        problems += [f"pattern {pattern!r} matches no parameter of the model" for pattern in unused]
        if not problems:  # else the parameters meant may be among those that do not fit
            idle = [name for name in self.repeat_along if name not in repeated]
            problems += [f"repeat_along has {name!r}, and no parameter is to be repeated along it" for name in idle]
        if problems:
            raise UserError(
                f"Initial.path={self.path!r}: " + "; ".join(problems) + ". Add Initial.renames or Initial.left_at_init "
                "(for a mixture of experts from a dense model include initial/upcycle.gin)"
            )


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Another system's parameters: the size of their vocabulary, and a function from shapes to lazily read values; the
    step that they were saved at, and a function from shapes and axes to the optimizer's state; None where it has none.
    """

    vocab_size: int
    values: Callable[[Mapping[str, Shape]], Mapping[str, "Values"]]
    step: int | None
    optimizer_state: Callable[[Params, Axes], Any] | None


_FAILED = "failed"  # what a process says of itself that found no checkpoint


def _step_of(opened: Tensors | tuple[Checkpoints, int]) -> int | None:
    return opened.step if isinstance(opened, Tensors) else opened[1]


def _shapes(leaves: Mapping[str, Any]) -> dict[str, Shape]:
    return {name: tuple(leaf.shape) for name, leaf in leaves.items()}


def _first_match(name: str, patterns: Sequence[str], used: set[str]) -> str | None:
    for pattern in patterns:
        if re.fullmatch(pattern, name):
            used.add(pattern)
            return pattern
    return None


def _insert(tree: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value
