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
