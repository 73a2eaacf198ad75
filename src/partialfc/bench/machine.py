"""What a measurement runs on, and how much memory is free there."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from partialfc.distributed.collectives import world_size_of

PROC = Path("/proc")  # of Linux; elsewhere the standard library answers


def describe(device: str) -> dict[str, str | int]:
    """Hardware and versions, to print beside every figure."""
    facts: dict[str, str | int] = {
        "cpu": _first_field(PROC / "cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def provenance(device: str) -> dict[str, Any]:
    """When, by which command, with which version, in how many processes and on what a result is made."""
    program, *arguments = sys.argv
    name = "partialfc" if Path(program).name == "__main__.py" else Path(program).name
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([name, *arguments]),
        "partialfc": metadata.version("partialfc"),
        "processes": world_size_of(),
        **describe(device),
    }


def available_bytes(device: str) -> int:
    """Memory that can be allocated now: the device's, or the machine's within the container's limit."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    kibibytes = _first_field(PROC / "meminfo", "MemAvailable")
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = int(kibibytes.split()[0]) * 1024 if kibibytes else installed
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def _first_field(path: Path, name: str) -> str:
    """The value of the first "name: value" line of a file; "" without one."""
    if path.exists():
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return ""
