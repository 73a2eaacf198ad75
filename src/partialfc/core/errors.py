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
    """What to append to the message about an unknown name: " Did you mean 'r50'?", or "" if nothing is near.

    Case, `-` and `_` do not count. Names that share their first part are preferred, and so are those that begin with
    the unknown name, or end with it as an option does without its section.
    """
    plain = {_plain(one): one for one in known}
    word = _plain(name)
    first, dash, _ = word.partition("-")
    near = [one for one in plain if dash and one.partition("-")[0] == first] or list(plain)
    ends = [one for one in plain if one == word or one.endswith(f"-{word}")]
    begins = [one for one in near if word and one.startswith(word)]
    close = difflib.get_close_matches(word, near, n=1, cutoff=0.5)
    nearest = ends or begins[:4] or close
    return f" Did you mean {' or '.join(repr(plain[one]) for one in nearest)}?" if nearest else ""


def _plain(name: str) -> str:
    return name.strip("-").replace("_", "-").replace(".", "-").lower()


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
