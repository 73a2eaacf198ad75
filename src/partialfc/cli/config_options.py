"""The options of a configuration: one for each key of `TrainConfig`, whose docstring is its help."""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import textwrap
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, get_type_hints

from partialfc.cli.parser import Parser
from partialfc.cli.values import convert, form
from partialfc.config.options import TrainConfig, flatten

# Options that everybody types have short names, and `train --help` shows them first.
SHORT_NAMES = {
    "backbone.name": "--backbone",
    "schedule.epochs": "--epochs",
    "data.global_batch_size": "--batch-size",
    "optimizer.lr": "--lr",
    "head.sample_rate": "--sample-rate",
    "data.workers": "--workers",
    "device": "--device",
}


class _HelpAll(argparse.Action):
    """Shows the help with every option."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, Parser)
        print(parser.format_help(everything=True), end="")
        parser.exit()


def add_config_options(parser: Parser, *, skip: Sequence[str] = ()) -> None:
    """Add --recipe, --config, and an option for each key of `TrainConfig`; see `build_config`.

    Args:
        skip: keys whose options the command adds itself.
    """
    parser.add_argument("--help-all", action=_HelpAll, nargs=0, help="show every option and exit")
    parser.add_argument("--recipe", metavar="NAME", help="start from this recipe; `partialfc recipes` lists them")
    help_ = "YAML file with any of these options, which overrides the recipe"
    parser.add_argument("--config", metavar="FILE", type=Path, action="append", default=[], help=help_)
    common = parser.add_argument_group("the most used of the training's options")
    _add_fields(parser, TrainConfig, "", skip, common)
    common._group_actions.sort(key=lambda action: list(SHORT_NAMES).index(action.dest))


def _add_fields(parser: Parser, config_class: type, prefix: str, skip: Sequence[str], common: Any) -> None:
    types, sections = _type_hints(config_class), []
    group = parser.add_argument_group((config_class.__doc__ or "").rstrip("."))
    parser.details.append(group)
    for name, sentence in _docstrings(config_class).items():
        key = prefix + name
        if key in skip:
            continue
        if is_dataclass(types[name]):
            sections.append(name)
            continue
        option = f"--{key}".replace("_", "-")
        (common if key in SHORT_NAMES else group).add_argument(
            *dict.fromkeys((SHORT_NAMES.get(key, option), option)),
            dest=key,
            type=partial(convert, types[name]),
            default=getattr(config_class(), name),
            metavar=form(types[name])[0],
            help=sentence.replace("%", "%%"),
        )
    for name in sections:
        _add_fields(parser, types[name], f"{prefix}{name}.", skip, common)


_type_hints = cache(get_type_hints)


@cache
def _docstrings(config_class: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, as one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(str(docstring.value.value).split())
        for field, docstring in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)
    }


def build_config(options: Namespace) -> TrainConfig:
    """The configuration that the options of `add_config_options` give."""
    config = TrainConfig()
    return config.with_values({key: getattr(options, key) for key in flatten(config.to_dict())})
