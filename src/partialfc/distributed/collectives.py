"""Process groups and collectives: the only module that talks to torch.distributed.

Every function takes the process group it works on; None means "the default group, if one was started". With one
process, or none started, each is the same code path without communication. Functions that communicate say how often.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.rendezvous import rendezvous

from partialfc.core.errors import InputError, JobError
from partialfc.distributed.activity import doing
from partialfc.distributed.rendezvous import agree_on_session

Group = dist.ProcessGroup
_WORDS_OF_COLLECTIVES = ("gloo", "nccl", "connection closed by peer")

# torch 2.13 gave the two a new name and deprecated the one that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def rank_of(group: Group | None = None) -> int:
    """This process's number in `group`, 0 without a process group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def world_size_of(group: Group | None = None) -> int:
    """The number of processes in `group`, 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's number on its machine, as torchrun tells it; 0 without torchrun."""
    return _launched("LOCAL_RANK", 0)


def local_world_size() -> int:
    """How many processes torchrun started on this machine; 1 without torchrun."""
    return _launched("LOCAL_WORLD_SIZE", 1)


def launched_rank() -> int:
    """This process's number among all that torchrun started, also while no process group is up; 0 without torchrun."""
    return _launched("RANK", 0)


@dataclass(frozen=True)
class Shard:
    """The contiguous rows [start, stop) of `total` that this process owns; `group` owns all of them together.

    Ranks differ by at most one row, whatever divides what, and a rank may own none.
    """

    start: int
    stop: int
    total: int
    group: Group | None = None

    @staticmethod
    def of(total: int, group: Group | None = None) -> Shard:
        """This process's share of `total` rows."""
        start, stop = split_evenly(total, world_size_of(group), rank_of(group))
        return Shard(start, stop, total, group)

    def __len__(self) -> int:
        return self.stop - self.start

    def rows(self, each: int) -> range:
        """The rows of this share where each of the `total` things has `each` rows."""
        return range(self.start * each, self.stop * each)

    @property
    def rank(self) -> int:
        return rank_of(self.group)

    @property
    def world_size(self) -> int:
        return world_size_of(self.group)


def split_evenly(total: int, parts: int, part: int) -> tuple[int, int]:
    """Start and stop of one of `parts` contiguous parts of range(total) whose sizes differ by at most one."""
    return total * part // parts, total * (part + 1) // parts


