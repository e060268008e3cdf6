"""What README and the Makefile say is so."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_files_that_readme_names_exist():
    for name in re.findall(r"`((?:framework|models|gin|tasks|launch|tests)/[\w./]*)`", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"include '([\w/.]+)'", README):
        if not name.startswith("t5x"):
            assert (ROOT / "gin" / name).exists(), name


def test_the_example_of_readme_is_the_lab():
    """Every line README quotes from tests/lab/bigram.gin is in it, comments aside."""
    lab = (ROOT / "tests/lab/bigram.gin").read_text()
    block = README[README.index("    import optimizers\n") : README.index("    cd tests/lab")]
    for line in block.splitlines():
        line = line.split("  #")[0].strip()
        assert line in lab, line


def test_the_ci_runs_readmes_test_command():
    assert "make test" in README
    assert "make test" in (ROOT / ".ci/run").read_text().splitlines()


def test_nothing_names_where_packages_come_from_or_this_workplace():
    words = ["pypi" + ".org", "/" + "work/", "files.python" + "hosted"]
    for path in ROOT.rglob("*"):
        inside = path.relative_to(ROOT).parts
        if path.is_file() and not inside[0].startswith(".") and path.suffix in {".py", ".md", ".gin", ".toml", ".html"}:
            text = path.read_text()
            assert not [word for word in words if word in text], path
