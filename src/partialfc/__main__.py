"""`python -m partialfc`, which torchrun starts with `-m partialfc`."""

from __future__ import annotations

import os
import signal
from typing import NoReturn

from partialfc.distributed.signals import end_process, exit_unsaved


def main() -> NoReturn:
    """Run one command. Until training handles SIGTERM itself, it ends the process with a sentence and status 143.

    So does SIGINT with status 130, until the imports are done and a KeyboardInterrupt cleans up.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, exit_unsaved)
    # A thread of GNU OpenMP that waits for the others spins for a long time by default. Beside other programs it then
    # keeps the very processor that the others wait for (docs/performance.md). Read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from partialfc.cli import main as run  # imports torch, which takes seconds

    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_process(run())


if __name__ == "__main__":
    main()
