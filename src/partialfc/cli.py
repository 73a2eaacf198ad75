"""The command line: options from typed signatures, results for people or as JSON, one sentence for a mistake.

No logic of its own: every command calls one function of the package and shows what it returns.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json as json_module
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse import ArgumentParser, Namespace

from partialfc.bench.head import bench_head
from partialfc.config.options import TrainConfig, flatten
from partialfc.config.recipes import RECIPES, data_set, describe, recipe_config
from partialfc.core.console import Progress
from partialfc.core.device import choose_device
from partialfc.core.errors import InputError, JobError, StoppedBySignal
from partialfc.data.inspect import inspect
from partialfc.demo import demo
from partialfc.distributed.collectives import launched_rank
from partialfc.evaluation.pairs import evaluate_pair_set
from partialfc.evaluation.run import evaluate_benchmarks, read_benchmarks, table, write_results
from partialfc.faces.sets import FaceWorld
from partialfc.model.files import load_model
from partialfc.plan.planning import make_plan, recipe_memory
from partialfc.plan.text import plan_text
from partialfc.report.page import write_report
from partialfc.training.build import check_config
from partialfc.training.loop import train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    The exit status is 0 done, 1 the job failed, 2 the input was wrong, 130 interrupted, 143 stopped
    by SIGTERM after saving."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _run(arguments)
    except InputError as error:
        return _complain(error, 2)
    except StoppedBySignal as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends one more while this process is on its way out
        print(f"partialfc: {stop}", file=sys.stderr)
        return 128 + stop.signum
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (JobError, OSError) as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted; a training run goes on from its last checkpoint with --resume", 130)
    return 0


def _complain(message: object, status: int) -> int:
    print(f"partialfc: error: {message}", file=sys.stderr)
    return status


def _run(arguments: list[str]) -> None:
    recipe, arguments = _recipe_and_config_first(arguments)
    chosen = build_parser(recipe).parse_args(arguments)
    path, options = chosen.command, chosen[chosen.command]
    if "command" in options:
        path, options = f"{path} {options.command}", options[options.command]
    COMMANDS[path](options)


def _recipe_and_config_first(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The recipe, and the words with `--config FILE` before all other options of the command.

    So the order of precedence is defaults, recipe, file, flags, wherever they stand on the line.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe", nargs="?")
    finder.add_argument("--config", action="append", nargs="?", default=[])
    found, rest = finder.parse_known_args(arguments)
    options = [word for path in found.config for word in ("--config", path) if word is not None]
    if found.recipe is not None:
        options += ["--recipe", found.recipe]
    return found.recipe, [*rest[:1], *options, *rest[1:]]


class _Parser(ArgumentParser):
    """A parser that says what is wrong in one sentence and takes no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        print(f"partialfc: error: {self._one_sentence(message)}", file=sys.stderr)
        raise SystemExit(2)

    def _one_sentence(self, message: str) -> str:
        sentence = " ".join(message.split()).rstrip(".")
        sentence = re.sub(r"Parser key \"([^\"]+)\":", r"option \1:", sentence)
        sentence = re.sub(r"<class '(\w+)'>", r"\1", sentence).replace("typing.", "")
        sentence = re.sub(r"Expected a Literal\[([^\]]*)\]", r"expected one of \1", sentence)
        unknown = re.search(r"unrecognized arguments: (--[\w.-]+)|does not accept option '([\w.]+)'", sentence)
        if unknown:
            wrong = unknown[1] or f"--{unknown[2]}"
            nearest = difflib.get_close_matches(wrong, self._all_options(), n=1)
            hint = f"did you mean {nearest[0]}" if nearest else "see --help for the options"
            return f"unknown option {wrong} ({hint}; options are not abbreviated)."
        return f"{sentence}."

    def _all_options(self) -> list[str]:
        options: list[str] = []
        for action in self._actions:
            options += action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for parser in dict(action.choices).values():
                    options += parser._all_options()
        return options


