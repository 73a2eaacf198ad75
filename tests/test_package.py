"""The package as a whole: it imports with its core dependencies alone, and without side effects."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import partialfc

CORE_ONLY = """
import importlib, importlib.abc, pkgutil, sys

EXTRAS = {"tensorboard", "wandb", "timm", "sklearn", "scipy", "pytest", "hypothesis", "onnx"}
EXTRAS |= {"pyarrow", "lmdb", "msgpack", "simplejpeg", "cv2"}

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in EXTRAS:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import torch
before = torch.get_num_threads(), torch.initial_seed(), torch.get_default_dtype()
import partialfc
modules = [module.name for module in pkgutil.walk_packages(partialfc.__path__, "partialfc.")]
for name in modules:
    if not name.endswith("__main__"):
        importlib.import_module(name)
assert before == (torch.get_num_threads(), torch.initial_seed(), torch.get_default_dtype())
print(len(modules))
"""


@pytest.mark.multiprocess
@pytest.mark.slow
def test_every_module_imports_with_the_core_dependencies() -> None:
    done = subprocess.run([sys.executable, "-c", CORE_ONLY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) + 1 == sum(1 for _ in Path(partialfc.__file__).parent.rglob("*.py"))  # itself too


def test_public_names_come_without_importing_torch_first() -> None:
    code = "import sys, partialfc; assert 'torch' not in sys.modules; "
    code += "print([getattr(partialfc, name) for name in dir(partialfc)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "partialfc.head.partial_fc.PartialFC" in done.stdout


@pytest.mark.multiprocess
def test_python_m_partialfc_answers() -> None:
    done = subprocess.run([sys.executable, "-m", "partialfc", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "train" in done.stdout


def test_the_command_tells_openmp_not_to_spin_before_torch_is_imported() -> None:
    program = """
import os, sys
import partialfc.__main__ as entry
assert "torch" not in sys.modules
import partialfc.cli
partialfc.cli.main = lambda: print(os.environ["GOMP_SPINCOUNT"]) or 0
entry.main()
"""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    for given, expected in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment | given, check=True, capture_output=True, text=True)
        assert done.stdout.strip() == expected
