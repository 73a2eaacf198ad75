"""Process groups and collectives over torch.distributed.

Every function takes the process group it works on; None is the default group, if one was started. With one process, or
no group, each is the same code path without communication. Docstrings count the collectives.
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
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from partialfc.core.errors import InputError, JobError
from partialfc.distributed.activity import activity
from partialfc.distributed.rendezvous import agree_on_session

Group = dist.ProcessGroup
was_one_of_several = False  # whether this process has ever started a group
_ERRORS_OF_COLLECTIVES = ("gloo", "nccl", "connection closed by peer")

# torch 2.13 renamed these two and deprecated the names that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def rank_of(group: Group | None = None) -> int:
    """This process's rank in `group`, 0 without a process group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def world_size_of(group: Group | None = None) -> int:
    """The number of processes in `group`, 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's rank on its machine, from torchrun's environment; 0 without torchrun."""
    return _launched("LOCAL_RANK", 0)


def local_world_size() -> int:
    """The number of processes that torchrun started on this machine; 1 without torchrun."""
    return _launched("LOCAL_WORLD_SIZE", 1)


def launched_rank() -> int:
    """This process's rank from torchrun's environment, also without a process group; 0 without torchrun."""
    return _launched("RANK", 0)


@dataclass(frozen=True)
class Shard:
    """The contiguous rows [start, stop) of `total` that this process owns; the ranks of `group` own all of them.

    Shares differ by at most one row, and a rank may own none.
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Shard:
        return self  # it never changes, and a group cannot be copied

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise InputError("a head with a process group cannot be pickled: save its state_dict() instead.")
        return self.__dict__

    def __len__(self) -> int:
        return self.stop - self.start

    def rows(self, each: int) -> range:
        """The rows of this share where every one of the `total` items has `each` rows."""
        return range(self.start * each, self.stop * each)

    @property
    def rank(self) -> int:
        return rank_of(self.group)

    @property
    def world_size(self) -> int:
        return world_size_of(self.group)


def split_evenly(total: int, parts: int, part: int) -> tuple[int, int]:
    """Start and stop of one of `parts` contiguous parts of range(total), whose sizes differ by at most one."""
    return total * part // parts, total * (part + 1) // parts


@contextmanager
def process_group(
    device: torch.device,
    timeout_seconds: float = 600.0,
    *,
    launch_info: Mapping[str, Any] | None = None,
    validate: Callable[[Sequence[Mapping[str, Any]]], str | None] = lambda infos: None,
) -> Iterator[None]:
    """Start the default group from torchrun's environment (gloo on the CPU, NCCL on CUDA), and destroy it at the end.

    Without torchrun's variables, or with one process, it starts nothing.

    Args:
        timeout_seconds: of the start, and of every collective.
        launch_info, validate: see `agree_on_session`.

    Raises:
        InputError: on all ranks, with the sentence of `validate`; or torchrun's variables are incomplete.
        JobError: a process is missing at the timeout, or cannot be reached.
    """
    launched_size = _launched("WORLD_SIZE", 1)
    if dist.is_initialized() or (launched_size == 1 and launched_rank() == 0):
        yield
        return
    names = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        there = "WORLD_SIZE" if "WORLD_SIZE" in os.environ else "RANK"
        raise InputError(f"{there} is set but {', '.join(missing)} is not: start the processes with torchrun.")
    if launched_rank() >= launched_size:
        raise InputError(
            f"RANK is {launched_rank()} and WORLD_SIZE {launched_size}, but ranks count from 0: start the processes "
            "with torchrun."
        )
    global was_one_of_several
    was_one_of_several = True
    # Beside NCCL, gloo carries host tensors, such as those that ranks agree on a checkpoint with.
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
            f"Rank {launched_rank()} cannot connect to the other {launched_size - 1} processes, whose store is "
            f"{store_address()} ({reason}): start all of them, allow their connections, and name the interface "
            "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) if the hosts' names resolve to another."
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def _launched(name: str, default: int) -> int:
    """A number that the launcher sets in the environment."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise InputError(
            f"The environment has {name}={value!r}, which is no number: start the processes with torchrun."
        )
    return int(value)


