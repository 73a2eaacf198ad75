"""Run folders as training leaves them, written line by line, so that no training is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partialfc.config.options import BackboneConfig, DataConfig, HeadConfig, ScheduleConfig, TrainConfig
from partialfc.evaluation.pairs import evaluate_pairs
from partialfc.evaluation.run import evaluate_features
from partialfc.evaluation.statistics.figures import Result
from partialfc.evaluation.statistics.metrics import Scores
from partialfc.evaluation.verification import with_groups, with_quality
from partialfc.model.features import Features
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


class ExampleBenchmark:
    """Pairs whose scores overlap, with a picture of one colour for each image."""

    what = "an example"

    def __init__(self, pairs: int = 200, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.is_same = np.arange(pairs) % 2 == 0
        self.embeddings = generator.normal(size=(2 * pairs, 8)).astype(np.float32)
        self.embeddings[1::2][self.is_same] += 1.2 * self.embeddings[0::2][self.is_same]
        self.pixels = generator.integers(0, 256, (2 * pairs, 1, 1, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
        self.images = self

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        return f"{HOSTILE} {index}"

    def image(self, index: int) -> NDArray[np.uint8]:
        picture: NDArray[np.uint8] = self.pixels[index]
        return picture

    def evaluate(self, features: Features) -> Result:
        result = evaluate_pairs(features.embeddings, self.is_same).result()
        groups = {}
        for group, scores in (("odd", result.scores[""].genuine[::2]), ("even", result.scores[""].genuine[1::2])):
            impostor = result.scores[""].impostor[len(group) % 2 :: 2]
            groups[group] = Scores(scores, impostor, len(impostor))
        return with_quality(with_groups(result, groups), features)

    def result(self) -> Result:
        features = Features(self.embeddings, np.zeros(len(self), bool))
        return evaluate_features("example", self, features)
