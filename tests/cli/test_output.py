"""How numbers are said."""

from __future__ import annotations

import pytest

from lowbit.cli.output import bytes_bar, say_bytes, say_count, table


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
