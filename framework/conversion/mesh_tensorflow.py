"""Mesh-TensorFlow's checkpoints of T5, mT5 and ByT5 (`model.ckpt-1000000.index`, `.data-00000-of-00002` ...) under our
names.

Mesh-TensorFlow names a variable by its sublayer, "decoder/block_003/layer_002/DenseReluDense/wo/kernel", and its
arrays lie as T5X's do (t5x/checkpoint_importer.py in T5X's sources reads them without moving a value). So a checkpoint
is taken for the T5X network that it would become, and what that network is here holds for it too.
"""

import copy
import dataclasses
import functools
import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meshway.framework.conversion import t5x
from meshway.framework.conversion.t5x_files import T5XArrays, T5XFiles
from meshway.framework.errors import UserError, first_line, nearest_names
from meshway.framework.terminal import count_of, listed

_PREFIX = re.compile(r"(?P<prefix>.+?)(?:\.index|\.meta|\.data-\d{5}-of-\d{5})?")
_STEP = re.compile(r".*-(\d+)")
_SLOT = re.compile(r".+(?:_slot_(?:v|vr|vc|m)|/adam_[mv])")  # of Adafactor (T5's) or Adam, beside their variable
_LAYER = re.compile(r"(encoder|decoder|transformer)/block_(\d{3,})/(.+)")
_GLOBAL_STEP = "global_step"
_BIAS = "SelfAttention/relative_attention_bias"  # of layer 0 for the stack, or of each layer

# A layer's sublayers in order: Mesh-TensorFlow's name, T5X's, that of T5X's norm before it.
_SUBLAYERS: Mapping[str, Sequence[tuple[str, str, str]]] = {
    "encoder": (
        ("SelfAttention", "attention", "pre_attention_layer_norm"),
        ("DenseReluDense", "mlp", "pre_mlp_layer_norm"),
    ),
    "decoder": (
        ("SelfAttention", "self_attention", "pre_self_attention_layer_norm"),
        ("EncDecAttention", "encoder_decoder_attention", "pre_cross_attention_layer_norm"),
        ("DenseReluDense", "mlp", "pre_mlp_layer_norm"),
    ),
    "alone": (  # a decoder without an encoder
        ("SelfAttention", "self_attention", "pre_self_attention_layer_norm"),
        ("DenseReluDense", "mlp", "pre_mlp_layer_norm"),
    ),
}
_ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}
_MLP = ("wi", "wi_0", "wi_1", "wo")

# Settings of operative_config.gin by which Mesh-TensorFlow computes something else from the same arrays.
_REFUSED = (
    (r"\w*[aA]ttention\w*\.fold_scaling_into_initializer\s*=\s*False", "attention scores are scaled"),
    (r"sinusoid_positional_embedding\s*=\s*True", "positions are added as sines"),
)


class MeshTensorFlowFiles(T5XFiles):
    """The variables of one checkpoint, by Mesh-TensorFlow's names, but the step and what optimizers keep beside them.

    TensorFlow reads them, each whole whenever a part of it is asked for.
    """

    ACTIVATIONS = r"DenseReluDense\.activation"

    def __init__(self, path: Path, step: int | None = None):
        """`path` is a checkpoint's prefix (`.../model.ckpt-1000000`), one of its files, or a folder of checkpoints, of
        which `step` is one, None the latest.

        Raises:
          UserError: there is no such checkpoint; files of it are missing or shorter than its index says; TensorFlow is
            not installed.
        """
        prefix = find_checkpoint(path, step)
        reader = _reader(prefix)
        shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
        every = {name: _Variable(prefix, name, tuple(shapes[name]), dtypes[name], reader) for name in sorted(shapes)}
        _check_files(prefix, sum(variable.num_bytes for variable in every.values()))
        slots = {name for name in every if _SLOT.fullmatch(name)}
        kept = {name: each for name, each in every.items() if name not in slots and name != _GLOBAL_STEP}
        T5XArrays.__init__(self, prefix, kept)
        self.num_slots = len(slots)
        self._step = int(every[_GLOBAL_STEP][...]) if _GLOBAL_STEP in every else _step_of(prefix) or 0

    @property
    def step(self) -> int:
        """Its global_step, or else the number in its name; 0 where neither tells."""
        return self._step

    @property
    def config_file(self) -> Path:
        """Where Mesh-TensorFlow writes what its recipe bound: beside its checkpoints."""
        return self.directory.parent / "operative_config.gin"

    def renamed(self, names: Mapping[str, str]) -> "MeshTensorFlowFiles":
        """Returns the variables by other names: own name -> the other."""
        view = copy.copy(self)
        view._values = {other: self._values[name] for name, other in names.items()}
        return view

    @functools.cached_property
    def moments(self) -> T5XArrays:
        """Raises UserError: what Mesh-TensorFlow's optimizers keep is not converted."""
        raise UserError(
            f"{self.directory} is Mesh-TensorFlow's, whose optimizer state is not converted: take the parameters alone"
        )


