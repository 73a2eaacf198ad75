"""`python -m partialfc`, which torchrun starts with `-m partialfc`."""

from __future__ import annotations

import signal
import sys

from partialfc.training.signals import end_at_once


def main() -> int:
    """Run one command. Until a training listens itself, SIGTERM ends the process with a sentence and status 143."""
    signal.signal(signal.SIGTERM, end_at_once)
    from partialfc.cli import main as run  # imports torch, which takes seconds

    return run()


if __name__ == "__main__":
    sys.exit(main())
