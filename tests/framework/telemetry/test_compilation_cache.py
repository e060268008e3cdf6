"""Where compiled programs are kept, and that a second start of a recipe compiles none."""

import os
import re
import subprocess
import zlib

import jax
import pytest
from running import command, copy_lab, state_hash

from meshway.framework.errors import UserError
from meshway.framework.telemetry import compilation_cache

NAMES = [
    *("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_compilation_cache_max_size"),
    *("jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes"),
]


@pytest.fixture
def settings(monkeypatch):
    """jax's settings as they are without the tests' own, and afterwards as before."""
    monkeypatch.setattr(compilation_cache, "_kept", None)
    before = {name: getattr(jax.config, name) for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: {name: getattr(jax.config, name) for name in NAMES}
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder_is_in_the_user_s_cache_unless_told_otherwise(tmp_path, settings):
    for environment, folder in (
        ({"XDG_CACHE_HOME": str(tmp_path)}, tmp_path / "meshway" / "programs"),
        ({"MESHWAY_CACHE_DIR": str(tmp_path)}, tmp_path / "programs"),
        ({"MESHWAY_COMPILATION_CACHE": str(tmp_path / "own")}, tmp_path / "own"),
    ):
        jax.config.update("jax_compilation_cache_dir", None)
        assert compilation_cache.keep(environment) == ""
        (kind,) = folder.iterdir()
        assert settings()["jax_compilation_cache_dir"] == str(kind)
        assert settings()["jax_compilation_cache_max_size"] == compilation_cache.MAX_BYTES
    assert (
        compilation_cache.in_words()
        == f"0 programs compiled, 0 read from {kind} (MESHWAY_COMPILATION_CACHE= keeps none)"
    )


def test_it_can_be_turned_off_and_what_jax_is_told_is_left_alone(tmp_path, settings):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    before = settings()
    assert compilation_cache.keep({"XDG_CACHE_HOME": str(tmp_path)}) == "" and settings() == before
    assert compilation_cache.keep({"MESHWAY_COMPILATION_CACHE": ""}) == ""
    assert not settings()["jax_enable_compilation_cache"] and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_said(tmp_path, settings):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match="MESHWAY_COMPILATION_CACHE=.*/file cannot be written: Not a directory; give anot"
    ):
        compilation_cache.keep({"MESHWAY_COMPILATION_CACHE": str(tmp_path / "file")})
    note = compilation_cache.keep({"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert re.fullmatch(
        r"compiled programs are not kept: .*/file/meshway/programs/\S+ cannot be written \(.*\); MESH.*", note
    )
    assert settings()["jax_compilation_cache_dir"] is None and compilation_cache.in_words() == ""


def test_what_a_killed_process_wrote_in_part_is_removed(tmp_path, settings):
    compilation_cache.keep({"MESHWAY_COMPILATION_CACHE": str(tmp_path)})
    (folder,) = tmp_path.iterdir()
    whole = zlib.compress(bytes(range(256)) * 9)
    for name, content in {"whole": whole, "cut": whole[:-5], "empty": b"", "zstandard": b"\x28\xb5\x2f\xfd"}.items():
        (folder / f"{name}-cache").write_bytes(content)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.keep({"MESHWAY_COMPILATION_CACHE": str(tmp_path)})
    kept = {path.name for path in folder.glob("*-cache")}
    assert kept - {"zstandard-cache"} == {"whole-cache"}  # the last stays where nothing here could read it


@pytest.mark.slow
def test_a_second_start_compiles_nothing_and_computes_the_same(tmp_path):
    """Without the cache, with an empty one, and with that once more: the same bytes; the third reads all programs."""
    lab = copy_lab(tmp_path)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    told, hashes = [], []
    for number, folder in enumerate(["", str(tmp_path / "programs"), str(tmp_path / "programs")]):
        words = ("train", "--gin_file=linen.gin", f"--gin.MODEL_DIR={lab / str(number)}", "--gin.TRAIN_STEPS=4")
        environment = kept | {"MESHWAY_COMPILATION_CACHE": folder}
        done = subprocess.run(command(*words), cwd=lab, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        told.append(re.findall(r"([\d,]+) programs compiled, ([\d,]+) read from", done.stdout))
        hashes.append(state_hash(lab / str(number), 4))
        assert "cpu_aot_loader" not in done.stderr
    assert told[0] == [] and told[2][0][0] == "0" and int(told[1][0][0]) > 5, told
    assert len(set(hashes)) == 1
