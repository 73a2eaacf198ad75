"""What the README shows works as it stands."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from partialfc.cli import build_parser
from partialfc.config.recipes import RECIPES
from partialfc.training.build import check_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if "partialfc" in line
]


def test_the_python_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    loss = names["loss"]
    assert isinstance(loss, torch.Tensor)
    assert loss.detach().item() > 0


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_only_options_that_exist(command: str) -> None:
    words = shlex.split(command)
    arguments = words[words.index("partialfc") + 1 :]
    parsed = build_parser().parse_args(arguments)
    assert parsed.command == arguments[0]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_a_possible_configuration(name: str) -> None:
    config = RECIPES[name]
    check_config(replace(config, data=replace(config.data, path="somewhere")))


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)$", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
