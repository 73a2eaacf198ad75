"""Signals while a process does not train, and the end of one process of several."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

LONE = """
import os, signal, sys, threading, time
from partialfc.distributed.signals import StopSignals
with StopSignals() as signals, signals.exit_on_signal():
    print("waiting", flush=True)
    if sys.argv[1] == "alone":
        time.sleep(60)
    os.kill(os.getpid(), signal.SIGTERM)
print("received", signals.received)
"""


@pytest.mark.slow
def test_a_process_that_waits_for_others_ends_by_itself() -> None:
    """Its main thread sits in a call that a signal does not end; where the others come, the signal is remembered."""
    command = [sys.executable, "-c", LONE]
    process = subprocess.Popen([*command, "alone"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors == "partialfc: stopped by SIGTERM while not training: there was nothing to save\n"
    done = subprocess.run([*command, "met"], capture_output=True, text=True, check=True)
    assert done.stdout == "waiting\nreceived 15\n"


IMPORTING = """
import os, signal, sys, types
from partialfc.__main__ import main
assert "torch" not in sys.modules
class Cli(types.ModuleType):
    def __getattr__(self, name):
        os.kill(os.getpid(), int(sys.argv[1]))
        return None
sys.modules["partialfc.cli"] = Cli("partialfc.cli")
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_command_imports_is_heard(number: signal.Signals) -> None:
    command = [sys.executable, "-c", IMPORTING, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr == f"partialfc: stopped by {number.name} while not training: there was nothing to save\n"


@pytest.mark.parametrize(("several", "status"), [(True, 3), (False, -signal.SIGABRT)])
def test_one_of_several_processes_ends_without_pythons_own_end(several: bool, status: int) -> None:
    program = (
        "import atexit, os\nfrom partialfc.distributed import collectives, signals\natexit.register(os.abort)\n"
        f"collectives.was_one_of_several = {several}\nprint('done', end='')\nsignals.end_process(3)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == status
    if several:
        assert done.stdout == b"done"
