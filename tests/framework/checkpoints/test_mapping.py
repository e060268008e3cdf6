"""Which parameter of a checkpoint each of a model's comes from, and which checkpoint a path means."""

import jax.numpy as jnp
import pytest

from meshway.framework.checkpoints.manager import Checkpoints, find_checkpoint
from meshway.framework.checkpoints.mapping import Initial
from meshway.framework.errors import UserError

SAVED = {f"params/{name}": [[4], "float32"] for name in ("a/w", "a/b", "b/w", "c/w", "c/w2")}


def found(names, **options):
    """The source of each parameter, all of one shape."""
    shapes, axes = dict.fromkeys(names, (4,)), dict.fromkeys(names, ("embed",))
    return {name: source.name for name, source in Initial("run", **options).sources(shapes, axes, SAVED).items()}


def test_the_first_pattern_that_matches_decides():
    renames = [("x/w", "a/w"), ("x/(.*)", r"c/\1")]
    assert found(["x/w", "x/w2"], renames=renames) == {"x/w": "a/w", "x/w2": "c/w2"}


def test_a_name_is_renamed_once():
    """Names can be exchanged."""
    renames = [("a/w", "b/w"), ("b/w", "a/w")]
    assert found(["a/w", "b/w"], renames=renames) == {"a/w": "b/w", "b/w": "a/w"}


def test_a_pattern_matches_the_whole_name_or_not_at_all():
    assert found(["c/w", "c/w2"], renames=[("c/w", "a/w")]) == {"c/w": "a/w", "c/w2": "c/w2"}
    assert found(["c/w", "c/w2"], left_at_init=["c/w"]) == {"c/w2": "c/w2"}


def test_an_alternative_that_begins_another_renames_the_whole_name():
    assert found(["x", "xy"], renames=[("x|xy", "a/w")]) == {"x": "a/w", "xy": "a/w"}
    assert found(["w", "w2"], renames=[("(w|w2)", r"c/\1")]) == {"w": "c/w", "w2": "c/w2"}
    assert found(["z/w", "q"], renames=[("(z)/w|q", "c/w")]) == {"z/w": "c/w", "q": "c/w"}


def test_what_is_no_regular_expression_is_told():
    with pytest.raises(UserError, match=r"Initial.renames: '\(x' is not a regular expression"):
        found(["x"], renames=[("(x", "a/w")])
    with pytest.raises(UserError, match=r"Initial.left_at_init: '\*' is not a regular expression"):
        found(["x"], left_at_init=["*"])
    with pytest.raises(UserError, match=r"Initial.renames: 'x' becomes 'a/.*1': invalid group reference"):
        found(["x"], renames=[("x", r"a/\1")])
    with pytest.raises(UserError, match="Initial.renames: 'x' becomes .*: unknown group name 'part'"):
        found(["x"], renames=[("x", r"a/\g<part>")])


def test_what_is_left_at_init_goes_by_the_models_own_name():
    renames = [("x/(.*)", r"a/\1")]
    assert found(["x/w", "x/b"], renames=renames, left_at_init=["x/b"]) == {"x/w": "a/w"}
    with pytest.raises(UserError, match="pattern 'a/b' matches no parameter"):
        found(["x/w", "x/b"], renames=renames, left_at_init=["a/b"])


def test_a_path_means_its_own_checkpoint_or_the_latest(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (3, 12):
        checkpoints.save_params({"w": jnp.ones(2)}, step)
    checkpoints.close()
    folder = tmp_path / "checkpoints"
    for path in (tmp_path, folder):
        assert find_checkpoint(path, None, "here") == (folder, 12)
        assert find_checkpoint(path, 3, "here") == (folder, 3)
    assert find_checkpoint(folder / "3", None, "here") == (folder, 3)
