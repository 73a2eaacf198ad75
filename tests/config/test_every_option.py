"""Every option is used somewhere and explained."""

from __future__ import annotations

import ast
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from partialfc.cli import build_parser
from partialfc.config import options
from partialfc.config.options import TrainConfig, flatten, parse_steps
from partialfc.core.errors import InputError

SOURCES = Path(options.__file__).parents[1]
ROOT = Path(__file__).parents[2]


def dotted_keys(configuration: type = TrainConfig, prefix: str = "") -> list[str]:
    hints = get_type_hints(configuration)
    keys = []
    for field in fields(configuration):
        kind = hints[field.name]
        keys += dotted_keys(kind, f"{prefix}{field.name}.") if is_dataclass(kind) else [prefix + field.name]  # type: ignore[arg-type]
    return keys


def attributes_read() -> set[str]:
    """Names that some module reads from a configuration: `config.data.path`, or the methods and checks of its own."""
    names = set()
    for path in SOURCES.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path == Path(options.__file__):  # a check of a value alone is no use of it
            methods = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
            nodes = [
                node
                for method in methods
                if method.name not in ("check", "_check_combinations")
                for node in ast.walk(method)
            ]
        else:
            nodes = list(ast.walk(tree))
        names |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    return names


def test_every_option_is_read_somewhere() -> None:
    read = attributes_read()
    unread = [key for key in dotted_keys() if key.rpartition(".")[2] not in read]
    assert not unread
    assert "no_such_option" not in read


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["train", "--help-all"])
    explained: dict[str, str] = {}
    option = ""
    for line in capsys.readouterr().out.splitlines():
        if named := re.match(r"  (?:--[\w-]+, )?(--[\w.-]+)", line):
            option, line = named[1], line[named.end() :]
        if option:
            explained[option] = f"{explained.get(option, '')} {line.strip()}"
    for key in dotted_keys():
        _, *sentence = explained["--" + key.replace("_", "-")].partition("(default:")[0].split()
        assert len(sentence) >= 3, key


def test_flat_keys_are_those_of_the_configuration() -> None:
    assert list(flatten(TrainConfig().to_dict())) == dotted_keys()


def test_a_range_of_steps() -> None:
    assert parse_steps(None) == range(0)
    assert parse_steps("10:15") == range(10, 15)
    for text in ("10", "5:5", "a:b", ":3"):
        with pytest.raises(InputError, match="10:15"):
            parse_steps(text)
