"""Triton decides when it is imported whether its kernels are interpreted, and torch._dynamo and
transformers import it too; so the choice is made here, before any test module is loaded.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
