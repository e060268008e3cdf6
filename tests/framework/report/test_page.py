import html.parser
import json
import math
import random
import re
from pathlib import Path

import pytest

from meshway.framework.errors import UserError
from meshway.framework.evaluation.records import Records
from meshway.framework.report import plots
from meshway.framework.report.page import write_report
from meshway.framework.report.plots import read_run
from meshway.framework.telemetry.timeline import Timeline, read_goodput
from meshway.framework.telemetry.writers import json_line

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(html.parser.HTMLParser):
    """A page's tags, which must nest, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def _fill(folder: Path) -> None:
    (folder / "eval").mkdir(parents=True)
    lines = [{"step": 0, "validation/loss": 9.5}]
    for step in range(10, 101, 10):
        scalars = {"loss": 9 - step / 20, "learning_rate": 1e-3, "tokens_per_second": 12345.0 + step}
        scalars |= {"data_wait_fraction": 0.004, "mfu": 0.3, "grad_norm": 1.0}
        lines.append({"step": step, **scalars} | ({"validation/loss": 5.125} if step == 100 else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = {"input": "a < b & c", "target": "<script>alert(1)</script>", "prediction": "one\x00\ud800"}
    for task, name in (("summarize", "f1"), ("$span$_x", "exact_match")):
        evaluations = [{"step": s, "metrics": {"loss": 5.0, name: s / 100}} for s in (0, 50, 100)]
        evaluations[1]["predictions"] = [sample] * 20
        text = "".join(json.dumps(line) + "\n" for line in evaluations)
        (folder / "eval" / f"{task}.jsonl").write_text(text)
    rows = [
        {"name": "params/embedding", "axes": ["vocab", None], "shape": [100, 8], "spec": "(model, None)"}
        | {"bytes_per_device": 3200, "rule": "vocab->model"},
        {"name": "params/scale", "axes": ["embed"], "shape": [8], "spec": "(None,)"}
        | {"bytes_per_device": 32, "rule": "embed->None"},
        {"name": "step", "axes": [], "shape": [], "spec": "()", "bytes_per_device": 4, "rule": ""},
    ]
    (folder / "layout.json").write_text(json.dumps(rows))
    (folder / "model_info.txt").write_text("a table")
    (folder / "config.gin").write_text("X = '<&>'\n")


def test_a_full_run_is_told_on_one_self_contained_page(tmp_path: Path) -> None:
    folder = tmp_path / "my <run>"
    _fill(folder)
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    for needed in ("my <run>", "5.125", "9.5", "12,400", "30.0%", "808", "a < b & c", "X = '<&>'"):
        assert needed in page.text, needed
    for needed in ("params/embedding", "vocab, -", "100 x 8", "(model, None)", "3.1 KiB", "$span$_x"):
        assert needed in page.text, needed
    assert "<script>alert(1)</script>" in page.text and page.count("script") == 0
    # loss, rate, tokens/s, waiting, norm, MFU; then loss, f1 and exact match of the tasks
    assert page.count("svg") == 9
    assert page.count("table") == 4  # two of them are the tasks'
    assert page.text.count("one\N{REPLACEMENT CHARACTER}?") == 2 * 12
    references = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    assert not references and "url(#" in text and "@import" not in text
    assert all(value.startswith("#") for _, attrs in page.tags if (value := attrs.get("xlink:href")))
    assert not any(colour in text for colour in plots._CSS)


def test_memory_is_told_where_it_was_counted(tmp_path: Path) -> None:
    _fill(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[3:]:  # the run went on where memory is counted
        line |= {"device_bytes_in_use": 2**30, "device_peak_bytes_in_use": 3 * 2**30 + line["step"]}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert (
        "peak memory of a device3.0 GiB" in page.text and "Device memory, GiB" in page.text and page.count("svg") == 10
    )
    path.write_text("".join(json.dumps(line | {"device_bytes_limit": 80 * 2**30}) + "\n" for line in lines))
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert "peak memory of a device3.0 GiB of 80.0 GiB" in page.text


def test_metrics_of_each_task_stand_in_a_table_over_steps(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    lines: list[dict] = [{"step": 1000 * n, "metrics": {"loss": 5 - n / 100, "token_f1": n / 3}} for n in range(50)]
    lines[49] |= {"failed": {"rouge": "KeyError: <label>"}, "metrics": {"loss": 0.125}}
    lines[48]["metrics"]["loss"] = None
    (tmp_path / "eval" / "summary.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "summary, the last 40 of 50 steps" in page.text and page.count("tr") == 1 + 40
    assert "steplosstoken f110,0004.93.3333" in page.text and "48,000-1649,0000.125-" in page.text
    assert "rouge raised KeyError: <label> at step 49,000" in page.text


def test_what_metrics_return_besides_numbers_is_shown_of_the_last_step(tmp_path: Path) -> None:
    """Images and sounds are kept of the last step alone, so that a task's file stays small."""
    records = Records(tmp_path / "eval")
    for step in (1, 2):
        values = {
            "note": {"kind": "text", "text": f"<b>step {step}</b>"},
            "map": {"kind": "image", "png": ["aGk="]},
            "sound": {"kind": "audio", "wav": ["aG8="]},
            "spread": {"kind": "histogram", "edges": [0.0, 1.0, 2.0], "counts": [3, 1]},
            "raw": {"kind": "tensor", "dtype": "float32", "shape": [2, 3], "data": "", "metadata": ""},
        }
        records.add(step, {"ids": {"metrics": {"loss": 1.0}, "values": values}})
    page = Page(write_report(tmp_path).read_text())
    assert "<b>step 2</b>" in page.text and "step 1</b>" not in page.text and "float32 [2, 3]" in page.text
    sources = [dict(attrs).get("src") for tag, attrs in page.tags if tag in ("img", "audio")]
    assert sources == ["data:image/png;base64,aGk=", "data:audio/wav;base64,aG8="]
    assert "4 values from 0 to 2" in page.text and sum(tag == "rect" for tag, _ in page.tags) >= 2
    assert sorted(records.read("ids")[1]["values"]) == ["note", "spread"] and len(records.read("ids")[2]["values"]) == 5


