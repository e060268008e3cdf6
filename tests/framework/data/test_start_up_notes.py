import subprocess
import sys

import pytest

NOTES = """WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1795946890.211309   10723 port.cc:153] oneDNN custom operations are on.
I0000 00:00:1795946890.212440   10723 cudart_stub.cc:31] Could not find cuda drivers on your machine.
I0000 00:00:1795946890.312440   10723 cpu_feature_guard.cc:227] This binary is optimized.
To enable the following instructions: AVX2 FMA, in other operations, rebuild TensorFlow.
E0000 00:00:1795947402.289075     819 cuda_platform.cc:52] failed call to cuInit: UNKNOWN ERROR (303)
"""
# A library that speaks as TensorFlow's C++ does: on the stream itself, once as it loads and once as it looks for GPUs.
TENSORFLOW = f"""
import os
NOTES = {NOTES!r}
os.write(2, NOTES.encode() + b"a warning that matters\\n")
class config:
    def set_visible_devices(devices, kind):
        os.write(2, NOTES.encode())
        print("hidden:", kind)
"""


def said(folder, code, exits=0):
    """Runs code that imports a stand-in for TensorFlow; returns standard output, standard error."""
    package = folder / "tensorflow"
    package.mkdir()
    (package / "__init__.py").write_text(TENSORFLOW)
    (package / "compat.py").write_text("")
    (folder / "mylab.py").write_text("import sys\nprint('mine', file=sys.stderr)\nimport tensorflow.compat\n")
    (folder / "broken.py").write_text("import tensorflow\nraise ImportError('no such library')\n")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == exits, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("name", ["mylab", "tensorflow", "tensorflow.compat"])
def test_whoever_imports_tensorflow_its_notes_are_dropped_and_other_words_kept(tmp_path, name):
    code = f"""if True:
        import importlib
        from meshway.framework.data import seqio_adapter
        with seqio_adapter.dropped():
            importlib.import_module({name!r})
        assert not any("seqio_adapter" in type(finder).__module__ for finder in sys.meta_path)
        import tensorflow
        importlib.reload(tensorflow)
    """
    out, err = said(tmp_path, code)
    first, mark, reloaded = err.partition("a warning that matters\n")
    assert first == ("mine\n" if name == "mylab" else "") and mark
    assert "oneDNN" in reloaded, "the test's notes are not notes"
    assert out == "hidden: GPU\nhidden: TPU\n"


def test_the_import_of_a_recipe_is_quiet(tmp_path):
    out, err = said(tmp_path, "from meshway.launch.recipe.configurables import import_module; import_module('mylab')")
    assert err == "mine\na warning that matters\n" and out == "hidden: GPU\nhidden: TPU\n"


def test_a_failure_to_load_keeps_every_line(tmp_path):
    code = """if True:
        from meshway.framework.data import seqio_adapter
        import pathlib
        pathlib.Path(sys.path[0], "tensorflow", "__init__.py").open("a").write("raise ImportError('no libcuda')")
        try:
            with seqio_adapter.dropped():
                import tensorflow
        except ImportError as error:
            print(error)
    """
    out, err = said(tmp_path, code)
    assert out == "no libcuda\n" and err == NOTES + "a warning that matters\n"


def test_last_words_of_a_process_that_ends_during_the_import_are_heard(tmp_path):
    """As of one that another one's mistake ends: a thread says so, and ends it at once."""
    code = """if True:
        import os, threading
        from meshway.framework.data import seqio_adapter
        def end():
            print("meshway: process 0 of 2 stops", file=sys.stderr, flush=True)
            os._exit(2)
        with seqio_adapter.without_notes():
            thread = threading.Thread(target=end)
            thread.start()
            thread.join()
    """
    assert said(tmp_path, code, exits=2)[1] == "meshway: process 0 of 2 stops\n"
