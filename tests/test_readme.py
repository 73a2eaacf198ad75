"""What the README shows works as it stands."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from markdown_blocks import ROOT, blocks

from partialfc.cli import build_parser
from partialfc.config.recipes import RECIPES
from partialfc.training.build import check_config

BLOCKS = blocks(ROOT / "README.md")
COMMANDS = [command for block in BLOCKS for command in block.commands]


def test_the_python_example_runs() -> None:
    (example,) = (block.code for block in BLOCKS if block.language == "python")
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    loss = names["loss"]
    assert isinstance(loss, torch.Tensor)
    assert loss.detach().item() > 0


def test_the_commands_that_everybody_needs_are_there() -> None:
    assert {command[0] for command in COMMANDS} >= {"data", "train", "evaluate", "plan"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_has_only_options_that_exist(command: list[str]) -> None:
    options = build_parser().parse_args(command)
    assert options.run.__module__.startswith("partialfc.cli.")  # of a command, not of a group of commands


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_a_possible_configuration(name: str) -> None:
    config = RECIPES[name]
    check_config(replace(config, data=replace(config.data, path="somewhere")))


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [line.split()[1] for block in BLOCKS for line in block.code.splitlines() if line.startswith("make ")]
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
