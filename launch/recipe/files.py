"""Finds gin files by path, by name or of a run, and joins them: runs/<verb>.gin, layout, recipe, command line."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.files import in_bucket, local_path, no_directory, open_path
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import t5x
from meshway.launch.recipe.t5x_names import PAGE
from meshway.launch.recipe.text import Binding, Import, Include, Place, Statement, parse, parse_flag

# By path, beside launch/: the package mapping keeps folders side by side, installed or not.
SHIPPED = Path(__file__).parent.parent.parent / "gin"
_LAYOUT, _AUTO = "LAYOUT", "auto"
_CHOOSES = ("infer", "serve")  # verbs that choose a layout


class GinFiles:
    """Where gin files are looked for.

    Args:
      search_paths: folders tried before the shipped one.
      shipped: the folder with runs/, models/, layouts/, optimizers/ and recipes/.
    """

    def __init__(self, search_paths: Sequence[str], shipped: Path = SHIPPED):
        for folder in search_paths:
            if not local_path(folder).is_dir():
                raise UserError(f"--gin_search_paths: {folder} is not a folder")
        self.shipped = shipped
        self.folders = [*(local_path(folder) for folder in search_paths), shipped]
        self.answers: list[str] = []  # to lines of T5X's in the files that were read

    def find(
        self, name: str, beside: Path | None, place: Place, subfolder: str = "", others: Sequence[str] = ()
    ) -> Path:
        """Returns the file that `name` means.

        Tried in turn: beside the including file, the path as given, in each search path, in the shipped folder, and
        there by the end of its path (`quickstart` finds `recipes/quickstart.gin`). What a shipped file includes is
        beside it or in the shipped folder: nothing in a user's folders changes a shipped recipe.

        Args:
          name: a path, with or without `.gin`, or a name.
          beside: the folder of the file that names it, if any.
          place: who asks, for the error.
          subfolder: look in this folder of the search paths and the shipped ones only (`layouts`), if
            `name` is a bare name.
          others: what could be meant that is no file.

        Raises:
          UserError: nothing is found, or several shipped files end so.
        """
        bare = "/" not in name and not name.endswith(".gin")
        roots = [folder / subfolder for folder in self.folders]
        if beside and beside.is_relative_to(self.shipped.resolve()):
            roots = [beside, self.shipped]
        elif not (subfolder and bare):
            roots = [*([beside] if beside else []), Path(), *roots]
        given = [local_path(each) if subfolder else open_path(each) for each in (name, f"{name}.gin")]
        for path in given if in_bucket(given[0]) else (root / each for root in roots for each in given):
            if path.is_file():
                return path.resolve()
        return self._find_by_end(name, roots, place, subfolder, others)

    def _find_by_end(self, name: str, roots: list[Path], place: Place, subfolder: str, others: Sequence[str]) -> Path:
        known = self.shipped_names(subfolder)
        end = tuple(Path(name.removesuffix(".gin")).parts)
        matches = [path for path in known if Path(path).parts[-len(end) :] == end]
        if len(matches) == 1:
            return (self.shipped / f"{matches[0]}.gin").resolve()
        if matches:
            raise UserError(f"{place}: {name!r} is the name of several shipped files: {', '.join(matches)}")
        looked = ", ".join(str(root) if root.parts else "the current folder" for root in roots)
        stems = [Path(path).name for path in known]
        near = did_you_mean(name.removesuffix(".gin"), [*known, *stems, *others])
        raise UserError(f"{place}: found no gin file {name!r} (looked in {looked}){near}")

    def shipped_names(self, subfolder: str = "") -> list[str]:
        """Returns the shipped files, as `recipes/quickstart`, sorted."""
        files = (self.shipped / subfolder).rglob("*.gin")
        return sorted(path.relative_to(self.shipped).with_suffix("").as_posix() for path in files)

    def runs(self) -> dict[str, Path]:
        """Returns verb -> the file of its defaults."""
        found: dict[str, Path] = {}
        for folder in self.folders:
            for path in sorted((folder / "runs").glob("*.gin")):
                found.setdefault(path.stem, path.resolve())
        return found

    def shown(self, path: Path) -> str:
        """Returns `path` for people: relative to the current or the shipped folder where it is inside one."""
        for folder, prefix in ((Path.cwd(), Path()), (self.shipped.resolve(), Path("gin"))):
            if path.is_relative_to(folder):
                return str(prefix / path.relative_to(folder))
        return str(path)

    def read(self, path: Path, including: tuple[Path, ...] = ()) -> list[Import | Binding]:
        """Returns the statements of a file, with those of the files it includes in their places.

        Raises:
          UserError: a file is not found, does not parse, or includes itself; or a recipe includes one of `runs`.
        """
        try:
            text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.shown(path)}: cannot be read: {error}") from error
        including = (*including, path)
        statements: list[Import | Binding] = []
        parsed = parse(text, self.shown(path))
        self.answers += t5x.answers(parsed)
        for statement in parsed:
            if not isinstance(statement, Include):
                statements.append(statement)
                continue
            if t5x.includes(statement.file):
                continue  # answered
            included = self.find(statement.file, path.parent, statement.place)
            if including[0] not in (runs := self.runs()).values():
                _refuse_defaults(included, f"{statement.place}: include {statement.file!r}", runs)
            if included in including:
                chain = " -> ".join(self.shown(file) for file in (*including, included))
                raise UserError(f"{statement.place}: files include each other: {chain}")
            statements += self.read(included, including)
        return statements


@dataclasses.dataclass(frozen=True)
class Joined:
    """All statements of a run in order, later bindings winning.

    Attributes:
      imports, bindings: what the run reads.
      layout_is_shipped: whether the layout in force can be asked for by name again, on any machine.
    """

    imports: list[Import]
    bindings: list[Binding]
    layout_is_shipped: bool


def join(invocation: Invocation, files: GinFiles) -> Joined:
    """Reads everything an invocation names.

    The layout that files choose comes before the recipe, which may override parts of it; a layout chosen on
    the command line comes after the recipe: it replaces the recipe's, whatever that one bound.

    Raises:
      UserError: a file, a layout or a flag is wrong.
    """
    runs = files.runs()
    if invocation.verb not in runs:
        raise UserError(f"meshway is incomplete: no file runs/{invocation.verb}.gin in {files.folders[-1]}")
    defaults = [_as_default(statement) for statement in files.read(runs[invocation.verb])]
    recipe: list[Statement] = []
    base: Path | None = None  # the folder of the recipe file that chose the layout
    for name in invocation.gin_files:
        path = _given(name, files)
        _refuse_defaults(path, f"--gin_file={name}", runs)
        statements = files.read(path)
        base = path.parent if any(_is_layout(statement) for statement in statements) else base
        recipe += statements
    if files.answers:
        listed = "".join(f"\n    {line}" for line in files.answers)
        raise UserError(f"the recipe is written for T5X; write its lines so ({PAGE}):{listed}")
    flags = [_said_by_its_flag(parse_flag(flag), invocation.flags) for flag in invocation.bindings]

    chosen = [statement for statement in [*defaults, *recipe, *flags] if _is_layout(statement)]
    layout: list[Import | Binding] = []
    shipped = False
    if chosen and chosen[-1].value is not None:
        choice = chosen[-1]
        if not isinstance(choice.value, str):
            raise UserError(f"{choice.place}: LAYOUT must be a layout's name or file, not {choice.value!r}")
        if choice.value == _AUTO:
            raise UserError(
                f"{choice.place}: LAYOUT='auto' is for `meshway infer`, `serve` and Predictor alone, given as they "
                "start: --layout=auto, layout='auto'; `meshway plan` says which layout that is: name it here"
            )
        others = [_AUTO] if invocation.verb in _CHOOSES else []
        path = files.find(choice.value, None if choice in flags else base, choice.place, "layouts", others)
        shipped = path.is_relative_to(files.shipped.resolve())
        layout = files.read(path)
    if chosen and chosen[-1] in flags:
        everything = [*defaults, *recipe, *layout, *flags]
    else:
        everything = [*defaults, *layout, *recipe, *flags]
    return Joined(
        [statement for statement in everything if isinstance(statement, Import)],
        [statement for statement in everything if isinstance(statement, Binding)],
        shipped,
    )


def _given(name: str, files: GinFiles) -> Path:
    """Returns the file that --gin_file names."""
    place = Place(f"--gin_file={name}")
    try:
        return files.find(name, None, place)
    except UserError as error:
        answer = t5x.includes(name)
        if not answer:
            raise
        instead = answer[2:] if answer.startswith("#") else f"write {t5x.as_flags(answer)}"
        raise UserError(f"{place} is a file of T5X's: {instead}") from error


def _refuse_defaults(path: Path, given: str, runs: Mapping[str, Path]) -> None:
    """Raises UserError for a file of a verb's defaults, given as if it were a recipe."""
    for verb, defaults in runs.items():
        if path == defaults:
            raise UserError(
                f"{given} has the defaults of `meshway {verb}`, which reads them by itself, as every verb reads its "
                "own: leave it out, and give the recipe alone"
            )


