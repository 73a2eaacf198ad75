"""The command line: one file a command, each of which calls one function of the package and shows what it returns."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from importlib import metadata

from partialfc.cli import (
    align,
    bench,
    data,
    demo,
    embed,
    evaluate,
    export,
    finetune,
    migrate,
    plan,
    recipes,
    report,
    runs,
    train,
    verify,
)
from partialfc.cli.parser import Parser, add_commands
from partialfc.core.console import say
from partialfc.core.errors import InputError, JobError, StoppedBySignal
from partialfc.core.files import NO_UTF8

_FIRST_STEPS = """first steps:
  partialfc demo                  the whole job on drawn faces, in minutes
  partialfc data inspect DATA     what is in a data set
  partialfc train DATA --benchmark lfw.bin --out runs/mine
  partialfc evaluate runs/mine --benchmark lfw.bin
  partialfc recipes               published trainings, and what they take

`partialfc COMMAND --help` shows the options of a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0 done, 1 the job failed, 2 the input was wrong, 130 interrupted, 143 stopped by SIGTERM
        after saving; of `verify` 0 the same person, 1 different persons.
    """
    with contextlib.suppress(AttributeError):  # of a stream that is no file
        sys.stdout.reconfigure(errors=NO_UTF8)  # type: ignore[union-attr]
    try:
        options = build_parser().parse_args(arguments)
        status: int = options.run(options) or 0
    except InputError as error:
        return _failed(error, 2)
    except StoppedBySignal as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends another while this process exits
        say(f"partialfc: {stop}")
        return 128 + stop.signum
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (JobError, OSError) as error:
        return _failed(error, 1)
    except KeyboardInterrupt as error:
        return _failed(str(error) or "interrupted", 130)
    return status


def _failed(message: object, status: int) -> int:
    say(f"partialfc: error: {message}")
    return status


def build_parser() -> Parser:
    """The parser of the whole command line; what it parses has a function `run`."""
    what = "Train face recognition on millions of identities with Partial FC, and see how good it is."
    parser = Parser(prog="partialfc", description=what, epilog=_FIRST_STEPS)
    version = f"partialfc {metadata.version('partialfc')}"
    parser.add_argument("--version", action="version", version=version, help="show the version and exit")
    commands = add_commands(parser)
    parser.set_defaults(run=lambda _: parser.print_help())
    first = (demo, train, finetune, recipes, plan, evaluate, align, embed, verify, export)
    for command in (*first, report, runs, data, migrate, bench):
        command.add_parser(commands)
    return parser
