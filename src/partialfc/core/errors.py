"""The ways in which a command ends before its time, and the exit status that belongs to each."""

import signal


class InputError(ValueError):
    """The user's mistake: a bad file, option or value.

    The message is one sentence that names the culprit and the remedy. The command line prints it
    without a traceback and exits with status 2.
    """


class JobError(RuntimeError):
    """The job failed for a reason that is not the user's input (exit status 1)."""


class StoppedBySignal(JobError):
    """A signal asked for the end, and the state was saved (exit status 128 + signal: 143 for SIGTERM).

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int, what: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} {what}")
        self.signum = signum
