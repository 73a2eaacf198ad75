"""Values of options: from the text of the command line, and from YAML files."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml

from partialfc.config.sample_rate import SampleRate
from partialfc.core.errors import InputError

_WIDEST = 50  # characters of choices in the help


def form(hint: Any) -> tuple[str, str, Callable[[str], Any]]:
    """What the help shows for a value of this type, what a message calls it, and what makes it from text."""
    if NoneType in get_args(hint):
        hint = next(part for part in get_args(hint) if part is not NoneType)
    known: dict[Any, tuple[str, str, Callable[[str], Any]]] = {
        bool: ("{true,false}", "true or false", {"true": True, "false": False}.__getitem__),
        int: ("N", "a whole number", int),
        float: ("X", "a number", float),
        str: ("TEXT", "text", str),
        list[str]: ("[NAME,...]", "a list such as [a,b]", _names),
        SampleRate: ("X", "a number, or a list such as [[0.8,0.1],[0.2,1]]", _rate),
    }
    if hint in known:
        return known[hint]
    names = get_args(hint)
    choices, shown = {name: name for name in names}, ",".join(names)
    shown = f"{{{shown}}}" if len(shown) < _WIDEST else "NAME"  # the sentence of the option then has the names
    return shown, f"one of {', '.join(names)}", choices.__getitem__


def _names(text: str) -> list[str]:
    return [str(name) for name in yaml.safe_load(text if text.startswith("[") else f"[{text}]")]


def _rate(text: str) -> SampleRate:
    if not text.startswith("["):
        return float(text)
    return [[float(part) for part in phase] for phase in yaml.safe_load(text)]


def convert(hint: Any, text: str) -> Any:
    """The value of an option: bool, int, float, str, list[str], SampleRate, a Literal, or one of these | None."""
    if text == "null" and NoneType in get_args(hint):
        return None
    _, kind, make = form(hint)
    try:
        return make(text)
    except (KeyError, TypeError, ValueError, yaml.YAMLError):
        raise ArgumentTypeError(f"{text!r} is not {kind}") from None


class _OneOfEachKey(yaml.SafeLoader):
    """Refuses a key that stands twice; PyYAML keeps the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if key.value in (other.value for other in keys[:number]):
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The nested options of a YAML file.

    Raises:
        InputError: there is none at `path`; the sentence says what is there, and what to give instead.
    """
    example = "`partialfc train DATA --print-config` prints an example"
    if path.is_dir():
        inside = path / "config.yaml"
        remedy = f"give {inside}" if inside.is_file() else f"give a YAML file; {example}"
        raise InputError(f"--config {path} is a folder: {remedy}.")
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise InputError(f"--config {path} cannot be read: {error.strerror}.") from error
    is_weights = path.suffix in (".pt", ".pth", ".safetensors")
    if is_weights or encoded.startswith((b"PK\3\4", b"\x80\x02", b"\x80\x03", b"\x80\x04")):
        weights = "give a model to `evaluate` or --backbone.init, and a YAML file here"
        raise InputError(f"--config {path} is a file of weights, no configuration: {weights}.")
    if path.suffix == ".py":
        raise InputError(f"--config {path} is a Python file, which is not run: write its options as YAML; {example}.")
    try:
        content = yaml.load(encoded.decode("utf-8-sig"), _OneOfEachKey)
    except UnicodeDecodeError as error:
        raise InputError(f"--config {path} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise InputError(f"--config {path} cannot be read as YAML: {problem}{where}.") from error
    if not isinstance(content, dict):
        raise InputError(f"--config {path} holds no options: write lines such as `seed: 1`.")
    return content
