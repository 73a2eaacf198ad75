"""The shown progress, checked as text with a clock that the test moves."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time

import pytest
from rich.console import Console

from partialfc.core.console import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def plain() -> Console:
    return Console(file=io.StringIO(), width=60)


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None, legacy_windows=False)


def lines(console: Console) -> list[str]:
    """The visible text, control codes removed."""
    assert isinstance(console.file, io.StringIO)
    text = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", console.file.getvalue())
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def test_lines_at_the_start_every_ten_seconds_and_at_the_end(clock: Clock, plain: Console) -> None:
    with Progress("training", 1000, unit=None, console=plain, clock=clock) as shown:
        for step in range(10, 251, 10):
            clock.now += 1.0
            shown.update(step, epoch=step / 100, loss=10.0 - step / 100, images_per_second=1234.5, data_wait=0.034)
    assert lines(plain) == [
        "training: step 10/1,000 (1%), epoch 0.10, loss 9.90, 1,234 images/s, data wait 3%, "
        "estimating time left, 0:01 so far",
        "training: step 110/1,000 (11%), epoch 1.10, loss 8.90, 1,234 images/s, data wait 3%, 1:29 left",
        "training: step 210/1,000 (21%), epoch 2.10, loss 7.90, 1,234 images/s, data wait 3%, 1:19 left",
        "training: step 250/1,000 (25%), epoch 2.50, loss 7.50, 1,234 images/s, data wait 3%, stopped after 0:25",
    ]


def test_the_last_line_is_not_printed_twice(clock: Clock, plain: Console) -> None:
    with Progress("training", 20, unit=None, console=plain, clock=clock) as shown:
        shown.update(10)
        clock.now += 10.0
        shown.update(20)
    assert lines(plain) == ["training: step 10/20 (50%), estimating time left", "training: step 20/20 (100%), in 0:10"]


def test_the_rate_is_that_of_this_process_and_of_the_last_half_minute(clock: Clock, plain: Console) -> None:
    with Progress("training", 100_000, unit=None, console=plain, clock=clock) as shown:
        shown.update(50_000)  # a resumed run: these steps took no time here
        for step in range(50_001, 50_021):
            clock.now += 10.0
            shown.update(step)
        for step in range(50_030, 50_080, 10):
            clock.now += 10.0
            shown.update(step)
    seen = lines(plain)
    assert seen[20].endswith("step 50,020/100,000 (50%), 138:50:00 left")  # one step in ten seconds
    assert seen[25].endswith("step 50,070/100,000 (50%), 13:52:10 left")  # one step a second


def test_other_figures_are_shown_under_their_names(clock: Clock, plain: Console) -> None:
    with Progress("training", 20, unit=None, console=plain, clock=clock) as shown:
        shown.update(20, epoch=3.0, target_cosine=0.456, lr=0.012345, pair_accuracy=0.98765)
    assert lines(plain) == [
        "training: step 20/20 (100%), epoch 3, cosine 0.46, lr 0.0123, pair accuracy 0.9877, in 0:00"
    ]


def test_the_position_moves_without_figures_which_stay(clock: Clock, plain: Console) -> None:
    with Progress("training", 20, unit=None, console=plain, clock=clock) as shown:
        shown.update(10, loss=3.0)
        clock.now += 10.0
        shown.update(11)
    assert lines(plain)[-1] == "training: step 11/20 (55%), loss 3.00, 1:30 left"


def test_messages_are_kept_as_they_are(clock: Clock, plain: Console) -> None:
    text = "step 3: [bold] 99.50% " + "long " * 30 + "."
    with Progress("training", 20, unit=None, console=plain, clock=clock) as shown:
        shown.message(text)
    assert lines(plain) == [text]


def test_a_terminal_gets_a_bar_with_figures_below(clock: Clock, terminal: Console) -> None:
    with Progress("training", 5000, unit=None, console=terminal, clock=clock) as shown:
        shown.update(1200, epoch=2.0, loss=12.0)
        clock.now += 10.0
        shown.update(1250, epoch=2.5, loss=11.5, images_per_second=1052.0)
        shown.update(1251, loss=0.0)  # too early for another drawing
        shown.message("step 1250: lfw accuracy 91.2%")
        shown.update(1250, epoch=2.5, loss=11.5, images_per_second=1052.0)
    seen = lines(terminal)
    assert "step 1250: lfw accuracy 91.2%" in seen
    assert seen[-2].startswith("training  ━━━")
    assert seen[-2].endswith("1,250/5,000 (25%)  stopped after 0:10")
    assert seen[-1] == "epoch 2.50  loss 11.50  1,052 images/s"
    assert any(line.endswith("12:30 left") for line in seen)
    assert all(len(line) <= 80 for line in seen)


def test_a_first_step_that_takes_long_is_seen_to_go_on(terminal: Console) -> None:
    with Progress("training", 5000, unit=None, console=terminal):
        time.sleep(2.5)
    assert any("0/5,000 (0%)" in line and "estimating time left, 0:01 so far" in line for line in lines(terminal))


def test_a_failure_leaves_the_terminal_with_its_cursor(clock: Clock, terminal: Console) -> None:
    def fail() -> None:
        with Progress("training", 5000, unit=None, console=terminal, clock=clock):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert isinstance(terminal.file, io.StringIO)
    codes = re.findall(r"\x1b\[\?25[lh]", terminal.file.getvalue())
    assert codes == ["\x1b[?25l", "\x1b[?25h"]


def test_it_shows_rate_and_time_left(clock: Clock, plain: Console) -> None:
    with Progress("reading", console=plain, clock=clock) as shown:
        for done in (0, 1000, 2000, 4000):
            shown.update(done, 4000)
            clock.now += 10.0
    assert lines(plain) == [
        "reading: 0/4,000 (0%), estimating time left",
        "reading: 1,000/4,000 (25%), 100 images/s, 0:30 left",
        "reading: 2,000/4,000 (50%), 100 images/s, 0:20 left",
        "reading: 4,000/4,000 (100%), 133 images/s, in 0:30",
    ]


def test_on_a_terminal_it_is_one_line_even_before_the_total_is_known(clock: Clock, terminal: Console) -> None:
    with Progress("rendering", unit="face", console=terminal, clock=clock) as shown:
        assert any(line.startswith("rendering  ━") and line.endswith(" 0") for line in lines(terminal))
        shown.update(10, 40)
        clock.now += 4.0
        shown.update(40, 40)
    assert re.fullmatch(r"rendering  ━+  40/40 \(100%\)  7\.5 faces/s  in 0:04", lines(terminal)[-1])


def test_a_job_without_updates_shows_nothing(clock: Clock, plain: Console) -> None:
    with Progress("reading", 10, console=plain, clock=clock):
        pass
    assert lines(plain) == []


def test_quiet_shows_nothing(clock: Clock, plain: Console, terminal: Console) -> None:
    for console in (plain, terminal):
        with Progress("training", 20, quiet=True, console=console, clock=clock) as shown:
            shown.update(20)
            shown.message("done")
        assert lines(console) == []


def test_standard_output_is_left_for_results(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("training", 1, unit=None) as shown:
        sys.stdout.write('{"accuracy": 0.9}\n')
        shown.update(1)
    captured = capsys.readouterr()
    assert captured.out == '{"accuracy": 0.9}\n'
    assert captured.err == "training: step 1/1 (100%), in 0:00\n"


CLOSED_READER = """
import sys
from partialfc.core.console import Progress
sys.stdin.readline()
with Progress("training", 3, unit=None) as progress:
    for step in range(4):
        progress.message("hello")
        progress.update(step)
print("done")
"""


@pytest.mark.multiprocess
def test_a_job_continues_when_its_reader_has_closed() -> None:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", CLOSED_READER]
    with subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stderr.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stdout.read() == "done\n"
    assert process.returncode == 0
