import dataclasses
import io
import os
import re

import numpy as np
import pytest
from data_in_memory import LENGTHS, encoded, memory
from rich.console import Console

from meshway.framework.data.features import EncoderDecoder, PrefixLanguageModel
from meshway.framework.data.inspection.decoded_rows import decode_rows
from meshway.framework.data.inspection.figures import Sample, inspect
from meshway.framework.data.passthrough import PassThrough
from meshway.framework.data.vocabularies import Bytes
from meshway.framework.errors import UserError
from meshway.launch import cli
from meshway.launch import inspection as inspect_data
from meshway.launch import inspection as verb

GOLDEN = """\
    mix
      read by     SimpleNamespace
      converter   PrefixLanguageModel, packed
      lengths     inputs 24, targets 12
      batch size  4 rows
      vocabulary  inputs, targets: bytes vocabulary of 359 ids, 100 of them extra (sha256 8e0a43b0e1f7)

    Batch features
    feature                dtype    shape
    decoder_input_tokens   int32    [4, 36]
    decoder_target_tokens  int32    [4, 36]
    decoder_loss_weights   float32  [4, 36]
    decoder_segment_ids    int32    [4, 36]
    decoder_positions      int32    [4, 36]
    decoder_prefix_mask    int32    [4, 36]

    Sources
    source  split  examples  items an epoch  items a row  rows an epoch  truncated
    a       -             2               2         2.00              1     21.88%
    An item is an example, or one of the parts it is split into. Truncated is the share of all tokens that no row shows.

    Tokens of an example
    source  feature  mean  p50  p95  max  total  cut at
    a       inputs    4.0    4    4    4      8      24
    a       targets  12.0    5   19   19     24      12
    Of every example, before anything is cut off.

    The first 2 batches
    source  rows  items  items a row  decoder density  decoder loss
    all        8     16         2.00            69.4%         47.2%
    Density is the share of a row that is no padding, loss the share that carries loss.

    Rows, as the model sees them: [n] begins segment n; where only some tokens carry loss, «they» do.

    a, row 0
      decoder targets: 25 of 36 tokens, 2 segments
        [1] ⇥cd</s>«blue</s>» [2] ab↵</s>«it is far to» [11 of padding]
"""


def pairs(*texts):
    return [{"inputs": encoded(i)[0], "targets": encoded(t)[0]} for i, t in texts]


def shown(inspection, **console):
    stream = io.StringIO()
    inspect_data.show(inspection, Console(file=stream, **{"width": 200, "highlight": False} | console))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def golden():
    return "".join(line.removeprefix("    ") for line in GOLDEN.splitlines(keepends=True))


@pytest.fixture
def tiny():
    return memory(PrefixLanguageModel(), {"a": pairs(("ab\n", "it is far too long"), ("\tcd", "blue"))})


def test_a_pipe_gets_marks(tiny):
    assert shown(inspect(tiny, batches=2, rows=1)) == golden()


def test_loss_is_marked_anew_in_each_segment(tiny):
    weights = np.array([[1.0, 1.0, 1.0, 0.0, 1.0, 0.0]])
    segments = np.array([[1, 1, 2, 2, 3, 0]])
    batch = {
        "decoder_target_tokens": np.array([[100, 101, 102, 103, 104, 0]]),
        "decoder_loss_weights": weights,
        "decoder_segment_ids": segments,
    }
    sample = Sample("", decode_rows(batch, {"targets": Bytes()}))
    text = shown(dataclasses.replace(inspect(tiny, batches=1, rows=0), samples=[sample]))
    assert text.endswith("\n    [1] «ab» [2] «c»d [3] «e» [1 of padding]\n")


def test_a_terminal_gets_colours_in_place_of_marks(tiny):
    text = shown(inspect(tiny, batches=2, rows=1), force_terminal=True, color_system="standard", width=60)
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert "cd</s>blue</s>ab↵</s>it is far to [11" in plain and "«" not in plain.split("a, row 0")[1]
    assert max(map(len, plain.splitlines())) <= 60
    styles = dict.fromkeys(re.findall(r"\x1b\[([\d;]*)m(?=⇥cd|blue|ab↵|it is far|</s>)", text))
    assert list(styles) == ["2;36", "2;7;36", "1;36", "1;7;36", "2;33", "2;7;33", "1;33"]