def _said_by_its_flag(binding: Binding, flags: Mapping[str, str]) -> Binding:
    own = flags.get(binding.name)
    return dataclasses.replace(binding, place=Place(own)) if own else binding


def _as_default(statement: Import | Binding) -> Import | Binding:
    if isinstance(statement, Binding):
        return dataclasses.replace(statement, is_default=True)
    return statement


def _is_layout(statement: Statement) -> TypeGuard[Binding]:
    return isinstance(statement, Binding) and statement.is_macro and statement.parameter == _LAYOUT


def is_auto(invocation: Invocation) -> bool:
    """Whether a command's last word on its layout is that it be chosen for it, as `infer --layout=auto`, or `serve`'s.

    Raises:
      UserError: it says what the mesh is, too; or describes devices for no choice.
    """
    layouts = [each.partition("=")[2].strip().strip("'\"") for each in invocation.bindings if _binds(each, _LAYOUT)]
    if invocation.verb not in _CHOOSES or not layouts or layouts[-1] != _AUTO:
        if invocation.verb in _CHOOSES and getattr(invocation.options, "topology", None):
            raise UserError("--topology has no effect without --layout=auto: leave it out")
        return False
    if mesh := [each for each in invocation.bindings if each.partition("=")[0].strip().startswith("mesh.MeshShape.")]:
        raise UserError(f"--gin.{mesh[0]}: --layout=auto chooses the mesh too; leave it out, or name the layout")
    return True