def test_a_report_can_be_made_again_with_the_same_bytes(tmp_path: Path) -> None:
    _fill(tmp_path / "run")
    first = write_report(tmp_path / "run").read_bytes()
    assert write_report(tmp_path / "run").read_bytes() == first
    assert not list((tmp_path / "run").glob(".report*"))


def _timeline(folder: Path, attempts: int, **more: object) -> None:
    """Adds attempts of 100 seconds each, 20 apart, of 10 steps; every second one was killed after its checkpoint."""
    lines = []
    for index in range(attempts):
        phases = {"startup": 8.0, "compile": 20.0, "training": 60.0, "data_wait": 2.0, "checkpoint": 4.0}
        line = {"began": 1.7e9 + 120 * index, "time": 1.7e9 + 120 * index + 100, "event": "report"}
        line |= {"start_step": 5 * index, "step": 5 * index + 10, "seconds": phases | {"evaluation": 6.0}}
        lines.append(json.dumps(line | more) + "\n")
    (folder / "timeline.jsonl").write_text("".join(lines))


def test_where_the_time_went_is_drawn_and_told(tmp_path: Path) -> None:
    _fill(tmp_path / "run")
    _timeline(tmp_path / "run", 2, outcome="failed: <a peer> is gone" + " for good" * 99, devices=8)
    with (tmp_path / "run" / "timeline.jsonl").open("a") as file:
        file.write('{"began": 17')  # killed
    text = write_report(tmp_path / "run").read_text(encoding="utf-8")
    page = Page(text)
    assert page.count("svg") == 10 and page.count("table") == 5
    # Of 220 seconds 120 went into training, and 30 of them into steps that were done again.
    for needed in (
        "Where the time went",
        "40.9% of 3:40 in 2 attempts",
        "failed: <a peer> is gone",
        "0 to 10",
        "30.0 s",
    ):
        assert needed in page.text, needed
    for needed in ("2023-11-14 22:13", "20.0 s", "13.6%", "start-up", "1 line of timeline.jsonl could not be read."):
        assert needed in page.text, needed
    assert page.text.count("for good") < 20
    assert not any(colour in text for colour in plots._CSS)
    assert write_report(tmp_path / "run").read_text(encoding="utf-8") == text


