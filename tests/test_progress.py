"""A stage tells how far it is: a bar on a terminal, one plain line in a log."""

import io
import sys

import pytest

from loraprune.progress import stage
from loraprune.words import duration_text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_one_line_a_stage_with_the_last_note(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("train", 4) as advance:
        advance()
        advance(2, "forget 0.51")
        advance(note="")
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err == "train  4/4  0 s  forget 0.51\n"


def test_a_stage_that_fails_says_how_far_it_came_and_raises(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), stage("score", 10) as advance:
        advance(3)
        raise RuntimeError("out of memory")
    assert capsys.readouterr().err == "score  3/10  0 s\n"


def test_a_terminal_gets_a_bar_with_title_count_and_note(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with stage("evaluate [after]", 3) as advance:
        advance(3, "final 0.93 [kept]")
    last = terminal.getvalue().rsplit("evaluate", 1)[-1]
    assert "[after]" in last and "3/3" in last and "final 0.93 [kept]" in last


def test_two_stages_know_nothing_of_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("one", 1) as advance:
        advance(1, "note of one")
    with stage("two", 2):
        pass
    assert capsys.readouterr().err.splitlines()[1] == "two  0/2  0 s"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (41.4, "41 s"), (59.7, "1 min 00 s"), (192, "3 min 12 s"), (7500, "2 h 05 min")],
)
def test_durations_are_said_as_a_person_says_them(seconds: float, words: str) -> None:
    assert duration_text(seconds) == words


def test_a_stage_may_turn_out_shorter_than_it_was_announced(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("train", 300) as advance:
        advance(50)
        advance(0, new_total=150)
        advance(100)
    assert capsys.readouterr().err == "train  150/150  0 s\n"