def build_parser(recipe: str | None = None) -> ArgumentParser:
    """The parser of the whole command line; `recipe` sets the defaults of `train`."""
    parser = _Parser(prog="partialfc", description="Train face recognition with Partial FC, and see how good it is.")
    commands = parser.add_subcommands(dest="command")
    commands.add_subcommand("demo", _demo_parser(), help="the whole job on procedural faces, on this machine")
    commands.add_subcommand("train", _train_parser(recipe), help="train a model, evaluating on the way")
    commands.add_subcommand("recipes", _recipes_parser(), help="the published recipes: data, cost, expected score")
    commands.add_subcommand("plan", _plan_parser(recipe), help="predicted memory and step time, and the rate that fits")
    commands.add_subcommand("evaluate", _evaluate_parser(), help="run benchmarks on a trained model")
    commands.add_subcommand("report", _report_parser(), help="one run as one HTML page")
    data, bench = _Parser(), _Parser()
    commands.add_subcommand("data", data, help="look at data sets, or write procedural ones")
    below = data.add_subcommands(dest="command")
    below.add_subcommand("inspect", _inspect_parser(), help="health and counts of a training set")
    below.add_subcommand("faces", _faces_parser(), help="procedural faces in the real formats")
    commands.add_subcommand("bench", bench, help="measure the project's own speed and memory")
    below = bench.add_subcommands(dest="command")
    below.add_subcommand("head", _bench_head_parser(), help="step time and memory of the head")
    return parser


def _with_json(parser: ArgumentParser) -> ArgumentParser:
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output, nothing else")
    return parser


def _demo_parser() -> ArgumentParser:
    parser = _Parser(description="Render procedural faces, train on them, and test on identities never seen.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of data, run and report")
    parser.add_argument("--seed", type=int, default=0, help="faces and training are functions of it")
    return _with_json(parser)


