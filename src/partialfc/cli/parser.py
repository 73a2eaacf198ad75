"""What the commands share: options and their precedence, one sentence for a mistake, results as text or JSON."""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import json
import sys
import textwrap
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from functools import cache, partial
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints

import yaml

from partialfc.config.options import TrainConfig, flatten
from partialfc.config.recipes import recipe_config
from partialfc.core.errors import InputError, did_you_mean


class _HelpFormatter(argparse.HelpFormatter):
    """Adds the default to the help of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        sentence = (action.help or "").rstrip(".")
        sentence = sentence[:1].upper() + sentence[1:]
        if action.nargs == 0 or not action.option_strings or action.default in (None, "", []):
            return sentence
        default = json.dumps(action.default) if isinstance(action.default, bool) else action.default
        return f"{sentence} (default: {default})"


class Parser(argparse.ArgumentParser):
    """Takes `-` and `_` alike and no abbreviations, and says what is wrong in one sentence.

    With the options of `add_config_options`, the order of precedence is defaults, recipe, files, command line, wherever
    these stand on the line.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **options)
        for kind in (int, float):
            self.register("type", kind, partial(convert, kind))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"partialfc: error: {message}{'' if message.endswith(('.', '?')) else '.'}\n")

    def parse_known_args(  # type: ignore[override]
        self, arguments: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        words = [self._kebab_case(word) for word in (sys.argv[1:] if arguments is None else arguments)]
        options, unknown = super().parse_known_args(words, namespace)
        if "--config" in self._option_string_actions:
            if options.recipe is not None:
                self.set_defaults(**flatten(recipe_config(options.recipe).to_dict()))
            for path in options.config:
                self.set_defaults(**self._read_config(path))
            options, unknown = super().parse_known_args(words, namespace)
        if unknown:
            option = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
            hint = did_you_mean(option.replace("_", "-"), self._option_string_actions)
            self.error(f"there is no option {option}; options are not abbreviated.{hint}")
        return options, unknown

    def _kebab_case(self, word: str) -> str:
        name, equals, value = word.partition("=")
        kebab = name.replace("_", "-")
        return f"{kebab}{equals}{value}" if kebab in self._option_string_actions else word

    def _read_config(self, path: Path) -> dict[str, Any]:
        """The values of a YAML file of options, by their dotted names."""
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"cannot read {path} as YAML: {' '.join(str(error).split())}.") from error
        if not isinstance(content, dict):
            raise InputError(f"{path} holds no options: write lines such as `seed: 1`.")
        actions = {action.dest: action for action in self._actions}
        values = flatten(content)
        for name, value in values.items():
            if name not in actions:
                raise InputError(f"{path}: there is no option {name}.{did_you_mean(name, actions)}")
            if isinstance(convert := actions[name].type, partial):
                try:
                    values[name] = convert(value if isinstance(value, str) else json.dumps(value))
                except ArgumentTypeError as error:
                    raise InputError(f"{path}: {name}: {error}.") from error
        return values


def add_commands(parser: Parser) -> Any:
    """The place of the commands below `parser`, whose own `run` asks for one of them."""
    commands = parser.add_subparsers(title="commands", metavar="command")
    parser.set_defaults(run=lambda _: parser.error(f"give a command: one of {', '.join(commands.choices)}"))
    return commands


def add_command(commands: Any, name: str, run: Callable[[Namespace], None], **options: Any) -> Parser:
    """The parser of a command that calls `run`, whose docstring is the help; it has the option --json, see `show`."""
    sentence = inspect.getdoc(run)
    parser: Parser = commands.add_parser(name, help=sentence, description=sentence, **options)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output, nothing else")
    return parser


def show(options: Namespace, result: Any, text: str) -> None:
    """Print a result: as JSON with --json, as text without."""
    print(json.dumps(result) if options.json else text)


def facts_text(facts: dict[str, Any]) -> str:
    """Facts by name as two aligned columns."""
    width = max(map(len, facts))
    return "\n".join(f"{name:>{width}}  {value}" for name, value in facts.items())


# -- options of a configuration ----------------------------------------------------------------------------------------


