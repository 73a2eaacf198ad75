"""`partialfc recipes`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from partialfc.cli.parser import add_command, facts_text, show
from partialfc.config.recipes import GPU_HOURS, RECIPES, SCORES, data_set, describe
from partialfc.core.errors import InputError, did_you_mean
from partialfc.plan.planning import recipe_memory

_NOTE = """Hours are predictions for H100 GPUs, not measured; MFR-ALL and IJB-C are the
published scores in percent. `partialfc recipes NAME` shows a recipe in full."""


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "recipes", run)
    help_ = "one recipe, to be shown in full, or words that the listed ones have, such as webface12m r100"
    parser.add_argument("name", nargs="*", metavar="WORD", help=help_)


def run(options: Namespace) -> None:
    """List the published recipes, which `train --recipe` takes, with data, cost and expected score."""
    (name,) = options.name if len(options.name) == 1 else ("",)
    if name in RECIPES:
        facts = describe(name) | {"memory": recipe_memory(name)}
        parts = (facts["memory"] or {}).items()
        memory = ", ".join(f"{part.replace('_', ' ')} {size / 2**30:.2f}" for part, size in parts)
        shown = facts | {"memory": f"GiB a GPU: {memory}" if memory else "fits any machine"}
        show(options, facts, f"{shown.pop('command')}\n\n{facts_text(shown)}")
        return
    names = [one for one in RECIPES if all(_plain(word) in _plain(_text(one)) for word in options.name)]
    if not names:
        words = " ".join(options.name)
        raise InputError(f"There is no recipe {words!r}; `partialfc recipes` lists them.{did_you_mean(words, RECIPES)}")
    heading = f"{'':<30} {'':>10} {'':>7} {'':>5} {'GPU-':>6} {'MFR-':>6} {'IJB-C':>6}"
    lines = [heading]
    lines.append(f"{'recipe':<30} {'identities':>10} {'images':>7} {'hours':>5} {'hours':>6} {'ALL':>6} {'1e-4':>6}")
    recipes = [describe(one) | {"memory": recipe_memory(one)} for one in names] if options.json else []
    show(options, recipes, "\n".join([*lines, *map(_row, names), "", _NOTE]))


def _row(name: str) -> str:
    data, score = data_set(name), SCORES.get(name)
    if data is None:
        return f"{name:<30} procedural faces"
    gpu_hours = GPU_HOURS[name]
    hours = gpu_hours / RECIPES[name].data.fewest_processes
    figures = "" if score is None else f" {score[0]:6.2f} {score[1]:6.2f}"
    return f"{name:<30} {data[1]:>10,} {data[2] / 1e6:>6.1f}M {hours:>5.1f} {gpu_hours:>6,.0f}{figures}"


def _text(name: str) -> str:
    return f"{name} {describe(name)['data']} {RECIPES[name].backbone.name}"


def _plain(text: str) -> str:
    return text.replace("_", "-").lower()
