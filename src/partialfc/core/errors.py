"""The errors that end a command, and the exit status that belongs to each."""

import difflib
import signal
from collections.abc import Iterable


class InputError(ValueError):
    """The user's mistake: a bad file, option or value.

    The message is one sentence that names the culprit and the remedy. The command line prints it
    without a traceback and exits with status 2.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What to append to the message about an unknown name: " Did you mean 'r50'?", or "" if nothing is near."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


class JobError(RuntimeError):
    """The job failed for a reason that is not the user's input (exit status 1)."""


class StoppedBySignal(JobError):
    """A signal stopped the job, and the state was saved (exit status 128 + signal: 143 for SIGTERM).

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int, what: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} {what}")
        self.signum = signum
