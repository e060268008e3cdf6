"""A run's checkpoint as a Hugging Face directory (weights, config.json, tokenizer) or as one of T5X's."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from meshway.framework.checkpoints.manager import Checkpoints, find_checkpoint
from meshway.framework.checkpoints.stored import StoredMoments, StoredParams
from meshway.framework.conversion import hugging_face, tokenizer_files
from meshway.framework.conversion.family import Family, read_config
from meshway.framework.conversion.rules import pieces_of
from meshway.framework.conversion.settings import Reference
from meshway.framework.conversion.t5x import Layout, network_for
from meshway.framework.conversion.t5x_files import write_native
from meshway.framework.conversion.tensor_files import size_in_bytes, write_tensors
from meshway.framework.data.vocabularies import load, read_framing
from meshway.framework.errors import UserError
from meshway.framework.files import in_bucket, local_path
from meshway.framework.interfaces import Model
from meshway.framework.progress import progress_of_bytes
from meshway.framework.terminal import count_of, format_bytes, listed
from meshway.framework.trees import flatten
from meshway.launch.convert_in import NOTES, ORIGIN, T5X_NOTES
from meshway.launch.recipe import bindings as recipe_bindings

T5X = "t5x"  # the family that is no Hugging Face directory's


@dataclasses.dataclass(frozen=True)
class Run:
    """A checkpoint of a run.

    Attributes:
      root: the run directory.
      checkpoints: its folder of checkpoints.
      step: which one.
      averaged: whether averages of parameters are meant, where it has them.
    """

    root: Path
    checkpoints: Path
    step: int
    averaged: bool = False

    @property
    def state(self) -> Path:
        """The folder of its arrays."""
        return self.checkpoints / str(self.step) / "state"


@dataclasses.dataclass(frozen=True)
class Origin:
    """What is known of where a run's weights came from.

    Attributes:
      folder: the files kept of it.
      notes: what import noted: "family", "base", "copies".
      config: its config.json.
    """

    folder: Path
    notes: Mapping[str, Any]
    config: Mapping[str, Any]


def find_run(path: Path, step: int | None, averaged: bool = False) -> Run | None:
    """Returns the checkpoint that --from means, None where it means none; raises as `find_checkpoint` does."""
    found = find_checkpoint(path, step, "--from")
    if found is None and in_bucket(path):
        raise UserError(
            f"--from={path} is neither a run directory (checkpoints/) nor a checkpoint of one; other formats are not "
            "read from buckets yet: copy it, and give that folder"
        )
    return None if found is None else Run(found[0].parent, *found, averaged)


def _open(run: Run) -> tuple[dict[str, Any], Mapping[str, Any], StoredParams]:
    """Returns what was saved beside a checkpoint, the bindings of its recipe, and its parameters, still to be read."""
    checkpoints = Checkpoints(run.checkpoints, read_only=True)
    saved, averages = checkpoints.recipe(run.step), checkpoints.averages(run.step) if run.averaged else ()
    bindings = recipe_bindings.bindings_of(saved["gin"], f"the recipe of {run.root}")
    return saved, bindings, StoredParams(run.state, saved["schema"], averages=averages)


def to_hugging_face(
    run: Run, folder: Path, family: str | None, dtype: np.dtype | None, max_shard_size: str
) -> dict[str, str]:
    """Writes a checkpoint as a Hugging Face directory.

    Args:
      run: the checkpoint.
      folder: where, empty.
      family, dtype, max_shard_size: see `convert.convert`.

    Returns:
      what was done, for people.

    Raises:
      UserError: the model is of no family, or its recipe computes something that its config.json cannot express.
    """
    max_bytes = size_in_bytes(max_shard_size)
    saved, bindings, stored = _open(run)
    origin = _origin(run, bindings)
    found = _family(family, origin, run)
    base = origin.notes["base"] if origin else found.bases[0]
    pieces = pieces_of(found.rules, base, stored.shapes)
    specs = {piece.theirs: stored.spec(piece, dtype) for piece in pieces}
    made = {piece.theirs: piece for piece in pieces}
    for name, other in (origin.notes["copies"] if origin else {}).items():
        if name not in made:
            specs[name], made[name] = specs[other], made[other]
    config = _config(run, found, bindings, origin, {spec.dtype for spec in specs.values()})
    _check_nothing_lost(found, config, saved["gin"], "logits/kernel" in stored.shapes, folder)
    total = sum(spec.num_bytes for spec in specs.values())
    with progress_of_bytes(total, "writing tensors") as wrote:
        names = write_tensors(folder, specs, lambda name: stored.tensor(made[name], dtype), max_bytes, wrote)
    copied = _tokenizer(run, origin, folder)
    config |= _special_ids(run, folder, config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return {
        "family": f"{found.name} ({found.architecture})",
        "checkpoint": f"step {run.step} of {run.root}",
        "tensors": f"{len(specs)} in {count_of(len(names), 'file')}, {format_bytes(total)}",
        "dtype": ", ".join(sorted({spec.dtype.name for spec in specs.values()})),
        "tokenizer": ", ".join(copied) or "none was kept with the run",
    }


def _family(wanted: str | None, origin: Origin | None, run: Run) -> Family:
    if origin is None:
        if wanted is None:
            raise UserError(
                f"{run.root} was not converted from a Hugging Face directory: give the family to write by --family, "
                f"one of {', '.join(hugging_face.FAMILIES)}, or {T5X} for a checkpoint of T5X"
            )
        return hugging_face.named(wanted)
    own = hugging_face.named(origin.notes["family"])
    if wanted is not None and hugging_face.named(wanted) is not own:
        raise UserError(f"--family={wanted}, but {run.root} holds a model of family {own.name}")
    return own


def _origin(run: Run, bindings: Mapping[str, Any]) -> Origin | None:
    """Returns what import kept: in the run directory, or in the one that the run started from."""
    found = _kept(run, bindings, f"{ORIGIN}/{NOTES}")
    return None if found is None else Origin(found[0].parent, found[1], read_config(found[0].parent))


def _kept(run: Run, bindings: Mapping[str, Any], name: str) -> tuple[Path, Any] | None:
    """Returns (path, content) of a JSON file that import kept in the run directory, or in the one that the run started
    from; None where there is none."""
    started = bindings.get("mapping.Initial.path")
    for root in (run.root, *([local_path(started)] if isinstance(started, str) else [])):
        path = root / name
        if path.is_file():
            try:
                return path, json.loads(path.read_text("utf-8"))
            except ValueError as error:
                raise UserError(f"{path} cannot be read: {error}") from error
    return None


def _layouts(run: Run, bindings: Mapping[str, Any]) -> dict[str, Layout] | None:
    """Returns how layers lay in the T5X checkpoint that a run came from, None where it came from none."""
    found = _kept(run, bindings, T5X_NOTES)
    return None if found is None else {stack: Layout(**each) for stack, each in found[1].items()}


def _config(
    run: Run, family: Family, bindings: Mapping[str, Any], origin: Origin | None, dtypes: set[np.dtype]
) -> dict[str, Any]:
    """Returns config.json: the origin's own where it agrees with the recipe, else one made from the recipe."""
    dtype = next(iter(dtypes)).name if len(dtypes) == 1 else "float32"
    made = family.write(bindings, dtype)
    if origin is None:
        return made | _length(family, bindings) | _ids_of_texts(run, "is_encoder_decoder" in made)
    kept = dict(origin.config)
    key = "dtype" if "dtype" in kept else "torch_dtype"
    tied = not bindings["TIED_LOGITS"]
    if family.read(kept, tied, list(kept)) == family.read(made, tied, list(made)):
        return kept | ({key: dtype} if len(dtypes) == 1 else {})
    silent = {name: value for name, value in kept.items() if name not in made and not family.speaks_of(name)}
    return silent | made


