"""`partialfc plan`."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from functools import partial
from typing import Any, get_type_hints

from partialfc.cli.parser import add_command, convert, show
from partialfc.config.recipes import recipe_plan_request
from partialfc.core.device import choose_device, compute_dtype, dtype_name
from partialfc.plan.planning import make_plan
from partialfc.plan.request import PlanRequest
from partialfc.plan.text import plan_text


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "plan", run)
    parser.add_argument("--recipe", metavar="NAME", help="start from a recipe, its data and its number of GPUs")
    types = get_type_hints(PlanRequest)
    for field in dataclasses.fields(PlanRequest):
        name, help_ = "--" + field.name.replace("_", "-"), field.metadata["help"]
        parser.add_argument(name, type=partial(convert, types[field.name]), help=help_)


def run(options: Namespace) -> None:
    """Predict the memory of each GPU and the time of a step, and which sample rate fits."""
    defaults = PlanRequest() if options.recipe is None else recipe_plan_request(options.recipe)
    names = [field.name for field in dataclasses.fields(PlanRequest)]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    request = dataclasses.replace(defaults, **given)
    here = choose_device(request.device if request.device in ("cpu", "cuda") else "cpu")
    plan = make_plan(request, auto_precision=dtype_name(compute_dtype("auto", here)))
    show(options, plan.to_dict(), plan_text(plan))
