"""`report.html`: a run on one page, made from the files of its run directory and from nothing else."""

import string
from pathlib import Path

from meshway.framework.errors import UserError
from meshway.framework.files import replace_file
from meshway.framework.training.report.elements import escape, folded
from meshway.framework.training.report.evaluation import evaluation, samples
from meshway.framework.training.report.experts import experts
from meshway.framework.training.report.heading import heading
from meshway.framework.training.report.layout import layout
from meshway.framework.training.report.run_files import Run, read_run
from meshway.framework.training.report.time_spent import time_spent
from meshway.framework.training.report.training import training


def write_report(model_dir: str | Path) -> Path:
    """Makes `report.html` in a run directory and returns its path.

    Reads `metrics.jsonl`, `timeline.jsonl`, `eval/<task>.jsonl`, `layout.json`, `model_info.txt` and `config.gin`.
    What is missing or unreadable is left out with a sentence, so a page can be made at any time, also after a crash.
    The page needs no other file, runs no script, and is the same bytes for the same files.

    Raises:
      UserError: no such folder, or the page cannot be written.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise UserError(f"no run directory {folder}: a report is made from the files of a run")
    run = read_run(folder)
    sections = (heading, training, experts, evaluation, samples, time_spent, layout, _recipe)
    template = string.Template((Path(__file__).with_name("page.html")).read_text(encoding="utf-8"))
    page = template.substitute(title=escape(run.name), body="\n".join(section(run) for section in sections))
    path = folder / "report.html"
    try:
        replace_file(path, page.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _recipe(run: Run) -> str:
    if not run.config.strip():
        return ""
    return f"<h2>Recipe</h2>\n{folded('config.gin', run.config)}"