def _length(family: Family, bindings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the longest rows that the model is for, where transformers would else take its own default."""
    field = "max_position_embeddings"
    if field not in family.defaults:
        return {}
    scaling = bindings.get("ROPE_SCALING")
    selector = scaling.selector if isinstance(scaling, Reference) else ""
    factor, original = (bindings.get(f"{selector}.{name}") for name in ("factor", "original_length"))
    if factor and original:
        return {field: int(factor * original)}
    lengths = bindings.get("TASK_FEATURE_LENGTHS")
    length = lengths.get("targets") if isinstance(lengths, Mapping) else None
    return {field: length or family.defaults[field]}


def _ids_of_texts(run: Run, has_encoder: bool) -> dict[str, Any]:
    """Returns the ids that texts of a run begin and end with; null for none, so that transformers takes no default."""
    path, start, stop = run.root / "vocabularies.json", [0], list[int]()
    if path.is_file():
        try:
            index = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        eos = load(run.root / "vocabularies", "targets").eos_id
        start, stop = index.get("start", start), index.get("stop") or ([] if eos is None else [eos])
    first = start[0] if start else None
    ids = {"eos_token_id": stop if len(stop) > 1 else next(iter(stop), None)}
    if has_encoder:
        return ids | {"decoder_start_token_id": first, "pad_token_id": 0}
    return ids | {"bos_token_id": first, "pad_token_id": None}


def _check_nothing_lost(family: Family, config: Mapping[str, Any], gin: str, own_output: bool, folder: Path) -> None:
    """Raises UserError where the recipe's model computes something else than one of this config.json would.

    The recipe that import would write for `config` is resolved, and compared with the run's own.
    """
    again = family.read(config, own_output, list(config))
    kind = f"{family.name} model"
    _compare(
        gin, family.include(config), again, folder, f"a {kind} of this config.json", f"no {kind} that transformers"
    )


def _compare(gin: str, include: str, bindings: Mapping[str, Any], folder: Path, there: str, none: str) -> Model:
    """Compares a run's model with another one.

    Args:
      gin: the run's resolved recipe.
      include, bindings: the other one's recipe.
      folder: where that can be written for a moment.
      there: the other one, in words.
      none: what the run's model is not where they differ, in words.

    Returns:
      the other one.

    Raises:
      UserError: they compute something else.
    """
    path = folder / "compared.gin"
    path.write_text(recipe_bindings.text_of(include, bindings), encoding="utf-8")
    model, recipe = recipe_bindings.build_network(path)
    path.unlink()
    expected = recipe_bindings.model_of(recipe.resolved, "the recipe of the exported model")
    found = recipe_bindings.model_of(gin, "the recipe of the run")
    other = [
        f"{name} is {found.get(name, 'not bound')!r} in the recipe and {expected.get(name, 'not bound')!r} in {there}"
        for name in recipe_bindings.differences(found, expected)
    ]
    if other:
        raise UserError(f"the model is {none} could load: {listed(other, 4, '; ')}")
    return model


def to_t5x(run: Run, folder: Path, dtype: np.dtype | None, optimizer_state: bool) -> dict[str, str]:
    """Writes a checkpoint in T5X's own format, as `checkpoint_STEP` in a folder.

    Args:
      run: the checkpoint.
      folder: where, empty.
      dtype: what parameters are written as, None for what they are.
      optimizer_state: whether Adafactor's state goes with them.

    Returns:
      what was done, for people.

    Raises:
      UserError: the model is none of T5X's networks, or the state not that of T5X's Adafactor.
    """
    saved, bindings, stored = _open(run)
    network = network_for(stored.shapes, _layouts(run, bindings), bindings.get("ACTIVATIONS"))
    there, none = f"T5X's network of {network.include}", "no network of T5X's examples that T5X"
    model = _compare(saved["gin"], network.include, network.bindings, folder, there, none)
    pieces = pieces_of(network.rules, "", stored.shapes)
    specs = {f"target/{piece.theirs}": stored.spec(piece, dtype) for piece in pieces}
    readers: dict[str, Callable[[], np.ndarray]] = {
        f"target/{piece.theirs}": functools.partial(stored.tensor, piece, dtype) for piece in pieces
    }
    inline, notes = {"state/step": np.asarray(run.step, np.int32)}, dict[str, str]()
    if optimizer_state:
        moments = StoredMoments(run.state, saved["schema"])
        if moments.num_updates != run.step:
            notes["for T5X"] = f"adafactor.Adafactor.step_offset = {run.step - moments.num_updates}, where decay began"
        for name, spec, read in moments.arrays(network.factor_rules, pieces, stored.shapes, flatten(model.axes())):
            if spec is None:
                inline[f"state/param_states/{name}"] = read()
            else:
                specs[f"state/param_states/{name}"], readers[f"state/param_states/{name}"] = spec, read
    total = sum(spec.num_bytes for spec in specs.values())
    with progress_of_bytes(total, "writing arrays") as wrote:
        write_native(folder / f"checkpoint_{run.step}", specs, lambda name: readers[name](), inline, wrote)
    return {
        "network": network.include,
        "checkpoint": f"step {run.step} of {run.root}",
        "optimizer": "Adafactor, with its state"
        if optimizer_state
        else "left out; --optimizer_state writes Adafactor's",
        "arrays": f"{len(specs)} in T5X's own format, {format_bytes(total)}",
        "dtype": ", ".join(sorted({stored.spec(piece, dtype).dtype.name for piece in pieces})),
        **notes,
    }


def _special_ids(run: Run, folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of config.json by which transformers starts and stops as the run does, where `config` and a
    generation_config.json in `folder` differ; the latter is then changed too."""
    if not (run.root / "vocabularies.json").is_file():
        return {}
    framing = read_framing(run.root)
    changes: dict[str, Any] = {}
    if framing.stop and set(tokenizer_files.stop_ids(folder, config)) != set(framing.stop):
        changes["eos_token_id"] = list(framing.stop) if len(framing.stop) > 1 else framing.stop[0]
    starts = "decoder_start_token_id" if config.get("is_encoder_decoder") else "bos_token_id"
    if framing.start and config.get(starts) != framing.start[0]:
        changes[starts] = framing.start[0]
    path = folder / tokenizer_files.GENERATION
    if changes and path.is_file():
        generation = json.loads(path.read_text("utf-8")) | changes
        path.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    return changes


def _tokenizer(run: Run, origin: Origin | None, folder: Path) -> list[str]:
    """Copies the tokenizer's files, or writes the vocabulary of a model that was trained here or with another one than
    its origin's; returns their names."""
    has_own = (run.root / "vocabularies.json").is_file()
    own = load(run.root / "vocabularies", "targets") if has_own else None
    if origin is not None:
        theirs = tokenizer_files.read_vocabulary(origin.folder, origin.config)
        if own is None or theirs is None or theirs.cuts_like(own):
            return tokenizer_files.copy_files(origin.folder, folder)
    if own is None:
        return []
    tokenizer_files.write_vocabulary(own, folder)
    return [name for name in tokenizer_files.FILES if (folder / name).is_file()]