@contextmanager
def process_group(
    device: torch.device,
    timeout_seconds: float = 600.0,
    *,
    launch_info: Mapping[str, Any] | None = None,
    validate: Callable[[Sequence[Mapping[str, Any]]], str | None] = lambda infos: None,
) -> Iterator[None]:
    """Start the default group from torchrun's environment (gloo on the CPU, NCCL on CUDA), and end it afterwards.

    Without torchrun's variables, or with one process, it starts nothing.

    Args:
        launch_info: what this process says of itself, for `validate`.
        validate: called on rank 0 with the infos of all ranks; a sentence if they do not fit together.

    Raises:
        InputError: on all ranks, with that sentence; or torchrun's variables are not complete.
        JobError: the processes did not meet in time.
    """
    if dist.is_initialized() or (_launched_size() == 1 and launched_rank() == 0):
        yield
        return
    names = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        there = "WORLD_SIZE" if "WORLD_SIZE" in os.environ else "RANK"
        raise InputError(f"{there} is set but {', '.join(missing)} is not: start the processes with torchrun.")
    if launched_rank() >= _launched_size():
        raise InputError(
            f"RANK is {launched_rank()} and WORLD_SIZE {_launched_size()}, but ranks count from 0: start the processes "
            "with torchrun."
        )
    # Beside a GPU's NCCL, gloo carries what lives on the host, such as the checkpoints' agreements.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        timeout = timedelta(seconds=timeout_seconds)
        store, rank, world_size = next(iter(rendezvous("env://", timeout=timeout)))
        session_id = agree_on_session(store, rank, world_size, launch_info or {}, validate, timeout_seconds)
        dist.init_process_group(
            backend,
            store=PrefixStore(f"partialfc/{session_id}", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
    except RuntimeError as error:
        if not is_broken_exchange(error):
            raise
        reason = " ".join(str(error).splitlines()[0].split())
        raise JobError(
            f"Rank {launched_rank()} cannot connect to the other {_launched_size() - 1} processes, which meet at "
            f"{_store_name()} ({reason}): start all of them, let the network pass them, and name its interface "
            "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) if the names of the hosts lead elsewhere."
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def _launched_size() -> int:
    return _launched("WORLD_SIZE", 1)


def _launched(name: str, default: int) -> int:
    """A number that the launcher gives in the environment."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise InputError(
            f"The environment has {name}={value!r}, which is no number: start the processes with torchrun."
        )
    return int(value)


def _store_name() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def is_broken_exchange(error: BaseException) -> bool:
    """Whether an error comes from a collective: NCCL's and the store's have types, gloo's are known by their words."""
    if isinstance(error, dist.DistError):
        return True
    words = str(error).lower()
    ours = isinstance(error, JobError)
    return isinstance(error, RuntimeError) and not ours and any(word in words for word in _WORDS_OF_COLLECTIVES)


class KeyValueStore:
    """The launcher's store of small values, over a connection of its own, which blocks no one else's.

    Attributes:
        name: where it is, for people.
    """

    def __init__(self, prefix: str, timeout_seconds: float) -> None:
        self.name = f"the processes' meeting point {_store_name()}"
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        connection = TCPStore(
            host, port, is_master=False, timeout=timedelta(seconds=timeout_seconds), wait_for_workers=False
        )
        self._store = PrefixStore(prefix, connection)

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def get(self, keys: list[str]) -> list[str]:
        """The values of keys that were set before, in one round trip."""
        return [value.decode() for value in self._store.multi_get(keys)]


def has_store() -> bool:
    """Whether the processes were started through a store that `KeyValueStore` can reach."""
    return "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ


def _exchange(name: str) -> AbstractContextManager[None]:
    return doing(f"in {name}", waits=True)


def all_reduce(tensor: Tensor, op: str = "sum", group: Group | None = None) -> Tensor:
    """Replace `tensor`, in place, by its "sum", "max" or "min" over the ranks. One collective."""
    if world_size_of(group) > 1:
        ops = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        with _exchange("an all-reduce"):
            dist.all_reduce(tensor, ops[op], group=group)
    return tensor


def row_counts(rows: int, device: torch.device, group: Group | None = None) -> list[int]:
    """How many rows each rank brings, in rank order. One collective, and a host read."""
    world_size = world_size_of(group)
    if world_size == 1:
        return [rows]
    counts = torch.zeros(world_size, dtype=torch.int64, device=device)
    counts[rank_of(group)] = rows
    return all_reduce(counts, group=group).tolist()


def all_gather_rows(tensor: Tensor, counts: list[int], group: Group | None = None) -> Tensor:
    """Concatenate every rank's rows, in rank order, on every rank. One collective.

    Args:
        tensor: (counts[rank], ...) of one dtype and trailing shape on all ranks.
        counts: the rows of each rank, as `row_counts` gives them.
    """
    return start_gather_rows(tensor, counts, group)()


def start_gather_rows(tensor: Tensor, counts: list[int], group: Group | None = None) -> Callable[[], Tensor]:
    """Begin `all_gather_rows`; what is returned waits for it. One collective, beside what the caller does meanwhile."""
    if world_size_of(group) == 1:
        return lambda: tensor
    widest = max(counts)
    padded = tensor.new_zeros((widest, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    gathered = tensor.new_empty((widest * len(counts), *tensor.shape[1:]))
    work = _all_gather(gathered, padded, group=group, async_op=True)

    def finish() -> Tensor:
        with _exchange("an all-gather"):
            work.wait()
        if min(counts) == widest:
            return gathered
        return torch.cat([gathered[r * widest : r * widest + count] for r, count in enumerate(counts)])

    return finish


def reduce_scatter_rows(tensor: Tensor, counts: list[int], group: Group | None = None) -> Tensor:
    """Sum (sum of counts, ...) over the ranks and keep this rank's rows: (counts[rank], ...). One collective."""
    return start_reduce_scatter_rows(tensor, counts, group)()


def start_reduce_scatter_rows(tensor: Tensor, counts: list[int], group: Group | None = None) -> Callable[[], Tensor]:
    """Begin `reduce_scatter_rows`; what is returned waits for it. One collective, beside what the caller does."""
    if world_size_of(group) == 1:
        return lambda: tensor
    widest = max(counts)
    own = counts[rank_of(group)]
    if min(counts) < widest:
        parts = tensor.split(counts)
        tensor = tensor.new_zeros((widest * len(counts), *tensor.shape[1:]))
        for r, part in enumerate(parts):
            tensor[r * widest : r * widest + len(part)] = part
    result = tensor.new_empty((widest, *tensor.shape[1:]))
    work = _reduce_scatter(result, tensor.contiguous(), group=group, async_op=True)

    def finish() -> Tensor:
        with _exchange("a reduce-scatter"):
            work.wait()
        return result[:own]

    return finish


def broadcast(tensor: Tensor, source: int = 0, group: Group | None = None) -> Tensor:
    """Replace `tensor`, in place, by the one of rank `source`. One collective."""
    if world_size_of(group) > 1:
        with _exchange("a broadcast"):
            dist.broadcast(tensor, group_src=source, group=group)
    return tensor


def any_rank(flag: bool, device: torch.device | None = None, group: Group | None = None) -> bool:
    """Whether `flag` is true on any rank: the same answer everywhere. One collective, and a host read."""
    if world_size_of(group) == 1:
        return flag
    return bool(all_reduce(torch.tensor([int(flag)], device=device), "max", group).item())


def barrier(group: Group | None = None) -> None:
    """Wait for all ranks. One collective."""
    if world_size_of(group) > 1:
        with _exchange("a barrier"):
            dist.barrier(group=group)


def gather_json(value: Any, device: torch.device | None = None, group: Group | None = None) -> list[Any]:
    """Every rank's `value` (anything JSON can hold), in rank order, on every rank. Two collectives.

    JSON rather than torch's object collectives, which pickle.
    """
    if world_size_of(group) == 1:
        return [value]
    device = device or torch.device("cpu")
    encoded = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    counts = row_counts(len(encoded), device, group)
    everything = bytes(all_gather_rows(encoded, counts, group).cpu().numpy())
    stops = torch.tensor(counts).cumsum(0).tolist()
    return [json.loads(everything[stop - count : stop]) for count, stop in zip(counts, stops, strict=True)]


def host_group(timeout_seconds: float = 600.0) -> Group | None:
    """A group of all processes whose collectives meet no others: gloo, on the host; None for one process.

    Every rank calls it, in the same order as other groups. A thread may use it while the default group is at work.
    """
    if world_size_of() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))


def start_max(values: list[int], group: Group | None = None) -> Callable[[], list[int]]:
    """Begin to find the largest of each value over the ranks; what is returned waits for it. One collective.

    It runs beside whatever the caller does before it asks for the result.
    """
    largest = torch.tensor(values, dtype=torch.int64)
    if world_size_of(group) == 1:
        return largest.tolist
    work = dist.all_reduce(largest, dist.ReduceOp.MAX, group=group, async_op=True)

    def finish() -> list[int]:
        with _exchange("an all-reduce"):
            work.wait()
        return largest.tolist()

    return finish


# -- tensors in parts: DTensors, each rank with some of the rows -----------------------------------------------------
# Their module takes half a second to import, so it is imported where such a tensor may appear.


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_shard(tensor: Tensor) -> Tensor:
    """This process's part, in the same memory; a tensor that is not in parts is its own."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor in parts put together, on every rank; others as they are. One collective for one in parts."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor
    with _exchange("an all-gather of a tensor"):
        result: Tensor = tensor.full_tensor().detach()
    return result


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor the part that `like` is of its own, in memory of its own; itself if `like` is whole."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    # Without a source rank, each rank cuts its part out of its own copy; a view of it would keep all of it in memory.
    part: Tensor = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).clone()
    return part
