"""Every collective at world size 1 in this process and at 3 in others, with uneven rows."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_workers import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from partialfc.core.errors import InputError, JobError
from partialfc.distributed import collectives, sharded

CPU = torch.device("cpu")
WORLD_SIZE = 3


def collect(rank: int, folder: Path) -> None:
    """Call every function once on each rank and save its result."""
    rows = torch.full((rank, 2), float(rank))
    counts = collectives.row_counts(rank, CPU)
    full = torch.arange(6.0).view(3, 2) + 10 * rank
    pair = dist.new_group([0, 2])
    in_pair = rank != 1
    results: dict[str, Any] = {
        "facts": [collectives.rank_of(), collectives.world_size_of(), collectives.local_rank()],
        "launched": collectives.launched_rank(),
        "counts": counts,
        "gathered": collectives.all_gather_rows(rows, counts),
        "gathered evenly": collectives.all_gather_rows(torch.tensor([rank]), [1, 1, 1]),
        "gathered bfloat16": collectives.all_gather_rows(rows.bfloat16(), counts).float(),
        "started": collectives.start_gather_rows(rows, counts)(),
        "sharded": shard_and_gather(),
        "scattered": collectives.reduce_scatter_rows(full, [0, 1, 2]),
        "scattered evenly": collectives.reduce_scatter_rows(full, [1, 1, 1]),
        "reduced": [float(collectives.all_reduce(torch.tensor(float(rank)), op)) for op in ("sum", "max", "min")],
        "broadcast": collectives.broadcast(torch.tensor([rank]), source=1),
        "json": collectives.gather_json({"rank": rank, "text": "é" * rank}),
        "shard": [getattr(collectives.Shard.of(10), name) for name in ("start", "stop", "total", "rank", "world_size")],
        "pair": [collectives.rank_of(pair), collectives.world_size_of(pair)] if in_pair else [],
        "pair's sum": float(collectives.all_reduce(torch.tensor(rank + 1.0), group=pair)) if in_pair else 0.0,
        "pair's second": collectives.broadcast(torch.tensor([rank]), 1, pair) if in_pair else torch.tensor([-1]),
    }
    collectives.barrier()
    torch.save(results, folder / f"{rank}.pt")


def shard_and_gather() -> list[Tensor]:
    """This rank's shard of 5 rows of 2, and the full tensor gathered from all shards."""
    tensor = torch.arange(10.0).view(5, 2)
    like = distribute_tensor(torch.zeros(5, 2), init_device_mesh("cpu", (WORLD_SIZE,)), [Shard(0)])
    shards = sharded.shard_like(tensor, like)
    assert sharded.is_sharded(shards)
    assert not sharded.is_sharded(tensor)
    part = sharded.local_shard(shards)
    assert part.untyped_storage().nbytes() == 4 * part.numel()  # no view that keeps the whole tensor
    return [part, sharded.full_tensor(shards)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(WORLD_SIZE, collect, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


@pytest.mark.multiprocess
def test_facts(ranks: list[dict[str, Any]]) -> None:
    assert [result["facts"] for result in ranks] == [[0, 3, 0], [1, 3, 1], [2, 3, 2]]
    assert [result["launched"] for result in ranks] == [0, 1, 2]
    assert [result["shard"] for result in ranks] == [[0, 3, 10, 0, 3], [3, 6, 10, 1, 3], [6, 10, 10, 2, 3]]


@pytest.mark.multiprocess
def test_rows_are_gathered_in_rank_order(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["counts"] == [0, 1, 2]
        assert torch.equal(result["gathered"], torch.tensor([[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]))
        assert torch.equal(result["gathered"], result["gathered bfloat16"])
        assert torch.equal(result["gathered evenly"], torch.arange(3))
        assert torch.equal(result["started"], result["gathered"])


@pytest.mark.multiprocess
def test_a_sharded_tensor_is_gathered(ranks: list[dict[str, Any]]) -> None:
    whole = torch.arange(10.0).view(5, 2)
    assert torch.equal(torch.cat([result["sharded"][0] for result in ranks]), whole)
    assert all(torch.equal(result["sharded"][1], whole) for result in ranks)
    assert sharded.full_tensor(whole) is sharded.local_shard(whole) is sharded.shard_like(whole, whole) is whole


@pytest.mark.multiprocess
def test_rows_are_summed_and_scattered(ranks: list[dict[str, Any]]) -> None:
    total = 3 * torch.arange(6.0).view(3, 2) + 30
    assert torch.equal(torch.cat([result["scattered"] for result in ranks]), total)
    assert [len(result["scattered"]) for result in ranks] == [0, 1, 2]
    assert torch.equal(torch.cat([result["scattered evenly"] for result in ranks]), total)


@pytest.mark.multiprocess
def test_reductions_are_the_same_everywhere(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["reduced"] == [3.0, 2.0, 0.0]
        assert result["broadcast"].tolist() == [1]
        assert result["json"] == [{"rank": rank, "text": "é" * rank} for rank in range(3)]


@pytest.mark.multiprocess
def test_subgroups_count_their_own_ranks(ranks: list[dict[str, Any]]) -> None:
    assert [result["pair"] for result in ranks] == [[0, 2], [], [1, 2]]
    assert [result["pair's sum"] for result in ranks] == [4.0, 0.0, 4.0]
    assert [result["pair's second"].item() for result in ranks] == [2, -1, 2]


def test_one_process_is_the_same_code_without_communication() -> None:
    rows = torch.arange(6.0).view(3, 2)
    assert (collectives.rank_of(), collectives.world_size_of()) == (0, 1)
    assert collectives.row_counts(3, CPU) == [3]
    assert collectives.all_gather_rows(rows, [3]) is rows
    assert collectives.reduce_scatter_rows(rows, [3]) is rows
    assert collectives.all_reduce(rows, "max") is rows
    assert collectives.broadcast(rows) is rows
    assert collectives.gather_json({"a": 1}) == [{"a": 1}]
    collectives.barrier()
    shard = collectives.Shard.of(5)
    assert (len(shard), shard.rank, shard.world_size) == (5, 0, 1)


@given(total=st.integers(0, 10_000), parts=st.integers(1, 64))
def test_split_evenly_covers_everything_once(total: int, parts: int) -> None:
    bounds = [collectives.split_evenly(total, parts, part) for part in range(parts)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == total
    assert all(left[1] == right[0] for left, right in itertools.pairwise(bounds))
    sizes = {stop - start for start, stop in bounds}
    assert max(sizes) - min(sizes) <= 1


def test_without_torchrun_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with collectives.process_group(CPU):
        assert not dist.is_initialized()
    assert collectives.local_rank() == collectives.launched_rank() == 0


def test_half_of_torchruns_variables_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="RANK, MASTER_ADDR is not: start the processes with torchrun"):
        collectives.process_group(CPU).__enter__()
    assert os.environ["WORLD_SIZE"] == "2"


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("WORLD_SIZE", None, "RANK is set but WORLD_SIZE is not: start the processes with torchrun"),
        ("MASTER_ADDR", None, "WORLD_SIZE is set but MASTER_ADDR is not: start"),
        ("WORLD_SIZE", "two", "The environment has WORLD_SIZE='two', which is no number: start"),
        ("RANK", "2", "RANK is 2 and WORLD_SIZE 2, but ranks count from 0: start"),
    ],
)
def test_a_broken_environment_is_the_users_mistake(
    name: str, value: str | None, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, good in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, good)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"^{sentence}"):
        collectives.process_group(CPU).__enter__()


def test_a_network_that_refuses_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "7"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(collectives, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(collectives, "agree_on_session", lambda *_: "session")

    def refuse(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("Gloo connectFullMesh failed with\n [pair.cc] Connection refused")

    monkeypatch.setattr(dist, "init_process_group", refuse)
    with pytest.raises(
        JobError, match=r"^Rank 0 cannot connect to the other 1 processes, whose store is here:7 \(Gloo"
    ):
        collectives.process_group(CPU).__enter__()


def fail(rank: int, folder: Path) -> None:
    raise RuntimeError(f"rank {rank} fails")


@pytest.mark.multiprocess
def test_a_failing_worker_fails_its_test(tmp_path: Path) -> None:
    worker: Callable[[int, Path], None] = fail
    with pytest.raises(Exception, match="rank 0 fails"):
        run_ranks(1, worker, tmp_path)
