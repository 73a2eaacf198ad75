"""`partialfc evaluate`."""

from __future__ import annotations

import tempfile
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from partialfc.bench.machine import provenance
from partialfc.cli.parser import Parser, add_benchmarks, add_command, add_device, named_paths, show
from partialfc.core.console import say
from partialfc.core.device import choose_device
from partialfc.core.errors import InputError
from partialfc.distributed.collectives import gather_json, launched_rank, process_group
from partialfc.evaluation.run import embed_benchmarks, evaluate_features, in_order, open_benchmarks, write_results
from partialfc.evaluation.statistics.figures import Figure, Result, rate_name, results_table
from partialfc.evaluation.statistics.thresholds import (
    Realised,
    Thresholds,
    apply_thresholds,
    measure_thresholds,
    read_thresholds,
)
from partialfc.evaluation.statistics.thresholds import write_thresholds as write_thresholds_file
from partialfc.model.contract import contract_of, same_source
from partialfc.model.embed import Precision
from partialfc.model.features import read_features
from partialfc.model.files import Model, find_model, load_model

_SIZE = 112  # of the images of a benchmark whose features are stored


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "evaluate", run)
    help_ = "run folder, model folder, or file of weights; several give one table"
    parser.add_argument("model", type=Path, nargs="*", metavar="MODEL", help=help_)
    what = ".bin files, folders of IJB, lists (.csv), folders of one's own people"
    add_benchmarks(parser, required=True, what=what)
    help_ = "features (.npy, .parquet) of the benchmark's images instead of a model, or those of the model"
    parser.add_argument("--embeddings", type=Path, metavar="FILE", help=help_)
    _add_options(parser)
    add_device(parser)


def _add_options(parser: Parser) -> None:
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write results.json and the features there")
    help_ = "also report FMR and FNMR at the thresholds of this file"
    parser.add_argument("--thresholds", type=Path, metavar="FILE", help=help_)
    help_ = "write thresholds.json beside the model, measured on the one benchmark that is given"
    parser.add_argument("--write-thresholds", action="store_true", help=help_)
    help_ = "read the ROC of IJB at the nearest FAR, as the public script does"
    parser.add_argument("--compat", choices=["insightface"], help=help_)
    help_ = "add the embeddings of mirrored images, or do not; by default as the model's configuration says"
    parser.add_argument("--flip", action=BooleanOptionalAction, default=None, help=help_)
    parser.add_argument("--batch-size", type=int, metavar="N", default=256, help="images embedded at once")
    parser.add_argument("--precision", choices=get_args(Precision), default="float32", help="dtype of the backbone")
    parser.add_argument("--workers", type=int, metavar="N", default=2, help="processes that read images")


def run(options: Namespace) -> None:
    """Run benchmarks on models, or on stored features."""
    for name in ("batch_size", "workers"):
        if getattr(options, name) < (name == "batch_size"):
            raise InputError(f"--{name.replace('_', '-')} is {getattr(options, name)}: give a positive number.")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise InputError(f"{options.out} is a file: give a folder with --out.")
    paths, device = named_paths(options.benchmark), choose_device(options.device)
    if not options.model and options.embeddings is None:
        remedy = "give a model before --benchmark, or features with --embeddings"
        raise InputError(f"There is nothing to evaluate: {remedy}.")
    if options.embeddings is not None and (len(paths) > 1 or len(options.model) > 1):
        raise InputError("--embeddings holds the features of one benchmark: give one benchmark, and one model at most.")
    if options.write_thresholds and (len(paths) > 1 or len(options.model) != 1):
        raise InputError("--write-thresholds needs one model and one benchmark.")
    thresholds = None if options.thresholds is None else read_thresholds(options.thresholds)
    started = time.monotonic()
    with process_group(device):
        made = provenance(str(device))
        if options.embeddings is not None:
            models = {str(options.embeddings): _evaluate_stored(options, paths, thresholds)}
        else:
            loaded = [load_model(path, device).with_flip(options.flip) for path in options.model]
            models = {
                str(path): _evaluate_model(options, path, model, paths, thresholds)
                for path, model in zip(options.model, loaded, strict=True)
            }
    if launched_rank() != 0:
        return
    content = {name: one["json"] for name, one in models.items()}
    made["seconds"] = round(time.monotonic() - started, 1)
    shown = {"made": made} | (next(iter(content.values())) if len(content) == 1 else {"models": content})
    if options.out is not None:
        several = len(models) > 1
        results = {
            f"{short.replace('/', '-')}-{name}" if several else name: result
            for short, one in zip(_short_names(models), models.values(), strict=True)
            for name, result in one["results"].items()
        }
        write_results(options.out, shown, results)
    show(options, shown, _text(models))


