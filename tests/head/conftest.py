"""What the head does at world sizes 1 to 4, run once a session: four processes serve the sizes 2, 3 and 4."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import head_cases
import pytest
import rank_scenarios
import torch
from distributed_workers import run_ranks
from torch import Tensor

Results = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="session")
def ranks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every rank of every world size left what it found."""
    folder = tmp_path_factory.mktemp("ranks")
    head_cases.run_cases(folder)
    rank_scenarios.run_scenarios(folder)
    run_ranks(4, rank_scenarios.work, folder)
    return folder


@pytest.fixture(scope="session")
def merged_results(ranks_folder: Path) -> Callable[[int], Results]:
    """The merged results of every case of head_cases at a world size."""

    @cache
    def results(world_size: int) -> Results:
        by_rank = [
            torch.load(ranks_folder / f"cases-{world_size}-{rank}.pt", weights_only=True) for rank in range(world_size)
        ]
        return {
            name: head_cases.merge(case, [of_rank[name] for of_rank in by_rank])
            for name, case in head_cases.cases().items()
        }

    return results


@pytest.fixture(scope="session")
def scenario(ranks_folder: Path) -> Callable[[str, int], list[Any]]:
    """What each rank found in a scenario of rank_scenarios at a world size, in rank order."""

    def results(name: str, world_size: int) -> list[Any]:
        paths = [ranks_folder / f"scenarios-{world_size}-{rank}.pt" for rank in range(world_size)]
        return [torch.load(path, weights_only=True)[name] for path in paths]

    return results