def test_many_attempts_are_folded(tmp_path: Path) -> None:
    _timeline(tmp_path, 60)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Time by attempt, the last 24" in page.text and page.count("details") == 1
    assert page.text.count("killed") == 59 and page.text.count("not written yet") == 1


STATISTICS = ("load_max", "load_min", "entropy", "drop_rate")


def _route(folder: Path, layers: int) -> None:
    """Adds what a mixture of experts reports, in `layers` layers of its decoder and one of its encoder."""
    names = [f"decoder/router/{statistic}/layer_{layer:02d}" for statistic in STATISTICS for layer in range(layers)]
    names += [f"encoder/router/{statistic}/layer_01" for statistic in STATISTICS]
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[1:]:
        line |= {name: 1.5 for name in names} | {"router_load_loss": 0.01, "router_z_loss": 0.02}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluations = folder / "eval" / "summarize.jsonl"
    metrics = {name: 1.5 for name in names} | {"router_load_loss": 0.01}
    evaluations.write_text(json.dumps({"step": 100, "metrics": metrics | {"loss": 5.0, "f1": 0.5}}) + "\n")


@pytest.mark.parametrize("layers", [2, 24])
def test_experts_are_shown_by_layer(tmp_path: Path, layers: int) -> None:
    _fill(tmp_path / "run")
    _route(tmp_path / "run", layers)
    text = write_report(tmp_path / "run").read_text(encoding="utf-8")
    page = Page(text)
    assert page.count("svg") == 9 + 2 * 4 + 2, "by stack and statistic, and two losses; none of them once more below"
    for needed in (
        "Experts",
        "Decoder: busiest expert (1 is even)",
        "Encoder, layer 1: dropped token choices",
        "Router loss: z",
    ):
        assert page.text.count(needed) == 1, needed
    assert page.text.count(f"layer {layers - 1}") == (8 if layers == 2 else 4)
    # Few layers have a colour and a name each, many a place on a scale.
    assert ("color-mix" in text) == ("linear-gradient" in text) == (layers == 24)
    if layers == 24:
        assert len(set(re.findall(r"color-mix\([^)]*\)[^)]*\)", text))) == 24
    assert not any(colour in text for colour in plots._CSS)


def test_a_dense_run_of_before_has_neither_section(tmp_path: Path) -> None:
    _fill(tmp_path / "run")
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    for absent in ("Where the time went", "Experts", "timeline", "goodput"):
        assert absent not in page.text