def store_address() -> str:
    """Where the launcher's key-value store listens, for messages."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def is_broken_exchange(error: BaseException) -> bool:
    """Whether an error comes from a collective: NCCL's and the store's have types, gloo's have known messages."""
    if isinstance(error, dist.DistError):
        return True
    message = str(error).lower()
    ours = isinstance(error, JobError)
    return isinstance(error, RuntimeError) and not ours and any(part in message for part in _ERRORS_OF_COLLECTIVES)


def connect_store(prefix: str, timeout_seconds: float) -> Store:
    """The launcher's key-value store, over a connection of its own, so that its calls do not block those of others.

    Args:
        prefix: of all keys.
        timeout_seconds: of a call.
    """
    host, port, timeout = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=timeout_seconds)
    store = TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    return PrefixStore(prefix, store)


def has_store() -> bool:
    """Whether the launcher has a store that `connect_store` can reach."""
    return "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ


def _waiting_in(collective: str) -> AbstractContextManager[None]:
    return activity(f"in {collective}", waits=True)


def all_reduce(tensor: Tensor, op: str = "sum", group: Group | None = None) -> Tensor:
    """Replace `tensor`, in place, by its "sum", "max" or "min" over the ranks. One collective."""
    if world_size_of(group) > 1:
        ops = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        with _waiting_in("an all-reduce"):
            dist.all_reduce(tensor, ops[op], group=group)
    return tensor


def row_counts(rows: int, device: torch.device, group: Group | None = None) -> list[int]:
    """The number of rows of each rank, in rank order. One collective, and a host read."""
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
    """Start `all_gather_rows`; the returned function waits for its result. One collective, asynchronous."""
    if world_size_of(group) == 1:
        return lambda: tensor
    widest = max(counts)
    padded = tensor.new_zeros((widest, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    gathered = tensor.new_empty((widest * len(counts), *tensor.shape[1:]))
    work = _all_gather(gathered, padded, group=group, async_op=True)

    def finish() -> Tensor:
        with _waiting_in("an all-gather"):
            work.wait()
        if min(counts) == widest:
            return gathered
        return torch.cat([gathered[r * widest : r * widest + count] for r, count in enumerate(counts)])

    return finish


def start_reduce_scatter_rows(tensor: Tensor, counts: list[int], group: Group | None = None) -> Callable[[], Tensor]:
    """Start to sum (sum of counts, ...) over the ranks; the returned function waits for this rank's rows of the sum.

    They are (counts[rank], ...). One collective, asynchronous.
    """
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
        with _waiting_in("a reduce-scatter"):
            work.wait()
        return result[:own]

    return finish


def broadcast(tensor: Tensor, source: int = 0, group: Group | None = None) -> Tensor:
    """Replace `tensor`, in place, by the one of rank `source`. One collective."""
    if world_size_of(group) > 1:
        with _waiting_in("a broadcast"):
            dist.broadcast(tensor, group_src=source, group=group)
    return tensor


def gather_json(value: Any, device: torch.device | None = None, group: Group | None = None) -> list[Any]:
    """Every rank's JSON-serialisable `value`, in rank order, on every rank. Two collectives.

    torch's object collectives would unpickle what they receive.
    """
    if world_size_of(group) == 1:
        return [value]
    device = device or torch.device("cpu")
    encoded = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    counts = row_counts(len(encoded), device, group)
    received = bytes(all_gather_rows(encoded, counts, group).cpu().numpy())
    stops = torch.tensor(counts).cumsum(0).tolist()
    return [json.loads(received[stop - count : stop]) for count, stop in zip(counts, stops, strict=True)]


def host_group(timeout_seconds: float = 600.0) -> Group | None:
    """A second group of all processes, gloo on the host, that a thread may use beside the default group's collectives.

    Every rank calls it, in the same order as other groups. None for one process.
    """
    if world_size_of() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))


def start_max(values: list[int], group: Group | None = None) -> Callable[[], list[int]]:
    """Start an element-wise maximum over ranks; the returned function waits for it. One collective, asynchronous."""
    largest = torch.tensor(values, dtype=torch.int64)
    if world_size_of(group) == 1:
        return largest.tolist
    work = dist.all_reduce(largest, dist.ReduceOp.MAX, group=group, async_op=True)

    def finish() -> list[int]:
        with _waiting_in("an all-reduce"):
            work.wait()
        return largest.tolist()

    return finish
