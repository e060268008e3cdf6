"""meshway export: predict and score of a checkpoint as StableHLO programs, which run without meshway.

    meshway export --model_dir=runs/quickstart --output=programs --platforms=cpu,tpu,cuda

A program (`jax.export`) is called as `program(parameters, batch, ...)`, where parameters are named arrays, and a batch
has the features that the model reads, as `manifest.json` says; docs/inference.md shows all of it in a few lines.
"""

import itertools
import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework import terminal
from meshway.framework.data.seqio_vocabularies import Opaque
from meshway.framework.data.vocabularies import load
from meshway.framework.distributed import processes
from meshway.framework.errors import UserError, did_you_mean, first_line
from meshway.framework.files import io_errors, local_path, replace_file
from meshway.framework.inference.beam_search import BeamSearch
from meshway.framework.inference.decoding import Decoder, Stop, decoding_model
from meshway.framework.inference.predictor import Session, open_session
from meshway.framework.inference.recipe_model import RecipeModel
from meshway.framework.inference.rows import doubling
from meshway.framework.interfaces import ArraySpec, Batch
from meshway.framework.partitioning.partitioner import path_name
from meshway.framework.terminal import format_bytes, installed_version
from meshway.launch.infer_flags import refuse_idle_in_export

if TYPE_CHECKING:
    from meshway.launch.recipe.config import Invocation

PLATFORMS = ("cpu", "tpu", "cuda", "rocm")
MODES = ("predict", "score")
MANIFEST = "manifest.json"
_PARAMETERS, _SAVED_MODEL, _VERSION = "parameters.npz", "saved_model", 1


def export(
    opened: RecipeModel,
    model_dir: str,
    decoder: Decoder,
    output: str = "",
    platforms: str | Sequence[str] | None = None,
    modes: str | Sequence[str] = MODES,
    beams: int | None = None,
    step: int | None = None,
    batch_size: int = 8,
    max_input_length: int | None = None,
    max_new_tokens: int | None = None,
    saved_model: bool = False,
) -> Path:
    """Writes a folder: a program for each mode and bucket of lengths, the parameters, vocabularies, and a manifest.

    Args:
      opened: model and layout of the recipe.
      model_dir: the run directory, or one of its checkpoints.
      decoder: how predictions are made.
      output: the folder to make; the manifest is written last.
      platforms: of PLATFORMS, 'cpu,tpu': what programs are lowered for, which needs no such device; None: for this one.
      modes: of MODES, 'predict,score'.
      beams: beam search of so many instead of `decoder`.
      step: which checkpoint; None for the latest that can be read.
      batch_size: rows of every batch.
      max_input_length, max_new_tokens: as in `meshway infer`: shapes are those of its buckets.
      saved_model: also write a TensorFlow SavedModel of the programs.

    Raises:
      UserError: anything the user can mend; one message.
    """
    if jax.process_count() > 1:
        raise UserError("meshway export runs as one process")
    if not output:
        raise UserError("meshway export needs --output=DIR, the folder to make")
    chosen = _chosen("--platforms", jax.export.default_export_platform() if platforms is None else platforms, PLATFORMS)
    wanted = _chosen("--modes", modes, MODES)
    folder = local_path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output={output} exists already: move it away, or give another folder")
    if not folder.absolute().parent.is_dir():
        raise UserError(f"--output={output}: there is no folder {str(folder.absolute().parent)!r}")
    tensorflow = _import_tensorflow() if saved_model else None
    if "predict" in wanted:
        decoding_model(opened.model, "it may score (--modes=score)")
    session = open_session(opened, model_dir, step, say=lambda line: print(line, file=sys.stderr))
    decoder = decoder if beams is None else BeamSearch(beams)
    session.engine(decoder, batch_size)  # refuses what does not fit
    writer = _Programs(session, folder, batch_size, chosen)
    limits = opened.limits(max_input_length, max_new_tokens)
    with io_errors(folder):
        folder.mkdir(exist_ok=True)
        entries = list(itertools.chain.from_iterable(writer.of(mode, decoder, limits) for mode in wanted))
        manifest = _manifest(session, decoder, chosen, batch_size, entries) | {"parameters": writer.save_parameters()}
        vocabularies = session.run / "vocabularies"
        if vocabularies.is_dir():
            shutil.copytree(vocabularies, folder / "vocabularies")
            _say_without_text(vocabularies, manifest["vocabularies"])
        if tensorflow is not None:
            writer.save_model(tensorflow, entries)
            manifest["saved_model"] = _SAVED_MODEL
        replace_file(folder / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"written: {output}: {len(entries)} programs for {', '.join(chosen)}, {format_bytes(size)}", file=sys.stderr)
    return folder