class _Variable:
    """A variable that is read when it is sliced."""

    def __init__(self, prefix: Path, name: str, shape: tuple[int, ...], dtype: Any, reader: Any):
        self.shape, self.dtype = shape, np.dtype(dtype.as_numpy_dtype)
        self._prefix, self._name, self._reader = prefix, name, reader

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __getitem__(self, box: Any) -> np.ndarray:
        try:
            return np.asarray(self._reader.get_tensor(self._name))[box]
        except Exception as error:  # TensorFlow's own, of which some are no OpError
            raise UserError(f"{self._name!r} cannot be read from {self._prefix}: {first_line(error)}") from error


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint of TensorFlow's, or a folder of some."""
    return bool(_checkpoints(path))


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """Returns the prefix of a checkpoint's files, as `MeshTensorFlowFiles` takes it; raises UserError without one."""
    found = _checkpoints(path)
    if not found:
        raise UserError(f"{path} is no checkpoint of Mesh-TensorFlow: there is no {path.name}.index")
    steps = {_step_of(prefix): prefix for prefix in found}
    if step is not None and step not in steps:
        numbered = sorted(each for each in steps if each is not None)
        raise UserError(f"{path} has no checkpoint of step {step}; there are {numbered}")
    return steps[max(steps, key=lambda each: -1 if each is None else each) if step is None else step]


def open_checkpoint(path: Path, step: int | None = None) -> tuple[T5XFiles, t5x.T5XNetwork]:
    """Returns a checkpoint of T5X or Mesh-TensorFlow and its network; see `T5XFiles` and `network_of`."""
    if is_checkpoint(path):
        files = MeshTensorFlowFiles(path, step)
        return files, network_of(files)
    plain = T5XFiles(path, step)
    return plain, t5x.network_of(plain)


def network_of(files: MeshTensorFlowFiles) -> t5x.T5XNetwork:
    """Returns what network a checkpoint holds, by the names and shapes of its variables.

    The MLP's activations leave no trace there: they are read from the `operative_config.gin` beside it; without one
    they are those of T5 1.1 and 1.0, see `t5x.network_of`.

    Raises:
      UserError: variables that T5 has not, or lacks; two vocabularies; activations that meshway lacks; the config has
        settings by which something else is computed.
    """
    names = _Names.of(files)
    network = t5x.network_of(files.renamed(names.to_t5x(files)))
    named = [(rule, names.of_t5x(rule.theirs)) for rule in network.rules]
    rules = tuple(dataclasses.replace(rule, theirs=own) for rule, own in named if own is not None)
    files.check_config(_REFUSED)
    return dataclasses.replace(network, rules=rules)


