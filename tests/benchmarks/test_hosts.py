"""Two hosts, which are network namespaces: a host cut off, and a rank killed under torchrun. The long form of it is
benchmarks/hosts.py."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import hosts

    reason = hosts.why_not(tmp_path) if sys.platform == "linux" else "network namespaces are Linux's"
    if reason is not None:
        pytest.skip(reason)
    return hosts


def test_a_host_is_cut_off(hosts: ModuleType, tmp_path: Path) -> None:
    with hosts.opened_stage(tmp_path, steps=10_000, fault_step=3, heartbeat_timeout=5) as stage:
        outcome = hosts.cut_off(stage, leaving=1)
    assert outcome.as_written, outcome.said
    assert "rank 1 (on host-b, process " in outcome.messages["host-a"]
    assert "has sent no heartbeat for" in outcome.messages["host-a"]
    # On a busy machine the silence of rank 0 may be noticed before that of the store on the same host.
    assert re.search("has not answered for|rank 0 .* has sent no heartbeat for", outcome.messages["host-b"])


def test_a_killed_rank_starts_again_and_goes_on_by_itself(hosts: ModuleType, tmp_path: Path) -> None:
    """Under torchrun, whose store still holds the addresses of the dead."""
    with hosts.opened_stage(tmp_path, steps=12) as stage:
        outcome = hosts.killed_rank(stage)
    assert outcome.as_written, outcome.said
    assert 0 <= outcome.lost_steps <= 12 // 8 + 6  # those since the last checkpoint; the one before may be in writing
    assert not [name for name in os.listdir("/var/run/netns") if name.startswith(f"pfc{os.getpid()}x")]
