"""How numbers are said."""

from __future__ import annotations

import pytest

from lowbit.cli.output import Seldom, bytes_bar, say_bytes, say_count, steps_bar, table


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1536, "1.54 kB"),
        (164_000_000, "164 MB"),
        (1.3e12, "1.3 TB"),
        (5e15, "5e+03 TB"),
    ],
)
def test_bytes(count, text):
    assert say_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (134_515_008, "134.5 M"), (671e9, "671 B"), (1.04e12, "1.04 T")],
)
def test_counts(count, text):
    assert say_count(count) == text


def test_tables_align():
    assert table(["a", "n"], [["long", "1"], ["x", "200"]], right={1}).splitlines() == [
        "a       n",
        "long    1",
        "x     200",
    ]


def test_a_quiet_bar_swallows(capsys):
    with bytes_bar("x", 10, quiet=True) as advance:
        advance(5)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_log_shows_that_a_long_run_lives(capsys, monkeypatch):
    """In pipes hours passed without a line. Not of what is short, and nothing beside JSON."""
    for quiet, every, said in ((False, 30.0, False), (True, 0.0, False), (False, 0.0, True)):
        monkeypatch.setattr(Seldom, "EVERY", every)
        with steps_bar("calibrating", quiet=quiet) as step, bytes_bar("x", 3000, quiet=quiet) as advance:
            step("layers.3", 3, 30)
            advance(1000)
            advance(500)
        captured = capsys.readouterr()
        lines = "calibrating: 3 of 30, layers.3\nx: 1 kB of 3 kB\nx: 1.5 kB of 3 kB\n"
        assert captured.err == (lines if said else "") and captured.out == ""


def test_lines_of_a_log_are_seldom(capsys, monkeypatch):
    now = iter([0.0, 29.0, 31.0, 60.0, 62.0])
    monkeypatch.setattr("lowbit.cli.output.time.monotonic", lambda: next(now))
    say = Seldom("x")
    for line in "abcd":
        say(line)
    assert capsys.readouterr().err == "x: b\nx: d\n"
