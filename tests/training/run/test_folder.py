"""The folder of a run: one run at a time, and only the same run again."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from small_runs import config_without_saves, signal_at

from partialfc.core.errors import InputError, StoppedBySignal
from partialfc.training.loop import train
from partialfc.training.run.folder import lock_folder


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    holder = "import sys; from pathlib import Path; from partialfc.training.run.folder import lock_folder\n"
    holder += "with lock_folder(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"in use by another run \(process {process.pid} on "):
        train(config_without_saves(), tmp_path, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]
    process.kill()  # however it ends, the lock goes with it
    process.communicate()
    with lock_folder(tmp_path):
        pass
    train(config_without_saves(), tmp_path, quiet=True)


def test_a_run_from_before_an_option_is_resumed(tmp_path: Path) -> None:
    """A missing key of the stored configuration has its default; another value is still another run."""
    with signal_at(1), pytest.raises(StoppedBySignal):
        train(config_without_saves(), tmp_path, quiet=True)
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del stored["head"]["unsampled"], stored["backbone"]["sync_batch_norm"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    changed = config_without_saves()
    changed = replace(changed, head=replace(changed.head, unsampled="lazy_dense"))
    with pytest.raises(InputError, match=r"another head\.unsampled"):
        train(changed, tmp_path, resume=True, quiet=True)
    train(config_without_saves(), tmp_path, resume=True, quiet=True)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"config\.yaml is missing: restore it"):
        train(config_without_saves(), tmp_path, resume=True, quiet=True)
