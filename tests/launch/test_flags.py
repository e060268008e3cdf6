"""Flags: one field of a dataclass gives the parser, the help and the value; verbs and places declare them alike."""

import dataclasses
from typing import Literal

import pytest

from meshway.framework.errors import UserError
from meshway.launch import cli
from meshway.launch.bench_flags import BenchServeFlags
from meshway.launch.cluster.options import KINDS
from meshway.launch.flags import Parser, add_flags, binds, flag, flags_of, given, not_negative, refuse_unknown
from meshway.launch.invocation import MACROS
from meshway.launch.recipe.configurables import ImportTable, find, parameters
from meshway.launch.recipe.files import GinFiles
from meshway.launch.recipe.text import Import
from meshway.launch.verbs import VERBS


@dataclasses.dataclass(frozen=True)
class Place:
    nodes: int = flag("how many nodes", "N")
    env: tuple[str, ...] = flag("a variable; repeat for more", "KEY=VALUE", ())
    spot: bool = flag("use spot capacity", default=False)
    words: tuple[str, ...] = ()  # not a flag


@dataclasses.dataclass(frozen=True)
class Verb:
    source: str | None = binds("a.b.source", "where from", "DIR", name="--from")
    rows: int | None = binds("a.b.rows", "how many", "N", least=0)
    rate: float | None = binds("RATE", "how fast", "X", reads=not_negative)
    kind: Literal["one", "two"] | None = binds("a.b.kind", "which", "KIND")
    stop: tuple[str, ...] | None = binds("a.b.stop", "a text; repeat for more", "TEXT")
    again: bool = binds("a.b.again", "once more")


def read(kind, *words):
    parser = Parser(prog="meshway it")
    add_flags(parser, flags_of(kind))
    return given(flags_of(kind), parser.parse_args(words), "meshway it")


@dataclasses.dataclass(frozen=True)
class Reserved(Place):
    node_list: str | None = flag("which nodes", "NODES", None)


def test_a_kind_s_own_flags_come_before_those_it_inherits():
    assert [each.name for each in flags_of(Reserved)] == ["--node_list", "--nodes", "--env", "--spot"]


def test_fields_become_values():
    assert read(Place, "--nodes=3", "--env=A=1", "--env", "B=2") == {"nodes": 3, "env": ("A=1", "B=2")}
    assert Place(**read(Place, "--nodes=1", "--spot")) == Place(1, (), True)


def test_what_was_given_becomes_bindings():
    values = read(Verb, "--from=x", "--rows=0", "--rate=.5", "--kind=two", "--stop=a", "--stop=b'", "--again")
    assert [each.bound(values[each.field]) for each in flags_of(Verb)] == [
        "a.b.source='x'",
        "a.b.rows=0",
        "RATE=0.5",
        "a.b.kind='two'",
        "a.b.stop=['a', \"b'\"]",
        "a.b.again=True",
    ]
    assert read(Verb) == {} and Verb() == Verb(None, None, None, None, None, False)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], r"^meshway it needs --nodes=N: how many nodes$"),
        (["--nodes=0"], r"^argument --nodes: '0' is not a whole number of at least 1 \(see meshway it --help\)$"),
        (["--node=1"], r"unrecognized arguments: --node=1"),  # no flag is abbreviated
    ],
)
def test_what_is_wrong_is_a_users_error(words, expected):
    with pytest.raises(UserError, match=expected):
        read(Place, *words)


def test_an_unknown_flag_is_told_whose_it_is_or_what_is_near():
    others = {"meshway other": flags_of(Place)}
    with pytest.raises(UserError, match="^--spot is a flag of `meshway other`, not of `meshway it`$"):
        refuse_unknown("--spot", "meshway it", flags_of(Verb), others)
    with pytest.raises(UserError, match="^meshway it: unknown flag --agian; did you mean '--again'[?]$"):
        refuse_unknown("--agian", "meshway it", flags_of(Verb), others)
    with pytest.raises(UserError, match="unknown flag --nods; did you mean '--nodes'[?]$"):
        refuse_unknown("--nods", "meshway it", (), others)


def test_a_flag_of_a_verb_is_bound_or_taken_by_the_verb_itself():
    """And no two flags of one command have one name or one binding."""
    kinds = [verb.flags for verb in VERBS.values()]
    kinds += [subject.flags for verb in VERBS.values() for subject in verb.subjects.values()]
    for flags in [*map(flags_of, kinds), *(kind.flags for kind in KINDS.values())]:
        assert len({each.name for each in flags}) == len(flags) == len({each.field for each in flags})
        bindings = [each.binding for each in flags if each.binding]
        assert len(set(bindings)) == len(bindings)
    unbound = {each.name for kind in kinds for each in flags_of(kind) if not each.binding}
    taken = {"--dry_run", "--model_dir", "--json", "--topology", "--cache", "--small", "--table", "--recipes"}
    of_bench_serve = {each.name for each in flags_of(BenchServeFlags)}  # it has no recipe to bind
    assert unbound == taken | {"--phase", "--compile"} | of_bench_serve


COMMANDS = [(name, subject) for name, verb in VERBS.items() for subject in verb.subjects or [None]]


@pytest.mark.parametrize(("verb", "subject"), COMMANDS)
def test_what_a_flag_binds_is_there(verb, subject):
    """A macro that recipes honour, or a parameter of something that the verb's own gin file imports."""
    flags = [each for each in flags_of(VERBS[verb].flags_for(subject)) if each.binding]
    files = GinFiles(())
    statements = files.read(files.runs()[verb]) if flags else []
    table = ImportTable(each for each in statements if isinstance(each, Import))
    for each in flags:
        selector, _, parameter = each.binding.rpartition(".")
        if selector:
            assert parameter in parameters(find(table.target(selector), importing=True)).names, each.binding
        else:
            assert each.binding in MACROS


@pytest.mark.parametrize(
    "words",
    [["bench", "moe", "--gin_file=a"], ["bench", "--gin_file=a", "moe"], ["bench", "--gin_file", "a", "moe"]],
)
def test_a_subject_may_stand_among_the_flags(words):
    invocation = cli.parse(words)
    assert (invocation.subject, invocation.gin_files) == ("moe", ("a",))


def test_help_of_a_verb_lists_its_subjects_and_that_of_a_subject_explains_its_flags(capsys):
    for name, verb in VERBS.items():
        for subject, entry in verb.subjects.items():
            assert cli.main([name, "--help"]) == 0
            listed = capsys.readouterr().out
            assert entry.help.split()[0] in listed and all(each.usage in listed for each in flags_of(entry.flags))
            assert cli.main([name, subject, "--help"]) == 0
            shown = " ".join(capsys.readouterr().out.split())
            assert f"usage: meshway {name} {subject} " in shown
            assert ("--gin.NAME=VALUE" in shown) == verb.takes_recipe(subject)
            assert all(each.help in shown for each in flags_of(entry.flags))
