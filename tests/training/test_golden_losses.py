"""Golden losses: a small run of a seed gives, step by step, the losses that are stored beside the tests.

A changed number is a decision: renew the file, in a commit that says why, with

    PARTIALFC_RENEW_GOLDEN=1 python -m pytest tests/training/test_golden_losses.py

Where the processor, torch and numba are those that the file names, the losses agree to 1e-6: the run repeats bit for
bit there, and nothing but a change of the code moves it. Elsewhere products are summed in another order. The learning
rate is so small that this rounding does not grow: kernels of torch in place of numba's, another memory order and even
float64 move no loss by more than 1e-6 of its value. Other machines may differ by 1e-4, which another sample of classes,
order of images, margin or schedule exceeds at once.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import FIXTURES, tiny_config, write_images

from partialfc.config.options import BackboneConfig, HeadConfig, OptimizerConfig, OutputConfig, TrainConfig
from partialfc.training.loop import train
from partialfc.training.run.log import read_metrics

GOLDEN = FIXTURES / "golden_losses.json"
STEPS, BATCH, IDENTITIES, SHOTS = 30, 24, 40, 4
SAME_MACHINE, OTHER_MACHINE = 1e-6, 1e-4  # relative


def golden_config(images: Path, update: Any) -> TrainConfig:
    """30 steps of two micro-steps over several epochs, with warm-up, mirroring, clipping and conflicts."""
    base = tiny_config(
        images,
        precision="float32",
        device="cpu",
        seed=7,
        backbone=BackboneConfig("mini", 16),
        head=HeadConfig(0.3, scale=16.0, update=update, conflict_threshold=0.6),
        optimizer=OptimizerConfig(lr=1e-3, lr_scaling="absolute"),  # small, so that rounding does not grow
        output=OutputConfig(log_every=1, checkpoint_every=STEPS, evaluate_every=STEPS),
    )
    return replace(
        base,
        data=replace(base.data, global_batch_size=BATCH, micro_batch_size=BATCH // 2),
        schedule=replace(base.schedule, epochs=STEPS * BATCH / (IDENTITIES * SHOTS), warmup_epochs=0.5),
    )


def this_machine() -> dict[str, str]:
    """What decides in which order numbers are added."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    models = [line for line in cpuinfo.splitlines() if line.startswith("model name")]
    return {
        "processor": models[0].partition(": ")[2] if models else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numba": metadata.version("numba") if find_spec("numba") else "none",
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(
        tmp_path_factory.mktemp("golden") / "set", [f"person {number}" for number in range(IDENTITIES)], SHOTS
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("update", ["sparse", "deferred"])
def test_the_losses_of_a_seed_are_the_stored_ones(update: str, images: Path, tmp_path: Path) -> None:
    train(golden_config(images, update), tmp_path, quiet=True)
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert len(losses) == STEPS
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    if os.environ.get("PARTIALFC_RENEW_GOLDEN"):
        GOLDEN.write_text(json.dumps(stored | {"machine": this_machine(), update: losses}, indent=1) + "\n")
        pytest.skip(f"{GOLDEN.name} is renewed")
    tolerance = SAME_MACHINE if stored["machine"] == this_machine() else OTHER_MACHINE
    assert losses == pytest.approx(stored[update], rel=tolerance)
