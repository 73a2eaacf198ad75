"""`partialfc plan`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any, get_args

from partialfc.cli.config_options import add_config_options, build_config
from partialfc.cli.parser import add_command, show
from partialfc.config.recipes import data_set
from partialfc.core.errors import InputError
from partialfc.plan.planning import make_plan, plan_text
from partialfc.plan.workload import Device, Workload


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "plan", run)
    parser.add_argument("--classes", type=int, metavar="N", help="identities of the data; a recipe knows its own")
    images = "images of the data, for the hours of the whole training; a recipe knows its own"
    parser.add_argument("--images", type=int, metavar="N", help=images)
    gpus = "processes, one a GPU; by default as many as hold the global batch at once"
    parser.add_argument("--gpus", type=int, metavar="N", help=gpus)
    kind = "kind of GPU; auto is h100, and cpu or cuda times steps on this machine"
    parser.add_argument("--device", choices=["auto", *get_args(Device)], default="auto", help=kind)
    parser.add_argument("--image-size", type=int, metavar="N", default=112, help="side of the images in pixels")
    nodes = "GPUs of one machine; more are joined by the network"
    parser.add_argument("--gpus-per-node", type=int, metavar="N", default=8, help=nodes)
    memory = "GiB of a GPU; by default what the device has"
    parser.add_argument("--gpu-memory", type=float, metavar="X", help=memory)
    add_config_options(parser, skip=("device",))


def run(options: Namespace) -> None:
    """Predict the memory of each GPU and the time of a step of a training, and the largest sample rate that fits."""
    device: Device = "h100" if options.device == "auto" else options.device
    config = build_config(options).with_backbone("cpu" if device == "cpu" else "cuda")
    data = None if options.recipe is None else data_set(options.recipe)
    known = config.data.num_classes if data is None else data[1]
    classes = known if options.classes is None else options.classes
    if classes is None:
        raise InputError("--classes is missing: give the number of identities, or a recipe of known data.")
    workload = Workload(
        config,
        classes,
        gpus=config.data.fewest_processes if options.gpus is None else options.gpus,
        device=device,
        image_size=options.image_size,
        gpus_per_node=options.gpus_per_node,
        images=data[2] if data is not None and options.images is None else options.images,
    )
    plan = make_plan(workload, gpu_memory=options.gpu_memory)
    show(options, plan.to_dict(), plan_text(plan))
