"""The table of faults: its short form in real processes that are killed, stopped, damaged and starved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import faults
from fault_rows.bench import Injection, Outcome, Row

PROGRAM = Path(faults.__file__)
LONG_FORM_ONLY = ("interrupted-3", "killed-replacing", "sigterm-random", "disk-model", "disk-never")
ROWS = [row.key for row in faults.ROWS if row.key not in LONG_FORM_ONLY]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str | None]]:
    """For each row that this session tests, the problems of its injections.

    One process runs them all, since it imports everything before it forks the trainings, and the rows share the
    uninterrupted runs that they compare with.
    """
    nodes = [
        node for node in request.session.items if isinstance(node, pytest.Function) and node.module is request.module
    ]
    rows = [str(node.callspec.params["row"]) for node in nodes if "row" in node.fixturenames]
    out = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-W", "error", str(PROGRAM), "--short", "--out", str(out), "--rows", *rows]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    results = faults.read_results(out / "results.jsonl")
    failed = any(outcome.problem is not None for outcome in results.values())
    assert done.returncode == int(failed), done.stderr
    return {row: [outcome.problem for (key, _), outcome in results.items() if key == row] for row in rows}


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("row", ROWS)
def test_a_fault_ends_as_its_row_says(row: str, outcomes: dict[str, list[str | None]]) -> None:
    if row.startswith("disk-") and not outcomes[row]:
        pytest.skip("whether it is injected depends on whether this user may mount a tmpfs")
    assert outcomes[row]
    assert not any(outcomes[row])


def test_the_table_has_all_rows() -> None:
    keys = [row.key for row in faults.ROWS]
    assert len(keys) == len(set(keys)) == 21
    assert set(keys) > set(LONG_FORM_ONLY)


INSTALL_ALL = """
from fault_rows import killed, patches, stopped
for moment in [*killed.MOMENTS.values(), *stopped.MOMENTS.values()]:
    if moment is not patches.terminate:
        moment()
for stage in [*patches.COPY_STAGES.values(), *patches.OWN_STAGES.values(), *patches.LEADER_STAGES.values()]:
    stage(9, patches.die)
patches.between_renames(9, patches.die)
for poison in (patches.poison_images, patches.poison_loss, patches.poison_weights_gradient):
    poison(range(5, 6))
print("installed")
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_every_fault_of_the_long_form_finds_what_it_patches() -> None:
    done = subprocess.run([sys.executable, "-c", INSTALL_ALL], cwd=PROGRAM.parent, capture_output=True, text=True)
    assert done.stdout == "installed\n", done.stderr


def test_what_ended_otherwise_is_shown_kept_and_tried_again(tmp_path: Path) -> None:
    outcomes = [Outcome(problem="it went wrong"), Outcome(lost=2), Outcome(lost=5)]
    row = Row("key", "a fault", "all is well", lambda bench, short: iter(()))
    results, folders = tmp_path / "results.jsonl", [tmp_path / name for name in "abc"]
    for name, outcome, folder in zip("xxy", outcomes, folders, strict=True):

        def inject(folder: Path, outcome: Outcome = outcome) -> Outcome:
            return outcome

        faults.run_one(row, Injection(name, inject), folder, results)
    assert [folder.exists() for folder in folders] == [True, False, False]
    done = faults.read_results(results)
    assert done == {("key", "x"): outcomes[1], ("key", "y"): outcomes[2]}
    assert faults.table([row], done)[2] == "| a fault | 2 | all is well | 3.5, 5 |"
    done["key", "y"] = outcomes[0]
    assert faults.table([row], done)[2] == "| a fault | 2 | **1 did otherwise** | 2.0, 2 |"


def test_an_error_in_a_row_is_a_problem_of_that_injection(tmp_path: Path) -> None:
    row = Row("key", "a fault", "all is well", lambda bench, short: iter(()))
    broken = Injection("x", lambda folder: Outcome(lost=1 // 0))
    outcome = faults.run_one(row, broken, tmp_path / "a", tmp_path / "r.jsonl")
    assert outcome.problem == "ZeroDivisionError: integer division or modulo by zero"
