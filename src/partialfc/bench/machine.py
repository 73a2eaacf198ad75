"""What a measurement ran on, and how much memory there is and was used."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

import torch


def describe(device: str) -> dict[str, str | int]:
    """Names and sizes that stand beside every figure."""
    facts: dict[str, str | int] = {
        "cpu": _first_field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def available_bytes(device: str) -> int:
    """Memory that can be allocated now: the device's, or the machine's within the container's limit."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    kibibytes = _first_field(Path("/proc/meminfo"), "MemAvailable")
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = int(kibibytes.split()[0]) * 1024 if kibibytes else installed
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def peak_resident_bytes() -> int:
    """The most memory this process has held so far.

    Linux counts ru_maxrss on from the process that started this one; its VmHWM is this one's own.
    """
    kibibytes = _first_field(Path("/proc/self/status"), "VmHWM")
    if kibibytes:
        return int(kibibytes.split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _first_field(path: Path, name: str) -> str:
    """The value of the first "name: value" line of a file of /proc; "" without one."""
    if not path.exists():
        return ""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
