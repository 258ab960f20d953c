"""What others named or wrote commands no terminal: paths, classes, tensors, locks, errors."""

import io
import json

import pytest

import evaluate
from options.printable import printable
from parallel import terminal
from training import run_folder
from training.logbook import Logbook, as_table
from training.stopping import exit_code
from weights.provenance import Entry, Initial

# Clears the screen; a link to elsewhere; text from right to left; a second line; half a character.
HOSTILE = "a\x1b[2Jb\x9b8;;c\u202ed\ne\udcff"
SHOWN = r"a\x1b[2Jb\x9b8;;c\u202ed\ne\udcff"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, SHOWN),
        ("\x07\x08\r\t\x7f\u2028", r"\x07\x08\r\t\x7f\u2028"),
        ("[/red] \u65e5\u672c\u3000\xe9 \\n", "[/red] \u65e5\u672c\u3000\xe9 \\n"),
        ("\u0645\u200c\u06cc", "\u0645\u200c\u06cc"),  # a letter's joiner, no command
    ],
)
def test_controls_are_shown_as_python_writes_them_and_letters_as_they_are(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("show", [terminal.say, terminal.warn, terminal.show_result])
def test_whatever_prints_a_foreign_name_prints_one_plain_line(show, capsys):
    show(f"file {HOSTILE}", "second")
    assert "".join(capsys.readouterr()).splitlines() == [f"file {SHOWN}", "second"]


@pytest.mark.parametrize("show", [terminal.say, terminal.warn, terminal.show_result])
def test_a_terminal_without_the_letters_gets_escapes_and_stays_in_use(show, monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", ascii_only)
    monkeypatch.setattr("sys.stderr", ascii_only)
    show("\u65e5 x")
    show("again")
    assert ascii_only.buffer.getvalue() == b"\\u65e5 x\nagain\n"


def test_an_event_of_the_log_is_one_line_whatever_its_values_hold(small_run, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    book = Logbook(tmp_path / "run", config=small_run(), is_main=True, step=0)
    book.event("init", source=HOSTILE)
    book.close()
    assert capsys.readouterr().out == f"init source={SHOWN}\n"
    (line,) = (tmp_path / "run" / "log.jsonl").read_text("ascii").splitlines()
    assert json.loads(line)["source"] == HOSTILE
    assert "\x1b" not in line


def test_a_table_keeps_its_form_around_foreign_text(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    lines = as_table(HOSTILE, {HOSTILE: "x" * 300, "\u65e5\u672c": HOSTILE})
    assert lines[0].strip() == SHOWN
    assert [line for line in lines if SHOWN in line and "x" * 300 in line]
    assert all(printable(line) == line for line in lines)
    assert len(lines) == 5  # title, two borders, two rows


def test_an_error_is_one_plain_line_for_torchrun_too(tmp_path, monkeypatch, capsys):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))

    def program():
        raise ValueError("file a\x1b[2J  b:\n   bad")

    assert exit_code(program) == 2
    line = r"error (rank 0): file a\x1b[2J  b: bad"  # two blanks of a name stay two
    assert capsys.readouterr().err == f"{line}\n"
    assert json.loads(file.read_text())["message"]["message"] == line


def test_a_mistyped_flag_is_one_plain_line(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse(["cat", f"--{HOSTILE}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert SHOWN in line


def test_a_traceback_for_torchrun_is_plain(tmp_path, monkeypatch):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))

    def program():
        raise TypeError("a\x1b[2J")

    with pytest.raises(TypeError):
        exit_code(program)
    text = json.loads(file.read_text())["message"]["message"]
    assert text.splitlines()[-1] == r"TypeError: a\x1b[2J"
    assert len(text.splitlines()) > 3


def test_tensors_names_are_plain_in_the_table_of_initial_values():
    entry = Entry("head.weight", (2, 3), "loaded", sources=(HOSTILE,))
    table = Initial([entry], [HOSTILE], "none")
    assert [line for line in table.lines() if f"<- {SHOWN}" in line]
    assert f"not used: {SHOWN}" in table.lines()


def test_a_planted_lock_is_shown_and_not_obeyed(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise BlockingIOError

    (tmp_path / ".lock").write_text(HOSTILE[:-1])
    monkeypatch.setattr(run_folder.fcntl, "lockf", refuse)
    assert exit_code(lambda: run_folder._try_lock(tmp_path)) == 2
    line = r"in use by a\x1b[2Jb\x9b8;;c\u202ed e"
    assert line in capsys.readouterr().err


def test_class_names_are_plain_in_the_table_of_classes(capsys):
    one = {"top1": 50.0, "top5": 100.0, "loss": 1.0, "images": 2.0}
    scores = {**one, "val_loss": 1.0, "val_images": 2, "classes": {HOSTILE: one}}
    evaluate.print_scores(scores, origin=HOSTILE, per_class=True)
    out = capsys.readouterr().out
    assert out.count(SHOWN) == 2
    assert "\x1b" not in out
