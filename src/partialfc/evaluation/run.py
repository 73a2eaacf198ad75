"""Benchmarks by name and path: read, embedded together, evaluated, and written to files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from partialfc.core.errors import InputError
from partialfc.core.files import write_file
from partialfc.data.pair_files import PairSet, read_pairs
from partialfc.evaluation.benchmarks import Benchmark, open_benchmark
from partialfc.evaluation.images import JoinedImages
from partialfc.evaluation.statistics.figures import Result
from partialfc.model.config import ModelConfig
from partialfc.model.embed import check_images, embed_source
from partialfc.model.features import Features
from partialfc.model.files import Model


def read_benchmarks(benchmarks: Mapping[str, Path], model_config: ModelConfig) -> dict[str, PairSet]:
    """The verification files of a training by name.

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


def open_benchmarks(paths: Mapping[str, Path], image_size: int, *, compat: bool = False) -> dict[str, Benchmark]:
    """Read benchmarks by name; see `open_benchmark`."""
    return {name: open_benchmark(path, image_size, compat=compat) for name, path in paths.items()}


def embed_benchmarks(
    model: Model, benchmarks: Mapping[str, Benchmark], path: Path, *, quiet: bool, **options: Any
) -> dict[str, Features]:
    """The features of each benchmark. An image that several share is embedded once.

    Args:
        path: the feature file of all images; an interrupted call is continued there.
        options: `batch_size`, `precision` and `workers` of `embed_source`.
    """
    joined = JoinedImages({name: benchmark.images for name, benchmark in benchmarks.items()})
    features = embed_source(model, joined, path, source=", ".join(benchmarks), quiet=quiet, **options)
    return {name: features.take(rows) for name, rows in joined.rows.items()}


def evaluate_features(name: str, benchmark: Benchmark, features: Features) -> Result:
    """The result of one benchmark.

    Raises:
        InputError: there is not one row for each image, and what its protocol refuses.
    """
    if len(features.embeddings) != len(benchmark.images):
        raise InputError(
            f"There are {len(features.embeddings):,} features, but {name} has {len(benchmark.images):,} images: give "
            "one row for each, in the order of the benchmark."
        )
    try:
        return benchmark.evaluate(features)
    except InputError as error:
        raise InputError(f"benchmark {name}: {error}") from error


def write_results(folder: Path, content: Mapping[str, Any], results: Mapping[str, Result]) -> None:
    """Write `results.json`, and the 1:1 scores of each result as `<name>-scores.npz`.

    Such a file has `scores` and `is_same` of the pairs, genuine ones first, and `impostor_pairs`, how many were
    compared: of large sets only the largest impostor scores are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "results.json", json.dumps({"schema_version": 1, **content}, indent=2) + "\n")
    for name, result in results.items():
        if (scores := result.scores.get("")) is not None:
            both = np.concatenate([scores.genuine, scores.impostor])
            is_same = np.arange(len(both)) < len(scores.genuine)
            path = folder / f"{name}-scores.npz"
            np.savez_compressed(path, scores=both, is_same=is_same, impostor_pairs=scores.impostors)
