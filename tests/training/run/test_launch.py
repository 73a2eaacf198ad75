"""Wrong launches: each is one sentence, the same on all ranks, before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distributed_workers import run_ranks
from small_runs import small_config, write_images

from partialfc.config.options import TrainConfig
from partialfc.core.errors import InputError
from partialfc.training.loop import train
from partialfc.training.run import folder as run_folder
from partialfc.training.run.launch import first_difference


def launch_info(host: str = "a", **changes: Any) -> dict[str, Any]:
    config = changes.pop("config", small_config())
    facts = {
        "partialfc": "0.1.0 (code 12345678)",
        "torch": "2.13.0",
        "benchmark": ["lfw"],
        "resume": True,
        "verify": False,
    }
    return {"host": host, "refusal": None, "config": config.to_dict(), "device type": "cpu", **facts, **changes}


def with_rate(rate: float) -> TrainConfig:
    base = small_config()
    return replace(base, head=replace(base.head, sample_rate=rate))


def test_what_a_host_may_have_of_its_own() -> None:
    base = small_config()
    local = replace(base, data=replace(base.data, path="elsewhere", workers=7))
    assert first_difference([launch_info(), launch_info("b", config=local), launch_info("c")]) is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"config": with_rate(0.25)},
            "rank 2 on b has head.sample_rate 0.25, but rank 0 on a has 0.5: start all processes with the same options",
        ),
        ({"benchmark": []}, r"rank 2 on b has benchmark \[\], but rank 0 on a has \['lfw'\]: "),
        ({"resume": False}, "rank 2 on b has resume False, but rank 0 on a has True: "),
        ({"device type": "cuda"}, "rank 2 on b has device type cuda, but rank 0 on a has cpu: "),
        (
            {"torch": "2.11.0"},
            "rank 2 on b has torch 2.11.0, but rank 0 on a has 2.13.0: install the same on all hosts",
        ),
        ({"partialfc": "0.2.0"}, r"rank 2 on b has partialfc 0.2.0, but rank 0 on a has 0.1.0 \(code 12345678\): inst"),
        ({"refusal": "no GPU."}, r"rank 2 on b: no GPU\."),
    ],
)
def test_the_first_difference_is_named(change: dict[str, Any], sentence: str) -> None:
    found = first_difference([launch_info(), launch_info("b"), launch_info("b", **change)])
    assert found is not None
    with pytest.raises(InputError, match=f"^{sentence}"):
        raise InputError(found)


def test_what_all_say_is_said_once() -> None:
    assert first_difference([launch_info(refusal="no GPU."), launch_info("b", refusal="no GPU.")]) == "no GPU."


def said(folder: Path) -> list[str]:
    return [(folder / f"said-{rank}").read_text() for rank in range(2)]


def try_to_train(rank: int, folder: Path, config: TrainConfig, out: Path) -> None:
    try:
        train(config, out, quiet=True)
    except InputError as error:
        (folder / f"said-{rank}").write_text(str(error))


def every_mistake(rank: int, folder: Path) -> None:
    """On rank 1 first other options, then another folder, then other data."""
    config = small_config(device="cpu")
    (folder / "options").mkdir(exist_ok=True)
    try_to_train(rank, folder / "options", with_rate(0.5 + 0.25 * rank), folder / "run")
    assert not (folder / "run").exists()
    run_folder._SECONDS_TO_SEE = 0.5
    (folder / "folders").mkdir(exist_ok=True)
    try_to_train(rank, folder / "folders", config, folder / f"run-{rank}")
    (folder / "data").mkdir(exist_ok=True)
    local = replace(config, data=replace(config.data, path=str(folder / f"images-{rank}")))
    try_to_train(rank, folder / "data", local, folder / "run")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_hosts_that_differ(tmp_path: Path) -> None:
    for rank in range(2):
        write_images(tmp_path / f"images-{rank}", [f"person {number}" for number in range(3 + rank)])
    run_ranks(2, every_mistake, tmp_path, joined=False)
    options, folders, data = (set(said(tmp_path / name)) for name in ("options", "folders", "data"))
    assert len(options) == len(folders) == len(data) == 1
    assert "has head.sample_rate 0.75, but rank 0 on" in options.pop()
    assert f"writes to {tmp_path / 'run-0'}: give a folder on storage that all hosts share with --out." in folders.pop()
    assert data.pop().count("images-") == 2
    assert not (tmp_path / "run").exists()