def _evaluate_model(
    options: Namespace, path: Path, model: Model, paths: Mapping[str, Path], thresholds: Thresholds | None
) -> dict[str, Any]:
    contract = contract_of(model)
    say(f"model: {model.origin}")
    benchmarks = open_benchmarks(paths, model.config.image_size, compat=options.compat is not None)
    for name, benchmark in benchmarks.items():
        say(f"benchmark {name}: {benchmark.what}")
    embedding = {name: getattr(options, name) for name in ("batch_size", "precision", "workers")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if options.out is None else options.out
        folder.mkdir(parents=True, exist_ok=True)
        stored = Path(gather_json(str(folder))[0]) / f"features-{contract[:12]}.npy"
        features = embed_benchmarks(model, benchmarks, stored, quiet=options.json, **embedding)
    results = {name: evaluate_features(name, benchmark, features[name]) for name, benchmark in benchmarks.items()}
    if options.write_thresholds:
        _write_thresholds(results, contract, path)
    return _content(results, thresholds, {"model": str(path), "origin": model.origin, "contract": contract})


def _compares_pictures(result: Result) -> bool:
    """Whether the scores are of two pictures, as those of `partialfc verify`, and not of templates of several."""
    return "" in result.scores and not result.kind.startswith("ijb")


def _write_thresholds(results: Mapping[str, Result], contract: str, model: Path) -> None:
    ((name, result),) = results.items()
    if not _compares_pictures(result):
        raise InputError(f"{name} does not compare two pictures at a time: thresholds need that.")
    written = measure_thresholds(result.scores[""], name=name, contract=contract)
    say(f"thresholds: {write_thresholds_file(written, model.parent if model.is_file() else find_model(model))}")


def _evaluate_stored(options: Namespace, paths: Mapping[str, Path], thresholds: Thresholds | None) -> dict[str, Any]:
    expected = contract_of(load_model(options.model[0]).with_flip(options.flip)) if options.model else None
    features = read_features(options.embeddings, expected)
    ((name, benchmark),) = open_benchmarks(paths, _SIZE, compat=options.compat is not None).items()
    say(f"benchmark {name}: {benchmark.what}")
    if features.contract is None:
        say(f"features: {options.embeddings} has no sidecar, so whose they are is unverified")
    features, is_named = in_order(features, benchmark.images, options.embeddings)
    if not is_named:
        say(f"features: no name of a row is that of an image, so row i of {options.embeddings} is taken for image i")
    facts = {"embeddings": str(options.embeddings), "contract": features.contract, "verified": expected is not None}
    results = {name: evaluate_features(name, benchmark, features)}
    if options.write_thresholds:
        if features.contract is None:
            raise InputError(f"{options.embeddings} does not say whose features it has: thresholds need that.")
        _write_thresholds(results, features.contract, options.model[0])
    return _content(results, thresholds, facts)


def _content(results: dict[str, Result], thresholds: Thresholds | None, facts: dict[str, Any]) -> dict[str, Any]:
    """Results, and what JSON holds of them: with thresholds also what these do on each benchmark with 1:1 scores."""
    content: dict[str, Any] = {}
    lines = []
    for name, result in results.items():
        # Names of folders do not tell who is in them.
        content[name] = {**result.to_dict(), "identity_overlap": "unknown"}
        if thresholds is None:
            continue
        if not _compares_pictures(result):
            lines.append(f"{name}: the thresholds, which are for two pictures, are not tried on it")
            continue
        if facts["contract"] is not None and not same_source(thresholds.contract, facts["contract"]):
            raise InputError(
                f"The thresholds were measured with another model (contract {thresholds.contract[:12]}…): measure them "
                "with this one, by --write-thresholds."
            )
        groups = {part: scores for part, scores in result.scores.items() if part}
        realised = apply_thresholds(thresholds, result.scores[""], groups)
        content[name]["thresholds"] = [one.to_dict() for one in realised]
        lines += [f"{name}: {line}" for one in realised for line in _realised_lines(one)]
    return {"results": results, "lines": lines, "json": {**facts, "benchmarks": content}}


def _realised_lines(realised: Realised) -> list[str]:
    """What one threshold does, as text: overall, and indented by group."""
    lines = [f"{_rates(realised.fmr, realised.fnmr)} at cosine {realised.threshold.cosine:.3f}, set for FMR "]
    lines[0] += rate_name(realised.threshold.target)
    if realised.expected is not None:
        low, high = realised.expected
        is_expected = realised.fmr.value is not None and low <= realised.fmr.value <= high
        lines[0] += f" ({'as expected' if is_expected else 'NOT as expected'}: {low:.2g} to {high:.2g})"
    return lines + [f"  {group}: {_rates(*figures)}" for group, figures in realised.groups.items()]


def _rates(fmr: Figure, fnmr: Figure) -> str:
    texts = ["not resolvable" if one.value is None else f"{one.value:.3g}" for one in (fmr, fnmr)]
    return f"FMR {texts[0]}, FNMR {texts[1]}"


def _short_names(models: Mapping[str, Any]) -> list[str]:
    """The last part of each path, or the whole paths if these are alike."""
    names = [Path(name).name for name in models]
    return names if len(set(names)) == len(names) else list(models)


def _text(models: Mapping[str, dict[str, Any]]) -> str:
    table = results_table(
        {name: one["results"] for name, one in zip(_short_names(models), models.values(), strict=True)}
    )
    lines = [line for one in models.values() for line in one["lines"]]
    return "\n".join([table, *lines, "Whether people of the training set are among these is unknown."])