def test_an_empty_folder_gives_sentences(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    for sentence in (
        "There is no metrics.jsonl, or nothing in it.",
        "There is no config.gin, or nothing in it.",
        "No step has been reported yet.",
        "No evaluation has been written yet.",
        "No evaluation has written predictions.",
    ):
        assert sentence in page.text
    assert page.count("svg") == 0


def test_what_a_crash_cut_is_left_out_and_said(tmp_path: Path) -> None:
    _fill(tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert "1 line of metrics.jsonl could not be read." in page.text
    assert page.count("svg") == 9


@pytest.mark.parametrize("seed", range(4))
def test_garbage_in_any_file_never_breaks_the_page(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    values = [
        None,
        True,
        "x",
        [],
        {},
        [1, "a"],
        {"loss": 1},
        math.nan,
        math.inf,
        -1,
        10**400,
        1e308,
        "\ud800",
        2.5,
    ]

    def thing() -> object:
        return rng.choice(values)

    def row(keys: list[str]) -> str:
        return json.dumps({key: thing() for key in keys if rng.random() < 0.8})

    _fill(tmp_path / "run")
    keys = ["step", "loss", "learning_rate", "mfu", "tokens_per_second", "validation/loss"]
    keys += ["device_peak_bytes_in_use", "device_bytes_limit"]
    steps = [f'{{"step": {n}, "loss": {json.dumps(thing())}, "mfu": {json.dumps(thing())}}}' for n in range(9)]
    junk = [row(keys) for _ in range(30)] + ["[" * 100_000, "", "\x00\x01", '{"step": 1', "[]", '"step"']
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(steps + junk), encoding="utf-8")
    evaluations = [row(["metrics", "predictions"])[:-1].lstrip("{") for _ in range(30)]
    lines = [f'{{"step": {n}{"," if text else ""}{text}}}' for n, text in enumerate(evaluations)]
    lines += [f'{{"step": {40 + n}, "metrics": {{"f1": {json.dumps(thing())}}}}}' for n in range(9)]
    kinds = ["text", "image", "audio", "histogram", "tensor"]
    shown = {kind: {"kind": kind} | {key: thing() for key in ("text", "png", "wav", "edges")} for kind in kinds}
    shown |= {"bars": {"kind": "histogram", "edges": [thing(), thing(), 2.0], "counts": [1.0, thing()]}, "x": thing()}
    lines += [f'{{"step": 51, "values": {json.dumps(rng.choice([shown, thing()]))}}}']
    lines += [f'{{"step": 50, "predictions": [{json.dumps(thing())}, {{"input": {json.dumps(thing())}}}]}}']
    (tmp_path / "run" / "eval" / "summarize.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "run" / "eval" / "bytes.jsonl").write_bytes(rng.randbytes(500))
    (tmp_path / "run" / "config.gin").write_bytes(rng.randbytes(200))
    _timeline(tmp_path / "run", 3, outcome=thing(), devices=thing(), event=thing())
    with (tmp_path / "run" / "timeline.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n".join([row(["began", "time", "start_step", "step", "seconds"]) for _ in range(30)] + junk))
    columns = ["axes", "shape", "spec", "bytes_per_device", "rule"]
    rows = [{"name": thing()} | {key: thing() for key in columns} for _ in range(20)]
    (tmp_path / "run" / "layout.json").write_text(json.dumps(rows), encoding="utf-8")
    Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))


def test_no_folder_and_no_room_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run directory"):
        write_report(tmp_path / "nothing")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match="cannot write .*report.html: Is a directory"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_long_curves_are_thinned_but_keep_their_spikes() -> None:
    points = [(step, 1.0) for step in range(100_000)]
    points[54_321] = (54_321, 99.0)
    points[77_777] = (77_777, math.nan)
    thinned = plots._thinned(points)
    assert len(thinned) <= plots._MAX_POINTS + 2
    assert (54_321, 99.0) in thinned
    assert thinned == sorted(thinned)


BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # all that str.splitlines() takes for the end of a line


def test_only_a_newline_ends_a_line_of_json(tmp_path):
    """A prediction may hold any other character: its record is read as it was written."""
    text = f"one{BREAKS}two"
    sample = {"input": text, "target": text, "prediction": text}
    record = {"metrics": {"loss": 5.0}, "counts": {}, "predictions": [sample], "failed": {"metric": text}}
    records = Records(tmp_path / "eval")
    records.add(10, {"a_task": record})
    assert records.read("a_task") == {10: {"step": 10, **record}}
    (tmp_path / "metrics.jsonl").write_bytes(json_line(10, {"loss": 1.0, "note": text}))
    with pytest.raises(ValueError), Timeline(tmp_path / "timeline.jsonl"):
        raise ValueError("\u2028".join("ab"))
    run = read_run(tmp_path)
    assert run.evaluations["a_task"] == [{"step": 10, **record}]
    assert run.reports == [{"step": 10, "loss": 1.0, "note": text}]
    assert len(run.goodput.attempts) == len(read_goodput(tmp_path / "timeline.jsonl").attempts) == 1
    assert not [sentence for sentence in run.missing if "could not be read" in sentence]
