"""Run folders as training leaves them, written line by line, so that no training is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from partialfc.config.options import BackboneConfig, DataConfig, HeadConfig, ScheduleConfig, TrainConfig
from partialfc.data.pair_files import PairSet
from partialfc.evaluation.pairs import PairResult, evaluate_pairs
from partialfc.training.run.log import MetricsLog

HOSTILE = "<script>alert('1')</script>\"'&amp;<svg onload=x>"


def train_line(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "epoch": step / 10,
        "loss": 20.0 / step,
        "target_cosine": 0.01 * step,
        "conflict_share": 0.0,
        "grad_norm": 500.0 / step**2,
        "lr": 0.1 - 0.001 * step,
        "lr_head": 0.1 - 0.001 * step,
        "images_per_second": 200.0 + step,
        "data_wait": 0.05,
        "sampled_classes": 12,
        "skipped_steps": 0,
        "unreadable": 0,
        **changes,
    }


def evaluation_line(step: int, benchmark: str = "lfw", **changes: Any) -> dict[str, Any]:
    return {
        "kind": "evaluation",
        "step": step,
        "benchmark": benchmark,
        "pairs": 600,
        "accuracy": 0.8 + step / 1000,
        "accuracy_std": 0.01,
        "cosine_threshold": 0.3,
        "auc": 0.9,
        "equal_error_rate": 0.1,
        "tar_at_far": {"0.001": 0.5},
        **changes,
    }


def write_run(root: Path, lines: list[dict[str, Any]] | None = None, config: TrainConfig | None = None) -> Path:
    """A run of 10 steps an epoch, planned for 4 epochs."""
    root.mkdir(parents=True)
    config = config or TrainConfig(
        data=DataConfig(path="faces", global_batch_size=50),
        backbone=BackboneConfig("mini", 64),
        head=HeadConfig(sample_rate=0.1, scale=32.0),
        schedule=ScheduleConfig(epochs=4),
    )
    (root / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    if lines is not None:
        with MetricsLog(root / "metrics.jsonl") as log:
            for line in lines:
                log.write(line)
    return root


def example_pairs(pairs: int = 200, seed: int = 0) -> tuple[PairResult, PairSet]:
    """Embeddings whose pairs overlap, and a picture of one colour for each."""
    generator = np.random.default_rng(seed)
    is_same = np.arange(pairs) % 2 == 0
    embeddings = generator.normal(size=(2 * pairs, 8))
    embeddings[1::2][is_same] += 1.2 * embeddings[0::2][is_same]
    images = generator.integers(0, 256, (2 * pairs, 1, 1, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    return evaluate_pairs(embeddings, is_same), PairSet(images, is_same)
