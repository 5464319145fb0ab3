"""Triton decides when it is imported whether its kernels are interpreted, and torch._dynamo and
transformers import it too; so the choice is made here, before any test module is loaded.
"""

import os
import sys
from pathlib import Path

# With LOWBIT_MACHINE kernels are compiled, and run on a machine of tests/machines.
os.environ.setdefault("TRITON_INTERPRET", "0" if "LOWBIT_MACHINE" in os.environ else "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Test modules share `sample_models`; pytest's importlib mode puts no test directory on the path.
sys.path.insert(0, str(Path(__file__).parent))

# Minutes long and of few tests: last, they would leave one worker without work while the other one ends.
_FIRST = ("test_compiled_operators.py", "test_compiled_prefill.py", "test_distributed.py")


def pytest_collection_modifyitems(items: list) -> None:
    """The longest files first. With `--no-loadscope-reorder`: xdist's own order is that of how many tests there are."""
    items.sort(key=lambda item: item.path.name not in _FIRST)
