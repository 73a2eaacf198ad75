"""Benchmarks by name and file: read, run, shown as a table, written to files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from partialfc.core.errors import InputError
from partialfc.data.pair_files import PairSet, read_pairs
from partialfc.evaluation.pairs import PairResult, evaluate_pair_set
from partialfc.model.config import ModelConfig
from partialfc.model.embed import check_images
from partialfc.model.files import Model


def read_benchmarks(benchmarks: Mapping[str, Path], model_config: ModelConfig) -> dict[str, PairSet]:
    """The verification files by name.

    Raises:
        InputError: a file is no pair file, or the model cannot take its images.
    """
    pair_sets = {name: read_pairs(path) for name, path in benchmarks.items()}
    for name, pairs in pair_sets.items():
        try:
            check_images(pairs.images, model_config)
        except InputError as error:
            raise InputError(f"benchmark {name}: {error}") from error
    return pair_sets


def evaluate_benchmarks(
    model: Model, benchmarks: Mapping[str, Path], *, batch_size: int = 256
) -> dict[str, PairResult]:
    """Run verification files on a model; all of them are read and checked before the first is run."""
    pair_sets = read_benchmarks(benchmarks, model.config)
    return {name: evaluate_pair_set(model, pairs, batch_size=batch_size) for name, pairs in pair_sets.items()}


def table(results: Mapping[str, PairResult]) -> str:
    """The results as text, a line a benchmark."""
    lines = [f"{'benchmark':<16} {'pairs':>7} {'accuracy':>18} {'EER':>7} {'TAR@FAR=1e-3':>13} {'threshold':>10}"]
    for name, result in results.items():
        accuracy = f"{result.accuracy:.2%} ± {result.accuracy_std:.2%}"
        lines.append(
            f"{name:<16} {len(result.is_same):>7,} {accuracy:>18} {result.equal_error_rate:>7.2%} "
            f"{result.tar_at_far[1e-3]:>13.2%} {result.cosine_threshold:>10.3f}"
        )
    return "\n".join(lines)


def write_results(folder: Path, results: Mapping[str, PairResult]) -> None:
    """Write `results.json`, and the scores of each benchmark as `<name>-scores.npz` (`scores`, `is_same`)."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = {name: result.summary() for name, result in results.items()}
    (folder / "results.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    for name, result in results.items():
        np.savez_compressed(folder / f"{name}-scores.npz", scores=result.scores, is_same=result.is_same)