@dataclasses.dataclass(frozen=True)
class _Names:
    """Mesh-TensorFlow's names of what T5X has.

    Attributes:
      directory: the checkpoint's prefix, for messages.
      stacks: T5X's name of a stack -> Mesh-TensorFlow's.
      layer: T5X's name of a stack -> in each of its layers, T5X's name -> Mesh-TensorFlow's.
      around: outside layers, T5X's name -> Mesh-TensorFlow's.
      shared: whether the layers of a stack have one position bias, kept in the first.
    """

    directory: Path
    stacks: Mapping[str, str]
    layer: Mapping[str, Mapping[str, str]]
    around: Mapping[str, str]
    shared: bool

    @classmethod
    def of(cls, files: MeshTensorFlowFiles) -> "_Names":
        """Returns the names by which a checkpoint goes; raises UserError where it has no decoder, or two embeddings."""
        found = {match[1] for name in files if (match := _LAYER.fullmatch(name))}
        decoder = next((stack for stack in ("decoder", "transformer") if stack in found), None)
        if decoder is None:
            raise UserError(
                f"{files.directory} is not a T5 of Mesh-TensorFlow: it has no decoder/block_000/..., but "
                f"{listed(files, 4) or 'nothing'}"
            )
        alone = "encoder" not in found
        if not alone and (own := [f"{stack}/embedding" for stack in ("encoder", decoder)])[0] in files:
            raise UserError(
                f"{files.directory} has an embedding for each stack ({', '.join(own)}); meshway's T5 shares one, "
                "shared/embedding"
            )
        norm = "rms_norm" if any("/rms_norm/" in name for name in files) else "layer_norm"
        final = "rms_norm" if norm == "rms_norm" else "final_layer_norm"
        stacks = {"decoder": decoder} if alone else {"encoder": "encoder", "decoder": decoder}
        around = {f"{theirs}/{theirs}_norm/scale": f"{own}/{final}/scale" for theirs, own in stacks.items()}
        around["decoder/logits_dense/kernel"] = f"{decoder}/logits/kernel"
        embedding = ("decoder/token_embedder/embedding", f"{decoder}/embedding")
        around |= dict([embedding if alone else ("token_embedder/embedding", "shared/embedding")])
        kinds = {"decoder": "alone"} if alone else {"encoder": "encoder", "decoder": "decoder"}
        layer = {stack: dict(_layer_names(_SUBLAYERS[kind], norm)) for stack, kind in kinds.items()}
        biased = {match[2] for name in files if name.endswith(_BIAS) and (match := _LAYER.fullmatch(name))}
        return cls(files.directory, stacks, layer, around, biased <= {"000"})

    def to_t5x(self, files: MeshTensorFlowFiles) -> dict[str, str]:
        """Returns each variable's name -> T5X's; raises UserError for what T5 has not, or lacks in its first layer."""
        around = {own: theirs for theirs, own in self.around.items()}
        places = {
            (self.stacks[stack], own): (stack, theirs)
            for stack, names in self.layer.items()
            for theirs, own in names.items()
        }
        found, unknown = {}, []
        for name in files:
            match = _LAYER.fullmatch(name)
            if name in around:
                found[name] = around[name]
            elif match and (match[1], match[3]) in places:
                stack, theirs = places[match[1], match[3]]
                shared = self.shared and match[3].endswith(_BIAS)
                found[name] = f"{stack}/{theirs}" if shared else f"{stack}/layers_{int(match[2])}/{theirs}"
            else:
                unknown.append(name)
        if unknown:
            wanted = re.sub(r"block_\d+", "block_000", unknown[0])
            near = nearest_names(wanted, [*around, *(f"{stack}/block_000/{own}" for stack, own in places)])
            raise UserError(
                f"{self.directory}: {count_of(len(unknown), 'variable', 'has')} no place in T5: "
                f"{listed(unknown, 6)}" + (f" (nearest that has: {near[0]})" if near else "")
            )
        self._check_complete(files)
        return found

    def of_t5x(self, theirs: str) -> str | None:
        """Returns the name of what T5X calls `theirs`, where {layer} stands for a layer's number; None without one."""
        if theirs in self.around:
            return self.around[theirs]
        stack, _, rest = theirs.partition("/")
        inner = rest.removeprefix("layers_{layer}/")
        own = self.layer[stack].get(inner)
        return own and f"{self.stacks[stack]}/block_{'000' if inner == rest else '{layer:03d}'}/{own}"

    def _check_complete(self, files: MeshTensorFlowFiles) -> None:
        """Raises UserError where a variable is missing that tells what the network is."""
        decoder = self.layer["decoder"]
        needed = [own for theirs, own in self.around.items() if "embedding" in theirs]
        for rest in ("self_attention/out/kernel", "mlp/wo/kernel", "relpos_bias/rel_embedding"):
            needed.append(f"{self.stacks['decoder']}/block_000/{decoder[rest]}")
        if missing := [name for name in needed if name not in files]:
            raise UserError(f"{self.directory} is not a complete T5 of Mesh-TensorFlow: it has no {missing[0]}")


