"""`partialfc report`."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from partialfc.bench.machine import provenance
from partialfc.cli.parser import add_benchmarks, add_command, add_device, named_paths, show
from partialfc.core.device import choose_device
from partialfc.evaluation.benchmarks import Benchmark
from partialfc.evaluation.run import embed_benchmarks, evaluate_features, open_benchmarks
from partialfc.model.files import load_model
from partialfc.report.page import write_report
from partialfc.report.subjects import read_subjects

_SIZE = 112  # of the faces of IJB that are shown beside results


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "report", run)
    help_ = "run folder, or results of evaluate --out; several are compared"
    parser.add_argument("paths", type=Path, nargs="+", metavar="RUN-or-RESULTS", help=help_)
    what = "benchmarks, on which runs are evaluated and of which the hardest pairs are shown"
    add_benchmarks(parser, what=what)
    help_ = "the page; by default report.html in the first folder"
    parser.add_argument("--out", type=Path, metavar="FILE", help=help_)
    parser.add_argument("--title", metavar="TEXT", help="its title")
    parser.add_argument("--no-pictures", action="store_true", help="leave the faces of the hardest pairs out")
    add_device(parser)


def run(options: Namespace) -> None:
    """Show runs and results of evaluate as one HTML page; with benchmarks, also the hardest pairs."""
    subjects = read_subjects(options.paths)
    paths, device = named_paths(options.benchmark), choose_device(options.device)
    benchmarks: dict[str, Benchmark] = {}
    for place, subject in enumerate(subjects):
        if subject.run is None or not set(paths) - set(subject.results):
            continue
        model = load_model(subject.path, device)
        benchmarks = open_benchmarks(paths, model.config.image_size)
        missing = {name: one for name, one in benchmarks.items() if name not in subject.results}
        with tempfile.TemporaryDirectory() as folder:
            features = embed_benchmarks(model, missing, Path(folder) / "features.npy", quiet=options.json)
            results = {name: evaluate_features(name, one, features[name]) for name, one in missing.items()}
        subjects[place] = subject.with_results(results, subject.made or provenance(str(device)))
    benchmarks = benchmarks or open_benchmarks(paths, _SIZE)
    pictures = {} if options.no_pictures else {name: one.images for name, one in benchmarks.items()}
    path = write_report(subjects, out=options.out, pictures=pictures, title=options.title)
    show(options, {"report": str(path)}, f"report: {path}")
