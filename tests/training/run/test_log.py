"""metrics.jsonl: what is written is read, and a resumed run continues the lines of its checkpoint."""

from __future__ import annotations

import errno
import json
import math
import os
from datetime import datetime
from pathlib import Path

import pytest
import torch

from partialfc.core.errors import InputError, JobError
from partialfc.training.run.log import MetricsLog, log_start, read_metrics


def write(path: Path, steps: range, resume_step: int = 0) -> None:
    with MetricsLog(path, resume_step=resume_step) as log:
        for step in steps:
            log.write({"kind": "train", "step": step, "loss": 1.0 / step})


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def test_lines_are_readable_while_the_log_is_open(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"step": 1, "loss": 0.1, "name": "é", "folds": [0.5, 0.75]})
        assert read_metrics(path) == [{"step": 1, "loss": 0.1, "name": "é", "folds": [0.5, 0.75]}]


def test_a_resumed_run_keeps_the_lines_of_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    before = path.read_text().splitlines()
    write(path, range(6, 9), resume_step=5)
    assert steps(path) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert path.read_text().splitlines()[:5] == before[:5]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    write(path, range(1, 2))
    assert steps(path) == [1]


def test_a_file_with_nothing_to_remove_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    inode = path.stat().st_ino
    write(path, range(4, 5), resume_step=3)
    assert path.stat().st_ino == inode
    assert steps(path) == [1, 2, 3, 4]


@pytest.mark.parametrize("tail", [b'{"step": 4, "lo', b'{"step": 4}', b"\xc3", b"\0\0\0"])
def test_a_last_line_that_was_cut_off_is_left_out_and_removed(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    with path.open("ab") as file:
        file.write(tail)
    assert steps(path) == [1, 2, 3]
    write(path, range(4, 5), resume_step=9)
    assert steps(path) == [1, 2, 3, 4]


def test_an_evaluation_that_comes_again_is_not_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in (4, 8):
            log.write({"kind": "train", "step": step})
            for name in ("lfw", "cfp"):
                log.write({"kind": "evaluation", "step": step, "benchmark": name})
    with MetricsLog(path, resume_step=8, evaluates_again=["lfw"]) as log:
        log.write({"kind": "evaluation", "step": 8, "benchmark": "lfw", "accuracy": 0.9})
    found = [(line["step"], line.get("benchmark"), line.get("accuracy")) for line in read_metrics(path)]
    assert found[:3] == [(4, None, None), (4, "lfw", None), (4, "cfp", None)]
    assert found[3:] == [(8, None, None), (8, "cfp", None), (8, "lfw", 0.9)]


class SmallDisk:
    """Stands for os.write on a disk with so many bytes left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room, self.plain = room, os.write
        monkeypatch.setattr(os, "write", self.write)

    def write(self, descriptor: int, content: bytes) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.plain(descriptor, content[: self.room])
        self.room -= written
        return written


def test_a_full_disk_ends_the_log_without_half_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"step": 1})
        SmallDisk(monkeypatch, 7)
        with pytest.raises(JobError, match=r"metrics\.jsonl cannot be written \(No space left on device\): make room"):
            log.write({"step": 2})
        assert path.read_bytes() == b'{"step": 1, "schema_version": 1}\n'


def test_a_patient_log_writes_later_what_it_could_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, patient=True) as log:
        disk = SmallDisk(monkeypatch, 7)
        log.write({"step": 1})
        log.write({"step": 2})
        assert path.read_bytes() == b""
        disk.room = 1000
        log.write({"step": 3})
        assert steps(path) == [1, 2, 3]
    log = MetricsLog(path, resume_step=9, patient=True)
    disk.room = 0
    log.write({"step": 4})
    with pytest.raises(JobError, match="No space left"):
        log.close()
    assert steps(path) == [1, 2, 3]


def test_numbers_that_json_lacks_return_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"step": 1, "loss": math.nan, "norms": {"high": math.inf, "low": (-math.inf, 0.5)}, "text": "Nan"})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "step": 1,
        "loss": "NaN",
        "schema_version": 1,
        "norms": {"high": "Infinity", "low": ["-Infinity", 0.5]},
        "text": "Nan",
    }
    [line] = read_metrics(path)
    assert math.isnan(line["loss"])
    assert line["norms"] == {"high": math.inf, "low": [-math.inf, 0.5]}
    assert line["text"] == "Nan"


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path, enabled=False) as log:
        log.write({"step": 1})
    assert not path.parent.exists()


def test_a_line_without_a_step_is_a_mistake(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log, pytest.raises(ValueError, match="needs an integer step"):
        log.write({"loss": 0.5})


@pytest.mark.parametrize("bad", ["not json", "[1]", '{"loss": 1}', '{"step": "one"}'])
def test_a_damaged_line_is_named_and_nothing_is_overwritten(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    content = f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n'
    path.write_text(content)
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2, is no line of metrics"):
        read_metrics(path)
    with pytest.raises(InputError, match="line 2"):
        MetricsLog(path)
    assert path.read_text() == content


def test_a_missing_file_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be read \(No such file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_line_of_a_newer_version_is_refused_and_names_may_be_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = {"step": 1, "samples": [os.fsdecode(b"Jos\xe9"), "José"]}
    with MetricsLog(path) as log:
        log.write(line)
    assert read_metrics(path) == [line]
    path.write_bytes(path.read_bytes().replace(b'"schema_version": 1', b'"schema_version": 2'))
    with pytest.raises(InputError, match=r"metrics.jsonl has schema_version 2, and this partialfc reads them up to 1"):
        read_metrics(path)


def test_each_start_is_noted_with_its_command_and_machine(tmp_path: Path) -> None:
    path = tmp_path / "starts.jsonl"
    for step in (0, 20, 10):
        log_start(path, step, torch.device("cpu"))
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [0, 10]  # the steps that the second start added are lost
    assert {"date", "command", "partialfc", "processes", "cpu", "cores", "torch", "python"} <= lines[0].keys()
    assert datetime.fromisoformat(lines[0]["date"]).tzinfo is not None
