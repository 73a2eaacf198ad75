"""What the commands share: options and their precedence, one sentence for a mistake, results as text or JSON."""

from __future__ import annotations

import argparse
import inspect
import json
import shutil
import sys
import textwrap
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from partialfc.cli.values import convert, read_yaml
from partialfc.config.options import flatten
from partialfc.config.recipes import recipe_config
from partialfc.core.errors import InputError, did_you_mean

# What others call our options, the published configurations among them.
_ELSEWHERE = {
    "--backbone": "arch model network net",
    "--epochs": "epoch num-epoch num-epochs max-epochs",
    "--lr": "learning-rate base-lr lr",
    "--sample-rate": "rate sample",
    "--benchmark": "eval val val-targets verification benchmarks test",
    "--out": "output output-dir save-dir work-dir o",
    "--precision": "amp mixed-precision dtype",
    "--optimizer.name": "optimizer optim",
    "--backbone.init": "init pretrained weights finetune load",
    "--backbone.embedding-dim": "embedding-size embedding-dim dim",
    "--data.path": "data dataset data-dir train-dir root rec",
    "--device": "cuda cpu",
    "--head.margin": "margin loss margin-list",
    "--head.conflict-threshold": "interclass-filtering-threshold",
    "--schedule.warmup-epochs": "warmup warmup-epoch",
    "--output.log-every": "frequent verbose",
    "--print-config": "config-print show-config dry-run",
}
_MEANT = {name: option for option, names in _ELSEWHERE.items() for name in names.split()}


