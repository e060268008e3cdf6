"""meshway cache: the tasks of a recipe, or any others, prepared once and kept.

    meshway cache --gin_file=recipes/quickstart.gin
    meshway cache --task=NAME --module=mylab.tasks --directory=/data/cache
    meshway cache --task=NAME --module=mylab.tasks --from_seqio=/data/seqio_cache
    meshway cache --gin_file=pretrain.gin --directory=/shared/cache --part=1/4    # of four machines

Every leaf of a mixture is cached, all its splits. A run that was killed goes on where it was when run again. Of a
recipe's large tasks the rows that training will read are counted too, at the recipe's lengths and seed.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from meshway.framework.data import seqio_caches
from meshway.framework.data.cache.builder import build
from meshway.framework.data.cache.shards import BuiltSplit, cache_directory
from meshway.framework.data.rows.row_counts import PARALLEL
from meshway.framework.data.rows.row_source import POOL_ITEMS
from meshway.framework.data.task_data import module_names
from meshway.framework.errors import UserError
from meshway.framework.terminal import format_columns

if TYPE_CHECKING:
    from meshway.launch.recipe.config import Invocation


def cache(
    mixture_or_task_name: str,
    module: str | Sequence[str] | None = None,
    directory: str | None = None,
    splits: str | Sequence[str] | None = None,
    num_shards: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    max_bad_examples: int = 0,
    from_seqio: str | None = None,
    seqio_cache_dirs: str | Sequence[str] = (),
    part: str | None = None,
    imported: Sequence[str] = (),
) -> list[BuiltSplit]:
    """Caches a task, or every leaf of a mixture, and prints what it found.

    Args:
      mixture_or_task_name: the registered name.
      module: name(s) of the Python module(s) whose import registers it.
      directory: where; None for the user's cache directory.
      splits: which, as 'train,validation' or a list; None for all.
      num_shards: files of each split; None for as many as there are already, else 8.
      workers: processes; None for one a core, or only this one for little data.
      overwrite: remove the tasks' caches first, all splits of them.
      max_bad_examples: source examples of a split that may fail; they are left out and reported.
      from_seqio: where seqio's script cached these tasks, all of them: its examples are taken as they are.
      seqio_cache_dirs: where it may have cached some of them, beside seqio's global cache directories.
      part: 'I/N', which of N parts of the shards this machine builds; the last to end, or a call without it, completes
        the cache.
      imported: modules that the recipe itself imports, which may register tasks.

    Raises:
      UserError: a task, an example or an argument is at fault, or another version of a task is there.
    """
    modules = module_names(module)
    chosen = splits.split(",") if isinstance(splits, str) else splits
    root = directory or str(cache_directory())
    seqio_caches.add_directories(module_names(seqio_cache_dirs))
    built = build(
        [mixture_or_task_name],
        [*imported, *modules],
        root,
        splits=chosen,
        num_shards=num_shards,
        num_workers=workers,
        overwrite=overwrite,
        max_bad_examples=max_bad_examples,
        from_seqio=from_seqio,
        part=_part(part),
    )
    if part and not built:
        print(f"part {part} is built in {root}; not all parts are there: the last of them completes the cache")
        return built
    print(format_table(built))
    for one in built:
        if one.bad:
            print(f"bad examples left out: {len(one.bad)}, the first: {one.bad[0]}")
        if not one.examples:
            print(f"task {one.task!r}, split {one.split!r} has no examples")
    print(f"cached in {root}")
    return built


def _part(text: str | None) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text or "1/1")
    if not found:
        raise UserError(f"--part must be as 1/4, the first of four parts, not {text!r}")
    return int(found[1]), int(found[2])


def format_table(built: Sequence[BuiltSplit]) -> str:
    """Returns one line for each split: its task, examples, tokens by feature, megabytes and seconds."""
    names = sorted({name for one in built for name in one.tokens})
    rows = [["task", "split", "examples", *(f"{name} tokens" for name in names), "MB", "seconds"]]
    for one in built:
        tokens = [f"{one.tokens[name]:,}" if name in one.tokens else "-" for name in names]
        rows.append([one.task, one.split, f"{one.examples:,}", *tokens, f"{one.bytes / 1e6:.1f}", f"{one.seconds:.1f}"])
    return "\n".join(format_columns(rows, right=range(2, len(rows[0]))))


def run(invocation: "Invocation") -> None:
    """Runs the verb from the command line."""
    from meshway.launch.recipe import config

    recipe = config.load(invocation)
    built = cache(**recipe.build("cache.cache"), imported=recipe.registering)
    is_large = any(one.examples >= PARALLEL * POOL_ITEMS for one in built)
    if is_large and recipe.macro("TASK_FEATURE_LENGTHS"):  # else nothing says yet how they will be read
        count_rows(invocation)


def count_rows(invocation: "Invocation") -> None:
    """Counts the rows that training will read of what is cached, as far as the recipe says how."""
    import jax

    from meshway.framework.data.grain_loader import CachedData
    from meshway.launch.recipe import config

    jax.config.update("jax_platforms", "cpu")
    try:
        kept = tuple(binding for binding in invocation.bindings if not binding.startswith("cache."))
        look = dataclasses.replace(invocation, verb="inspect", subject="data", bindings=kept, options=None)
        source = config.load(look).build("inspection.data")["source"]
        counted = source.count_rows() if isinstance(source, CachedData) else {}
    except UserError as error:
        print(f"rows are not counted yet, the first run will: {error}")
        return
    for name, rows in counted.items():
        print(f"task {name!r}: {', '.join(f'{each:,}' for each in rows)} rows a pass; kept beside the cache")


if __name__ == "__main__":
    from meshway.launch import cli

    sys.exit(cli.main(["cache", *sys.argv[1:]]))
