"""Who may import whom, read from the source of every file; and what `import lowbit` costs."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STDLIB = set(sys.stdlib_module_names)

# Module or package → what of lowbit it may import at any place, functions included. Lists follow
# `dtypes ← granularity ← scheme ← quantize ← formats ← checkpoint ← engines`; `nn → ops → kernels`.
BASE = {"errors", "dtypes", "granularity"}
NUMERICS = BASE | {"scheme", "quantize"}
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "compiling": set(),
    "dtypes": {"errors"},
    "granularity": {"errors", "dtypes"},
    "scheme": BASE,
    "quantize": BASE | {"scheme"},
    "formats": NUMERICS,
    "checkpoint": NUMERICS | {"compiling", "formats", "__version__"},
    "engines": NUMERICS | {"formats", "checkpoint"},
    "targets": BASE | {"scheme"},
    "ops": NUMERICS | {"compiling", "kernels", "targets"},
    "kernels": set(),
}
# What only the outer layers may reach.
FORBIDDEN: dict[str, set[str]] = {
    "nn": {"calibration", "cli", "api", "engines", "evaluate"},
    "calibration": {"cli"},
    "evaluate": {"cli"},
    "api": {"cli"},
    "quality": {"cli"},
}


def files(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def imports(file: Path, *, top_level: bool = False) -> set[str]:
    """Dotted names that a file imports; with `top_level`, only what importing the file runs."""
    tree = ast.parse(file.read_text("utf-8"))
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parents = file.relative_to(ROOT).parts[: -node.level]
                package = ".".join(("lowbit.kernels", *parents[1:]) if parents[0] == "kernels" else parents)
                module = f"{package}.{module}".rstrip(".")
            found.update(f"{module}.{a.name}" for a in node.names)
        for child in ast.iter_child_nodes(node):
            if top_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if not guarded:
                visit(child)

    visit(tree)
    return found


def part_of(file: Path) -> str:
    """`checkpoint` for lowbit/checkpoint/plan.py, `scheme` for lowbit/scheme.py, `kernels` for kernels/."""
    if file.is_relative_to(ROOT / "kernels"):
        return "kernels"
    return file.relative_to(ROOT / "lowbit").parts[0].removesuffix(".py")


ALL = [*files(ROOT / "lowbit"), *files(ROOT / "kernels")]


@pytest.mark.parametrize("file", ALL, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_follow_the_arrows(file):
    part = part_of(file)
    inside = {name.split(".")[1] for name in imports(file) if name.startswith("lowbit.")}
    inside.discard(part)
    if part in ARROWS:
        assert inside <= ARROWS[part], f"{part} may not import {sorted(inside - ARROWS[part])}"
    assert not inside & FORBIDDEN.get(part, set())
    if part not in ("cli", "__main__"):
        assert "cli" not in inside


@pytest.mark.parametrize("file", files(ROOT / "kernels"), ids=lambda f: f.name)
def test_kernels_import_only_torch_and_triton(file):
    """Their own package may be named from inside; lowbit may not."""
    outside = {n for n in imports(file) if n.split(".")[0] not in STDLIB | {"torch", "triton"}}
    assert all(n.startswith("lowbit.kernels") for n in outside), outside


CONVERTING = [
    *(f for part in ("cli", "checkpoint", "formats", "engines") for f in files(ROOT / "lowbit" / part)),
    *(ROOT / "lowbit" / f"{m}.py" for m in ("__init__", "api", "dtypes", "scheme", "granularity")),
]


@pytest.mark.parametrize("file", CONVERTING, ids=lambda f: str(f.relative_to(ROOT)))
def test_the_converting_half_loads_no_torch(file):
    top = {n.split(".")[0] for n in imports(file, top_level=True)}
    assert not top & {"torch", "transformers", "triton", "compressed_tensors", "safetensors", "ray"}
    if part_of(file) == "cli":
        assert not top - STDLIB - {"lowbit", "typer"}


@pytest.mark.parametrize("file", ALL, ids=lambda f: str(f.relative_to(ROOT)))
def test_nothing_is_unpickled_or_executed(file):
    text = file.read_text("utf-8")
    names = imports(file)
    assert not {n.split(".")[0] for n in names} & {"pickle", "marshal", "shelve", "dill"}
    assert "trust_remote_code=True" not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "eval"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)


def test_packages_in_pyproject_are_the_directories():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    listed = set(ast.literal_eval("[" + text.split("packages = [", 1)[1].split("]", 1)[0] + "]"))
    found = {
        ".".join(d.relative_to(ROOT).parts)
        for d in [ROOT / "lowbit", *(ROOT / "lowbit").rglob("*")]
        if d.is_dir() and any(d.glob("*.py"))
    }
    assert listed == found | {"lowbit.kernels"}
    assert '"lowbit.kernels" = "kernels"' in text
    for package in listed - {"lowbit.kernels"}:
        assert (ROOT / package.replace(".", "/") / "__init__.py").is_file()


def test_import_lowbit_is_free():
    heavy = {"torch", "numpy", "numba", "triton", "transformers", "typer"}
    code = f"import sys, lowbit; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_converter_works_where_triton_and_transformers_are_missing(tmp_path):
    from sample_models import llama, write

    write(tmp_path / "src", *llama(layers=1))
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('triton', 'transformers', 'torch', 'compressed_tensors', 'safetensors'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import lowbit\n"
        f"lowbit.convert({str(tmp_path / 'src')!r}, {str(tmp_path / 'out')!r}, 'int8')\n"
        f"print(lowbit.verify({str(tmp_path / 'out')!r}, {str(tmp_path / 'src')!r}).ok)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_a_top_level_package_named_kernels_is_not_ours():
    spec = importlib.util.find_spec("lowbit.kernels")
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).parent == ROOT / "kernels"
