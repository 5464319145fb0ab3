"""Launches as on an NVIDIA GPU, with none: Triton's own launcher on a CUDA driver that does nothing (stub_cuda.c).

Tensors lie in the CPU's memory and are never touched: what is tried is the host's half of a launch, its arguments
and the time it takes. Triton is imported here, so `TRITON_INTERPRET` must not be set.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sysconfig
from pathlib import Path

import torch


def _build(folder: Path) -> Path:
    """libcuda.so.1 in `folder`; RuntimeError where there is no C compiler."""
    from triton.backends import nvidia

    library = folder / "libcuda.so.1"
    include = Path(nvidia.__file__).parent / "include"
    compiler = os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0]
    command = [compiler, "-shared", "-fPIC", "-O1", "-w", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    done = subprocess.run(
        [*command, "-o", library, Path(__file__).with_suffix(".c")], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(
            f"expected a C compiler for the CUDA stub, found {compiler}: {done.stderr.strip()}"
        )
    (folder / "libcuda.so").symlink_to(library.name)
    return library


def install(target: str, folder: Path) -> ctypes.CDLL:
    """From here on Triton launches on the stub in this process, as on `target` (sm80, …); gives the stub, which counts.

    `folder`, an empty one, takes the stub and what Triton compiles against it: its launcher is none to keep.
    """
    os.environ |= {"STUB_CUDA_CAPABILITY": target.removeprefix("sm"), "TRITON_LIBCUDA_PATH": str(folder)}
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    stub = ctypes.CDLL(str(_build(folder)), mode=ctypes.RTLD_GLOBAL)

    import triton
    from triton.backends.nvidia import driver

    class Driver(driver.CudaDriver):
        def __init__(self) -> None:
            self.utils = driver.CudaUtils()
            self.launcher_cls = driver.CudaLauncher
            self.get_device_capability = lambda device: divmod(int(target.removeprefix("sm")), 10)
            self.get_current_stream = lambda device: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    triton.runtime.driver.set_active(Driver())
    return stub
