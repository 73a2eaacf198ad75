"""The device of a process, the dtype it computes in, and the memory it has used."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

from partialfc.core.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def dtype_name(dtype: torch.dtype) -> str:
    """The name that configurations use, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def choose_device(name: str, *, local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    """This process's device for "auto", "cpu" or "cuda": with several processes on a host, each has its own GPU.

    Raises:
        InputError: a GPU is asked for and there is none, or more processes run on this host than it has GPUs.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, but PyTorch sees no GPU: use --device cpu, or auto.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    gpus, processes = torch.cuda.device_count(), max(local_world_size, local_rank + 1)
    if processes > gpus:
        raise InputError(
            f"{processes} processes were started on a host where PyTorch sees {gpus} GPU{'s' if gpus > 1 else ''}: "
            f"start at most {gpus}, with torchrun --nproc-per-node {gpus}, or use --device cpu."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that the backbone computes in, for "auto" or a key of `DTYPES`.

    "auto" is bfloat16 where it is faster than float32: on GPUs that have it, and on processors with AVX-512 BF16 (1.6
    times the images a second for the mini network; without these instructions it is slower than float32).
    """
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        faster = bool(capabilities.get("avx512_bf16", False))
    return torch.bfloat16 if faster else torch.float32


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: of its GPU, or resident in host memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # Linux; getrusage would count what the parent held before exec
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB
