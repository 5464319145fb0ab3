"""docs/engines.md from the results of check_engines.py."""

from pathlib import Path


def markdown(work: Path) -> str:
    return ""