def _train_parser(recipe: str | None = None) -> ArgumentParser:
    parser = _Parser(description="Train a model; start with torchrun for several processes.")
    _add_configuration(parser, recipe)
    parser.add_argument("--out", type=Path, default=Path("runs/train"), help="folder of the run")
    parser.add_argument(
        "--eval", nargs="+", default=[], metavar="NAME=PATH", help="verification .bin files to evaluate on the way"
    )
    parser.add_argument("--resume", action="store_true", help="go on if the folder holds a run, else start")
    parser.add_argument(
        "--verify", action="store_true", help="with --resume: read and compare every byte of the checkpoint first"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    return _with_json(parser)


def _add_configuration(parser: ArgumentParser, recipe: str | None, skip: str | None = None) -> None:
    """The options of a training, all but one of them, with a recipe's values as defaults."""
    parser.add_argument("--recipe", help="a complete configuration to start from; `partialfc recipes` lists them")
    parser.add_argument("--config", action="config", help="YAML file with options of the training")
    parser.add_class_arguments(TrainConfig, skip={skip} if skip else set())
    if recipe is not None:
        defaults = flatten(recipe_config(recipe).to_dict())
        parser.set_defaults({key: value for key, value in defaults.items() if key != skip})


def _configuration(parser: ArgumentParser, options: Namespace) -> TrainConfig:
    """The training that the options of `_add_configuration` describe."""
    values = parser.instantiate(options)
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    return TrainConfig(**{name: values[name] for name in names if name in values})


def _recipes_parser() -> ArgumentParser:
    parser = _Parser(description="Show the recipes that `train --recipe` takes, or one of them in full.")
    parser.add_argument("name", nargs="?", default=None, help="one recipe")
    return _with_json(parser)


def _plan_parser(recipe: str | None = None) -> ArgumentParser:
    parser = _Parser(description="Predict memory per GPU and time per step of a training, and the largest sample rate.")
    parser.add_argument("--classes", type=int, default=_known_classes(recipe), help="identities of the data")
    parser.add_argument("--gpus", type=int, default=None, help="by default as many as hold the global batch at once")
    parser.add_argument(
        "--device",
        type=Literal["auto", "v100", "a100", "h100", "h200", "cpu", "cuda"],
        default="auto",
        help="kind of GPU, from its data sheet; auto is h100, and cpu or cuda times some steps on this machine",
    )
    parser.add_argument("--image-size", type=int, default=112, help="side of the images in pixels")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of one machine; the network joins more")
    parser.add_argument("--gpu-memory", type=float, default=None, help="GiB of a GPU; by default what the device has")
    _add_configuration(parser, recipe, skip="device")
    return _with_json(parser)


def _known_classes(recipe: str | None) -> int | None:
    data = None if recipe is None else data_set(recipe)
    return None if data is None else data[1]


def _evaluate_parser() -> ArgumentParser:
    parser = _Parser(description="Run benchmarks on a model folder or a run folder.")
    parser.add_argument("model", type=Path, help="model folder or run folder")
    parser.add_argument("--benchmark", nargs="+", required=True, metavar="NAME=PATH", help="verification .bin files")
    parser.add_argument("--out", type=Path, default=None, help="write results.json and score files there")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--batch_size", type=int, default=256, help="images at once")
    return _with_json(parser)


def _report_parser() -> ArgumentParser:
    parser = _Parser(description="Show one run as one self-contained HTML page.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--benchmark", nargs="+", default=[], metavar="NAME=PATH", help="verification files to show scores and pairs of"
    )
    parser.add_argument("--out", type=Path, default=None, help="the page; by default report.html in the run folder")
    parser.add_argument("--title", type=str, default=None, help="its title")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to compute")
    return _with_json(parser)


def _inspect_parser() -> ArgumentParser:
    parser = _Parser(description="Count, check and hash a training set.")
    parser.add_argument("path", type=Path, help="folder with a .rec file, .rec file, or folder of identity folders")
    return _with_json(parser)


def _faces_parser() -> ArgumentParser:
    parser = _Parser(description="Write procedural faces: a training set, and pairs of other identities.")
    parser.add_argument("--out", type=Path, required=True, help="new folder for train/ and pairs.bin")
    parser.add_class_arguments(FaceWorld)
    return _with_json(parser)


def _bench_head_parser() -> ArgumentParser:
    parser = _Parser(description="Time a step of the head, one line of JSON a variant.")
    parser.add_argument("--classes", type=int, required=True, help="number of classes")
    parser.add_argument("--embedding-dim", type=int, default=512, help="width of the embeddings")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step")
    parser.add_argument("--sample-rate", type=float, default=0.1, help="part of the classes that a step uses")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each variant")
    parser.add_argument(
        "--operand-dtype",
        type=Literal["both", "float32", "bfloat16"],
        default="both",
        help="what products round them to",
    )
    parser.add_argument("--baseline", action="store_true", help="also the dense way of the reference implementation")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to compute")
    return _with_json(parser)


def _run_demo(options: Namespace) -> None:
    summary = demo(options.out, seed=options.seed, quiet=options.json)
    _show(options.json, summary.to_dict(), summary.text())


def _run_train(options: Namespace) -> None:
    config = _configuration(_train_parser(), options)
    check_config(config)
    if options.print_config:
        print(config.to_yaml(), end="")
        return
    result = train(
        config,
        options.out,
        benchmarks=named_paths(options.eval),
        resume=options.resume,
        verify=options.verify,
        quiet=options.json,
    )
    if launched_rank() == 0:
        _show(options.json, result.to_dict(), result.text())


def _run_recipes(options: Namespace) -> None:
    if options.name is not None:
        facts = describe(options.name) | {"memory": recipe_memory(options.name)}
        parts = (facts["memory"] or {}).items()
        memory = ", ".join(f"{part.replace('_', ' ')} {size / 2**30:.2f}" for part, size in parts)
        shown = facts | {"memory": f"GiB a GPU: {memory}" if memory else "fits any machine"}
        _show(options.json, facts, "\n".join(f"{key.replace('_', ' '):>13}  {value}" for key, value in shown.items()))
        return
    every = [describe(name) | {"memory": recipe_memory(name)} for name in RECIPES]
    lines = [f"{'recipe':<32} {'data':<62} expected score"]
    lines += [f"{facts['name']:<32} {facts['data']:<62} {facts['score']}" for facts in every]
    _show(options.json, every, "\n".join(lines))


def _run_plan(options: Namespace) -> None:
    config = _configuration(_plan_parser(), options)
    classes = options.classes or config.data.num_classes
    if classes is None:
        raise InputError("--classes is missing: give the number of identities, or a recipe of known data.")
    plan = make_plan(
        config,
        classes=classes,
        gpus=options.gpus,
        device="h100" if options.device == "auto" else options.device,
        image_size=options.image_size,
        gpus_per_node=options.gpus_per_node,
        gpu_memory=options.gpu_memory,
    )
    _show(options.json, plan.to_dict(), plan_text(plan))


def _run_evaluate(options: Namespace) -> None:
    model = load_model(options.model, choose_device(options.device))
    print(f"model: {model.origin}", file=sys.stderr)
    results = evaluate_benchmarks(model, named_paths(options.benchmark), batch_size=options.batch_size)
    if options.out is not None:
        write_results(options.out, results)
    _show(options.json, {name: result.summary() for name, result in results.items()}, table(results))


def _run_report(options: Namespace) -> None:
    results, pairs = {}, {}
    if options.benchmark:
        model = load_model(options.run, choose_device(options.device))
        pairs = read_benchmarks(named_paths(options.benchmark), model.config)
        results = {name: evaluate_pair_set(model, each) for name, each in pairs.items()}
    path = write_report(options.run, out=options.out, results=results, pairs=pairs, title=options.title)
    _show(options.json, {"report": str(path)}, f"report: {path}")


def _run_inspect(options: Namespace) -> None:
    with Progress("inspecting", quiet=options.json) as progress:
        facts = inspect(options.path, progress=progress.update)
    _show(options.json, facts, "\n".join(f"{name:>18}  {value}" for name, value in facts.items()))


def _run_faces(options: Namespace) -> None:
    world = FaceWorld(**{field.name: options[field.name] for field in dataclasses.fields(FaceWorld)})
    facts = world.write(options.out, quiet=options.json)
    _show(options.json, facts, "\n".join(f"{name:>16}  {value}" for name, value in facts.items()))


def _run_bench_head(options: Namespace) -> None:
    for line in bench_head(
        num_classes=options.classes,
        embedding_dim=options.embedding_dim,
        batch_size=options.batch_size,
        sample_rate=options.sample_rate,
        steps=options.steps,
        baseline=options.baseline,
        operand_dtype=None if options.operand_dtype == "both" else options.operand_dtype,
        device=choose_device(options.device).type,
    ):
        print(json_module.dumps(line), flush=True)


COMMANDS: dict[str, Callable[[Namespace], None]] = {
    "demo": _run_demo,
    "train": _run_train,
    "recipes": _run_recipes,
    "plan": _run_plan,
    "evaluate": _run_evaluate,
    "report": _run_report,
    "data inspect": _run_inspect,
    "data faces": _run_faces,
    "bench head": _run_bench_head,
}


def named_paths(pairs: Sequence[str]) -> dict[str, Path]:
    """NAME=PATH words as a dictionary.

    Raises:
        InputError: a word has no name or no path, or a name stands twice.
    """
    named: dict[str, Path] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise InputError(f"benchmark {pair!r} is not NAME=PATH: write for example lfw=data/lfw.bin.")
        if name in named:
            raise InputError(f"benchmark name {name!r} is given twice: give each file its own name.")
        named[name] = Path(path)
    return named


def _show(as_json: bool, result: Any, text: str) -> None:
    print(json_module.dumps(result) if as_json else text)