class _HelpFormatter(argparse.HelpFormatter):
    """Adds the default to the help of each option that has one; the text is the same in every version of Python."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=min(80, shutil.get_terminal_size().columns) - 2)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        """The arguments that must be given, and [options] for the others."""
        words = [self._form(action) for action in actions if action.required or not action.option_strings]
        # A form with spaces inside, such as [MODEL ...], stays in one piece.
        words = [word.replace(" ", "\xa0") for word in [*words, "[options]"]]
        fill = partial(textwrap.fill, break_on_hyphens=False, subsequent_indent=" " * 7)
        usage = fill(" ".join([self._prog, *words]), self._width - 7).replace("\xa0", " ")
        super().add_usage(usage.replace("%", "%%"), actions, groups, prefix)

    def _form(self, action: argparse.Action) -> str:
        value = self._format_args(action, action.dest)
        return f"{action.option_strings[0]} {value}" if action.option_strings else value

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        """As argparse does, but NAME ... instead of NAME [NAME ...], and COMMAND without dots."""
        (name,) = self._metavar_formatter(action, default_metavar)(1)
        forms = {argparse.ONE_OR_MORE: f"{name} ...", argparse.PARSER: name}
        return forms.get(str(action.nargs)) or super()._format_args(action, default_metavar)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, action.dest.upper())}"

    def _get_help_string(self, action: argparse.Action) -> str:
        sentence = (action.help or "").rstrip(".")
        sentence = sentence[:1].upper() + sentence[1:]
        if action.nargs == 0 or not action.option_strings or action.default in (None, "", []):
            return sentence
        default = json.dumps(action.default) if isinstance(action.default, bool) else action.default
        default = f"{default:g}" if isinstance(default, float) else default
        return f"{sentence} (default: {default})"


class Parser(argparse.ArgumentParser):
    """Takes `-` and `_` alike and no abbreviations, and says what is wrong in one sentence.

    With the options of `add_config_options`, the order of precedence is defaults, recipe, files, command line, wherever
    these stand on the line.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, add_help=False, **options)
        for kind in (int, float):
            self.register("type", kind, partial(convert, kind))
        self.add_argument("-h", "--help", action="help", help="show this help and exit")
        self.details: list[Any] = []

    def error(self, message: str) -> NoReturn:
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            message = f"{missing} missing: see {self.prog} --help"
        message = message.removeprefix("argument ").replace("ignored explicit argument", "it takes no value, and not")
        raise InputError(message if message.endswith((".", "?")) else f"{message}.")

    def format_help(self, *, everything: bool = False) -> str:
        """The help, without the groups of `details` unless everything is to be shown."""
        groups = self._action_groups
        self._action_groups = [group for group in groups if everything or group not in self.details]
        try:
            return super().format_help()
        finally:
            self._action_groups = groups

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        if isinstance(action, argparse._SubParsersAction):
            hint = did_you_mean(value, action.choices)
            self.error(f"there is no command {value!r}: {self.prog} has {', '.join(action.choices)}.{hint}")
        self.error(f"{'/'.join(action.option_strings)}: {value!r} is not one of {', '.join(action.choices)}")

    def parse_known_args(  # type: ignore[override]
        self, arguments: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        words = [self._kebab_case(word) for word in (sys.argv[1:] if arguments is None else arguments)]
        options, unknown = super().parse_known_args(words, namespace)
        if "--config" in self._option_string_actions:
            files = [self._read_config(path) for path in options.config]
            recipe = options.recipe or next((one["recipe"] for one in reversed(files) if one.get("recipe")), None)
            for values in (flatten(recipe_config(str(recipe)).to_dict()) if recipe else {}, *files):
                self.set_defaults(**values)
            options, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self.error(self._describe_unknown(unknown, words, options))
        if "--data.path" in self._option_string_actions and getattr(options, "DATA", None) is not None:
            if getattr(options, "data.path") != self.get_default("data.path"):
                self.error("the data are given twice: leave out DATA or --data.path")
            setattr(options, "data.path", options.DATA)
        return options, unknown

    def _describe_unknown(self, unknown: Sequence[str], words: Sequence[str], options: Namespace) -> str:
        """One sentence on the first of the words that is no option and no argument."""
        given = next((word for word in unknown if word.startswith("-")), unknown[0])
        word, _, value = given.partition("=")
        if not word.startswith("-"):
            return f"{word!r} is one argument too many: see {self.prog} --help"
        name = word.strip("-").replace("_", "-").lower()
        if name in ("gpu", "gpus", "nproc", "nproc-per-node", "world-size", "num-gpus") and hasattr(options, "resume"):
            return f"there is no option {word}: start several processes with torchrun --nproc-per-node N -m partialfc"
        meant = _MEANT.get(name.rpartition(".")[2])
        known = [option for option in self._option_string_actions if option not in ("-h", "--help")]
        if meant not in known:
            return f"there is no option {word}; options are not abbreviated.{did_you_mean(word, known)}"
        after = words[words.index(given) + 1 :][: self._option_string_actions[meant].nargs != 0]
        value = value or " ".join(one for one in after if not one.startswith("-"))
        hint = f" Did you mean '{f'{meant} {value}'.strip()}'?"
        return f"there is no option {word}; options are not abbreviated.{hint}"

    def _kebab_case(self, word: str) -> str:
        name, equals, value = word.partition("=")
        kebab = name.replace("_", "-")
        return f"{kebab}{equals}{value}" if kebab in self._option_string_actions else word

    def _read_config(self, path: Path) -> dict[str, Any]:
        """The values of a YAML file of options, by their dotted names."""
        content = read_yaml(path)
        of_the_command_line = ("help", "help_all", "config")
        actions = {one.dest: one for one in self._actions if one.option_strings and one.dest not in of_the_command_line}
        values = flatten(content)
        for name, value in values.items():
            if any(action.startswith(f"{name}.") for action in actions):
                raise InputError(f"{path}: {name} is a section: write its options below it, indented.")
            if name not in actions:
                raise InputError(f"{path}: there is no option {name}.{did_you_mean(name, actions)}")
            if isinstance(convert := actions[name].type, partial):
                try:
                    values[name] = convert(value if isinstance(value, str) else json.dumps(value, default=str))
                except ArgumentTypeError as error:
                    raise InputError(f"{path}: {name}: {error}.") from error
            if actions[name].nargs == "+" and not isinstance(values[name], list):
                values[name] = [values[name]]
        return values


def add_commands(parser: Parser) -> Any:
    """The place of the commands below `parser`, whose own `run` asks for one of them."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", prog=parser.prog)
    parser.set_defaults(run=lambda _: parser.error(f"give a command: one of {', '.join(commands.choices)}"))
    return commands


def add_command(commands: Any, name: str, run: Callable[[Namespace], int | None], **options: Any) -> Parser:
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
    """Facts by name as two aligned columns, wrapped to the terminal; those that are empty are left out."""
    texts = {name.replace("_", " "): str(value) for name, value in facts.items() if value not in ("", [], {}, None)}
    width, columns = max(map(len, texts)), max(60, shutil.get_terminal_size().columns) - 1
    longest = max(len(word) for text in texts.values() for word in text.split())
    indent = " " * max(2, min(width + 2, columns - longest))  # a hash is not broken in two
    wrap = partial(textwrap.fill, width=columns, subsequent_indent=indent, break_long_words=False)
    return "\n".join(wrap(f"{name:>{width}}  {text}", break_on_hyphens=False) for name, text in texts.items())


# -- options of several commands ---------------------------------------------------------------------------------------


def add_device(parser: Parser) -> None:
    """Add --device."""
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")


def add_detector(parser: Parser) -> None:
    """Add --detector, which `open_detector` reads."""
    help_ = "what finds faces in photographs: mtcnn (weights in facenet-pytorch), mtcnn=FOLDER with them, or yunet=FILE"
    parser.add_argument("--detector", metavar="NAME[=PATH]", help=help_)


def add_benchmarks(parser: Parser, *, required: bool = False, what: str = "verification .bin files") -> None:
    """Add --benchmark, which `named_paths` reads."""
    help_ = f"{what}, each under a name; by default that of its path"
    options: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "metavar": "[NAME=]PATH"}
    parser.add_argument("--benchmark", required=required, help=help_, **options)


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
            name, path = Path(pair.removesuffix(".xz")).stem, pair
        if not (name and path):
            raise InputError(
                f"benchmark {pair!r} is neither a path that exists nor NAME=PATH: write for example lfw=data/lfw.bin."
            )
        if "/" in name or name.startswith("."):
            raise InputError(f"benchmark name {name!r} has a slash or begins with a dot; files bear it: rename it.")
        if name in named:
            raise InputError(f"benchmark name {name!r} is given twice: give each file its own name.")
        named[name] = Path(path)
    return named
