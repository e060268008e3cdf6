import re

import pytest

from meshway.framework.errors import UserError
from meshway.launch.invocation import Invocation
from meshway.launch.recipe.files import of_run


def invocation(*bindings, **options):
    return Invocation("eval", bindings=bindings, **options)


def test_a_run_has_its_recipe(tmp_path):
    (tmp_path / "config.gin").write_text("")
    found = of_run(invocation(f"MODEL_DIR={str(tmp_path)!r}", "BATCH_SIZE=4"))
    assert found.gin_files == (str(tmp_path / "config.gin"),)
    assert found.bindings == (f"MODEL_DIR={str(tmp_path)!r}", "BATCH_SIZE=4")
    (tmp_path / "recipe.gin").write_text("")
    assert of_run(invocation(f"MODEL_DIR={tmp_path}")).gin_files == (str(tmp_path / "recipe.gin"),)


def test_the_last_directory_given_is_meant(tmp_path):
    (tmp_path / "config.gin").write_text("")
    found = of_run(invocation("MODEL_DIR='/nowhere'", f"MODEL_DIR={tmp_path}"))
    assert found.gin_files == (str(tmp_path / "config.gin"),)


def test_a_recipe_of_ones_own_is_kept(tmp_path):
    given = invocation("MODEL_DIR='/nowhere'", gin_files=("mine.gin",))
    assert of_run(given) is given


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "quickstart").mkdir()
    with pytest.raises(UserError, match="no such directory; did you mean 'quickstart'"):
        of_run(invocation(f"MODEL_DIR='{tmp_path}/quikstart'"))
    with pytest.raises(UserError, match=re.escape(f"(nor {tmp_path}/runs)")):
        of_run(invocation(f"MODEL_DIR='{tmp_path}/runs/quickstart'"))
    with pytest.raises(UserError, match="neither recipe.gin nor config.gin"):
        of_run(invocation(f"MODEL_DIR='{tmp_path}'"))
    (tmp_path / "quickstart" / "config.gin").write_text("")
    with pytest.raises(UserError, match=re.escape(f"as --model_dir={tmp_path}/quickstart")):
        of_run(invocation(f"MODEL_DIR='{tmp_path}'"))
    (tmp_path / "quickstart" / "checkpoints" / "2" / "state").mkdir(parents=True)
    for part in ("checkpoints", "checkpoints/2/state"):
        with pytest.raises(UserError, match=re.escape(f", or a run, as --model_dir={tmp_path}/quickstart") + "$"):
            of_run(invocation(f"MODEL_DIR='{tmp_path}/quickstart/{part}'"))
    with pytest.raises(UserError, match="config.gin: it is a file, not a directory$"):
        of_run(invocation(f"MODEL_DIR='{tmp_path}/quickstart/config.gin'"))
    with pytest.raises(UserError, match="meshway eval needs a run: --model_dir=DIR"):
        of_run(invocation())
    with pytest.raises(UserError, match="MODEL_DIR=3 is not a directory"):
        of_run(invocation("MODEL_DIR=3"))