def test_tokens_cannot_move_the_cursor():
    data = memory(EncoderDecoder(), {"a": pairs(("\x1b[2J\r", "[red]b[/red]"))})
    for terminal in (False, True):
        text = shown(inspect(data, batches=1, rows=1), force_terminal=terminal, color_system=None)
        assert "<0x1B>[2J<U+000D></s>" in text and "[red]b[/red]" in text
        assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)


def test_pictures_are_blocks():
    image = np.zeros((5, 4, 1), np.float32)
    image[1, 1:3] = 1.0
    converter = PassThrough({"image": (5, 4, 1), "label": ()}, {"image": "float32", "label": "int32"})
    example = {"image": (255 * image).astype(np.uint8), "label": np.uint8(3)}
    found = inspect(memory(converter, {"a": [example]}, {}), batches=1, rows=1)
    assert "[5, 4, 1]\n\n      @@@@\n\n\n\n  label: 3\n" in shown(found)
    coloured = shown(found, force_terminal=True, color_system="truecolor")
    black, both = "\x1b[38;2;0;0;0;48;2;0;0;0m▀\x1b[0m", "\x1b[38;2;0;0;0;48;2;255;255;255m▀\x1b[0m"
    lines = [black + both + both + black, 4 * black, 4 * black]
    assert "".join(f"    {line}\n" for line in lines) in coloured


def test_a_very_long_row_is_cut_but_counted(monkeypatch, tiny):
    monkeypatch.setattr(inspect_data, "_MOST_TOKENS", 10)
    assert "«blue</s>» [2] a [15 more tokens, 11 of padding]" in shown(inspect(tiny, batches=1, rows=1))


def test_the_page_goes_where_it_is_asked_to(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    verb.data(tiny, batches=1)
    verb.data(tiny, batches=1, model_dir=str(tmp_path / "run"))
    verb.data(tiny, batches=1, rows=0, html="here/look.html", model_dir=str(tmp_path / "run"))
    pages = [tmp_path / name for name in ("data.html", "run/data.html", "here/look.html")]
    assert all(path.read_text().startswith("<!doctype html>") for path in pages)
    assert "as a page: here/look.html" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write file/data.html: .*--html=PATH"):
        verb.data(tiny, batches=1, html="file/data.html")


@pytest.mark.parametrize(
    ("words", "subject", "bindings"),
    [
        (["inspect"], "layout", ()),
        (["inspect", "layout"], "layout", ()),
        (["inspect", "data"], "data", ()),
        (["inspect", "data", "--rows=0", "--html", "a.html"], "data", ("rows=0", "html='a.html'")),
        (["inspect", "data", "--batches=7"], "data", ("batches=7",)),
    ],
)
def test_the_subject_may_be_left_out(words, subject, bindings):
    invocation = cli.parse([*words, "--gin_file=a"])
    assert (invocation.subject, invocation.bindings) == (subject, tuple(f"inspection.data.{b}" for b in bindings))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["inspect", "--rows=2"], "--rows is a flag of `meshway inspect data`, not of `meshway inspect layout`"),
        (["inspect", "dta"], "takes no argument 'dta'; did you mean 'data'?"),
        (["inspect", "my.gin"], "takes no argument 'my.gin'; a recipe is given as --gin_file=my.gin"),
        (["inspect", "--gin_file=b", "data"], "takes no argument 'data' there: write `meshway inspect data ...`"),
        (["inspect", "data", "--rows=x"], "'x' is not a whole number"),
        (["inspect", "data", "--simulated_devices=2"], "runs in one process and needs no devices"),
    ],
)
def test_a_wrong_command_is_told(capsys, words, expected):
    assert cli.main([*words, "--gin_file=a"]) == 2
    assert expected in capsys.readouterr().err


def test_a_recipe_of_a_cached_mixture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bindings = {
        "MIXTURE_OR_TASK_NAME": "kept_mix",
        "MIXTURE_OR_TASK_MODULE": "cached_tasks",
        "CACHE_DIR": str(tmp_path / "cache"),
        "TASK_FEATURE_LENGTHS": str(LENGTHS),
        "BATCH_SIZE": 4,
    }
    words = [f"--gin.{name}={value}" for name, value in bindings.items()]
    assert cli.main(["inspect", "data", "--gin_file=models/t5_1_1/tiny", "--batches=3", "--rows=1", *words]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\nkept_plain +train +50 +50 ", said) and re.search(r"\nkept_trimmed +1 +50.00% +50", said)
    assert (
        "kept_plain, row 0" in said and "[1] train" in said and sorted(os.listdir(tmp_path)) == ["cache", "data.html"]
    )
