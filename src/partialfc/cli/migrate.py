"""`partialfc migrate`."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from partialfc.cli.parser import add_command, show
from partialfc.config.published import Conversion, convert_published, read_published
from partialfc.core.console import counted
from partialfc.core.errors import InputError
from partialfc.core.files import atomic_folder, output_errors, write_file
from partialfc.model.config import COLOR_ORDERS
from partialfc.model.files import STATE_DICT_SUFFIXES, load_model, save_model
from partialfc.training.migrate import migrate_run, rank_files


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "migrate", run)
    what = "folder with checkpoint_gpu_*.pt, configuration file (.py), or file of weights (.pt, .pth, .ckpt)"
    parser.add_argument("path", type=Path, metavar="PATH", help=what)
    help_ = "new folder: a run, a configuration or a model"
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help=help_)
    help_ = "of a checkpoint: the configuration file of its training"
    parser.add_argument("--config-file", type=Path, metavar="FILE", help=help_)
    help_ = "of a checkpoint: the training images; by default those that the configuration names"
    parser.add_argument("--data", type=Path, metavar="DATA", help=help_)
    help_ = "of a configuration: its processes, each of which has config.batch_size images"
    parser.add_argument("--world-size", type=int, metavar="N", help=help_)
    help_ = "let the head compute what the published code does where that differs from the paper"
    parser.add_argument("--compat", choices=["insightface"], help=help_)
    help_ = "of weights: the channels that the network was trained on"
    parser.add_argument("--color-order", choices=COLOR_ORDERS, default="rgb", help=help_)


def run(options: Namespace) -> None:
    """Take over checkpoints, configurations and weights of the published code; nothing in them is executed."""
    path, out = options.path, options.out
    if not path.exists():
        raise InputError(f"There is no {path}: give a folder with checkpoint_gpu_*.pt, a configuration or weights.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty: give a new folder with --out.")
    if path.is_dir():
        _migrate_folder(options)
    elif path.suffix == ".py":
        _migrate_config(options)
    elif path.name.startswith("checkpoint_gpu_"):
        raise InputError(
            f"{path} is the checkpoint of one rank: give the folder with those of all ranks, {path.parent}."
        )
    elif path.name.lower().endswith((*STATE_DICT_SUFFIXES, ".safetensors")):
        _migrate_weights(options)
    elif path.suffix == ".onnx":
        raise InputError(f"{path} can be evaluated as it is, partialfc evaluate {path}, but not trained.")
    else:
        raise InputError(f"{path} is nothing of the published code: give a folder, a .py file or a file of weights.")


def _migrate_folder(options: Namespace) -> None:
    path, out = options.path, options.out
    if (path / "config.yaml").is_file() or (path / "config.json").is_file():
        raise InputError(f"{path} is a folder of partialfc already: go on with train --resume, or evaluate it.")
    files = rank_files(path)
    if not files:
        weights = sorted(file for file in path.iterdir() if file.name.lower().endswith(STATE_DICT_SUFFIXES))
        hint = f": to take over weights alone, give the file {weights[0]}" if weights else ""
        raise InputError(f"{path} holds no checkpoint_gpu_0.pt{hint or ': give the output folder of a training'}.")
    if options.config_file is None:
        raise InputError("A checkpoint does not hold its margin and batch size: give its configuration, --config-file.")
    conversion = _convert(options, options.config_file, len(files))
    data = options.data or Path(conversion.config.data.path or "DATA")
    if not data.exists():
        raise InputError(
            f"There are no training images in {data}: name them with --data, since --resume compares them."
        )
    conversion = replace(conversion, config=conversion.config.with_values({"data.path": str(data)}))
    result = migrate_run(path, conversion, out, quiet=options.json)
    command = f"partialfc train {data} --config {out / 'config.yaml'} --out {out} --resume"
    facts = {"steps": result.steps, "total_steps": result.total_steps, "classes": result.num_classes}
    _show(
        options,
        {"kind": "run", **facts, "tensors": result.tensors, "ranks": len(files)},
        f"a checkpoint of {counted(len(files), 'rank')}: {result.steps:,} of {counted(result.total_steps, 'step')}, "
        f"{result.num_classes:,} classes, {counted(result.tensors, 'tensor')}, none left over",
        result.notes,
        command + _benchmarks(conversion, data),
    )


def _migrate_config(options: Namespace) -> None:
    if options.world_size is None:
        raise InputError("config.batch_size is of one process: say with --world-size how many there were.")
    conversion = _convert(options, options.path, options.world_size)
    with output_errors(options.out), atomic_folder(options.out) as new:
        write_file(new / "config.yaml", conversion.config.to_yaml())
    data = Path(conversion.config.data.path or "DATA")
    command = f"partialfc train {data} --config {options.out / 'config.yaml'} --out runs/mine"
    facts = {"kind": "config"}
    _show(options, facts, f"a configuration of {conversion.config.backbone.name}", conversion.notes, command)


def _migrate_weights(options: Namespace) -> None:
    model = load_model(options.path)
    with output_errors(options.out):
        save_model(options.out, model.backbone, replace(model.config, color_order=options.color_order))
    notes = (
        []
        if options.color_order == "bgr"
        else ["AdaFace's own weights take blue first: give --color-order bgr for them"]
    )
    facts = {"kind": "model", "backbone": model.config.backbone, "embedding_dim": model.config.embedding_dim}
    command = f"partialfc evaluate {options.out} --benchmark lfw.bin"
    _show(options, facts, f"a model: {model.origin}", notes, command)


def _convert(options: Namespace, path: Path, world_size: int) -> Conversion:
    if world_size < 1:
        raise InputError(f"--world-size is {world_size}: give a positive number.")
    return convert_published(read_published(path), world_size=world_size, compatible=options.compat is not None)


def _benchmarks(conversion: Conversion, data: Path) -> str:
    """The option that evaluates on the verification files of the configuration which stand beside the images."""
    files = [data / f"{name}.bin" for name in conversion.benchmarks if isinstance(name, str)]
    found = [str(file) for file in files if file.is_file()]
    return f" --benchmark {' '.join(found)}" if found else ""


def _show(options: Namespace, facts: dict[str, Any], what: str, notes: list[str], command: str) -> None:
    text = "\n".join([f"{options.out} holds {what}", *(f"- {note}" for note in notes), f"next: {command}"])
    show(options, {**facts, "out": str(options.out), "notes": notes, "next": command}, text)
