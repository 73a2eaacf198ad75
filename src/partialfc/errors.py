"""The two ways a command ends badly, and the exit status that belongs to each."""


class InputError(ValueError):
    """The user's mistake: a bad file, option or value.

    The message is one sentence that names the culprit and the remedy. The command line prints it
    without a traceback and exits with status 2.
    """


class JobError(RuntimeError):
    """The job failed for a reason that is not the user's input (exit status 1)."""