class _Programs:
    """Exports programs over a session's parameters, by name `layers/mlp/kernel`, and writes both into a folder."""

    def __init__(self, session: Session, folder: Path, batch_size: int, platforms: Sequence[str]):
        self._session, self._folder, self._batch_size, self._platforms = session, folder, batch_size, platforms
        self._tree = jax.tree.structure(session.params)
        self._names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(session.params)]

    def of(self, mode: str, decoder: Decoder, limits: Mapping[str, int]) -> Iterator[dict[str, Any]]:
        """Writes a program for each bucket of lengths; yields their entries in the manifest."""
        session, model = self._session, self._session.sharded.model
        longest = session.row_format.room(limits["inputs"], limits["targets"], scores=mode == "score")
        if mode == "score":
            for lengths in doubling(longest).shapes:
                batch = session.row_format.scored([[]] * self._batch_size, [[1]] * self._batch_size, lengths)

                def score(params: dict[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
                    return {"log_probs": model.score(self._nested(params), batch)}

                yield self._write(mode, score, lengths, batch)
            return
        decoding, stop = decoding_model(model), Stop(session.text.stop)
        for lengths in doubling({"inputs": longest["inputs"]}).shapes:
            prompt = [] if session.row_format.has_encoder or session.row_format.start else [1]
            batch = session.row_format.prompts([prompt] * self._batch_size, lengths["inputs"])

            def predict(
                params: dict[str, jax.Array], batch: Batch, ids: jax.Array, seed: jax.Array
            ) -> dict[str, jax.Array]:
                key = jax.random.key(seed)
                return vars(decoder(decoding, self._nested(params), batch, longest["targets"], stop, ids, key))

            more = {
                "ids": jax.ShapeDtypeStruct((self._batch_size,), jnp.int32),
                "seed": jax.ShapeDtypeStruct((), jnp.int32),
            }
            yield self._write(mode, predict, lengths | {"targets": longest["targets"]}, batch, more)

    def save_parameters(self) -> dict[str, Any]:
        """Writes the parameters, one at a time; returns their entry in the manifest."""
        arrays = {}
        with zipfile.ZipFile(self._folder / _PARAMETERS, "w") as archive:
            for name, leaf in zip(self._names, jax.tree.leaves(self._session.params), strict=True):
                value = np.asarray(leaf)
                arrays[name] = {"shape": list(value.shape), "dtype": str(value.dtype)}
                if value.dtype.kind == "V":  # bfloat16 and others that numpy's files have no name for
                    value = value.view(f"u{value.dtype.itemsize}")
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.ascontiguousarray(value).reshape(value.shape))
        return {"file": _PARAMETERS, "arrays": arrays}

    def save_model(self, tensorflow: Any, entries: Sequence[Mapping[str, Any]]) -> None:
        """Writes a SavedModel with a signature for each program, called as its file without the suffix, whose arguments
        are those of the manifest by name, without parameters."""
        from jax.experimental import jax2tf

        module = tensorflow.Module()
        leaves = jax.tree.leaves(self._session.params)
        module.parameters = [
            tensorflow.Variable(np.asarray(leaf), name=name) for name, leaf in zip(self._names, leaves, strict=True)
        ]
        signatures = {}
        for entry in entries:
            program = jax.export.deserialize(bytearray((self._folder / entry["file"]).read_bytes()))
            others = [name for name in entry["arguments"] if name != "batch"]
            named = entry["arguments"]["batch"] | {name: entry["arguments"][name] for name in others}
            spec = {
                name: tensorflow.TensorSpec(each["shape"], each["dtype"], name=name) for name, each in named.items()
            }
            converted = jax2tf.convert(
                lambda *given, program=program: program.call(*given),
                native_serialization_platforms=self._platforms,
                with_gradient=False,
            )

            def call(converted: Any = converted, others: Sequence[str] = others, **given: Any) -> Any:
                rest = [given.pop(name) for name in others]
                return converted(dict(zip(self._names, module.parameters)), given, *rest)

            function = tensorflow.function(call, autograph=False)
            signatures[entry["file"].partition(".")[0]] = function.get_concrete_function(**spec)
        tensorflow.saved_model.save(module, str(self._folder / _SAVED_MODEL), signatures=signatures)

    def _write(
        self,
        mode: str,
        function: Callable[..., dict[str, jax.Array]],
        lengths: Mapping[str, int],
        batch: Mapping[str, np.ndarray],
        more: Mapping[str, jax.ShapeDtypeStruct] = {},
    ) -> dict[str, Any]:
        partitioner, sharded = self._session.sharded.partitioner, self._session.sharded
        size = "_".join(str(length) for name, length in lengths.items() if mode == "score" or name == "inputs")
        file = f"{mode}_{size}.jax_export"
        spec = {name: ArraySpec(x.shape, x.dtype, ("batch", *[None] * (x.ndim - 1))) for name, x in batch.items()}
        features = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
        params = dict(zip(self._names, jax.tree.leaves(sharded.param_shapes), strict=True))
        shardings = dict(zip(self._names, jax.tree.leaves(sharded.param_shardings), strict=True))
        rest = [partitioner.replicated] * len(more)
        jitted = jax.jit(
            function,
            in_shardings=(shardings, partitioner.batch_shardings(spec), *rest),
            out_shardings=partitioner.replicated,
        )
        with terminal.stage(f"exporting {file}"), partitioner.activate():
            try:
                found = jax.export.export(jitted, platforms=self._platforms)(params, features, *more.values())
            except (ValueError, NotImplementedError) as error:
                raise UserError(
                    f"{type(sharded.model).__name__} cannot be exported for {', '.join(self._platforms)} ({file}): "
                    f"{first_line(error)}"
                ) from error
        (self._folder / file).write_bytes(found.serialize())
        return {
            "file": file,
            "mode": mode,
            "lengths": dict(lengths),
            "arguments": {"batch": _described(features), **_described(more)},
            "results": _described(jax.tree.unflatten(found.out_tree, found.out_avals)),
            "devices": found.nr_devices,
        }

    def _nested(self, params: Mapping[str, jax.Array]) -> Any:
        return jax.tree.unflatten(self._tree, [params[name] for name in self._names])


def _manifest(
    session: Session, decoder: Decoder, platforms: Sequence[str], batch_size: int, programs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    text, row_format = session.text, session.row_format
    about = session.run / "vocabularies.json"
    return {
        "written_by": f"meshway export {installed_version()}",
        "version": _VERSION,
        "jax": jax.__version__,
        "model": type(session.sharded.model).__name__,
        "run": session.run.absolute().name,
        "step": session.step,
        "platforms": list(platforms),
        "batch_size": batch_size,
        "decoder": str(decoder),
        "rows": {"encoder": row_format.has_encoder, "prefix": row_format.has_prefix},
        "special_tokens": {
            "padding": 0,
            "start": list(text.start),  # before the decoder's text
            "inputs_end": list(text.end),
            "targets_end": list(text.target_end),
            "stop": list(text.stop),
        },
        "vocabularies": json.loads(about.read_text("utf-8"))["features"] if about.is_file() else {},
        "programs": list(programs),
    }


def _say_without_text(folder: Path, names: Iterable[str]) -> None:
    """Says which vocabularies are code of users', which is not written: text needs it where programs run."""
    for name in names:
        vocabulary = load(folder, name)
        if isinstance(vocabulary, Opaque) and not vocabulary.is_ids:
            print(
                f"vocabulary of {name!r}: {vocabulary.name} is code of yours, and is not written. Programs take and "
                "return its ids: have that class encode and decode text where they run",
                file=sys.stderr,
            )


def _import_tensorflow() -> Any:
    """Returns the module; UserError where it, or jax2tf, is not there."""
    try:
        import tensorflow
        from jax.experimental import jax2tf  # noqa: F401 later versions of jax may not have it
    except ImportError as error:
        raise UserError(
            f"--saved_model needs TensorFlow and jax2tf, and one is missing here ({error}): pip install tensorflow, or "
            "leave it out"
        ) from error
    return tensorflow


def _described(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"shape": list(each.shape), "dtype": str(each.dtype)} for name, each in arrays.items()}


def _chosen(flag: str, given: str | Sequence[str], known: Sequence[str]) -> list[str]:
    """Returns the names of a flag, each once."""
    listed = given.split(",") if isinstance(given, str) else given
    names = list(dict.fromkeys("cuda" if name == "gpu" else name for name in listed))
    for name in names:
        if name not in known:
            raise UserError(f"{flag}: {name!r} is not one of {', '.join(known)}{did_you_mean(name, known)}")
    return names


def run(invocation: "Invocation") -> None:
    """Runs the verb from the command line."""
    from meshway.launch.recipe import config, files

    with processes.joined(*invocation.processes):
        recipe = config.load(files.of_run(invocation), import_unreferenced=False)
        with recipe.parts("export.export") as part:  # of gin/runs/export.gin
            opened: RecipeModel = part("opened")  # MODEL, LAYOUT and TASK_FEATURE_LENGTHS
            model_dir: str = part("model_dir")  # MODEL_DIR
            decoder: Decoder = part("decoder")  # --temperature, --top_k, --top_p, --num_decodes
            beams: int | None = part("beams")
            modes: str = part("modes")
            how = part.rest()  # --output, --platforms, ...
        refuse_idle_in_export(invocation.bindings, decoder, modes, beams)
        export(opened, model_dir, decoder, beams=beams, modes=modes, **how)


if __name__ == "__main__":
    from meshway.launch import cli

    sys.exit(cli.main(["export", *sys.argv[1:]]))
