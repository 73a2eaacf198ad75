"""Benchmarks by name and path: read, embedded together, evaluated, and written to files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from partialfc.core.errors import InputError
from partialfc.core.files import write_file
from partialfc.core.schema import check_schema_version
from partialfc.data.pair_files import PairSet, read_pairs
from partialfc.evaluation.benchmarks import Benchmark, open_benchmark
from partialfc.evaluation.images import JoinedImages
from partialfc.evaluation.statistics.curves import curve_facts, hardest_pairs
from partialfc.evaluation.statistics.figures import Result, result_from
from partialfc.model.config import ModelConfig
from partialfc.model.embed import Images, check_images, embed_source
from partialfc.model.feature_table import storable
from partialfc.model.features import Features
from partialfc.model.files import Model

RESULTS = "results.json"
SCHEMA_VERSION = 1


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


def in_order(features: Features, images: Images, source: Path) -> tuple[Features, bool]:
    """Features whose rows have names, in the order of the images of a benchmark; and whether their names say so.

    A name is compared by the end of its path that tells all images apart, since sets move. Features without names, or
    with other names for all images, stay as they are.

    Args:
        source: the file of the features, for messages.

    Raises:
        InputError: some of the images have no row.
    """
    wanted = [storable(images.name(index)).split("/") for index in range(len(images))]
    names = [storable(name).split("/") for name in features.names or ()]
    for depth in range(1, max(map(len, [*wanted, *names]), default=0) + 1):
        rows = {tuple(name[-depth:]): row for row, name in enumerate(names)}
        ends = [tuple(name[-depth:]) for name in wanted]
        if len(rows) == len(set(map(tuple, names))) and len(set(ends)) == len(set(map(tuple, wanted))):
            break
    missing = [index for index, end in enumerate(ends) if end not in rows]
    if len(missing) == len(ends):
        return features, False
    if missing:
        raise InputError(
            f"{source} has no row for {len(missing):,} of {len(ends):,} images, first {images.name(missing[0])}: "
            "embed them too."
        )
    return features.take(np.array([rows[end] for end in ends])), True


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
        result = benchmark.evaluate(features)
    except InputError as error:
        raise InputError(f"benchmark {name}: {error}") from error
    facts: dict[str, Any] = {"images": len(benchmark.images)}
    if (scores := result.scores.get("")) is not None:
        facts["curves"] = curve_facts(scores)
        facts["hardest"] = hardest_pairs(scores)
        for pair in itertools.chain(*facts["hardest"].values()):
            pair["names"] = [benchmark.images.name(row) for row in pair["rows"]]
    return replace(result, facts=facts | result.facts)


def read_results(path: Path) -> dict[str, tuple[dict[str, Any], dict[str, Result]]]:
    """What `write_results` wrote: for each model its facts, and its results by the name of the benchmark.

    Args:
        path: of `results.json`, or its folder. Scores are not read.

    Raises:
        InputError: there is no such file, it is damaged, or a newer version wrote it.
    """
    path = path / RESULTS if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check_schema_version(path, content, SCHEMA_VERSION)
        found = {}
        for name, one in content.get("models", {path.resolve().parent.name: content}).items():
            results = {benchmark: result_from(values) for benchmark, values in one["benchmarks"].items()}
            made = content.get("made", {})
            found[name] = {"made": made, **{key: one[key] for key in one if key != "benchmarks"}}, results
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give the results of evaluate --out.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} holds no results of evaluate, or is damaged: evaluate again.") from error
    return found


def write_results(folder: Path, content: Mapping[str, Any], results: Mapping[str, Result]) -> None:
    """Write `results.json`, and the 1:1 scores of each result as `<name>-scores.npz`.

    Such a file has `scores` and `is_same` of the pairs, genuine ones first, and `impostor_pairs`, how many were
    compared: of large sets only the largest impostor scores are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / RESULTS, json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=2) + "\n")
    for name, result in results.items():
        if (scores := result.scores.get("")) is not None:
            both = np.concatenate([scores.genuine, scores.impostor])
            is_same = np.arange(len(both)) < len(scores.genuine)
            path = folder / f"{name}-scores.npz"
            np.savez_compressed(path, scores=both, is_same=is_same, impostor_pairs=scores.impostors)
