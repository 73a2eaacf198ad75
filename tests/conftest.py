"""What must be set before any test imports torch."""

import os
from collections import Counter

# Before torch is imported, here and in the processes that tests start: the tensors of tests are small, and several
# threads a process wait for each other more than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is imported, which PyTorch may do before the tests of the kernels: they run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: of two processes, neither is then left with the longest file at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