def on_one_device(invocation: Invocation) -> Invocation:
    """Returns a command whose layout is to be chosen with one that shards nothing, which any recipe can be read with;
    another as it is."""
    if not is_auto(invocation):
        return invocation
    kept = [each for each in invocation.bindings if not _binds(each, _LAYOUT)]
    return dataclasses.replace(invocation, bindings=(*kept, f"{_LAYOUT}='single'"))


def _binds(binding: str, name: str) -> bool:
    return binding.partition("=")[0].strip() == name


RECIPES = ("recipe.gin", "config.gin")  # what `meshway convert` writes; what `meshway train` resolved
_MACRO = "MODEL_DIR"


def of_run(invocation: Invocation) -> Invocation:
    """Returns the command with the recipe of its run: MODEL_DIR's `recipe.gin`, else its `config.gin`. MODEL_DIR may be
    one of the run's checkpoints.

    A command that has recipes of its own keeps them. Its other bindings override either.

    Raises:
      UserError: no recipe is given and MODEL_DIR is missing, is not a directory, or holds no recipe.
    """
    if invocation.gin_files:
        return invocation
    directory = run_directory(invocation)
    if directory is None:
        raise UserError(f"meshway {invocation.verb} needs a run: --model_dir=DIR, or a recipe: --gin_file=FILE")
    if not directory.is_dir():
        raise UserError(f"--model_dir={directory}: {no_directory(directory)}{_beside(directory)}")
    run = (
        directory.parent.parent if directory.name.isdecimal() and directory.parent.name == "checkpoints" else directory
    )
    for name in RECIPES:
        if (run / name).is_file():
            return dataclasses.replace(invocation, gin_files=(str((run / name).absolute()),))
    raise UserError(
        f"--model_dir={directory} is not a run directory: it holds neither {' nor '.join(RECIPES)}; give the recipe by "
        f"--gin_file=FILE, or a run{_inside(directory)}"
    )


def run_directory(invocation: Invocation) -> Path | None:
    """Returns the run directory that a command line names, by --model_dir or --gin.MODEL_DIR; None where it does not.

    Raises:
      UserError: it is not text.
    """
    values = [flag for flag in invocation.bindings if flag.partition("=")[0].strip() == _MACRO]
    if not values:
        return None
    value = parse_flag(values[-1]).value
    if not isinstance(value, str) or not value:
        raise UserError(f"--gin.{_MACRO}={value!r} is not a directory; write --model_dir=DIR")
    return open_path(value)


def _beside(directory: Path) -> str:
    """Returns the names beside a missing directory that are like its own, as a question."""
    parent = directory.parent
    if directory.exists():
        return ""
    if not parent.is_dir():
        return f" (nor {parent})"
    return did_you_mean(directory.name, [path.name for path in parent.iterdir() if path.is_dir()])


def _inside(directory: Path) -> str:
    """Returns the run that a directory is part of, or else one inside it, as an example."""
    near = [*list(directory.parents)[:3], *sorted(directory.iterdir())]
    runs = [path for path in near if any((path / name).is_file() for name in RECIPES)]
    return f", as --model_dir={runs[0]}" if runs else ""