def _layer_names(sublayers: Sequence[tuple[str, str, str]], norm: str) -> Iterator[tuple[str, str]]:
    """Yields (T5X's name, Mesh-TensorFlow's) of what a layer may have."""
    for place, (kind, theirs, before) in enumerate(sublayers):
        at = f"layer_{place:03d}"
        yield f"{before}/scale", f"{at}/{norm}/scale"
        if kind == "DenseReluDense":
            yield from ((f"{theirs}/{part}/kernel", f"{at}/{kind}/{part}/kernel") for part in _MLP)
        else:
            yield from ((f"{theirs}/{name}/kernel", f"{at}/{kind}/{part}") for part, name in _ATTENTION.items())
        if kind == "SelfAttention":
            yield "relpos_bias/rel_embedding", f"{at}/{_BIAS}"


def _checkpoints(path: Path) -> list[Path]:
    """Returns the prefixes of the checkpoints that a path names: one, or those in a folder, where a file of another
    kind may be called `*.index` too."""
    path = path.expanduser().absolute()
    if path.is_dir():
        prefixes = (file.with_suffix("") for file in path.glob("*.index") if file.is_file())
        return sorted(prefix for prefix in prefixes if any(path.glob(f"{glob.escape(prefix.name)}.data-*-of-*")))
    match = _PREFIX.fullmatch(str(path))
    prefix = Path(match["prefix"]) if match else path
    return [prefix] if Path(f"{prefix}.index").is_file() else []


def _step_of(prefix: Path) -> int | None:
    match = _STEP.fullmatch(prefix.name)
    return int(match[1]) if match else None


def _reader(prefix: Path) -> Any:
    from meshway.framework.data.seqio_adapter import dropped

    try:
        with dropped():
            import tensorflow as tf
    except ImportError as error:
        raise UserError(
            f"{prefix}: Mesh-TensorFlow's checkpoints need TensorFlow, which cannot be imported: {error}"
        ) from error
    try:
        return tf.train.load_checkpoint(str(prefix))
    except Exception as error:  # TensorFlow's own, of which some are no OpError
        raise UserError(f"{prefix}.index is truncated or damaged: {first_line(error)}") from error


def _check_files(prefix: Path, needed: int) -> None:
    """Raises UserError where files of the values are missing, or hold less than the index says."""
    files = sorted(prefix.parent.glob(f"{prefix.name}.data-*-of-*"))
    total = int(files[0].name.rpartition("-")[2]) if files else 1
    missing = [
        name
        for name in (f"{prefix.name}.data-{part:05d}-of-{total:05d}" for part in range(total))
        if not (prefix.parent / name).is_file()
    ]
    if missing:
        raise UserError(f"{prefix} is incomplete: {listed(missing, 4)} is missing beside its index")
    there = sum(file.stat().st_size for file in files)
    if there < needed:
        raise UserError(
            f"{files[0] if total == 1 else f'{prefix}.data-*'} is truncated: {there:,} bytes, and the values in its "
            f"index take {needed:,}"
        )
