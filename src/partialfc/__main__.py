"""`python -m partialfc`, which torchrun starts with `-m partialfc`."""

from __future__ import annotations

import signal
from typing import NoReturn

from partialfc.distributed.signals import end_process, exit_unsaved


def main() -> NoReturn:
    """Run one command. Until training handles SIGTERM itself, it ends the process with a sentence and status 143."""
    signal.signal(signal.SIGTERM, exit_unsaved)
    from partialfc.cli import main as run  # imports torch, which takes seconds

    end_process(run())


if __name__ == "__main__":
    main()
