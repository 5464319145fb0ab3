"""README and guide name commands, options and chips as they are. The guide's Python runs in calibration/test_cli.py."""

from __future__ import annotations

import re
from pathlib import Path

import click
import typer

from lowbit.cli import app
from lowbit.targets import ACCELERATORS

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "guide.md").read_text("utf-8")
TEXT = (ROOT / "README.md").read_text("utf-8") + GUIDE


def options() -> dict[str, set[str]]:
    """Command (`kernels explain` too) → its options."""
    found: dict[str, set[str]] = {}

    def visit(command: click.Command, name: str) -> None:
        for child, of in getattr(command, "commands", {}).items():
            visit(of, f"{name} {child}".strip())
        found[name] = {flag for p in command.params for flag in p.opts}

    visit(typer.main.get_command(app), "")
    return found


def test_commands_and_options_exist():
    known = options()
    commands = sorted(known, key=len, reverse=True)
    code = [*re.findall(r"```\n(.*?)```", TEXT, re.S), *re.findall(r"`([^`\n]+)`", TEXT)]
    given = [
        words for part in code for words in re.findall(r"^(?:.*[$m] )?lowbit ([a-z][^\n#]*)", part, re.M)
    ]
    assert len(given) > 15
    for words in given:
        name = next((c for c in commands if words.startswith(c) and c), None)
        assert name, f"no such command: lowbit {words}"
        for flag in re.findall(r"(?<=\s)--?[a-z][a-z-]*", words):
            assert flag in known[name], f"lowbit {name} has no {flag}"


def test_every_chip_has_a_row_with_its_scheme():
    rows = [line for line in GUIDE.splitlines() if line.startswith("| ")]
    for chip in ACCELERATORS.values():
        name = {"ascend910b": "Ascend 910B"}.get(chip.name, chip.name.upper())
        cells = next(row.split(" | ") for row in rows if re.search(rf"\b{name}\b", row.split(" | ")[0]))
        said = re.findall(r"`([^`]*)`", cells[1])
        assert said[0] == chip.scheme
        assert said[1:] == ([] if chip.format == "compressed-tensors" else [f"--format {chip.format}"])
