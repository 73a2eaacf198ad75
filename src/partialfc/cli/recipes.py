"""`partialfc recipes`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from partialfc.cli.parser import add_command, facts_text, show
from partialfc.config.recipes import RECIPES, describe
from partialfc.plan.planning import recipe_memory


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "recipes", run)
    parser.add_argument("name", nargs="?", help="one recipe, to be shown in full")


def run(options: Namespace) -> None:
    """List the published recipes, which `train --recipe` takes, with data, cost and expected score."""
    if options.name is not None:
        facts = describe(options.name) | {"memory": recipe_memory(options.name)}
        parts = (facts["memory"] or {}).items()
        memory = ", ".join(f"{part.replace('_', ' ')} {size / 2**30:.2f}" for part, size in parts)
        shown = facts | {"memory": f"GiB a GPU: {memory}" if memory else "fits any machine"}
        show(options, facts, facts_text({key.replace("_", " "): value for key, value in shown.items()}))
        return
    recipes = [describe(name) | {"memory": recipe_memory(name)} for name in RECIPES]
    lines = [f"{'recipe':<32} {'data':<62} expected score"]
    lines += [f"{facts['name']:<32} {facts['data']:<62} {facts['score']}" for facts in recipes]
    show(options, recipes, "\n".join(lines))
