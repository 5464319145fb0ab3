"""What `python -m build` puts into the sdist and the wheel: nothing of the source is missing from either."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parent.parent
PARTS = ("lowbit", "kernels", "tests", "scripts", "docs", "benchmarks")
FILES = (
    "pyproject.toml", "MANIFEST.in", "Makefile", "constraints.txt", "LICENSE", "README.md", "CONTRIBUTING.md",
    "CHANGELOG.md",
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy as of a clone; a build leaves things beside the source."""
    out = tmp_path_factory.mktemp("clone")
    for part in PARTS:
        shutil.copytree(ROOT / part, out / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, out)
    return out


def build(source: Path, kind: str, out: Path) -> Path:
    pytest.importorskip("setuptools", minversion="77")
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def all_files(source: Path, *parts: str) -> set[str]:
    return {f"{p.relative_to(source)}" for part in parts for p in (source / part).rglob("*") if p.is_file()}


def test_sdist_has_the_whole_source(source, tmp_path):
    with tarfile.open(build(source, "sdist", tmp_path)) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert not (all_files(source, *PARTS) | set(FILES)) - held


def test_wheel_has_every_module(source, tmp_path):
    """Packages are listed by hand in pyproject.toml, so that a new one could be left out."""
    with zipfile.ZipFile(build(source, "wheel", tmp_path)) as archive:
        held = set(archive.namelist())
    kernels = {f"lowbit/{name}" for name in all_files(source, "kernels")}
    assert not (all_files(source, "lowbit") | kernels) - held
    assert not {name.partition("/")[0] for name in held} - {"lowbit", "lowbit-0.1.0.dist-info"}


def test_users_install_nothing_that_no_code_uses():
    """What lowbit requires, and every extra that is not for working on it; accelerate is used through transformers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = {k: v for k, v in project["optional-dependencies"].items() if k not in ("demo", "test", "bench")}
    text = "\n".join(
        p.read_text("utf-8") for part in ("lowbit", "kernels") for p in (ROOT / part).rglob("*.py")
    )
    for requirement in (*project["dependencies"], *(r for of in extras.values() for r in of)):
        name = re.split(r"[<>=; ]", requirement)[0]
        module = {"pyyaml": "yaml"}.get(name, name)
        assert re.search(rf"\b{module}\b", text), requirement
