"""The start of several processes: each describes itself, and processes that do not match get one sentence."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from partialfc.config.options import TrainConfig, flatten
from partialfc.core.device import choose_device
from partialfc.core.errors import InputError
from partialfc.data.loader import Loader
from partialfc.distributed.collectives import gather_json, local_rank, local_world_size, process_group
from partialfc.distributed.rendezvous import LaunchInfo
from partialfc.training.build import check_config, data_signature
from partialfc.training.run.folder import differing_key
from partialfc.training.run.log import check_trackers

# Keys that may differ between hosts: the paths of the data, and the number of processes that read them.
_KEYS_OF_A_HOST = frozenset({"config.data.path", "config.data.overlay", "config.data.workers"})


@contextmanager
def joined(
    config: TrainConfig, benchmarks: Mapping[str, Path], *, resume: bool, verify: bool, timeout_seconds: float
) -> Iterator[torch.device]:
    """The process group of a run, and this process's device.

    Raises:
        InputError: on all ranks alike, if any cannot take part, or the ranks differ in what must be the same.
        JobError: not all processes arrived.
    """
    device, refusal = torch.device("cpu"), None
    try:
        check_config(config)
        if verify and not resume:
            raise InputError("--verify reads the checkpoint that a run goes on from: give --resume too.")
        check_trackers(config.output)
        device = choose_device(config.device, local_rank=local_rank(), local_world_size=local_world_size())
    except InputError as error:
        refusal = error
    launch_info = {
        "host": socket.gethostname(),
        "refusal": None if refusal is None else str(refusal),
        "partialfc": _own_version(),
        "torch": torch.__version__,
        "config": config.to_dict(),
        "benchmark": sorted(benchmarks),
        "resume": resume,
        "verify": verify,
        "device type": device.type,
    }
    with process_group(device, timeout_seconds, launch_info=launch_info, validate=first_difference):
        if refusal is not None:
            raise refusal
        yield device


def first_difference(infos: Sequence[LaunchInfo]) -> str | None:
    """The reason why processes with these infos, in rank order, cannot train together; None if they can."""
    first = infos[0]
    refusals = {rank: info["refusal"] for rank, info in enumerate(infos) if info["refusal"] is not None}
    for rank, refusal in refusals.items():
        on_all_ranks = len(refusals) == len(infos) and len(set(refusals.values())) == 1
        return refusal if on_all_ranks else f"rank {rank} on {infos[rank]['host']}: {refusal}"
    for rank, info in enumerate(infos):
        pair = f"rank {rank} on {info['host']} has {{}}, but rank 0 on {first['host']} has {{}}"
        for package in ("partialfc", "torch"):
            if info[package] != first[package]:
                versions = pair.format(f"{package} {info[package]}", first[package])
                return f"{versions}: install the same on all hosts."
        expected, own = _options(first), _options(info)
        key = differing_key(expected, own, _KEYS_OF_A_HOST)
        if key is not None:
            options = pair.format(f"{key.removeprefix('config.')} {own.get(key)}", expected.get(key))
            return f"{options}: start all processes with the same options, on the same kind of machine."
    return None


def check_same_data(loader: Loader) -> None:
    """Check that all ranks found the same amount of data. Two collectives.

    Raises:
        InputError: on all ranks, naming the first that differs.
    """
    own = {"host": socket.gethostname(), "path": str(loader.source.path), "data": data_signature(loader)}
    first, *others = gather_json(own)
    for rank, other in enumerate(others, start=1):
        for name, value in first["data"].items():
            if other["data"][name] != value:
                both = (other["data"][name], value)
                found, expected = (f"{each:,}" if isinstance(each, int) else each for each in both)
                raise InputError(
                    f"rank {rank} on {other['host']} finds {found} as {name.replace('_', ' ')} in {other['path']}, but "
                    f"rank 0 on {first['host']} finds {expected} in {first['path']}: give all hosts the same data."
                )


def _own_version() -> str:
    """The version and a digest of the code, which may have changed since an editable installation."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    try:
        version = metadata.version("partialfc")
    except metadata.PackageNotFoundError:
        version = "of no version"
    return f"{version} (code {digest.hexdigest()[:8]})"


def _options(info: LaunchInfo) -> dict[str, Any]:
    return flatten({name: info[name] for name in ("config", "benchmark", "resume", "verify", "device type")})