def add_config_options(parser: Parser, *, skip: str = "") -> None:
    """Add --recipe, --config, and an option for each key of `TrainConfig`; see `build_config`.

    Args:
        skip: the key whose option the command adds itself.
    """
    parser.add_argument("--recipe", metavar="NAME", help="start from this recipe; `partialfc recipes` lists them")
    help_ = "YAML file with any of these options, which overrides the recipe"
    parser.add_argument("--config", metavar="FILE", type=Path, action="append", default=[], help=help_)
    _add_fields(parser, TrainConfig, "", skip)


def _add_fields(parser: Parser, config_class: type, prefix: str, skip: str = "") -> None:
    types, sections = _type_hints(config_class), []
    group = parser.add_argument_group((config_class.__doc__ or "").rstrip("."))
    for name, sentence in _docstrings(config_class).items():
        if name == skip:
            continue
        if is_dataclass(types[name]):
            sections.append(name)
            continue
        group.add_argument(
            f"--{prefix}{name}".replace("_", "-"),
            dest=f"{prefix}{name}",
            type=partial(convert, types[name]),
            default=getattr(config_class(), name),
            metavar=_form(types[name])[0],
            help=sentence.replace("%", "%%"),
        )
    for name in sections:
        _add_fields(parser, types[name], f"{prefix}{name}.")


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


def _form(hint: Any) -> tuple[str, str, Callable[[str], Any]]:
    """What the help shows for a value of this type, what a message calls it, and what makes it from text."""
    if NoneType in get_args(hint):
        hint = next(part for part in get_args(hint) if part is not NoneType)
    known: dict[Any, tuple[str, str, Callable[[str], Any]]] = {
        bool: ("{true,false}", "true or false", {"true": True, "false": False}.__getitem__),
        int: ("N", "a whole number", int),
        float: ("X", "a number", float),
        str: ("TEXT", "text", str),
        list[str]: ("[NAME,...]", "a list such as [a,b]", _names),
    }
    names = get_args(hint)
    choices = {name: name for name in names}
    return known.get(hint) or (f"{{{','.join(names)}}}", f"one of {', '.join(names)}", choices.__getitem__)


def _names(text: str) -> list[str]:
    return [str(name) for name in yaml.safe_load(text if text.startswith("[") else f"[{text}]")]


def convert(hint: Any, text: str) -> Any:
    """The value of type `hint` (bool, int, float, str, list[str], a Literal, or one of these | None) of an option."""
    if text == "null" and NoneType in get_args(hint):
        return None
    _, kind, make = _form(hint)
    try:
        return make(text)
    except (KeyError, ValueError, yaml.YAMLError):
        raise ArgumentTypeError(f"{text!r} is not {kind}") from None


def build_config(options: Namespace) -> TrainConfig:
    """The configuration that the options of `add_config_options` give."""
    config = TrainConfig()
    return config.with_values({key: getattr(options, key) for key in flatten(config.to_dict())})


# -- options of several commands ---------------------------------------------------------------------------------------


def add_device(parser: Parser) -> None:
    """Add --device."""
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")


def add_benchmarks(parser: Parser, *, required: bool = False, what: str = "verification .bin files") -> None:
    """Add --benchmark, which `named_paths` reads."""
    help_ = f"{what}, each under a name; by default that of its path"
    parser.add_argument("--benchmark", nargs="+", required=required, default=[], metavar="[NAME=]PATH", help=help_)


def named_paths(pairs: Sequence[str]) -> dict[str, Path]:
    """[NAME=]PATH words as a dictionary; the name of a path is that of its file or folder.

    Raises:
        InputError: a word has an empty name or path, or no name and names nothing that exists, or a name is repeated
            or has a slash.
    """
    named: dict[str, Path] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals and Path(pair).exists():
            name, path = Path(pair).stem, pair
        if not (name and path):
            raise InputError(
                f"benchmark {pair!r} is neither a path that exists nor NAME=PATH: write for example lfw=data/lfw.bin."
            )
        if "/" in name:
            raise InputError(f"benchmark name {name!r} has a slash, which separates the parts of a figure: rename it.")
        if name in named:
            raise InputError(f"benchmark name {name!r} is given twice: give each file its own name.")
        named[name] = Path(path)
    return named
